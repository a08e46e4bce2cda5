"""The grid of benchmarks/cifar.py: a student in a pass with others ends as it does alone, and what is done is not done
again."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import cifar as grid
import cifar_tables
import criteria as steps
import hosts as each
from report import read_rows
from safetensors.torch import load_file

from mgd_timm.pipeline.run import run
from mgd_timm.recipe.options import as_dict
from mgd_timm.recipe.recipe import flatten, make_recipe
from mgd_timm.storage import checkpoint

pytestmark = pytest.mark.slow


@pytest.fixture
def arguments(small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    shown = {
        "data_dir": str(small_data),
        "epochs": 2,
        "lr": 0.1,
        "batch_size": 32,
        "pad": 2,
        "mean": (0.3,) * 3,
        "std": (0.3,) * 3,
    }
    heads = {"heads_epochs": 2, "heads_augmentations": 2}

    def small(args, student, options, seed, classes):  # type: ignore[no-untyped-def]
        return make_recipe(student=student, seed=seed, **shown, **heads, **options)

    monkeypatch.setattr(grid, "recipe_of", small)
    return ["--quick", "--hosts", "kd", "at", "--seeds", "3", "--output", str(tmp_path)]


def test_a_student_in_a_pass_ends_as_it_does_alone(arguments: list[str], tmp_path: Path) -> None:
    grid.main(arguments)
    (folder,) = tmp_path.glob("pass-*")
    state = checkpoint.load_newest(folder / "checkpoints", print)
    assert state is not None
    args = grid.parse(arguments)
    for arm in ("alone", "MAS+KD", "MAG+AT"):
        recipe = grid.recipe_of(args, "cifar_resnet8x05", grid.arms(args.hosts)[arm], 3, 10)
        place = tmp_path / arm
        run(make_recipe(**{**flatten(as_dict(recipe)), "output": str(place)}), quiet=True)
        alone = load_file(place / "export" / "model.safetensors")
        for name, tensor in alone.items():
            torch.testing.assert_close(
                state.tensors["trainee"][f"distillers.{arm}.student.model.{name}"], tensor, rtol=0, atol=0
            )
    rows = read_rows(tmp_path / "quick.jsonl")
    assert [row["arm"] for row in rows] == list(grid.arms(["kd", "at"]))
    assert all(row["versions"]["torch"] == torch.__version__.partition("+")[0] and row["noise"] for row in rows)
    summary = json.loads((tmp_path / "MAS+KD" / "summary.json").read_text())
    assert next(row for row in rows if row["arm"] == "MAS+KD")["last"] == round(summary["top1"], 2)


def test_finished_cells_are_not_done_again(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grid.main([*arguments, "--arms", "alone", "KD"])
    before = (tmp_path / "quick.jsonl").read_bytes()
    grid.main([*arguments, "--arms", "alone", "KD"])
    assert (tmp_path / "quick.jsonl").read_bytes() == before
    capsys.readouterr()
    grid.main([*arguments, "--arms", "alone", "KD", "AT"])
    assert "seed 3: AT\n" in capsys.readouterr().out
    assert len(read_rows(tmp_path / "quick.jsonl")) == 3


def test_the_table_pairs_seeds_and_keeps_effects_apart() -> None:
    base = {
        "pair": "vgg13-vgg8",
        "teacher": "cifar_vgg13",
        "student": "cifar_vgg8",
        "epochs": 240,
        "teacher_top1": 74.0,
    }
    base |= {"teacher_sha256": "t", "data_sha256": "d", "precision": "bf16"}
    values = {
        "alone": (70, 71),
        "KD": (72, 74),
        "MAS+KD": (73, 74.5),
        "AT": (71, 71),
        "AT+KD": (73, 75),
        "MAG+AT": (74, 75),
    }
    rows = [
        {**base, "arm": arm, "seed": seed, "last": float(last), "best": float(last)}
        for arm, scores in values.items()
        for seed, last in enumerate(scores)
    ]
    split = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in cifar_tables.table(rows).splitlines()
        if "|" in line
    ]
    lines = {name: cells for name, *cells in split}
    assert lines["MAS+KD"] == ["73.75 ± 1.06", "73.75 ± 1.06", "+3.25 ± 0.35", "+0.75 ± 0.35", "2", "74.18", ""]
    assert lines["MAG+AT"][3] == "+0.50 ± 0.71"  # over AT+KD, not over AT
    assert lines["AT"][2:4] == ["+0.50 ± 0.71", ""]
    assert lines["KD"][-2:] == ["73.18", "72.98"]


def test_the_table_and_picture_of_step_times(tmp_path: Path) -> None:
    row = {"pair": "cnn", "criterion": "at", "peak_bytes": 3 * 2**20, "kd_peak_bytes": 2**20, "ratio": {"median": 1.5}}
    row["ratio"] = {"median": 1.5, "quartiles": [1.4, 1.6], "n": 5, "steps": 2}  # type: ignore[dict-item]
    rows = [row, {**row, "criterion": "rkd"}, {"pair": "vit", "criterion": "at", "refused": "AT pairs maps"}]
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in steps.table(rows).splitlines()[2:]]
    assert lines == [
        ["at", "1.25", "1.50 (1.40 to 1.60)", "+2", "refused", ""],
        ["rkd", "-", "1.50 (1.40 to 1.60)", "+2", "", ""],
    ]
    steps.draw(rows, tmp_path / "times.png")
    assert (tmp_path / "times.png").stat().st_size > 5000


def test_the_table_of_hosts_pairs_seeds() -> None:
    found = {
        ("at", "X"): (80, 81),
        ("at", "X+KD"): (82, 84),
        ("at", "MAS+X"): (83, 83),
        ("dml", "X"): (80,),
        ("dml", "MAG+X"): (81,),
    }
    rows = [
        {"host": h, "arm": a, "seed": s, "top1": float(v)}
        for (h, a), values in found.items()
        for s, v in enumerate(values)
    ]
    lines = {
        cells[0]: cells[1:]
        for cells in ([c.strip() for c in line.split("|")[1:-1]] for line in each.table(rows).splitlines())
    }
    assert lines["at"] == ["80.50 ± 0.71", "83.00 ± 1.41", "83.00 ± 0.00", "+0.00 ± 1.41"]
    assert lines["dml"] == ["80.00", "", "81.00", "+1.00"]
