"""A read that never returns, in the midst of an epoch: all end within a minute, and the rank whose read it is is
named."""

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

from mgd_timm.distributed.watchdog import CODE
from mgd_timm.storage.checkpoint import load_newest, verify


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
                if Path(f"/proc/{one.pid}/wchan").read_text() == "wait_for_partner":
                    return rank
        time.sleep(0.05)
    pytest.fail("nobody reads the pipe")


def begun(checkpoints: Path, fault: Callable[[], str]) -> None:
    """Wait for the checkpoint after the fourth update: from there on, hangs are noticed."""
    deadline = time.monotonic() + 150
    while not any(int(path.name) >= 4 for path in checkpoints.glob("0*")):
        assert time.monotonic() < deadline, fault()
        time.sleep(0.02)


@dataclass(frozen=True)
class Launch:
    """A launch one of whose ranks hangs.

    Args:
        process: The launcher.
        pids: Of the ranks.
        who: Which one hangs.
        ended: Gives what it said, and the seconds that it took to end.
        checkpoints: Its folder of them.
    """

    process: subprocess.Popen[str]
    pids: list[int]
    who: int
    ended: Future[tuple[str, float]]
    checkpoints: Path


@pytest.fixture(scope="module", autouse=True)
def waiting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launch]:
    """With the limit as it is by default; it waits while the other tests run."""
    folder = tmp_path_factory.mktemp("launch")
    dead = Dead(write_pictures(folder / "data", count=24))
    words = flags(folder / "data", folder / "run", "--epochs", "1000")
    free = {name: value for name, value in environment().items() if name != "MGD_TIMM_SILENCE"}
    launch = subprocess.Popen(
        command(*words, processes=2), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=free
    )
    begun(folder / "run" / "checkpoints", lambda: str(launch.poll()))
    ranks = [child for child in psutil.Process(launch.pid).children() if "RANK" in child.environ()]
    ranks.sort(key=lambda child: int(child.environ()["RANK"]))
    dead.die()
    who = reader(ranks)
    began = time.monotonic()

    def end() -> tuple[str, float]:
        _, errors = launch.communicate(timeout=120)
        return errors, time.monotonic() - began

    with ThreadPoolExecutor(1) as pool:
        yield Launch(launch, [rank.pid for rank in ranks], who, pool.submit(end), folder / "run" / "checkpoints")
    launch.kill()


def hang(words: list[str], folder: Path, processes: int) -> tuple[int, float]:
    """Let a read of a run never return; gives the rank whose read it was, as it was named, and the seconds to the
    end."""
    dead = Dead(folder / "data")
    ranks = Ranks(words, folder / "hung", processes=processes, environment={"MGD_TIMM_SILENCE": "5"})
    begun(folder / "run" / "checkpoints", ranks.said)
    dead.die()
    living = [psutil.Process(rank.pid) for rank in ranks.ranks]
    who = reader(living)
    began = time.monotonic()
    readers = [child for rank in living for child in rank.children()]
    codes = ranks.wait(60)
    seconds = time.monotonic() - began
    assert codes == [CODE] * processes, ranks.said()
    deadline = time.monotonic() + 10
    while any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in readers):
        assert time.monotonic() < deadline, readers
        time.sleep(0.05)
    named = (
        rf"error: rank {who} \(\S+, pid {ranks.ranks[who].pid}\) hangs in update \d+ of 'train' at \S+:\d+ \(\w+\): "
    )
    for rank in range(processes):
        assert re.search(named, ranks.said(rank)), ranks.said(rank)
        assert ("in batches\n" in ranks.said(rank)) == (rank == who), ranks.said(rank)  # of the calls that it is in
        assert "Traceback" not in ranks.said(rank)
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
    report(f"hangs: a read that never returns, of rank {who} of 2: ended after {seconds:.0f} s, named, resumed")


def test_a_reader_that_hangs_ends_the_run(tmp_path: Path, report: Callable[[str], None]) -> None:
    data = write_pictures(tmp_path / "data", count=72)
    words = flags(data, tmp_path / "run", "--epochs", "100", "--workers", "1")
    who, seconds = hang(words, tmp_path, 3)
    report(f"hangs: a read that never returns, in a reader of rank {who} of 3: ended after {seconds:.0f} s, and named")


def test_a_launch_ends_within_a_minute(waiting: Launch, report: Callable[[str], None]) -> None:
    errors, seconds = waiting.ended.result()
    who = waiting.who
    assert waiting.process.returncode != 0
    named = rf"mgd-timm: error: rank {who} \(\S+, pid {waiting.pids[who]}\) hangs in update \d+ of 'train' at "
    assert re.search(named, errors), errors
    assert seconds < 60, errors
    assert not any(psutil.pid_exists(pid) for pid in waiting.pids)
    for checkpoint in waiting.checkpoints.glob("0*"):
        verify(checkpoint)
    assert load_newest(waiting.checkpoints, pytest.fail) is not None
    report(
        f"hangs: a launch with the limit as it is, a read of rank {who} of 2: it ended after {seconds:.0f} s, and "
        "named it"
    )
