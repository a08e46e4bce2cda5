"""A read that never returns, in the midst of an epoch: all ranks end with the process group's timeout, and the stacks
that are printed before show whose read it is."""

import contextlib
import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from forked import Ranks
from small import command, digest, environment, write_pictures

from mgd_timm.storage.checkpoint import load_newest, verify

TIMEOUT = 30.0
"""Seconds: `--process-timeout`."""
LONGEST = 240.0
"""Seconds until the end of a run on a busy machine: the timeout, and the time that a launcher gives ranks to end."""


def flags(data: Path, output: Path, *more: str) -> list[str]:
    words = ["train", "--model", "cifar_resnet8x05", "--data-dir", str(data), "--img-size", "112", "--batch-size", "4"]
    return [
        *words,
        "--seed",
        "3",
        "--checkpoint-interval",
        "2",
        "--checkpoint-hist",
        "1",
        "--process-timeout",
        str(TIMEOUT),
        "--output",
        str(output),
        *more,
    ]


class Dead:
    """A training image whose storage is gone: a pipe in its place, which nobody ever writes to."""

    def __init__(self, data: Path) -> None:
        self.path = next((data / "train").rglob("*.png"))
        self.kept = data / "kept.png"

    def die(self) -> None:
        pipe = self.kept.with_name("pipe")
        os.mkfifo(pipe)
        os.link(self.path, self.kept)
        os.replace(pipe, self.path)

    def come_back(self) -> None:
        os.replace(self.kept, self.path)


def reader(ranks: list[psutil.Process]) -> int:
    """The rank that waits for the pipe, itself or a reader of its."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for rank, process in enumerate(ranks):
            for one in (process, *process.children()):
                with contextlib.suppress(OSError):  # a reader of an epoch that has ended
                    if Path(f"/proc/{one.pid}/wchan").read_text() == "wait_for_partner":
                        return rank
        time.sleep(0.05)
    pytest.fail("nobody reads the pipe")


def begun(checkpoints: Path, fault: Callable[[], str]) -> None:
    """Wait for the checkpoint after the fourth update."""
    deadline = time.monotonic() + 150
    while not any(int(path.name) >= 4 for path in checkpoints.glob("0*")):
        assert time.monotonic() < deadline, fault()
        time.sleep(0.02)


@dataclass(frozen=True)
class Launch:
    """A launch one of whose ranks hangs.

    Args:
        process: The launcher.
        pids: Of the ranks and their readers.
        ended: Gives what it said, and the seconds that it took to end.
        checkpoints: Its folder of them.
    """

    process: subprocess.Popen[str]
    pids: list[int]
    ended: Future[tuple[str, float]]
    checkpoints: Path


@pytest.fixture(scope="module", autouse=True)
def waiting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launch]:
    """It waits while the other tests run."""
    folder = tmp_path_factory.mktemp("launch")
    dead = Dead(write_pictures(folder / "data", count=72))
    words = flags(folder / "data", folder / "run", "--epochs", "1000", "--workers", "1")
    launch = subprocess.Popen(
        command(*words, processes=2), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment()
    )
    begun(folder / "run" / "checkpoints", lambda: str(launch.poll()))
    ranks = [child for child in psutil.Process(launch.pid).children() if "RANK" in child.environ()]
    dead.die()
    reader(ranks)
    began = time.monotonic()
    pids = [one.pid for rank in ranks for one in (rank, *rank.children())]

    def end() -> tuple[str, float]:
        _, errors = launch.communicate(timeout=LONGEST)
        return errors, time.monotonic() - began

    with ThreadPoolExecutor(1) as pool:
        yield Launch(launch, pids, pool.submit(end), folder / "run" / "checkpoints")
    launch.kill()


STACKS = re.compile(r"Timeout \(.*\)!\n(?:Thread .*\n(?:  File .*\n)+\n?)+")
"""What a rank prints before the timeout."""


def reads(stacks: str) -> bool:
    """Whether a rank waits for images; the others wait for it in a collective."""
    return "data/loader.py" in stacks


def hang(words: list[str], folder: Path, processes: int) -> tuple[int, float]:
    """Let a read of a run never return; gives the rank whose read it was, and the seconds to the end."""
    dead = Dead(folder / "data")
    ranks = Ranks(words, folder / "hung", processes=processes)
    begun(folder / "run" / "checkpoints", ranks.said)
    dead.die()
    living = [psutil.Process(rank.pid) for rank in ranks.ranks]
    who = reader(living)
    began = time.monotonic()
    readers = [child for rank in living for child in rank.children()]
    try:
        codes = ranks.wait(LONGEST, grace=2)
    finally:
        for child in readers:  # torchrun's agent ends a rank with all that it started
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
    seconds = time.monotonic() - began
    assert None not in codes, ranks.said()
    assert 0 not in codes
    assert seconds > 0.8 * TIMEOUT
    for rank in range(processes):
        found = STACKS.findall(ranks.said(rank))
        assert [reads(stacks) for stacks in found] == [rank == who], ranks.said(rank)
    dead.come_back()
    return who, seconds


def test_a_read_that_never_returns_ends_the_run_which_resumes(tmp_path: Path, report: Callable[[str], None]) -> None:
    """To the same weights as if nothing had been."""
    data, more = write_pictures(tmp_path / "data"), ["--epochs", "4", "--workers", "0", "--resume"]
    who, seconds = hang(flags(data, tmp_path / "run", *more), tmp_path, 2)
    for name in ("run", "whole"):
        ranks = Ranks(flags(data, tmp_path / name, *more), tmp_path / name, processes=2)
        assert ranks.wait(120) == [0, 0], ranks.said()
        assert ("resumed after update" in ranks.said()) == (name == "run")
    export = Path("export", "model.safetensors")
    assert digest(tmp_path / "run" / export) == digest(tmp_path / "whole" / export)
    report(f"hangs: a read that never returns, of rank {who} of 2: ended after {seconds:.0f} s, resumed")


def test_a_reader_that_hangs_ends_the_run(tmp_path: Path, report: Callable[[str], None]) -> None:
    data = write_pictures(tmp_path / "data", count=72)
    words = flags(data, tmp_path / "run", "--epochs", "100", "--workers", "1")
    who, seconds = hang(words, tmp_path, 3)
    report(f"hangs: a read that never returns, in a reader of rank {who} of 3: ended after {seconds:.0f} s")


def test_a_launch_ends_all(waiting: Launch, report: Callable[[str], None]) -> None:
    errors, seconds = waiting.ended.result()
    assert waiting.process.returncode != 0
    assert sorted(reads(stacks) for stacks in STACKS.findall(errors)) == [False, True], errors
    assert not any(psutil.pid_exists(pid) for pid in waiting.pids)
    for checkpoint in waiting.checkpoints.glob("0*"):
        verify(checkpoint)
    assert load_newest(waiting.checkpoints, pytest.fail) is not None
    report(
        f"hangs: a launch by torchrun, a read in a reader of one of 2: it ended after {seconds:.0f} s, readers and all"
    )
