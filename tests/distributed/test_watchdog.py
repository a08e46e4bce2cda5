"""A rank that is killed or hangs ends the others, who name it; one that is only slow, or has left, ends nobody."""

import contextlib
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from forked import Ranks
from sharded_runs import Noise

from mgd_timm.distributed import watchdog
from mgd_timm.distributed.headway import Steps
from mgd_timm.distributed.watchdog import CODE
from mgd_timm.features import Batch, Features
from mgd_timm.storage.checkpoint import load_newest, verify

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
    words = [
        "train",
        "--model",
        "cifar_resnet8x05",
        "--data-dir",
        str(small_data),
        "--output",
        str(output),
        "--epochs",
        "500",
    ]
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
    assert load_newest(output / "checkpoints", pytest.fail) is not None


def work(case: str) -> int:
    """What the ranks of `test_only_what_is_wrong_is_told` do."""
    from mgd_timm.cli.main import guarded
    from mgd_timm.distributed.collectives import join

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


def compute(seconds: float, idly: bool | None = None) -> None:
    """Keep a processor busy; with `idly` the first one that there is, and if true only where nobody else wants it."""
    if idly is not None:
        os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
    if idly:
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        pass


def into_a_pipe() -> Callable[[float], None]:
    """What this process shows goes to a pipe; gives what fills it, to be read in some seconds: as after Ctrl-S, or in a
    pager."""
    out, into = os.pipe()
    os.dup2(into, 2)

    def fill(seconds: float) -> None:
        os.set_blocking(into, False)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(into, bytes(4096))
        os.set_blocking(into, True)
        threading.Thread(target=read, args=(seconds,), daemon=True).start()

    def read(seconds: float) -> None:
        time.sleep(seconds)
        while os.read(out, 65536):
            pass

    return fill


def step(case: str) -> int:
    """What the ranks of `test_a_hang_is_found_and_named` and `test_who_is_slow_goes_on` do: eight steps, each with a
    collective."""
    from accelerate.utils import gather_object

    from mgd_timm.cli.main import guarded
    from mgd_timm.distributed.collectives import join
    from mgd_timm.teachers.outputs.memory import store_outputs
    from mgd_timm.training.evaluation import evaluate

    accelerator = join()
    rank, steps = accelerator.process_index, Steps("work", "update")
    fill = into_a_pipe() if (case, rank) == ("is not read", 0) else None
    Steps.patience = 60.0 if case == "tries again" else 0.0

    def act(number: int) -> None:
        if (case, rank, number) == ("hangs", 1, 6):
            time.sleep(1000)
        elif (case, rank, number) == ("tries again", 1, 6):
            time.sleep(5)
        elif (case, number) == ("reads on a busy processor", 6):
            reader = multiprocessing.Process(target=compute, args=(5 if rank else 10, rank == 1), daemon=True)
            reader.start()
            if rank:
                reader.join()
        elif (case, rank, number) == ("waits for its reader", 1, 6):
            reader = multiprocessing.Process(target=time.sleep, args=(1000,), daemon=True)
            reader.start()
            print(f"reader {reader.pid}", flush=True)
            reader.join()
        elif (case, rank) == ("pauses", 1) and number > 4:
            time.sleep(2)
        elif (case, rank, number) == ("begins slowly", 1, 1):
            time.sleep(5)
        elif (case, rank) == ("is slow throughout", 1) and number > 1:
            time.sleep(5 if number == 6 else 0.8)
        elif (case, rank, number) == ("computes", 1, 6) or (case, rank, number) == (
            "waits for one that computes",
            2,
            6,
        ):
            compute(5)
        elif (case, rank, number) == ("receives slowly", 1, 6):
            for _ in range(1250):
                time.sleep(0.004)
        elif (case, rank, number) == ("waits for one that computes", 1, 6):
            time.sleep(6)

    def teach(batch: Batch) -> Features:
        seen.append(batch)
        if fill is not None and len(seen) == 5:
            time.sleep(0.2)  # the bar is drawn anew
            fill(5)
        return Features(torch.zeros(len(batch.labels), 10), torch.zeros(len(batch.labels), 2))

    def predict(batch: Batch) -> dict[str, torch.Tensor]:
        if case == "hangs in evaluation" and rank == 0 and len(seen) == 5:
            time.sleep(1000)
        seen.append(batch)
        return {"model": torch.zeros(len(batch.labels), 10)}

    seen: list[Batch] = []

    def action() -> None:
        for number in range(1, 9):
            with steps:
                act(number)
                gather_object([rank])
        if case == "hangs in evaluation":
            evaluate(predict, ("model",), Noise(31, 8), accelerator, 2)  # 8 batches each
        if case == "is not read":
            store_outputs(teach, Noise(31, 8), 1, accelerator, 2)
        if case == "writes alone" and rank == 0:
            time.sleep(5)
        gather_object([rank])

    return guarded("work", action)


HANGS = {"hangs": (1, "update 6 of 'work'"), "hangs in evaluation": (0, "batch 6 of 'evaluation'")}
HANGS["waits for its reader"] = HANGS["hangs"]
SLOW = ["pauses", "begins slowly", "is slow throughout", "computes", "receives slowly", "writes alone"]
SLOW += ["waits for one that computes", "tries again", "is not read"]
if sys.platform == "linux":
    SLOW += ["reads on a busy processor"]


@pytest.fixture(scope="module")
def at_once(tmp_path_factory):
    """The cases side by side: most of their time is spent waiting."""
    folder = tmp_path_factory.mktemp("cases")
    processes = {"waits for one that computes": 3}
    return {
        case: Ranks([case], folder / case, processes=processes.get(case, 2), environment=SHORT, target=target)
        for target, cases in ((work, CASES), (step, (*HANGS, *SLOW)))
        for case in cases
    }


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


@pytest.mark.parametrize("case", HANGS)
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere who sleeps cannot be told from who runs")
def test_a_hang_is_found_and_named(at_once, case):
    """By all, with the place of it; the hung one says how it came there. Its readers end with it."""
    ranks, (who, place) = at_once[case], HANGS[case]
    assert ranks.wait(60) == [CODE, CODE], ranks.said()
    line = rf"{re.escape(__file__)}:\d+ \((act|predict)\)"
    why = rf"hangs in {place} at {line}: for [34] s others have waited for it while it neither computed nor read\."
    for rank in (0, 1):
        said = ranks.said(rank)
        assert re.search(rf"mgd-timm: error: rank {who} \(\S+, pid {ranks.ranks[who].pid}\) {why}", said), said
        assert said.count("mgd-timm: error:") == 1
        assert ("Its main thread is here:" in said) == (rank == who)
        assert ("in action\n" in said) == (rank == who)
        assert "Traceback" not in said
    if "reader" in case:
        pid = int(re.search(r"reader (\d+)", ranks.said(1))[1])
        assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


@pytest.mark.parametrize("case", SLOW)
def test_who_is_slow_goes_on(at_once, case):
    ranks = at_once[case]
    assert set(ranks.wait(60)) == {0}, ranks.said()
    assert {ranks.said(rank) for rank in range(len(ranks.ranks))} == {""}


def unreachable() -> int:
    """The first rank, which waits for a second, does not reach the last one; a run asks for the watch once more."""
    from accelerate import Accelerator

    from mgd_timm.distributed.collectives import leave

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
