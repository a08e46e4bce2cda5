"""Commands as a user types them: runs, their folders, evaluation, export, resuming."""

import json
import re

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from small import FAST, ONE_IMAGE, SHORT, call, refuse

ONE_EPOCH = ["train", "--model", "cifar_resnet8x05", "--epochs", "1"]


def test_help_version_and_lists(mgd):
    assert mgd("--help")[0] == 0
    assert mgd("--version")[1].strip() == "0.1.0"
    code, out, _ = mgd("list", "criteria")
    assert code == 0
    assert all(
        name in out for name in ("ce", "kd", "fitnet", "at", "1000", "arXiv 1612.03928", "fitting stage", "local batch")
    )
    assert "cifar_resnet8x4" in mgd("list", "models", "--filter", "cifar_*")[1].split()
    assert "Fashion-MNIST" in mgd("list", "data")[1]


def test_a_run_folder_holds_what_the_run_was(trained):
    recipe = yaml.safe_load((trained / "recipe.yaml").read_text())
    assert recipe["method"] == "mas"
    assert recipe["optim"]["epochs"] == 1
    rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert set(rows[-1]["train"]) == {"task", "kd", "abstract", "detailed", "top1"}
    summary = json.loads((trained / "summary.json").read_text())
    assert summary["top1"] == rows[-1]["eval"]["top1"]
    assert {"abstract", "detailed", "teacher", "top1"} <= set(summary["heads"])
    assert summary["versions"]["torch"] == torch.__version__.split("+")[0]
    origin = json.loads((trained / "export" / "recipe.json").read_text())
    assert {"recipe", "teacher_sha256", "data_sha256", "model_sha256", "versions", "metrics"} <= set(origin)


def test_evaluate_gives_the_accuracy_of_the_run(mgd, trained):
    code, out, _ = mgd("evaluate", trained)
    assert code == 0
    found = json.loads(out.strip().splitlines()[-1])
    top1 = json.loads((trained / "summary.json").read_text())["top1"]
    assert found["top1"] == pytest.approx(top1, abs=ONE_IMAGE)
    assert found["n"] == 100
    assert found["data"] == yaml.safe_load((trained / "recipe.yaml").read_text())["data"]["data_dir"]


@pytest.mark.slow
def test_evaluate_takes_other_data_than_the_run(mgd, trained):
    found = json.loads(mgd("evaluate", trained, "--dataset", "embedded")[1].strip().splitlines()[-1])
    assert (found["data"], found["n"]) == ("embedded", 4_000)


def test_export_copies_the_student_under_a_licence(mgd, trained, tmp_path):
    assert mgd("export", trained, tmp_path / "out", "--license", "apache-2.0", "--tag", "mine")[0] == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["pretrained_cfg"]["license"], config["pretrained_cfg"]["tag"]) == ("apache-2.0", "mine")
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", trained / "export"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    refuse(mgd, ["exists: choose another folder"], "export", trained, tmp_path / "out")


def test_a_run_folder_teaches(mgd, trained, small_data, tmp_path):
    words = [
        "distill",
        *SHORT,
        "--method",
        "none",
        "--teacher",
        trained,
        "--data-dir",
        small_data,
        "--output",
        tmp_path / "next",
    ]
    code, out, _ = mgd(*words)
    assert code == 0
    said = re.search(r"teacher cifar_resnet8x05: top-1 ([\d.]+) %", out)
    assert said is not None
    top1 = json.loads((trained / "summary.json").read_text())["top1"]
    assert float(said[1]) == pytest.approx(top1, abs=ONE_IMAGE)


def test_val_split_is_evaluated_each_epoch_and_the_test_split_at_the_end(mgd, small_data, tmp_path):
    words = ["train", "--model", "cifar_resnet8x05", "--epochs", "1", "--val-split", "0.25", "--data-dir", small_data]
    assert mgd(*words, "--output", tmp_path / "run")[0] == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["last"]["n"] == 80
    assert summary["test"]["n"] == 100
    assert summary["top1"] == summary["test"]["top1"]
    assert summary["val_top1"] == summary["last"]["top1"]


