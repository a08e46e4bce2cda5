"""The paper's protocol: its pairs and numbers, stages found by digest, and the recipe as a user calls it."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
from small import call, environment

import mgd_timm.models  # noqa: F401
from mgd_timm.pipeline import cifar_stages
from mgd_timm.recipe import presets
from mgd_timm.recipe.recipe import make_recipe

RECIPE = Path(__file__).parents[2] / "recipes" / "cifar.py"


@pytest.fixture(scope="module")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten classes of 32x32 noise around colours, as npy files."""
    folder = tmp_path_factory.mktemp("colours")
    generator = np.random.default_rng(0)
    for split, count in (("train", 160), ("test", 60)):
        labels = np.arange(count) % 10
        shade = generator.integers(0, 90, (count, 32, 32, 3)) + (labels * 16)[:, None, None, None]
        np.save(folder / f"{split}_x.npy", shade.astype(np.uint8))
        np.save(folder / f"{split}_y.npy", labels)
    return folder


def test_all_pairs_are_of_networks_that_exist() -> None:
    assert len(presets.PAIRS) == 13
    for teacher, student in presets.PAIRS.values():
        assert timm.is_model(teacher)
        assert timm.is_model(student)


def test_an_unknown_pair_shows_all() -> None:
    with pytest.raises(
        ValueError, match=r"pair 'resnet32x4-resnet8': did you mean resnet32x4-resnet8x4.*vgg13-mobilenetv2"
    ):
        presets.pair("resnet32x4-resnet8")


@pytest.mark.parametrize(
    ("epochs", "expected"),
    [(240, (150, 180, 210)), (24, (15, 18, 21)), (30, (18.75, 22.5, 26.25)), (1, (0.625, 0.75, 0.875))],
)
def test_milestones_shrink_with_the_schedule(epochs: int, expected: tuple[int, ...]) -> None:
    optim = make_recipe(student="cifar_resnet20", **presets.training_options("cifar_resnet20", epochs)).optim
    assert (optim.epochs, optim.sched, optim.milestones) == (epochs, "multistep", expected)


@pytest.mark.parametrize(
    ("name", "lr"), [("cifar_resnet8x4", 0.05), ("cifar_mobilenetv2", 0.01), ("cifar_shufflev1", 0.01)]
)
def test_the_papers_numbers(name: str, lr: float) -> None:
    options = presets.training_options(name)
    found = make_recipe(student=name, **options, **presets.heads_options())
    assert (found.optim.lr, found.optim.momentum, found.optim.weight_decay, found.data.batch_size) == (
        lr,
        0.9,
        5e-4,
        64,
    )
    assert (found.heads.heads_protocol, found.heads.heads_epochs, found.heads.milestones) == (
        "live",
        60,
        (30, 45),
    )


def test_a_stage_is_known_by_all_its_teachers_and_by_what_chooses_their_rows(tmp_path: Path) -> None:
    file = tmp_path / "rows.txt"
    file.write_text("0\n1\n")
    one = cifar_stages.made_from(make_recipe())
    assert set(one) == {"teacher"}
    two = cifar_stages.made_from(make_recipe(teacher=["embedded"] * 2, teacher_classes=["auto", str(file)]))
    assert two["teacher"] == [one["teacher"]] * 2
    assert two["classes"][0] == "auto"
    file.write_text("1\n0\n")
    assert cifar_stages.made_from(make_recipe(teacher_classes=str(file)))["classes"] != two["classes"][1:]


@pytest.mark.parametrize(
    ("summary", "said"),
    [
        ({"teacher_top1": 81.234}, "teacher 81.23 %, student 70.00 %"),
        ({"teacher_top1": [81.2, None]}, "teacher 81.20 %, without logits, student 70.00 %"),
        ({}, "teacher without logits, student"),
    ],
)
def test_what_is_said_of_teachers_that_were_given(tmp_path: Path, capsys, summary, said: str) -> None:
    (tmp_path / "summary.json").write_text(json.dumps({**summary, "top1": 70.0, "best_top1": 71.0}))
    runpy.run_path(str(RECIPE))["print_result"]("pair", tmp_path, None)
    assert said in capsys.readouterr().out


def recipe(*words: str) -> int:
    return runpy.run_path(str(RECIPE))["main"](words)


@pytest.mark.slow
def test_the_recipe_runs_all_stages_and_uses_them_again(colours: Path, tmp_path: Path) -> None:
    words = [
        "--pair",
        "resnet56-resnet20",
        "--data-dir",
        str(colours),
        "--epochs",
        "1",
        "--output",
        str(tmp_path),
        "--amp",
    ]
    first = subprocess.run(
        [sys.executable, str(RECIPE), *words], capture_output=True, text=True, env=environment(), check=False
    )
    assert first.returncode == 0, first.stderr
    teacher, student = sorted(tmp_path.glob("teacher-*"))[0], sorted(tmp_path.glob("cifar_resnet20-mas-kd-*"))[0]
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    summary = json.loads((student / "summary.json").read_text())
    assert summary["heads"]
    assert summary["parameters"] == 272_474  # ResNet-20 with shortcut convolutions, 10 classes
    again = call(*words, target=recipe)
    assert again.returncode == 0, again.stderr
    assert f"found in {teacher}" in again.stdout
    assert f"found in {student}" in again.stdout
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    other = call(*words, "--method", "none", "--criterion", "at", target=recipe)
    assert other.returncode == 0, other.stderr
    assert f"found in {teacher}" in other.stdout
    assert len(list(tmp_path.glob("teacher-*"))) == 1
    assert len(list(tmp_path.glob("cifar_resnet20-*"))) == 2


@pytest.mark.slow
def test_two_processes_go_through_all_stages_as_one_run(colours: Path, tmp_path: Path) -> None:
    """One folder per stage, written by one of them, and a second call that finds both."""
    words = ["--pair", "resnet56-resnet20", "--teacher-epochs", "1", "--epochs", "1", "--student", "cifar_resnet8x05"]
    words += ["--data-dir", str(colours), "--output", str(tmp_path), "--batch-size", "16"]
    for said in ("started in", "found in"):
        done = call(*words, processes=2, target=recipe)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count(said) == 2
        assert done.stdout.count("resnet56-resnet20: teacher") == 1
    for folder in ("teacher-*", "cifar_resnet8x05-*"):
        (found,) = tmp_path.glob(folder)
        assert len((found / "metrics.jsonl").read_text().splitlines()) == 1


def test_the_recipe_refuses_what_it_does_not_know(colours: Path, tmp_path: Path, capsys) -> None:
    words = ["--pair", "resnet9-resnet8", "--data-dir", str(colours), "--output", str(tmp_path / "runs")]
    assert runpy.run_path(str(RECIPE))["main"](words) == 1
    said = capsys.readouterr().err
    assert "unknown pair 'resnet9-resnet8'" in said
    assert "wrn_40_2-shufflev1" in said
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--peer", "resnet18"], "two students that teach each other: mgd-timm distill --peer."),
        (["--resume"], "the same command continues a stopped run, without it."),
        (["--train-only", "classifier"], "only mgd-timm train takes it."),
    ],
)
def test_the_recipe_says_where_the_flags_are_that_it_does_not_take(capsys, words: list[str], said: str) -> None:
    with pytest.raises(SystemExit):
        runpy.run_path(str(RECIPE))["main"](words)
    assert said in capsys.readouterr().err
