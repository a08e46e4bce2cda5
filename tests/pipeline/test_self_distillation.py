"""A student that teaches itself: no teacher is loaded, nothing of the heads is exported, and resume is exact."""

import json
import shutil
from pathlib import Path

import pytest
import timm
import torch
from forked import Ranks, command_line
from safetensors.torch import load_file
from small import digest

import mgd_timm

pytestmark = pytest.mark.slow


def words(data: Path, output: Path, *more: str) -> list[str]:
    common = ["distill", "--criterion", "selfkd", "--student", "cifar_resnet8x05", "--data-dir", str(data)]
    return [*common, "--epochs", "2", "--batch-size", "32", "--drop", "0.2", "--output", str(output), *more]


def losses(output: Path) -> list[dict]:
    return [json.loads(line)["train"] for line in (output / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(small_data, tmp_path_factory):
    output = tmp_path_factory.mktemp("whole") / "run"
    assert command_line(*words(small_data, output)) == 0
    return output


def test_it_learns_without_a_teacher_and_exports_the_student_alone(whole):
    assert set(losses(whole)[-1]) == {"task", "selfkd", "top1"}
    assert losses(whole)[-1]["selfkd"] < losses(whole)[0]["selfkd"]
    exported = load_file(whole / "export" / "model.safetensors")
    assert exported.keys() == timm.create_model("cifar_resnet8x05", num_classes=10).state_dict().keys()
    recipe = json.loads((whole / "export" / "recipe.json").read_text())
    assert recipe["recipe"]["teacher"] is None
    assert "teacher_sha256" not in recipe
    assert not (whole / "heads").exists()
    tag = json.loads((whole / "export" / "config.json").read_text())["pretrained_cfg"]["tag"]
    assert tag.startswith("selfkd_")


def test_resumed_run_goes_on_to_the_same_bits(whole, small_data, tmp_path):
    """From the checkpoint of the first epoch; a kill between checkpoints is in test_resume."""
    output = tmp_path / "run"
    shutil.copytree(whole, output)
    *_, last = sorted(path for path in (output / "checkpoints").iterdir() if path.name.isdecimal())
    shutil.rmtree(last)
    shutil.rmtree(output / "export")
    assert command_line(*words(small_data, output), "--resume") == 0
    assert digest(output / "export" / "model.safetensors") == digest(whole / "export" / "model.safetensors")
    assert losses(output) == losses(whole)


def test_two_processes_learn_the_same(whole, small_data, tmp_path):
    run = Ranks(words(small_data, tmp_path / "run", "--batch-size", "16"), tmp_path / "log", processes=2)
    assert run.wait(120) == [0, 0], run.said()
    for one, two in zip(losses(whole), losses(tmp_path / "run"), strict=True):
        assert two["selfkd"] == pytest.approx(one["selfkd"], rel=0.02)


def test_a_transformer_teaches_itself_in_either_form(small_data, tmp_path):
    torch.manual_seed(0)
    options = {"criterion": "selfkd", "criterion_options": ("selfkd.form=byot",), "epochs": 1, "img_size": 32}
    student = mgd_timm.distill(student="test_vit", data=str(small_data), output=str(tmp_path / "run"), **options)
    assert sum(p.numel() for p in student.parameters()) == sum(
        p.numel() for p in timm.create_model("test_vit", num_classes=10, img_size=32).parameters()
    )
    assert losses(tmp_path / "run")[0]["selfkd"] > 0


def test_one_map_is_refused(small_data, tmp_path):
    with pytest.raises(ValueError, match=r"criterion 'selfkd': SelfKD needs 2 or more maps .* --maps stages"):
        mgd_timm.distill(data=str(small_data), output=str(tmp_path / "run"), criterion="selfkd", maps="last")
