"""The command line on one and on two real processes (gloo), and a disk that fills up."""

import json
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small import FAST, call, command, end_at, environment

from mgd_timm.criteria import CRITERIA


def flags(data: Path, output: Path, *more: str) -> list[str]:
    return ["distill", *FAST, "--epochs", "2", "--data-dir", str(data), "--output", str(output), *more]


def history(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def runs(small_data, tmp_path_factory):
    """The same global batch of 64: one process of two steps, and two processes of one."""
    folder = tmp_path_factory.mktemp("processes")
    for processes in (1, 2):
        more = ["--grad-accum-steps", str(2 // processes), "--method", "mas", "--criterion", "at"]
        done = call(*flags(small_data, folder / str(processes), *more), processes=processes)
        assert done.returncode == 0, done.stderr
        assert f"{processes} process" in done.stdout
    return {processes: folder / str(processes) for processes in (1, 2)}


def test_learning_rate_and_losses_do_not_depend_on_the_number_of_processes(runs):
    one, two = history(runs[1]), history(runs[2])
    assert [row["updates"] for row in one] == [row["updates"] for row in two] == [5, 10]
    assert [row["lr"] for row in one] == [row["lr"] for row in two]
    for name in ("task", "kd", "at", "abstract", "detailed", "top1"):
        assert two[0]["train"][name] == pytest.approx(one[0]["train"][name], rel=2e-3), name


def test_every_criterion_at_once_on_two_processes(small_data, tmp_path):
    """Under MAS, after the stages of AB and FT: no parameter is left without a gradient, which DDP would wait for in vain."""
    names = [name for name, kind in CRITERIA.items() if name not in ("ce", "kd", "fsp") and not kind.peers]
    more = ["--criterion", ",".join(names), "--fitting-epochs", "1", "--epochs", "1", "--batch-size", "16", "--img-size", "32"]
    done = call(*flags(small_data, tmp_path / "run", *more), processes=2)
    assert done.returncode == 0, done.stderr
    assert "memory banks 2 x 320 x 128: 0.3 MB" in done.stdout
    terms = set(history(tmp_path / "run")[-1]["train"])
    assert terms == {"task", "kd", "abstract", "detailed", "top1", *(name for name in names if name != "ab")}


def test_evaluation_counts_each_image_once_on_two_processes(runs):
    found = []
    for processes in (1, 2):
        done = call("evaluate", str(runs[1]), processes=processes)
        assert done.returncode == 0, done.stderr
        lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
        assert len(lines) == 1
        found.append(json.loads(lines[0]))
    assert found[0]["n"] == found[1]["n"] == 100
    assert found[0] == pytest.approx(found[1])
    assert found[0]["top1"] == json.loads((runs[1] / "summary.json").read_text())["top1"]


def test_the_headline_of_two_processes_is_the_accuracy_of_what_they_export(runs, small_data):
    """Each process has BatchNorm statistics of its own: those that were evaluated must be those that are exported."""
    done = call("evaluate", str(runs[2]))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.strip().splitlines()[-1])
    last = json.loads((runs[2] / "summary.json").read_text())["last"]
    assert found["loss"] == pytest.approx(last["loss"], rel=1e-5)
    assert found["top1"] == last["top1"]


def test_ctrl_c_on_two_processes_saves_the_state_and_another_number_of_processes_is_refused(small_data, tmp_path):
    output = tmp_path / "run"
    more = flags(small_data, output, "--method", "none", "--checkpoint-interval", "2", "--epochs", "40")
    code, errors = end_at(4, output / "checkpoints", signal.SIGINT, *more, processes=2, group=True)
    assert code != 0
    assert "its state is saved, --resume continues it" in errors
    done = call(*more, "--resume")
    assert done.returncode == 1
    assert "processes: 2 -> 1" in done.stderr
    done = call(*more, "--resume", processes=2)
    assert done.returncode == 0, done.stderr
    assert "resumed after update" in done.stdout


def test_a_full_disk_ends_both_processes_at_once(small_data, tmp_path):
    output = tmp_path / "run"
    call("train", "--model", "cifar_resnet8x05", "--epochs", "1", "--data-dir", str(small_data), "--output", str(tmp_path / "warm"))
    more = flags(small_data, output, "--method", "none")
    started = time.monotonic()
    done = subprocess.run(
        command(*more, processes=2),
        capture_output=True,
        text=True,
        timeout=120,
        env=environment(),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000)),
        check=False,
    )
    assert done.returncode != 0
    assert done.stderr.count("no room to write") >= 2  # each process says it, none waits for the other
    assert time.monotonic() - started < 90


def test_accelerate_launch_runs_the_module(small_data, tmp_path):
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "-m", "mgd_timm"]
    flags_here = [
        "train",
        "--model",
        "cifar_resnet8x05",
        "--epochs",
        "1",
        "--data-dir",
        str(small_data),
        "--output",
        str(tmp_path / "run"),
    ]
    done = subprocess.run([*launch, *flags_here], capture_output=True, text=True, timeout=180, env=environment(), check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "export" / "model.safetensors").is_file()
    # Without mpirun it starts one process where two were asked for, and says nothing: we do.
    started = int(re.search(r"(\d) process", done.stdout)[1])
    assert started == 2 or "warning: 2 processes were asked for and 1 run" in done.stdout


def test_a_full_disk_leaves_whole_checkpoints_and_a_clear_error(small_data, tmp_path):
    output = tmp_path / "run"
    more = flags(small_data, output, "--method", "none", "--checkpoint-interval", "2")

    def limit() -> None:  # a real refusal by the system: no file may grow past 40 kB (the weights need 80 kB)
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))

    call("train", "--model", "cifar_resnet8x05", "--epochs", "1", "--data-dir", str(small_data), "--output", str(tmp_path / "warm"))
    done = subprocess.run(
        command(*more),
        capture_output=True,
        text=True,
        timeout=180,
        env=environment(),
        preexec_fn=limit,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert "no room to write" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (output / "export").exists()
    assert [path.name for path in output.rglob(".writing-*")] == []
    done = call(*more, "--resume")
    assert done.returncode == 0, done.stderr
    assert (output / "export" / "model.safetensors").is_file()
