"""Teachers in sequence: each in turn as a run of its own would be, from the student that the one before left."""

import json
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import timm
from forked import Ranks
from safetensors.torch import load_file
from small import FAST, digest, write_small

import mgd_timm.models  # noqa: F401 - registers cifar_*
from mgd_timm.cli.main import main
from mgd_timm.pipeline.turns import turns_of
from mgd_timm.recipe.recipe import make_recipe
from mgd_timm.report.tables import curves_section
from mgd_timm.report.write import find

SHOWN = ["--mean", "0.3", "0.3", "0.3", "--std", "0.3", "0.3", "0.3"]  # else those of a run's first teacher


def test_each_teacher_has_its_epochs_classes_and_stretched_schedule():
    recipe = make_recipe(
        teacher=("a", "b", "c"),
        teachers_as="sequence",
        teacher_epochs=(10, 20, 40),
        teacher_classes=("x.txt", "auto", "none"),
        output="runs/x",
        sched="multistep",
        decay_milestones=(10.0, 15.0),
    )
    turns = turns_of(recipe)
    assert [turn.stage for turn in turns] == ["distil_1", "distil_2", "distil_3"]
    assert [turn.folder for turn in turns] == [Path("runs/x") / turn.stage for turn in turns]
    assert [turn.epochs_before for turn in turns] == [0, 10, 30]
    assert [turn.recipe.teacher for turn in turns] == [("a",), ("b",), ("c",)]
    assert [turn.recipe.teacher_classes for turn in turns] == [("x.txt",), ("auto",), ("none",)]
    assert [turn.recipe.optim.milestones for turn in turns] == [(5, 7.5), (10, 15), (20, 30)]


def test_by_default_each_teacher_takes_the_runs_epochs():
    turns = turns_of(make_recipe(teacher=("a", "b"), teachers_as="sequence", epochs=7))
    assert [turn.recipe.optim.epochs for turn in turns] == [7, 7]
    for way in ("mean", "sum"):
        (turn,) = turns_of(make_recipe(teacher=("a", "b"), teachers_as=way))
        assert (turn.stage, turn.recipe.teacher) == ("distil", ("a", "b"))


def test_one_teacher_is_the_plain_run():
    """The same stage (it seeds dropout), folder and schedule, and nothing else of the recipe is read of a sequence."""
    options = {"teacher": ("a",), "sched": "multistep", "decay_milestones": (0.1, 1.3), "output": "runs/x"}
    (plain,) = turns_of(make_recipe(**options, epochs=3))
    for epochs in ({"epochs": 3}, {"epochs": 3, "teacher_epochs": (3,)}):
        (turn,) = turns_of(make_recipe(**options, **epochs, teachers_as="sequence"))
        assert replace(turn, recipe=replace(turn.recipe, teachers_as="mean")) == plain


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"teacher_epochs": (3, 3)}, "leave --teacher-epochs out, or give --teachers-as sequence"),
        ({"teachers_as": "sequence", "teacher_epochs": (3,)}, r"expected a number of epochs for each of the teachers"),
        ({"teachers_as": "sequence", "teacher_epochs": (3, 0)}, "teacher_epochs=.3, 0.: expected 1 or more"),
        ({"teachers_as": "sequence", "teacher_weights": (0.5, 0.5)}, "one teacher at a time. Leave --teacher-weights"),
        ({"teachers_as": "sequence", "peer": "cifar_resnet8"}, "a second student would begin anew with each teacher"),
        ({"teachers_as": "sequence", "teacher": ("a",), "teacher_store": "x"}, "a store holds the outputs of one"),
        ({"teachers_as": "sequence", "teacher": None, "method": "none"}, "there is no teacher. Leave --teachers-as"),
    ],
)
def test_contradictions_are_refused(options, expected):
    with pytest.raises(ValueError, match=f"(?i){expected}"):
        make_recipe(**{"teacher": ("a", "b"), **options})


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_small(tmp_path_factory.mktemp("data"), train=80, test=40)


@pytest.fixture(scope="module")
def teachers(data, tmp_path_factory):
    """The embedded teacher, and a student of one epoch."""
    folder = tmp_path_factory.mktemp("teacher") / "run"
    words = ["train", "--model", "cifar_resnet8x05", "--epochs", "1", "--data-dir", str(data)]
    assert main([*words, "--output", str(folder)]) == 0
    return ["embedded", str(folder)]


@pytest.fixture(scope="module")
def flags(data):
    return ["distill", *FAST, *SHOWN, "--batch-size", "20", "--data-dir", str(data)]


@pytest.fixture(scope="module")
def sequence(flags, teachers, tmp_path_factory):
    output = tmp_path_factory.mktemp("sequence") / "run"
    words = ["--teacher", teachers[0], "--teacher", teachers[1], "--teachers-as", "sequence"]
    assert main([*flags, *words, "--teacher-epochs", "1", "2", "--output", str(output)]) == 0
    return output


