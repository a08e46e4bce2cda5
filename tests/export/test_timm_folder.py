"""A student leaves as timm reads it: bit-equal, alone, with the right words, whole or not at all."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import timm
import torch
from torch import nn

from mgd_timm import models  # noqa: F401  # registers cifar_*
from mgd_timm.export.timm_folder import export_model
from mgd_timm.models.pretrained_cfg import describe_weights

ABOUT = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "license": "mit", "tag": "mas_distilled"}


def student(name: str, classes: int = 5, size: int = 64, **options) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=classes, **options)
    for module in model.modules():  # running statistics as after training
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
    class_names = tuple(f"class {i}" for i in range(classes))
    describe_weights(model, input_size=(3, size, size), class_names=class_names, **ABOUT)
    return model


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("resnet10t", {}),
        ("test_vit", {"img_size": 64}),
        ("test_convnext", {}),
        ("mobilenetv3_small_050", {"drop_rate": 0.2}),
        ("cifar_resnet8x05", {}),
    ],
)
def test_timm_loads_the_same_bits(tmp_path, name, options):
    model = student(name, **options).to(memory_format=torch.channels_last)
    folder = export_model(model, tmp_path / "out")
    loaded = timm.create_model(f"local-dir:{folder}", pretrained=True)
    state = model.state_dict()
    assert list(loaded.state_dict()) == list(state)
    assert all(torch.equal(value, state[key]) for key, value in loaded.state_dict().items())
    images = torch.randn(2, 3, 64, 64)
    model.to(memory_format=torch.contiguous_format)
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(images), model.eval()(images))
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors", "recipe.json"]


def test_config_says_what_is_true_of_these_weights(tmp_path):
    model = student("mobilenetv3_small_050")
    config = json.loads((export_model(model, tmp_path / "out") / "config.json").read_text())
    known = config["pretrained_cfg"]
    assert (known["tag"], known["license"]) == (
        "mas_distilled",
        "mit",
    )  # not those of the architecture's default weights
    assert (known["mean"], known["std"], known["input_size"]) == ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6], [3, 64, 64])
    assert config["num_classes"] == known["num_classes"] == 5
    assert config["label_names"] == [f"class {i}" for i in range(5)]
    assert not {"url", "hf_hub_id", "file", "source"} & set(known)
    loaded = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    data = timm.data.resolve_model_data_config(loaded)
    assert (tuple(data["mean"]), tuple(data["std"]), data["input_size"]) == (
        (0.1, 0.2, 0.3),
        (0.4, 0.5, 0.6),
        (3, 64, 64),
    )


def test_files_have_the_mode_of_the_umask(tmp_path):
    folder = export_model(student("cifar_resnet8x05"), tmp_path / "out")
    (tmp_path / "plain").write_text("")
    mode = os.stat(tmp_path / "plain").st_mode
    assert all(os.stat(path).st_mode == mode for path in folder.iterdir())


def test_existing_folders_are_kept_unless_told(tmp_path):
    first = student("cifar_resnet8x05")
    folder = export_model(first, tmp_path / "out")
    second = student("cifar_resnet8x05", classes=7)
    with pytest.raises(FileExistsError, match="exists: choose another folder"):
        export_model(second, folder)
    assert timm.create_model(f"local-dir:{folder}", pretrained=True).num_classes == 5
    export_model(second, folder, overwrite=True)
    assert timm.create_model(f"local-dir:{folder}", pretrained=True).num_classes == 7
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("left", [[".new-out"], [".new-out", ".replaced-out"]])
def test_what_a_killed_export_left_is_replaced(tmp_path, left):
    for name in ["out", *left]:
        export_model(student("cifar_resnet8x05"), tmp_path / name)
    if ".replaced-out" in left:  # killed between its two renames
        shutil.rmtree(tmp_path / "out")
    for classes in (7, 8):
        folder = export_model(student("cifar_resnet8x05", classes=classes), tmp_path / "out", overwrite=True)
        assert timm.create_model(f"local-dir:{folder}", pretrained=True).num_classes == classes
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("options", [{"img_size": 64}, {"img_size": 64, "in_chans": 1}])
def test_a_module_built_for_another_size_is_exported_with_it(tmp_path, options):
    model = timm.create_model("test_vit3", num_classes=5, **options)
    folder = export_model(model, tmp_path / "out")
    size = [options.get("in_chans", 3), 64, 64]
    assert json.loads((folder / "config.json").read_text())["pretrained_cfg"]["input_size"] == size
    loaded = timm.create_model(f"local-dir:{folder}", pretrained=True)
    images = torch.randn(2, *size)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(images), model.eval()(images))


def test_only_timm_models_are_exported(tmp_path):
    with pytest.raises(ValueError, match="Linear has no pretrained_cfg with an 'architecture'"):
        export_model(nn.Linear(3, 3), tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_full_disk_leaves_nothing_half_written(tmp_path):
    script = """
import resource, sys, timm
from mgd_timm.export.timm_folder import export_model
model = timm.create_model("test_vit", num_classes=5)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    export_model(model, sys.argv[1])
except OSError as error:
    print(error.strerror)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "out")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "no space left to write" in done.stdout
    assert not list(tmp_path.iterdir())
