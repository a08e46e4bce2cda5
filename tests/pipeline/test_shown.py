"""What a run's evaluation showed its student, timm's transforms and `evaluate` show its export, to the last image."""

import json
import shutil

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config

import mgd_timm
from mgd_timm.data.dataset import load_images
from mgd_timm.pipeline.connect import find_defaults
from mgd_timm.pipeline.run_folder import read_recipe

pytestmark = pytest.mark.slow


def write_images(folder, height, width, count=16, mode="RGB"):
    """Two classes of noise in class folders."""
    generator = np.random.default_rng(height)
    for split in ("train", "test"):
        for name in ("a", "b"):
            place = folder / split / name
            place.mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(0, 200, (height, width, 3), dtype=np.uint8)
                pixels[:, : width // 2, "ab".index(name)] += 55
                Image.fromarray(pixels).convert(mode).save(place / f"{number:02}.png")
    return folder


def summary(folder):
    return json.loads((folder / "summary.json").read_text())


def assert_evaluates_as_the_run(run, models, data):
    last = summary(run)["last"]
    for model in models:
        for given in ((), (data,)) if (model.parent / "recipe.yaml").exists() or model == run else ((data,),):
            found = mgd_timm.evaluate(str(model), *given)
            assert (found["top1"], found["n"]) == (last["top1"], last["n"])
            assert found["loss"] == pytest.approx(last["loss"], rel=1e-6)


@pytest.mark.parametrize(
    ("size", "options"),
    [
        ((32, 32), {}),
        ((24, 32), {}),
        ((32, 24), {"img_size": 32, "mean": (0.4, 0.5, 0.6), "std": (0.3, 0.2, 0.1)}),
        ((24, 32), {"img_size": 48}),
        ((120, 160), {"img_size": 64}),
        ((160, 120), {"img_size": 64, "crop_pct": 0.8, "interpolation": "bicubic", "workers": 0}),
    ],
)
@pytest.mark.parametrize("student", ["test_resnet", "test_vit3"])  # of any size, and built for one
def test_timm_and_evaluate_show_what_the_run_showed(tmp_path, student, size, options):
    data = str(write_images(tmp_path / "data", *size))
    if student == "test_vit3" and size == (24, 32) and not options:
        options = {"in_chans": 3}  # 24x32: two patches of 16 do not fit 24 rows
        with pytest.raises(ValueError, match="upper left 16x32 of 24x32 pixels"):
            mgd_timm.train(student, data, epochs=1, output=tmp_path / "run")
        return
    mgd_timm.train(student, data, epochs=1, lr=0.01, batch_size=16, output=tmp_path / "run", **options)
    export = tmp_path / "run" / "export"
    model = timm.create_model(f"local-dir:{export}", pretrained=True)
    recipe = read_recipe(tmp_path / "run")
    images = load_images(recipe.data, recipe.seed, find_defaults(recipe, None, None))
    shown = next(images.test.batches([images.test.ids], 0, torch.device("cpu"))).images
    transform = create_transform(**resolve_data_config({}, model=model))
    files = sorted((tmp_path / "data" / "test").rglob("*.png"))
    theirs = torch.stack([transform(Image.open(path)) for path in files])
    torch.testing.assert_close(theirs, shown, atol=1e-5, rtol=0)
    moved = shutil.copytree(export, tmp_path / "moved")
    assert_evaluates_as_the_run(tmp_path / "run", (tmp_path / "run", export, moved), data)
    if "img_size" in options:  # another size where one is given
        loss = mgd_timm.evaluate(moved, data, img_size=80)["loss"] if student == "test_resnet" else None
        assert loss != summary(tmp_path / "run")["last"]["loss"]


def test_an_architecture_that_squashes_large_images_does_so_in_the_run_and_after_it(tmp_path):
    data = str(write_images(tmp_path / "data", 120, 160))
    student = timm.create_model("test_resnet", num_classes=2)
    student.pretrained_cfg = {**student.pretrained_cfg, "crop_mode": "squash", "crop_pct": 1.0}
    mgd_timm.train(student, data, epochs=1, lr=0.01, img_size=64, batch_size=16, output=tmp_path / "run")
    model = timm.create_model(f"local-dir:{tmp_path / 'run' / 'export'}", pretrained=True).eval()
    transform = create_transform(**resolve_data_config({}, model=model))
    assert model.pretrained_cfg["crop_mode"] == "squash"
    files = sorted((tmp_path / "data" / "test").rglob("*.png"))
    with torch.no_grad():
        logits = model(torch.stack([transform(Image.open(path)) for path in files]))
    labels = torch.tensor(["ab".index(path.parent.name) for path in files])
    loss = torch.nn.functional.cross_entropy(logits, labels).item()
    assert loss == pytest.approx(summary(tmp_path / "run")["last"]["loss"], rel=1e-5)
    assert_evaluates_as_the_run(tmp_path / "run", (tmp_path / "run",), data)


def test_evaluate_reads_grey_images_and_mixed_precision_as_the_run(tmp_path):
    data = str(write_images(tmp_path / "data", 32, 32))
    options = {"in_chans": 1, "amp": True, "val_split": 0.25, "img_size": 40}
    mgd_timm.train("cifar_resnet8x05", data, epochs=1, batch_size=16, output=tmp_path / "run", **options)
    test = summary(tmp_path / "run")["test"]
    for given in ((), (data,)):
        found = mgd_timm.evaluate(str(tmp_path / "run" / "export"), *given)
        assert found["top1"] == test["top1"]
        assert found["loss"] == pytest.approx(test["loss"], rel=1e-6)
    module = timm.create_model("cifar_resnet8x05", num_classes=2, in_chans=1)
    assert mgd_timm.evaluate(module, data)["n"] == 32  # in the channels that it takes


def test_both_students_are_described_by_the_images_that_they_were_evaluated_on(tmp_path):
    """The peer's own architecture would be shown other crops."""
    data = str(write_images(tmp_path / "data", 120, 120))
    networks = {"student": "test_resnet", "peer": "resnet10t"}
    mgd_timm.distill(**networks, data=data, img_size=64, epochs=1, batch_size=16, output=tmp_path / "run")
    keys = ("crop_pct", "crop_mode", "interpolation", "input_size")
    shown = []
    for name in ("export", "export_peer"):
        config = json.loads((tmp_path / "run" / name / "config.json").read_text())["pretrained_cfg"]
        shown.append([config[key] for key in keys])
    assert shown[0] == shown[1]
    peer = mgd_timm.evaluate(str(tmp_path / "run" / "export_peer"))
    assert peer["loss"] == pytest.approx(summary(tmp_path / "run")["peer"]["last"]["loss"], rel=1e-6)


def test_a_run_is_evaluated_from_elsewhere_and_says_when_its_data_has_changed(tmp_path, monkeypatch, capsys):
    write_images(tmp_path / "photos", 32, 32)
    monkeypatch.chdir(tmp_path)
    mgd_timm.train("cifar_resnet8x05", "photos", epochs=1, batch_size=16, output="runs/one")
    expected = summary(tmp_path / "runs" / "one")["top1"]
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    capsys.readouterr()
    for model in ("../runs/one", "../runs/one/export", shutil.copytree(tmp_path / "runs" / "one", "moved")):
        assert mgd_timm.evaluate(model)["top1"] == expected
    assert "has changed" not in capsys.readouterr().out
    shutil.copy(tmp_path / "photos" / "test" / "a" / "00.png", tmp_path / "photos" / "test" / "b" / "00.png")
    for model in ("../runs/one", "../runs/one/export"):
        mgd_timm.evaluate(model)
        said = [line for line in capsys.readouterr().out.splitlines() if "has changed" in line]
        assert len(said) == 1
        assert "its evaluation images or labels are others (sha256: evaluation " in said[0]
    (tmp_path / "photos" / "train" / "a" / "00.png").unlink()
    mgd_timm.evaluate("moved", img_size=32)
    assert "its training and evaluation images or labels are others" in capsys.readouterr().out
    mgd_timm.evaluate("moved", str(write_images(tmp_path / "others", 32, 32)))
    assert "has changed" not in capsys.readouterr().out