def test_trackers_are_written(mgd, small_data, tmp_path):
    words = [*ONE_EPOCH, "--data-dir", small_data, "--output", tmp_path / "run"]
    assert mgd(*words, "--log-with", "tensorboard")[0] == 0
    assert list((tmp_path / "run").rglob("events.out.tfevents*"))


def test_resume_starts_what_is_not_there_yet(mgd, small_data, tmp_path):
    """Whoever restarts a run that may be killed at any moment, at once too, gives one command."""
    (tmp_path / "run" / ".writing-abc").mkdir(parents=True)  # killed while its first file was written
    words = [*ONE_EPOCH, "--data-dir", small_data, "--output", "run", "--resume"]
    code, out, _ = mgd(*words)
    assert code == 0
    assert "run: nothing to resume, a new run starts" in out
    assert yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())["resume"] is False
    (tmp_path / "run" / "versions.json").unlink()  # killed before it was written
    code, out, _ = mgd(*words)
    assert code == 0
    assert "nothing to resume" not in out
    assert "resumed after update 5" in out
    assert not list((tmp_path / "run").glob(".writing-*"))
    assert (tmp_path / "run" / "versions.json").is_file()


def test_the_command_of_the_start_is_repeated_where_other_steps_make_its_global_batch(mgd, small_data, tmp_path):
    words = [*ONE_EPOCH, "--data-dir", small_data, "--output", "run", "--resume"]
    batch = ["--batch-size", "32", "--grad-accum-steps", "2"]
    out = mgd(*words, *batch)[1]
    assert "64 images per update in 2 steps" in out
    assert "is of the run's start" not in out
    out = mgd(*words, "--batch-size", "16", "--grad-accum-steps", "2")[
        1
    ]  # half of a step, as on half as many processes
    assert "grad_accum_steps=2 is of the run's start: its 64 images per update stay, in 4 steps now." in out
    assert "resumed after update 5" in out
    for steps in ("1", "3", "4"):
        said = f"grad_accum_steps={steps} contradicts global_batch_size=64"
        refuse(mgd, [said, "expected 2 micro-batches"], *words, "--batch-size", "32", "--grad-accum-steps", steps)
    refuse(mgd, ["optim.global_batch_size: 64 -> 32"], *words, *batch, "--global-batch-size", "32")


def test_a_teacher_near_chance_is_warned_of(mgd, small_data, tmp_path):
    import timm

    torch.manual_seed(0)
    save_file(timm.create_model("cifar_resnet8", num_classes=10).state_dict(), tmp_path / "random.safetensors")
    words = [
        "distill",
        *SHORT,
        "--method",
        "none",
        "--teacher",
        "cifar_resnet8",
        "--teacher-checkpoint",
        "random.safetensors",
    ]
    code, out, _ = mgd(*words, "--data-dir", small_data, "--output", "run")
    assert code == 0
    assert "warning: the teacher is near chance (10.00 %)" in out


@pytest.mark.long
@pytest.mark.slow
def test_a_compiled_run_ends_where_an_eager_one_does(small_data, tmp_path):
    """Teacher, heads, MAS over AT, an average of weights, and a last batch of another size, which is not compiled.

    In processes of their own: the checks of shapes that tests put around every function cannot be compiled.
    """
    words = [
        *FAST,
        "--data-dir",
        str(small_data),
        "--criterion",
        "at",
        "--epochs",
        "1",
        "--lr",
        "0.001",
        "--batch-size",
        "48",
    ]
    words += ["--model-ema", "--model-ema-decay", "0.5", "--heads-protocol", "live", "--heads-epochs", "1"]
    students = []
    for flag in ("--no-compile", "--compile"):
        done = call("distill", *words, flag, "--output", str(tmp_path / flag))
        assert done.returncode == 0, done.stderr
        students.append(load_file(tmp_path / flag / "export" / "model.safetensors"))
    for name, tensor in students[0].items():
        torch.testing.assert_close(students[1][name], tensor, rtol=1e-2, atol=1e-3)
