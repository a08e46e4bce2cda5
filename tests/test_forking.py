"""A fork waits for threads that are about to come to rest, and not for one that computes on."""

import hashlib
import subprocess
import sys
import threading

import pytest

from mgd_timm.forking import wait_for_rest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a thread's state is not read")


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


def test_a_thread_that_comes_to_rest_is_waited_for():
    thread = hashing(20)
    assert wait_for_rest(30)
    assert not thread.is_alive()


def test_a_thread_that_computes_on_is_not():
    thread = hashing(400)
    assert not wait_for_rest(0.01)
    assert thread.is_alive()
    thread.join()


@pytest.mark.slow
@pytest.mark.skipif(sys.version_info >= (3, 13), reason="Python's own fork is safe")
def test_every_fork_of_a_process_that_reads_images_waits():
    code = (
        "import mgd_timm.sources, os, threading\n"
        "from mgd_timm import forking\n"
        "looked_at, runs = [], forking._runs\n"
        "forking._runs = lambda task: looked_at.append(task) or runs(task)\n"
        "thread = threading.Thread(target=threading.Event().wait, daemon=True)\n"
        "thread.start()\n"
        "pid = os.fork()\n"
        "if not pid: os._exit(0)\n"
        "print(str(thread.native_id) in looked_at, os.waitpid(pid, 0)[1])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "0"]
