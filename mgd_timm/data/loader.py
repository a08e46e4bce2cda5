"""Reader processes that are forked while another thread is at rest.

Python before 3.13 copies its list of threads' lock into a forked process as it is. A thread that holds it at that
moment (as one of gloo's may, that gives back the last reference to a tensor just after a collective) is not in the new
process, which then waits for ever. From 3.13 on Python takes the lock itself before it forks.
"""

import os
import sys
import threading
import time
from pathlib import Path

_TASKS = Path("/proc/self/task")
REST = 0.05
"""Seconds, at most, that a fork waits for: a thread that computes for longer is not about to let go of anything."""


def wait_for_rest(seconds: float = REST) -> bool:
    """Wait until no other thread of this process runs, for so many seconds at most; gives whether none does (Linux)."""
    own, deadline = str(threading.get_native_id()), time.monotonic() + seconds
    while any(_runs(task) for task in os.listdir(_TASKS) if task != own):
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.0002)  # which lets a thread go on that waits for the interpreter
    return True


def _runs(task: str) -> bool:
    try:
        line = (_TASKS / task / "stat").read_bytes()
    except OSError:  # it has ended
        return False
    return line[line.rindex(b")") + 2 :].startswith(b"R")


if sys.version_info < (3, 13) and _TASKS.is_dir():
    os.register_at_fork(before=wait_for_rest)
