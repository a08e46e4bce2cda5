"""A rank that is killed or hangs ends the others, who name it; one that is only slow, or has left, ends nobody."""

import os
import re
import signal
import time
from pathlib import Path

import pytest
import torch
from forked import Ranks

from mgd_timm import watchdog
from mgd_timm.checkpoint import newest, verify
from mgd_timm.watchdog import CODE

SHORT = {"MGD_TIMM_SILENCE": "3"}


def started(words: list[str], output: Path, log: Path) -> Ranks:
    """Two ranks that have saved a checkpoint."""
    ranks, deadline = Ranks(words, log, processes=2, environment=SHORT), time.monotonic() + 120
    while not list((output / "checkpoints").glob("0*")):
        assert ranks.alive(), ranks.said()
        assert time.monotonic() < deadline, ranks.said()
        time.sleep(0.02)
    return ranks


@pytest.mark.parametrize(("kind", "who"), [(signal.SIGSTOP, 1), (signal.SIGKILL, 0)])
def test_a_hung_or_killed_rank_ends_the_other_one_which_names_it(small_data, tmp_path, kind, who):
    output = tmp_path / "run"
    words = ["train", "--model", "cifar_resnet8x05", "--data-dir", str(small_data), "--output", str(output), "--epochs", "500"]
    ranks = started([*words, "--batch-size", "32", "--checkpoint-interval", "2"], output, tmp_path / "log")
    pid = ranks.ranks[who].pid
    ranks.signal(kind, who)
    codes = ranks.wait(60)
    assert codes[1 - who] == CODE, ranks.said(1 - who)
    assert codes[who] == -signal.SIGKILL  # a hung one beside it is ended as well
    said = ranks.said(1 - who)
    why = "has given no sign of life for 3 s" if kind == signal.SIGSTOP else "is gone"
    assert re.search(rf"mgd-timm: error: rank {who} \(\S+, pid {pid}\) {why}.*start again with --resume\.", said), said
    assert said.count("mgd-timm: error:") == 1
    assert "Traceback" not in said
    for checkpoint in (output / "checkpoints").glob("0*"):
        verify(checkpoint)
    assert newest(output / "checkpoints", pytest.fail) is not None


def work(case: str) -> int:
    """What the ranks of `test_only_what_is_wrong_is_told` do."""
    from mgd_timm.cli import guarded
    from mgd_timm.processes import join

    def action() -> None:
        accelerator = join()
        if case == "slow":
            if accelerator.is_main_process:
                time.sleep(6)  # twice the limit
            accelerator.wait_for_everyone()
        elif case == "fails" and not accelerator.is_main_process:
            raise ValueError("a file of this rank alone")
        elif case == "breaks" and not accelerator.is_main_process:
            raise RuntimeError("a fault of this rank alone")
        elif case == "loses a reader" and not accelerator.is_main_process:
            read = iter(torch.utils.data.DataLoader(range(1000), num_workers=1, multiprocessing_context="fork"))
            os.kill(read._workers[0].pid, signal.SIGKILL)
            list(read)
        else:
            print("joined", flush=True)
            accelerator.wait_for_everyone()
            time.sleep(2)
            accelerator.wait_for_everyone()

    return guarded("work", action)


CASES = ["slow", "fails", "breaks", "loses a reader"]


@pytest.fixture(scope="module")
def at_once(tmp_path_factory):
    """The cases side by side: most of their time is spent waiting."""
    folder = tmp_path_factory.mktemp("cases")
    return {case: Ranks([case], folder / case, processes=2, environment=SHORT, target=work) for case in CASES}


@pytest.mark.parametrize("case", CASES)
def test_only_what_is_wrong_is_told(at_once, case):
    ranks = at_once[case]
    codes = ranks.wait(60)
    if case == "slow":
        assert codes == [0, 0]
        assert [ranks.said(0), ranks.said(1)] == ["", ""]
    else:
        assert codes == [CODE, 1], ranks.said()
        said = {"fails": "ValueError: a file of this rank alone", "breaks": "RuntimeError: a fault of this rank alone"}
        why = said.get(case, "a reader of images was ended from outside")
        which = r" \(DataLoader worker .*\)" if case == "loses a reader" else ""
        assert re.search(rf"error: rank 1 \(\S+, pid \d+\) failed: {why}{which}\.", ranks.said())
        assert why.rpartition(": ")[2] in ranks.said(1)
        assert "Traceback" not in ranks.said(0)
        assert ("Traceback" in ranks.said(1)) == (case == "breaks")


def unreachable() -> int:
    """The first rank, which waits for a second, does not reach the last one; a run asks for the watch once more."""
    from accelerate import Accelerator

    from mgd_timm.processes import leave

    accelerator = Accelerator()
    watchdog._CONNECT = 1.0
    if accelerator.process_index == 2:
        watchdog._connect = lambda *_: {}
    for _ in range(2):
        watchdog.start(accelerator)
        accelerator.wait_for_everyone()
    leave()
    return 0


def test_a_rank_that_is_out_of_reach_goes_along_unwatched(tmp_path):
    ranks = Ranks([], tmp_path / "log", processes=3, environment=SHORT, target=unreachable)
    assert ranks.wait(60) == [0, 0, 0], ranks.said()
    assert ranks.said(0).count("warning: rank 2 does not reach 127.0.0.1:") == 1
    assert [ranks.said(1), ranks.said(2)] == ["", ""]


def test_ranks_that_all_stood_still_go_on(tmp_path):
    """As after Ctrl-Z and fg: nobody was silent while the others lived."""
    ranks = Ranks(["stood still"], tmp_path / "log", processes=2, environment=SHORT, target=work)
    deadline = time.monotonic() + 60
    while "joined" not in ranks.said(0) + ranks.said(1) and time.monotonic() < deadline:
        time.sleep(0.02)
    ranks.signal(signal.SIGSTOP)
    time.sleep(5)
    ranks.signal(signal.SIGCONT)
    assert ranks.wait(60) == [0, 0], ranks.said()
    assert "error" not in ranks.said(0) + ranks.said(1)


@pytest.mark.parametrize("text", ["soon", "-1", "0.5", "inf", "nan"])
def test_a_limit_that_is_none_is_refused(monkeypatch, text):
    monkeypatch.setenv("MGD_TIMM_SILENCE", text)
    with pytest.raises(ValueError, match=f"MGD_TIMM_SILENCE='{text}': expected seconds of silence, 1 or more, or 0"):
        watchdog._limit()


def test_one_process_alone_is_not_watched():
    from accelerate import Accelerator

    watchdog.start(Accelerator(cpu=True))
    assert watchdog._running is None
