"""Workers live for a run and outlive signals, and a fork waits for threads that are about to become idle."""

import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from image_files import read

from mgd_timm.data.decode import DataError
from mgd_timm.data.loader import ReadAhead, wait_for_idle_threads
from mgd_timm.data.sources import LargeImageSource, _LargeImages

CPU = torch.device("cpu")


def test_workers_outlive_signals_to_the_process_group(large: Path) -> None:
    source = read(large, img_size=32, workers=2).train
    batches = source.batches(list(source.ids.split(1)), 0, torch.device("cpu"))
    found = [next(batches)]
    own = psutil.Process()
    workers = [
        child for child in own.children() if child.cmdline() == own.cmdline()
    ]  # not what another test's processes need
    assert len(workers) == 2
    for kind in (signal.SIGINT, signal.SIGTERM, signal.SIGTERM):
        for worker in workers:
            subprocess.run(["kill", f"-{kind.value}", str(worker.pid)], check=True)
        time.sleep(0.2)
    found += batches
    assert len(found) == 8
    del source, batches
    _, alive = psutil.wait_procs(workers, timeout=10)
    assert not alive


class Numbers:
    """Items that say which process read them. Key 13 cannot be read, and at key 99 the worker is killed."""

    def __getitem__(self, key: int) -> tuple[int, int]:
        if key == 13:
            raise DataError("image 13: corrupt.")
        if key == 99:
            os.kill(os.getpid(), signal.SIGKILL)
        return key, os.getpid()


def taken(batches: Iterator[list[torch.Tensor]]) -> tuple[list[list[int]], set[int]]:
    """Keys of each batch, and the processes that read them."""
    found = [(keys.tolist(), pids.tolist()) for keys, pids in batches]
    return [keys for keys, _ in found], {pid for _, pids in found for pid in pids}


KEYS = [[1, 2], [3], [4, 5], [6], [7, 8], [9]]


def test_workers_live_from_epoch_to_epoch() -> None:
    reader = ReadAhead(Numbers(), 2)
    keys, pids = taken(reader.batches(KEYS, CPU))
    assert keys == KEYS
    assert len(pids) == 2
    assert os.getpid() not in pids
    assert taken(reader.batches(KEYS[::-1], CPU)) == (KEYS[::-1], pids)
    stopped = reader.batches(KEYS, CPU)  # an epoch that is left early
    assert next(stopped)[0].tolist() == [1, 2]
    del stopped
    assert taken(reader.batches(KEYS[2:], CPU)) == (KEYS[2:], pids)
    with pytest.raises(DataError, match=r"^image 13: corrupt\. A hint\.$"):
        list(reader.batches([[1], [13], [2]], CPU, hint="A hint."))
    assert taken(reader.batches(KEYS, CPU)) == (KEYS, pids)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_may_be_taken_from_several_iterators_in_turn(workers: int) -> None:
    reader = ReadAhead(Numbers(), workers)
    first, second = reader.batches(KEYS, CPU), reader.batches(KEYS[::-1], CPU)
    pairs = [(one[0].tolist(), two[0].tolist()) for one, two in zip(first, second, strict=True)]
    assert pairs == list(zip(KEYS, KEYS[::-1], strict=True))
    assert taken(reader.batches(KEYS, CPU))[0] == KEYS


@pytest.mark.slow
def test_after_a_killed_worker_new_ones_start() -> None:
    reader = ReadAhead(Numbers(), 1)
    _, pids = taken(reader.batches(KEYS, CPU))
    with pytest.raises(RuntimeError, match="DataLoader worker"):
        list(reader.batches([[1], [99], [2]], CPU))
    keys, others = taken(reader.batches(KEYS, CPU))
    assert keys == KEYS
    assert pids.isdisjoint(others)


def test_workers_send_bytes(large: Path) -> None:
    source = read(large, img_size=32, workers=0, reprob=1.0).train
    assert isinstance(source, LargeImageSource)
    keys = [[(0, row) for row in (4, 1)]]
    (pixels,) = ReadAhead(_LargeImages(source.rows, 3, source.transform, 0), 2).batches(keys, CPU)
    assert (pixels.dtype, pixels.shape) == (torch.uint8, (2, 3, 32, 32))


@pytest.mark.slow
def test_workers_do_not_hold_up_the_exit(large: Path) -> None:
    script = f"""
import torch
from mgd_timm.data.dataset import load_images
from mgd_timm.recipe.data import Data
source = load_images(Data(data_dir={str(large)!r}, img_size=32, workers=2), 0).train
batches = source.batches(list(source.ids.split(1)), 0, torch.device("cpu"))
print(len(next(batches).labels))
held = [batches]
held.append(held)
del batches
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=300)
    assert (done.returncode, done.stdout.split()[-1]) == (0, "1"), done.stderr


linux = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a thread's state is not read")


def hashing(megabytes: int) -> threading.Thread:
    """A thread that computes without the interpreter's lock."""
    content = bytes(megabytes << 20)
    started = threading.Event()

    def work() -> None:
        started.set()
        hashlib.sha256(content).digest()

    thread = threading.Thread(target=work)
    thread.start()
    started.wait()
    return thread


@linux
def test_a_thread_that_becomes_idle_is_waited_for():
    thread = hashing(20)
    assert wait_for_idle_threads(30)
    assert not thread.is_alive()


@linux
def test_a_thread_that_computes_on_is_not():
    thread = hashing(400)
    assert not wait_for_idle_threads(0.01)
    assert thread.is_alive()
    thread.join()


@linux
@pytest.mark.skipif(sys.version_info >= (3, 13), reason="Python's own fork is safe")
def test_every_fork_of_a_process_that_reads_images_waits():
    code = (
        "import mgd_timm.data.sources, os, threading\n"
        "from mgd_timm.data import loader\n"
        "looked_at, runs = [], loader._is_running\n"
        "loader._is_running = lambda thread: looked_at.append(thread) or runs(thread)\n"
        "thread = threading.Thread(target=threading.Event().wait, daemon=True)\n"
        "thread.start()\n"
        "pid = os.fork()\n"
        "if not pid: os._exit(0)\n"
        "print(str(thread.native_id) in looked_at, os.waitpid(pid, 0)[1])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "0"]
