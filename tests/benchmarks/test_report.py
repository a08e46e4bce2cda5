"""What is shown: costs, tables, pictures, and pages that say what was measured."""

import json
import subprocess
import sys
from pathlib import Path

import timm
from PIL import Image
from report import draw_curves, machine, macs, markdown

ROOT = Path(__file__).parents[2]


def test_macs_agree_with_the_published_ones():
    import mgd_timm.models  # noqa: F401  # registers cifar_*

    assert round(macs(timm.create_model("resnet18"), (3, 224, 224)) / 1e9, 2) == 1.81
    assert round(macs(timm.create_model("cifar_resnet8x4"), (3, 32, 32)) / 1e9, 3) == 0.177
    assert round(macs(timm.create_model("cifar_resnet32x4"), (3, 32, 32)) / 1e9, 3) == 1.083


def test_tables_are_padded():
    assert markdown(["a", "bb"], [["xyz", "1"]]) == "| a   | bb |\n| --- | -: |\n| xyz |  1 |"


def test_curves_are_drawn_from_metrics(tmp_path):
    for seed in range(2):
        folder = tmp_path / str(seed)
        folder.mkdir()
        rows = [{"eval": {"top1": 50 + e + seed}, "train": {"top1": 60 + e}} for e in range(5)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    draw_curves(
        {"KD": [tmp_path / "0", tmp_path / "1"]}, tmp_path / "out" / "curves.png", title="t", level=("teacher", 60.0)
    )
    with Image.open(tmp_path / "out" / "curves.png") as picture:
        assert picture.size > (1000, 400)
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 20


def test_machine_names_what_a_number_ran_on():
    assert {"cpu", "cores", "memory_gib", "gpu", "system"} == set(machine())


def test_the_tables_of_pages_are_those_of_the_results():
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "readme.py", "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
