"""`import mgd_timm` and what it offers: instant to import, names or modules in, the student out."""

import json
import subprocess
import sys

import pytest
import timm
import torch

import mgd_timm
from mgd_timm.build import load_model

SHORT = {"epochs": 1, "heads_epochs": 1, "heads_views": 1}


def test_importing_the_package_loads_nothing_heavy():
    script = "import sys, mgd_timm; print([m for m in ('torch', 'timm', 'accelerate', 'datasets', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert all(hasattr(mgd_timm, name) for name in mgd_timm.__all__)
    with pytest.raises(AttributeError, match="no attribute 'distil'"):
        _ = mgd_timm.distil


def test_distill_takes_modules_and_gives_the_same_student_as_names(small_data, tmp_path):
    """A CNN of timm's own as the student; the module and its name differ in nothing but their initial weights."""
    torch.manual_seed(0)
    module = timm.create_model("resnet10t", num_classes=10)
    student = mgd_timm.distill(load_model("embedded"), module, str(small_data), output=tmp_path / "run", method="mag", **SHORT)
    assert student is module
    assert not student.training
    assert next(student.parameters()).device.type == "cpu"
    folder = mgd_timm.export_model(student, tmp_path / "out")
    loaded = timm.create_model(f"local-dir:{folder}", pretrained=True)
    images = torch.randn(2, 3, 28, 28)
    assert torch.equal(loaded.eval()(images), student.to(memory_format=torch.contiguous_format)(images))
    config = json.loads((folder / "config.json").read_text())
    assert config["pretrained_cfg"]["tag"].startswith("mag_kd_small")
    assert config["label_names"][1] == "Trouser"
    assert mgd_timm.evaluate(loaded, str(small_data))["top1"] == pytest.approx(
        json.loads((tmp_path / "run" / "summary.json").read_text())["top1"]
    )


@pytest.mark.parametrize(
    ("student", "criterion"), [("test_vit", ("fitnet",)), ("test_convnext", ("at", "kd:0.5")), ("test_efficientnet", ("kd",))]
)
def test_any_architecture_learns_under_mas(small_data, tmp_path, student, criterion):
    options = {"maps": "last", "lr": 0.01, "img_size": 32, "amp": student == "test_vit"}
    out = mgd_timm.distill(
        student=student, data=str(small_data), output=tmp_path / "run", method="mas", criterion=criterion, **options, **SHORT
    )
    assert all(torch.isfinite(p).all() for p in out.parameters())
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert {"task", "kd", "abstract", "detailed"} <= set(row["train"])


def test_train_and_its_moving_average(small_data, tmp_path):
    options = {"epochs": 2, "model_ema": True, "model_ema_decay": 0.8, "smoothing": 0.1, "val_split": 0.2}
    mgd_timm.train("cifar_resnet8x05", str(small_data), output=tmp_path / "run", **options)
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["eval"]["top1"] != last["eval"]["raw_top1"] or last["eval"]["loss"] != last["eval"]["raw_loss"]
    found = mgd_timm.evaluate(str(tmp_path / "run"))  # the exported one is the average
    assert found["top1"] == json.loads((tmp_path / "run" / "summary.json").read_text())["top1"]


def test_a_teacher_of_another_normalisation_sees_the_same_picture(small_data, tmp_path, capsys):
    """Statistics given for the student: the teacher's accuracy must not move."""
    accuracies = []
    for number, stats in enumerate(({}, {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)})):
        mgd_timm.distill(data=str(small_data), output=tmp_path / str(number), method="none", **SHORT, **stats)
        accuracies.append(json.loads((tmp_path / str(number) / "summary.json").read_text())["teacher_top1"])
    assert accuracies[0] == accuracies[1] > 80


def test_unknown_options_show_the_nearest(tmp_path):
    with pytest.raises(ValueError, match="unknown option 'epoch': did you mean epochs"):
        mgd_timm.distill(epoch=3, output=tmp_path / "run")
    assert not list(tmp_path.iterdir())
