"""ExecuTorch's file, one image at a time: the student's logits. Runs where the extra `executorch` is installed."""

import pytest
import timm
import torch

from mgd_timm.export.load_file import load_file
from mgd_timm.export.write_files import export_program, write_executorch

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # of ExecuTorch's own code, and what it imports
]


def test_executorch_gives_the_students_logits(tmp_path):
    pytest.importorskip("executorch")
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=5).eval()
    write_executorch(export_program(model, (3, 32, 32), batch=1), tmp_path / "model.pte")
    images = torch.randn(3, 3, 32, 32)
    file = load_file(tmp_path / "model.pte")
    assert (file.num_classes, file.pretrained_cfg["input_size"]) == (5, (3, 32, 32))
    with torch.no_grad():
        torch.testing.assert_close(file(images), model(images), atol=1e-5, rtol=0)
