"""What is shown: tables, pictures, and pages that say what was measured."""

import json
import subprocess
import sys
from pathlib import Path

from PIL import Image
from report import (
    append_rows,
    draw_curves,
    gains,
    has_row,
    machine,
    markdown,
    ratio,
    read_rows,
    spread,
    time_in_turn,
)

ROOT = Path(__file__).parents[2]


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


def test_a_row_that_was_cut_off_is_left_out(tmp_path):
    path = tmp_path / "rows.jsonl"
    assert read_rows(path) == []
    append_rows(path, [{"arm": "KD", "seed": 0}])
    with path.open("a") as file:
        file.write('{"arm": "KD", "se')
    append_rows(path, [{"arm": "KD", "seed": 1}])
    assert read_rows(path) == [{"arm": "KD", "seed": 0}, {"arm": "KD", "seed": 1}]
    assert has_row(path, {"seed": 1})
    assert not has_row(path, {"arm": "AT", "seed": 1})


def test_gains_are_of_the_same_seed():
    assert gains({0: 3.0, 1: 5.0, 2: 9.0}, {1: 4.0, 0: 1.0}) == [2.0, 1.0]
    assert (spread([]), spread([2.0], "+"), spread([1.0, 3.0])) == ("", "+2.00", "2.00 ± 1.41")


def test_loops_are_timed_in_turn_and_compared_turn_by_turn():
    order = []
    times = time_in_turn({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=3, steps=2)
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert {name: len(found) for name, found in times.items()} == {"a": 3, "b": 3}
    assert ratio([2.0, 6.0, 12.0], [1.0, 2.0, 3.0]) == {"median": 3.0, "quartiles": [2.0, 4.0], "n": 3}


def test_machine_names_what_a_number_ran_on():
    assert {"cpu", "cores", "memory_gib", "gpu", "system"} == set(machine())


def test_the_tables_of_pages_are_those_of_the_results():
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "readme.py", "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
