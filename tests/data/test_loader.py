"""Workers outlive signals, and a fork waits for threads that are about to become idle."""

import hashlib
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch
from image_files import read

from mgd_timm.data.loader import wait_for_idle_threads


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
