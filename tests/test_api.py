"""`import mgd_timm` and what it offers: instant to import, names or modules in, the student out."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from datasets import load_dataset
from PIL import Image
from small import ONE_IMAGE
from timm.data import create_transform, resolve_data_config
from torch import nn

import mgd_timm
from mgd_timm.api import evaluate_named
from mgd_timm.data.dataset import load_images
from mgd_timm.features import Defaults
from mgd_timm.models.load import load_model
from mgd_timm.pipeline.connect import find_defaults
from mgd_timm.pipeline.run_folder import read_recipe
from mgd_timm.recipe.data import Data
from mgd_timm.recipe.recipe import Recipe

SHORT = {"epochs": 1, "heads_epochs": 1, "heads_augmentations": 1}


def test_importing_the_package_loads_nothing_heavy():
    script = (
        "import sys, mgd_timm; print([m for m in ('torch', 'timm', 'accelerate', 'datasets', 'numpy') if m in "
        "sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert all(hasattr(mgd_timm, name) for name in mgd_timm.__all__)
    with pytest.raises(AttributeError, match="no attribute 'distil'"):
        _ = mgd_timm.distil


@pytest.mark.slow
def test_distill_takes_modules_and_gives_the_same_student_as_names(small_data, tmp_path):
    """A CNN of timm's own as the student; the module and its name differ in nothing but their initial weights."""
    torch.manual_seed(0)
    module = timm.create_model("resnet10t", num_classes=10)
    student = mgd_timm.distill(
        load_model("embedded"), module, str(small_data), output=tmp_path / "run", method="mag", **SHORT
    )
    assert student is module
    assert not student.training
    assert next(student.parameters()).device.type == "cpu"
    folder = mgd_timm.export_model(student, tmp_path / "out")
    loaded = timm.create_model(f"local-dir:{folder}", pretrained=True)
    images = torch.randn(2, 3, 28, 28)
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(images), student(images))
    config = json.loads((folder / "config.json").read_text())
    assert config["pretrained_cfg"]["tag"].startswith("mag_kd_small")
    assert config["label_names"][1] == "Trouser"
    top1 = json.loads((tmp_path / "run" / "summary.json").read_text())["top1"]
    assert mgd_timm.evaluate(loaded, str(small_data))["top1"] == pytest.approx(top1, abs=ONE_IMAGE)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("student", "criterion"),
    [("test_vit", ("fitnet",)), ("test_convnext", ("at", "kd:0.5")), ("test_efficientnet", ("kd",))],
)
def test_any_architecture_learns_under_mas(small_data, tmp_path, student, criterion):
    # AT compares where maps are active: at 32 px this ConvNeXt's last one has a single place.
    options = {
        "maps": "last",
        "lr": 0.01,
        "img_size": 64 if student == "test_convnext" else 32,
        "amp": student == "test_vit",
    }
    out = mgd_timm.distill(
        student=student,
        data=str(small_data),
        output=tmp_path / "run",
        method="mas",
        criterion=criterion,
        **options,
        **SHORT,
    )
    assert all(torch.isfinite(p).all() for p in out.parameters())
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert {"task", "kd", "abstract", "detailed"} <= set(row["train"])


def test_train_and_its_moving_average(small_data, tmp_path):
    options = {"epochs": 2, "model_ema": True, "model_ema_decay": 0.8, "smoothing": 0.1, "val_split": 0.2}
    mgd_timm.train("cifar_resnet8x05", str(small_data), output=tmp_path / "run", **options)
    assert "method: none" in (tmp_path / "run" / "recipe.yaml").read_text().splitlines()  # as mgd-timm train writes
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["eval"]["top1"] != last["eval"]["raw_top1"] or last["eval"]["loss"] != last["eval"]["raw_loss"]
    found = mgd_timm.evaluate(str(tmp_path / "run"))  # the exported one is the average
    top1 = json.loads((tmp_path / "run" / "summary.json").read_text())["top1"]
    assert found["top1"] == pytest.approx(top1, abs=ONE_IMAGE)


@pytest.mark.slow
def test_a_teacher_of_another_normalisation_sees_the_same_picture(small_data, tmp_path, capsys):
    """Statistics given for the student: the teacher's accuracy must not move."""
    accuracies = []
    for number, stats in enumerate(({}, {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)})):
        mgd_timm.distill(data=str(small_data), output=tmp_path / str(number), method="none", **SHORT, **stats)
        accuracies.append(json.loads((tmp_path / str(number) / "summary.json").read_text())["teacher_top1"])
    assert accuracies[0] == pytest.approx(accuracies[1], abs=ONE_IMAGE)
    assert accuracies[0] > 80


