"""Exports of many families, loaded in another process by timm and by Transformers: the same logits and labels."""

import json
import subprocess
import sys

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from small import environment
from torch import nn

from mgd_timm.export.timm_folder import export_model
from mgd_timm.models.pretrained_cfg import describe_weights

SLIM_SWIN = {"img_size": 64, "embed_dim": 24, "depths": (1, 1, 1, 1)}
FAMILIES = {
    "mobilenetv3_small_050": {"drop_rate": 0.2},
    "regnetx_002": {},
    "swin_tiny_patch4_window7_224": SLIM_SWIN,
    "test_byobnet": {},
    "test_coatnet": {"img_size": 64},
    "test_convnext": {},
    "test_efficientnet": {"act_layer": "gelu"},
    "test_mambaout": {},
    "test_nfnet": {},
    "test_resnet": {"global_pool": "max"},
    "test_vit": {"img_size": 64, "class_token": False, "global_pool": "avg"},
    "test_vit_relpos": {"img_size": 64},
}
SIDE = 64
# Takes a file of images, a picture and exported folders; prints for each folder both logits and the pipeline's answer.
LOAD = """
import json, sys
import timm, torch
from PIL import Image
from safetensors.torch import load_file
from transformers import pipeline

images, picture, *folders = sys.argv[1:]
for folder in folders:
    x = load_file(images)["images"]
    loaded = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    classify = pipeline("image-classification", folder)
    assert all(torch.equal(value, classify.model.state_dict()[f"timm_model.{name}"])
               for name, value in loaded.state_dict().items())
    with torch.no_grad():
        logits = [loaded(x).tolist(), classify.model(x).logits.tolist()]
    print("ANSWER", json.dumps([folder, *logits, classify(Image.open(picture))]))
"""


def student(name: str, options: dict) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, **options).eval()
    names = tuple(f"class {i}" for i in range(5))
    about = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "license": "mit", "tag": "test"}
    describe_weights(model, input_size=(3, SIDE, SIDE), class_names=names, **about)
    return model


@pytest.mark.slow
def test_timm_and_transformers_load_every_family(tmp_path):
    images = torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    save_file({"images": images}, tmp_path / "images.safetensors")
    Image.new("RGB", (80, 60), (200, 30, 90)).save(tmp_path / "picture.png")
    expected = {}
    for name, options in FAMILIES.items():
        model = student(name, options)
        folder = export_model(model, tmp_path / name)
        with torch.no_grad():
            expected[str(folder)] = model(images)
    arguments = [str(tmp_path / "images.safetensors"), str(tmp_path / "picture.png"), *expected]
    command = [sys.executable, "-c", LOAD, *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**environment(), "HF_HUB_OFFLINE": "1"}, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = [line.removeprefix("ANSWER ") for line in done.stdout.splitlines() if line.startswith("ANSWER ")]
    answers = [json.loads(line) for line in lines]
    assert [folder for folder, *_ in answers] == list(expected)
    for folder, of_timm, of_transformers, classified in answers:
        for logits in (of_timm, of_transformers):
            torch.testing.assert_close(torch.tensor(logits), expected[folder], msg=folder)
        assert {row["label"] for row in classified} == {f"class {i}" for i in range(5)}, folder
        assert sum(row["score"] for row in classified) == pytest.approx(1, abs=1e-4)
