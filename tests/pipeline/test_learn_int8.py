"""The int8 stage of a run (--qat): killed, on two processes, with any criterion; what it leaves is a plain student."""

import json
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
import timm
import torch
from forked import Ranks, command_line
from safetensors.torch import load_file
from small import FAST, ONE_IMAGE, digest

from mgd_timm.recipe.derived import qat_optim
from mgd_timm.recipe.recipe import make_recipe

QAT = [
    *FAST,
    "--epochs",
    "1",
    "--criterion",
    "fitnet:100:1",
    "--drop",
    "0.2",
    "--checkpoint-interval",
    "1",
    "--model-ema",
]
QAT += ["--model-ema-decay", "0.5"]


def flags(data: Path, output: Path, *more: str) -> list[str]:
    return ["distill", *QAT, "--data-dir", str(data), "--output", str(output), *more]


def weights(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "export" / "model.safetensors")


@pytest.fixture(scope="module")
def float_run(small_data, tmp_path_factory):
    output = tmp_path_factory.mktemp("float") / "run"
    assert command_line(*flags(small_data, output)) == 0
    return output


@pytest.fixture(scope="module")
def whole(float_run, small_data, tmp_path_factory):
    """The float run, continued with the stage."""
    output = shutil.copytree(float_run, tmp_path_factory.mktemp("whole") / "run")
    assert command_line(*flags(small_data, output, "--qat", "--qat-epochs", "2", "--resume")) == 0
    return output


@pytest.mark.slow
def test_the_export_is_a_plain_student(float_run, whole):
    before, after = weights(float_run), weights(whole)
    assert list(before) == list(after)
    assert any(not torch.equal(before[name], after[name]) for name in before)
    model = timm.create_model(f"local-dir:{whole / 'export'}", pretrained=True)
    assert list(model.state_dict()) == list(timm.create_model("cifar_resnet8x05", num_classes=10).state_dict())


@pytest.mark.slow
def test_the_summary_has_both_accuracies_before_and_after(float_run, whole):
    summary = json.loads((whole / "summary.json").read_text())
    found, trained = summary["qat"], json.loads((float_run / "summary.json").read_text())
    assert (found["epochs"], found["lr"]) == (2, pytest.approx(0.005))
    assert found["before"]["float"]["top1"] == pytest.approx(trained["top1"], abs=ONE_IMAGE)  # of the average
    assert found["after"]["float"] == summary["last"]
    assert found["after"]["int8"]["n"] == 100
    assert found["after"]["int8"] != found["after"]["float"]
    recipe = json.loads((whole / "export" / "recipe.json").read_text())["recipe"]
    assert (recipe["qat"], recipe["qat_epochs"]) == (True, 2)


@pytest.mark.slow
def test_warm_ups_of_the_run_have_ended_in_the_stage(whole):
    one, two = (json.loads(row) for row in (whole / "qat" / "metrics.jsonl").read_text().splitlines())
    assert (one["stage"], two["stage"]) == ("qat", "qat")
    assert one["train"]["fitnet"] > 0.75 * two["train"]["fitnet"]  # begun again, its mean weight would be a half


@pytest.mark.slow
def test_killed_in_the_stage_it_goes_on_to_the_bits_of_a_run_that_got_it_later(whole, small_data, tmp_path):
    assert "qat: true" in (whole / "recipe.yaml").read_text()
    words = flags(small_data, tmp_path / "run", "--qat", "--qat-epochs", "2")
    ranks, checkpoints = Ranks(words, tmp_path / "log"), tmp_path / "run" / "qat" / "checkpoints"
    while ranks.alive() and not any(path.name.isdecimal() and int(path.name) >= 12 for path in checkpoints.glob("*")):
        time.sleep(0.005)
    ranks.signal(signal.SIGKILL)
    assert ranks.wait(10) == [-signal.SIGKILL], ranks.said()
    again = Ranks([*words, "--resume"], tmp_path / "again")
    assert again.wait(120) == [0], again.said()
    assert re.search(r"qat: resumed after update 1\d", again.said()), again.said()
    assert digest(tmp_path / "run" / "export" / "model.safetensors") == digest(whole / "export" / "model.safetensors")


@pytest.mark.slow
def test_two_processes_carry_it_out(whole, small_data, tmp_path):
    words = [*flags(small_data, tmp_path / "run", "--qat", "--qat-epochs", "2"), "--global-batch-size", "32"]
    ranks = Ranks(words, tmp_path / "log", processes=2)
    assert ranks.wait(240) == [0, 0], ranks.said()
    one, two = (json.loads((place / "summary.json").read_text())["qat"] for place in (whole, tmp_path / "run"))
    # Other micro-batches for BatchNorm and dropout: another run, of the same length and about the same accuracy.
    assert (one["epochs"], one["lr"]) == (two["epochs"], two["lr"])
    assert all(torch.isfinite(tensor.float()).all() for tensor in weights(tmp_path / "run").values())
    assert list(weights(tmp_path / "run")) == list(weights(whole))


@pytest.mark.slow
def test_without_a_teacher_in_bfloat16(small_data, tmp_path):
    words = ["train", "--model", "cifar_resnet8x05", "--epochs", "1", "--data-dir", str(small_data), "--amp", "--qat"]
    assert command_line(*words, "--output", str(tmp_path / "run")) == 0
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["qat"]["epochs"] == 1


def test_the_stage_has_a_tenth_of_the_run_by_default():
    optim = qat_optim(make_recipe(epochs=35, lr=0.2, warmup_epochs=5, sched="multistep", model_ema=True, qat=True))
    assert (optim.epochs, optim.lr, optim.warmup_epochs, optim.sched) == (4, pytest.approx(0.02), 0, "cosine")
    assert not optim.model_ema
    assert qat_optim(make_recipe(epochs=3, qat=True)).epochs == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"qat_epochs": 2}, "qat_epochs=2: it is for --qat only. Leave --qat-epochs out, or give --qat."),
        ({"qat_lr": 0.1}, "qat_lr=0.1: it is for --qat only. Leave --qat-lr out, or give --qat."),
        ({"qat": True, "peer": "cifar_resnet8"}, "qat with peer='cifar_resnet8': it trains one student"),
        (
            {"qat": True, "teacher": None, "method": "none", "train_only": "classifier"},
            "a frozen backbone cannot learn",
        ),
    ],
)
def test_what_the_stage_cannot_train_is_refused(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make_recipe(**options)


def test_fsdp_is_refused(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert command_line("distill", "--qat", "--output", str(tmp_path / "run")) == 1
    assert "qat with FSDP: it rounds whole weights, and FSDP shards them" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