def test_unknown_options_show_the_nearest(tmp_path):
    with pytest.raises(ValueError, match="unknown option 'epoch': did you mean epochs"):
        mgd_timm.distill(epoch=3, output=tmp_path / "run")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (
            lambda: mgd_timm.train("cifar_resnet8", heads_epochs=3),
            "'heads_epochs' is for mgd_timm.distill only",
        ),
        (lambda: mgd_timm.train("cifar_resnet8", criterion=("at",)), "'criterion' is for mgd_timm.distill only"),
        (lambda: mgd_timm.evaluate("embedded", heads_epochs=3), "unknown option of an evaluation 'heads_epochs'"),
        (lambda: mgd_timm.evaluate("embedded", pad=3), "'pad' is for training only"),
    ],
)
def test_what_a_call_does_not_take_is_refused(call, said):
    with pytest.raises(ValueError, match=said):
        call()


@pytest.mark.slow
def test_what_is_no_model_is_refused():  # in a process without this suite's checks of types
    program = """
import mgd_timm
for call in (lambda: mgd_timm.evaluate(3), lambda: mgd_timm.distill([3]), lambda: mgd_timm.distill(student=3)):
    try:
        call()
    except ValueError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    expected = "=3: expected a timm name, a folder or a module that timm built."
    assert done.stdout.splitlines() == [f"{what}{expected}" for what in ("model", "teacher", "student")]


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (
            lambda m, data: mgd_timm.evaluate(nn.Linear(2, 2), data),
            "model: a Linear, which has no num_classes: expected a model of timm.create_model",
        ),
        (
            lambda m, data: mgd_timm.distill(m.half(), data=data, output="run"),
            r"teacher: its .* is torch\.float16, expected torch\.float32: pass model\.float\(\)",
        ),
        (
            lambda m, data: mgd_timm.train(m.requires_grad_(False), data, output="run"),
            "the student's weights are frozen: call student.req",
        ),
        (
            lambda m, data: mgd_timm.train(m, data, in_chans=1, output="run"),
            "the student takes 3 channels, the images have 1: --in-chans 3",
        ),
        (
            lambda m, data: mgd_timm.evaluate(m, data, in_chans=1),
            "the model takes 3 channels, the images have 1: --in-chans 3",
        ),
        (
            lambda m, data: mgd_timm.distill(timm.create_model("test_resnet", in_chans=4), data=data, output="run"),
            "the teacher takes 4 channels, the images have 3: --in-chans 4",
        ),
    ],
)
def test_models_that_cannot_be_used_are_refused_before_a_folder_is_made(call, said, small_data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=said):
        call(timm.create_model("cifar_resnet8", num_classes=10), str(small_data))
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"img_size": 112, "crop_pct": 0.8, "interpolation": "bicubic", "workers": 0}])
def test_timm_shows_images_to_an_exported_student_as_they_were_evaluated(options, small_data, tmp_path):
    """Small images whole, and large ones as the options say: neither is the architecture's own share of 0.95,
    bilinear."""
    mgd_timm.train("test_resnet", str(small_data), epochs=1, output=tmp_path / "run", **options)
    model = timm.create_model(f"local-dir:{tmp_path / 'run' / 'export'}", pretrained=True)
    transform = create_transform(**resolve_data_config({}, model=model))
    known, data = model.pretrained_cfg, read_recipe(tmp_path / "run").data
    images = load_images(data, 0, Defaults(mean=tuple(known["mean"]), std=tuple(known["std"])))
    shown = next(images.test.batches([images.test.ids[:8]], 0, torch.device("cpu"))).images
    raw = load_dataset(str(small_data), split="test[:8]")["image"]
    assert torch.allclose(torch.stack([transform(image.convert("RGB")) for image in raw]), shown, atol=1e-5)


@pytest.mark.slow
def test_options_replace_what_a_data_says(small_data, tmp_path):
    data = Data(data_dir=str(small_data), batch_size=16, pad=1)
    mgd_timm.train("cifar_resnet8x05", data, output=tmp_path / "run", epochs=1, batch_size=32, val_split=0.25)
    recipe = read_recipe(tmp_path / "run").data
    assert (recipe.batch_size, recipe.val_split, recipe.pad, recipe.data_dir) == (32, 0.25, 1, str(small_data))
    mgd_timm.distill(data=data, output=tmp_path / "two", method="none", pad=3, **SHORT)
    assert (read_recipe(tmp_path / "two").data.pad, read_recipe(tmp_path / "two").data.batch_size) == (3, 16)
    assert mgd_timm.evaluate("embedded", data, eval_split="train")["n"] == 320
    # Training's augmentation of large images, which small ones refuse, is nothing to an evaluation.
    assert mgd_timm.evaluate("embedded", replace(data, aa="rand-m5"))["n"] == 100


@pytest.mark.slow
def test_evaluate_takes_seed_and_data_of_a_run_and_of_its_export(small_data, tmp_path):
    """The validation cut is the only split, so its images depend on the seed."""
    place = tmp_path / "data"
    place.mkdir()
    shutil.copy(small_data / "train.parquet", place)
    options = {"epochs": 1, "val_split": 0.25, "seed": 7, "img_size": 32}
    mgd_timm.train("test_vit3", str(place), output=tmp_path / "run", lr=0.01, **options)
    last = json.loads((tmp_path / "run" / "summary.json").read_text())["last"]
    for model in (tmp_path / "run", tmp_path / "run" / "export"):
        found = mgd_timm.evaluate(model)
        assert (found["n"], found["top1"]) == (80, pytest.approx(last["top1"], abs=100 / 80 + 1e-3))
        assert found["loss"] == pytest.approx(last["loss"], rel=1e-4)
        assert mgd_timm.evaluate(str(model), seed=8)["loss"] != found["loss"]
        assert mgd_timm.evaluate(str(model), val_split=0.5)["n"] == 160
    # Other data: the size that the model is fixed to is the images' where none is named.
    assert mgd_timm.evaluate(str(tmp_path / "run"), str(small_data))["n"] == 100
    assert evaluate_named(str(tmp_path / "run"), dataset="embedded").data == "embedded"  # not the run's folder
    origin = tmp_path / "run" / "export" / "recipe.json"
    origin.write_text(json.dumps({"recipe": [3]}))
    with pytest.raises(ValueError, match=r"recipe.json: its recipe cannot be read"):
        mgd_timm.evaluate(str(origin.parent))
    origin.write_text(json.dumps({"recipe": {"epoch": 3}}))
    with pytest.raises(ValueError, match=r"recipe.json: its recipe cannot be read \(unknown option 'epoch'"):
        mgd_timm.evaluate(str(origin.parent))


def named(tmp_path, names):
    """Two images of ten classes in folders of these names."""
    for split in ("train", "test"):
        for i, name in enumerate(names):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for j in range(2):
                Image.fromarray(np.full((28, 28, 3), 20 * i + j, np.uint8)).save(folder / f"{j}.png")
    return str(tmp_path)


def test_classes_of_other_names_or_another_order_are_refused(tmp_path):
    place = named(tmp_path / "letters", "abcdefghij")
    expected = (
        r"class 0 is 'T-shirt/top' to the {} and 'a' in the data: both need the same classes in one order\. Rename"
    )
    with pytest.raises(ValueError, match=expected.format("model")):
        mgd_timm.evaluate("embedded", place)
    with pytest.raises(
        ValueError, match=r"class 0 is 'T-shirt/top' to the teacher and 'a' in the data.*Ways out: its rows"
    ):
        mgd_timm.distill(data=place, output=tmp_path / "run", method="none", **SHORT)
    model = load_model("embedded")
    model.pretrained_cfg = {**model.pretrained_cfg, "label_names": list("abdcefghij")}
    with pytest.raises(ValueError, match="class 2 is 'd' to the model and 'c' in the data"):
        mgd_timm.evaluate(model, place)
    for names in (None, "letters", tuple("abcdefghij"), [str(i) for i in range(10)]):
        model.pretrained_cfg = {**model.pretrained_cfg, "label_names": names}
        assert mgd_timm.evaluate(model, place)["n"] == 20
    model.pretrained_cfg = {**model.pretrained_cfg, "label_names": list("abc")}
    with pytest.raises(ValueError, match="the model names 3 classes, the data 10"):
        mgd_timm.evaluate(model, place)


def test_normalisation_of_the_wrong_kind_is_left_out(small_data, tmp_path):
    model = load_model("embedded")
    for wrong in (0.5, [], "0.5", [0.5, None, 0.5], (0.5, 0.5)):
        model.pretrained_cfg = {**model.pretrained_cfg, "mean": wrong}
        known = find_defaults(Recipe(), model, None)
        assert known.mean is known.std is None
    for wrong in ([], 0.5):
        model.pretrained_cfg = {**model.pretrained_cfg, "mean": wrong, "std": wrong}
        assert mgd_timm.evaluate(model, str(small_data))["n"] == 100