@pytest.mark.slow
def test_a_sequence_is_one_run_after_the_other_by_hand(sequence, flags, teachers, tmp_path):
    """As the authors run their code: the second run starts from the weights of the first one's student."""
    first, second = tmp_path / "first", tmp_path / "second"
    assert main([*flags, "--teacher", teachers[0], "--epochs", "1", "--output", str(first)]) == 0
    start = ["--student-checkpoint", str(first / "export" / "model.safetensors")]
    assert main([*flags, "--teacher", teachers[1], "--epochs", "2", *start, "--output", str(second)]) == 0
    assert digest(sequence / "export" / "model.safetensors") == digest(second / "export" / "model.safetensors")
    assert digest(sequence / "export" / "config.json") == digest(second / "export" / "config.json")


@pytest.mark.slow
def test_what_a_sequence_leaves(sequence, teachers):
    rows = [json.loads(line) for line in (sequence / "metrics.jsonl").read_text().splitlines()]
    assert [(row["stage"], row["epoch"], row["updates"]) for row in rows] == [
        ("distil_1", 1, 4),
        ("distil_2", 2, 8),
        ("distil_2", 3, 12),
    ]
    summary = json.loads((sequence / "summary.json").read_text())
    assert summary["updates"] == 12
    assert [(row["epochs"], row["updates"]) for row in summary["turns"]] == [(1, 4), (2, 8)]
    assert summary["turns"][1]["top1"] == summary["top1"] == rows[2]["eval"]["top1"]
    assert summary["best_epoch"] in (2, 3)
    assert len(summary["teacher_top1"]) == 2
    assert {"heads_1", "heads_2"} <= set(summary)
    provenance = json.loads((sequence / "export" / "recipe.json").read_text())
    second = json.loads((Path(teachers[1]) / "export" / "recipe.json").read_text())
    assert len(provenance["teacher_sha256"]) == 2
    assert provenance["recipe"]["teachers_as"] == "sequence"
    assert second["recipe"]["teacher"] is None
    model = timm.create_model(f"local-dir:{sequence / 'export'}", pretrained=True)
    assert set(load_file(sequence / "export" / "model.safetensors")) == set(model.state_dict())  # no trace of a method


@pytest.mark.slow
def test_a_report_shows_the_last_teacher_with_its_heads(sequence):
    found = find([sequence], {}, log=lambda _: None)
    assert found.groups[0].label == "MAS, 2 teachers in sequence"
    assert not isinstance(found.teacher, str)
    assert found.teacher.teacher.digest == found.groups[0].first.provenance["teacher_sha256"][1]
    assert found.teacher.teacher.heads is not None
    assert "MAS, 2 teachers in sequence, 3: " in curves_section(found)  # one line through the epochs of both


@pytest.fixture(scope="module")
def hard(flags, teachers):
    """With dropout, an optimizer of two states, a moving average and a checkpoint after each update."""
    words = [*flags, "--teacher", teachers[0], "--teacher", teachers[1], "--teachers-as", "sequence", "--epochs", "1"]
    words += ["--method", "none", "--criterion", "fitnet", "--drop", "0.2", "--opt", "adamw", "--lr", "0.003"]
    return [*words, "--checkpoint-interval", "1", "--model-ema", "--model-ema-decay", "0.9", "--batch-size", "10"]


@pytest.fixture(scope="module")
def whole(hard, tmp_path_factory):
    output = tmp_path_factory.mktemp("whole") / "run"
    assert main([*hard, "--output", str(output)]) == 0
    return output


@pytest.mark.slow
def test_killed_with_each_teacher_it_goes_on_to_the_same_bits(whole, hard, tmp_path):
    output, stages = tmp_path / "run", ("distil_1", "distil_2")
    words = [*hard, "--output", str(output), "--resume"]
    for stage in stages:
        run, checkpoints = Ranks(words, tmp_path / stage), output / stage / "checkpoints"
        while run.alive() and not any(path.name.isdecimal() for path in checkpoints.glob("*")):
            time.sleep(0.002)
        run.signal(signal.SIGKILL)
        assert run.wait(60) == [-signal.SIGKILL], run.said()
    run = Ranks(words, tmp_path / "last")
    assert run.wait(120) == [0], run.said()
    for stage in stages:
        assert f"{stage}: resumed after update" in run.said()
    assert digest(output / "export" / "model.safetensors") == digest(whole / "export" / "model.safetensors")
    assert history(output) == history(whole)


@pytest.mark.slow
def test_two_processes_show_each_teacher_the_same_updates(whole, hard, tmp_path):
    words = [*hard, "--batch-size", "5", "--output", str(tmp_path / "run")]
    ranks = Ranks(words, tmp_path / "log", processes=2)
    assert ranks.wait(120) == [0, 0], ranks.said()
    for ours, theirs in zip(history(tmp_path / "run"), history(whole), strict=True):
        assert [ours[key] for key in ("stage", "epoch", "updates", "lr")] == [
            theirs[key] for key in ("stage", "epoch", "updates", "lr")
        ]
        assert ours["train"].keys() == theirs["train"].keys()


def history(output: Path) -> list[dict]:
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{key: row[key] for key in ("stage", "epoch", "updates", "lr", "train", "eval")} for row in rows]
