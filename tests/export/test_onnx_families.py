"""ONNX files of twelve families, loaded by onnxruntime in another process: the same logits at any batch."""

import json
import subprocess
import sys

import pytest
import timm
import torch
from safetensors.torch import save_file
from small import environment
from torch import nn

from mgd_timm import models  # noqa: F401  # registers cifar_*
from mgd_timm.export.write_files import export_program, refused_formats, write_half_onnx, write_onnx

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of onnxscript's and onnxruntime's own code
]

FAMILIES = {
    "cifar_resnet8x05": {},
    "cifar_vgg8": {"num_classes": 2},
    "test_byobnet": {},
    "cifar_wrn_16_1": {},
    "test_convnext": {"in_chans": 1},
    "test_efficientnet": {"act_layer": "gelu"},
    "test_mambaout": {},
    "test_nfnet": {},
    "test_resnet": {"global_pool": "max"},
    "test_vit": {"img_size": 64, "class_token": False, "global_pool": "avg"},
    "test_vit4": {"img_size": 64},
    "swin_tiny_patch4_window7_224": {"img_size": 64, "embed_dim": 24, "depths": (1,)},
}
SIDE = 64
# Takes a file of images and ONNX files; prints the logits of each for one, two and five images.
LOAD = """
import json, sys
import onnxruntime
from safetensors.numpy import load_file

images = load_file(sys.argv[1])["images"]
for path in sys.argv[2:]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (entry,) = session.get_inputs()
    x = images[:, : entry.shape[1]]
    logits = [session.run(None, {entry.name: x[:count]})[0].tolist() for count in (1, 2, 5)]
    print(json.dumps([path, logits]))
assert "torch" not in sys.modules
"""


def test_onnxruntime_gives_every_familys_logits(tmp_path):
    images = torch.randn(5, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    save_file({"images": images}, tmp_path / "images.safetensors")
    expected = {}
    for name, options in FAMILIES.items():
        torch.manual_seed(0)
        model = timm.create_model(name, **{"num_classes": 5, **options}).eval()
        channels = options.get("in_chans", 3)
        path, half = tmp_path / f"{name}.onnx", tmp_path / f"{name}_fp16.onnx"
        write_onnx(export_program(model, (channels, SIDE, SIDE)), path, {})
        write_half_onnx(path, half)
        with torch.no_grad():
            expected[str(path)] = expected[str(half)] = model(images[:, :channels])
    command = [sys.executable, "-c", LOAD, str(tmp_path / "images.safetensors"), *expected]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), check=False)
    assert done.returncode == 0, done.stderr
    answers = dict(json.loads(line) for line in done.stdout.splitlines())
    assert set(answers) == set(expected)
    for path, logits in answers.items():
        bound = 0.02 if path.endswith("_fp16.onnx") else 1e-4
        for count, found in zip((1, 2, 5), logits, strict=True):
            scale = float(expected[path].abs().max())
            torch.testing.assert_close(
                torch.tensor(found), expected[path][:count], atol=bound * max(scale, 1), rtol=0, msg=path
            )


class Branching(nn.Module):
    """Takes one of two ways, by the pixels, which no graph can."""

    def forward(self, x):
        return x.mean((2, 3)) if x.sum() > 0 else x.amax((2, 3))


def test_a_network_that_an_exporter_does_not_take_is_named():
    model = Branching()
    said = r"Branching cannot be exported to onnx and int8 \(.+\): leave them out of --to"
    with pytest.raises(ValueError, match=said), refused_formats(model, "onnx", "int8"):
        export_program(model, (3, 8, 8))
