"""Killed and stopped ranks under a real launcher, and a loader's worker that is killed: all end, and the cause is named
where it can be known."""

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from forked import Ranks
from small import command, environment, write_pictures

from mgd_timm.storage.checkpoint import load_newest, verify


def launched(words: list[str], processes: int, checkpoints: Path) -> tuple[subprocess.Popen[str], list[psutil.Process]]:
    """A launch that has saved a checkpoint, and its ranks."""
    launch = subprocess.Popen(
        command(*words, processes=processes),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    deadline = time.monotonic() + 150
    while not list(checkpoints.glob("0*")):
        assert launch.poll() is None, launch.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    children = psutil.Process(launch.pid).children()
    return launch, sorted(
        (child for child in children if "RANK" in child.environ()), key=lambda c: int(c.environ()["RANK"])
    )


@pytest.mark.parametrize(("processes", "who", "kind"), [(2, 1, signal.SIGSTOP), (3, 1, signal.SIGKILL)])
def test_a_launch_ends(
    tiny_flags: list[str],
    tmp_path: Path,
    report: Callable[[str], None],
    processes: int,
    who: int,
    kind: signal.Signals,
) -> None:
    """torchrun's agent names a rank that was killed, and ends the others; a stopped one ends with the timeout."""
    words = [*tiny_flags, "--epochs", "1000", "--process-timeout", "30", "--output", str(tmp_path / "run")]
    launch, ranks = launched(words, processes, tmp_path / "run" / "checkpoints")
    began = time.monotonic()
    ranks[who].send_signal(kind)
    _, errors = launch.communicate(timeout=240)
    seconds = time.monotonic() - began
    assert launch.returncode != 0
    if kind == signal.SIGKILL:
        assert re.search(rf"exitcode\s*: -9 \(pid: {ranks[who].pid}\)", errors), errors
    else:
        assert errors.count("Timeout (0:00:2") == processes - 1, errors  # who stands still prints no stacks
        assert "If another process was killed or hangs, this error only follows from it" in errors
    assert not any(rank.is_running() for rank in ranks)
    for checkpoint in (tmp_path / "run" / "checkpoints").glob("0*"):
        verify(checkpoint)
    assert load_newest(tmp_path / "run" / "checkpoints", pytest.fail) is not None
    report(f"ranks: {kind.name} of rank {who} of {processes}: the launch ended after {seconds:.0f} s")


@pytest.mark.parametrize("processes", [1, 2])
def test_a_killed_worker_ends_the_run(tmp_path: Path, report: Callable[[str], None], processes: int) -> None:
    data = write_pictures(tmp_path / "data", count=480)  # the readers live as long as an epoch
    words = ["train", "--model", "cifar_resnet8x05", "--data-dir", str(data), "--img-size", "112", "--batch-size", "4"]
    words += ["--epochs", "1000", "--workers", "2", "--checkpoint-interval", "2", "--output", str(tmp_path / "run")]
    ranks = Ranks(words, tmp_path / "log", processes=processes)
    deadline, worker = time.monotonic() + 150, None
    while worker is None:
        assert ranks.alive(), ranks.said()
        assert time.monotonic() < deadline
        time.sleep(0.05)
        if list((tmp_path / "run" / "checkpoints").glob("0*")):
            children = psutil.Process(ranks.ranks[-1].pid).children()
            worker = next((child for child in children if "resource_tracker" not in " ".join(child.cmdline())), None)
    began = time.monotonic()
    os.kill(worker.pid, signal.SIGKILL)
    codes = ranks.wait(120, grace=2)
    assert None not in codes, "a process waited on"
    assert 0 not in codes
    said = ranks.said(processes - 1)
    assert re.search(rf"worker.*\b{worker.pid}\b", said, re.IGNORECASE), said
    report(f"worker: killed on one of {processes}: all ended after {time.monotonic() - began:.0f} s, and named it")
