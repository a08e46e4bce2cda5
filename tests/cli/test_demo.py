"""`mgd-timm demo`, as the first command that a user calls."""

import re
import subprocess
import sys

import pytest
from small import refuse

from mgd_timm.cli import demo_runs
from mgd_timm.models.load import load_model
from mgd_timm.pipeline.run import Result
from mgd_timm.recipe.recipe import make_recipe


def test_what_cannot_be_done_is_refused_before_anything_is_loaded(mgd, tmp_path):
    (tmp_path / "there").mkdir()
    refuse(mgd, ["--output there exists: choose another folder"], "demo", "--output", "there")
    refuse(mgd, ["--epochs 0: expected 1 or more"], "demo", "--epochs", "0")
    refuse(mgd, ["--epochs 3 with --quick"], "demo", "--epochs", "3", "--quick")
    assert list(tmp_path.iterdir()) == [tmp_path / "there"]


@pytest.mark.slow
def test_the_quick_demo_compares_four_students_and_prints_how_to_load_the_best(mgd, tmp_path, monkeypatch, small_data):
    """On the small data; the embedded ones are 30 times as many."""
    monkeypatch.setitem(demo_runs.BUDGET, "data_dir", str(small_data))
    code, out, errors = mgd("demo", "--quick", "--output", "demo")
    assert code == 0, errors
    rows = [line.strip("| ").split("|") for line in out.splitlines() if line.startswith("|")]
    assert [row[0].strip() for row in rows[2:]] == ["teacher (ResNet-20)", *demo_runs.ARMS]
    student, teacher = rows[3], rows[2]
    assert int(student[2].replace(",", "")) < int(teacher[2].replace(",", ""))
    assert float(student[3].split()[0]) < float(teacher[3].split()[0])
    for number, arm in enumerate(demo_runs.ARMS, 1):
        assert f"== {number} of 4: {arm}, seed 0" in out
        assert (tmp_path / "demo" / f"{arm.lower().replace('+', '_')}_0" / "summary.json").is_file()
    best = re.search(r"best student \((.+)\): demo/student, top-1 ([\d.]+) %", out)
    assert float(best[2]) == max(float(row[1]) for row in rows[3:])
    script = "\n".join(line.strip() for line in out.splitlines() if line.startswith("    "))
    assert "timm.create_model('local-dir:demo/student', pretrained=True)" in script
    script += "\nassert model.num_classes == 10"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path, timeout=120)


def test_the_best_student_is_evaluated_again_as_timm_loads_it(tmp_path, trained, small_data):
    """An export that is not what was trained is no success."""
    recipe = make_recipe(data_dir=str(small_data), output=str(trained))
    student = demo_runs.Student("KD", recipe, Result(load_model(str(trained)), {"top1": 101.0}))
    with pytest.raises(RuntimeError, match=r"student: top-1 .* when loaded with timm, and 101.0 % when it was trained"):
        demo_runs.export_best([student], tmp_path)
