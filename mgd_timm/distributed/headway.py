"""How far a process is in a loop, and whether it does anything there: what its watchdog tells the first process.

A process that others wait for has begun fewer collectives than they have; torch counts them, so that nothing is counted
on the way but steps. Whether it hangs is a guess, and one that must not be wrong: it is made in loops alone, whose
first steps (compilation, cold disks) are left out, and only of a process that has not moved, computed or read for
longer than ten of the steps before, nor wanted to: its readers may get next to nothing of a busy processor.
"""

import contextlib
import os
import sys
import sysconfig
import threading
import time
import traceback
from types import FrameType
from typing import Any, NamedTuple

import psutil
import torch

if sys.platform == "linux":
    import resource

FIRST = 3
"""Steps of a stage that are not watched; all but the very first of them tell how long a step takes."""
SLACK = 10
"""A step may take so many times as long as the longest one before it, whatever the limit is."""
SHARE = 0.01
"""Of a processor: who uses less does not compute. Threads of libraries use a thousandth; who lacks processors waits for
one."""
WAKES = 150
"""Of a process in a second: who is woken so often receives something, be it from a slow network. A polling lock wakes
100 times."""


class Steps:
    """The steps of a stage, each of which `with` surrounds; made by all processes together, before a first collective
    of them.

    Outside of steps (checkpoints, what one process writes or shows while the others wait) nothing is watched.

    Args:
        stage: What messages call it.
        unit: What they call a step.
        done: Steps done in an earlier process.
    """

    made = 0
    current: "Steps | None" = None
    patience = 0.0
    """Seconds that any step may take as well: for which a library tries again, and sleeps between."""

    def __init__(self, stage: str, unit: str = "batch", done: int = 0) -> None:
        Steps.made += 1
        self.serial, self.stage, self.unit, self.number, self.first = Steps.made, stage, unit, done, done + 1
        self.base = _collectives()
        self.thread = threading.get_ident()
        self.inside, self.longest = False, 0.0
        Steps.current = self  # also where this process has none of them

    def __enter__(self) -> None:
        self.number += 1
        self.inside = True
        Steps.current = self

    def __exit__(self, *_: object) -> None:
        self.inside = False


class Place(NamedTuple):
    """Where a process is.

    Args:
        serial: Of its `Steps`; the same on all processes in the same stage, 0 before the first.
        collectives: Begun since that was made.
        step: Which one, for the user.
        idle: Whether it is in a step that is watched, has not moved, and did nothing since it was last looked at.
        allowed: Seconds that such a step may take.
        where: Of an idle one, the line that its main thread is at.
    """

    serial: int
    collectives: int
    step: str
    idle: bool
    allowed: float
    where: str


class Headway:
    """Looks at this process's steps now and then, from a thread of its own.

    Args:
        limit: Seconds that any step may take.
    """

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self.process = psutil.Process()
        self.before: tuple[Steps, int, bool, int] | None = None
        self.still = self.used = 0.0
        self.seen: tuple[float, int, int] | None = None

    def look(self, passed: float) -> Place:
        """Where this process is, `passed` seconds after it was looked at before."""
        used = time.process_time() - time.thread_time()  # without this thread's
        busy, self.used = used - self.used >= SHARE * passed, used
        steps = Steps.current
        if steps is None:
            return Place(0, 0, "", False, self.limit, "")
        begun = _collectives() - steps.base
        place = steps, steps.number, steps.inside, begun
        idle = False
        if place == self.before:
            self.still += passed
            with contextlib.suppress(Exception):  # of a process that ends meanwhile; a dead watchdog would end them all
                idle = steps.inside and steps.number >= steps.first + FIRST and not busy and self._sleeps(passed)
        else:
            if self.before is not None and self.still:
                stage, number, inside, _ = self.before
                if inside and number > stage.first:
                    stage.longest = max(stage.longest, self.still + passed)
            self.before, self.still, self.seen = place, 0.0, None
        allowed = max(self.limit, SLACK * steps.longest, Steps.patience)
        step = f"{steps.unit} {steps.number} of {steps.stage!r}"
        return Place(steps.serial, begun, step, idle, allowed, _line(self.frame()) if idle else "")

    def _sleeps(self, passed: float) -> bool:
        """Whether neither the main thread nor a child runs or wants to, no child computed, and nothing was read."""
        if sys.platform != "linux":  # elsewhere all that is not stopped "runs"
            return False
        runs = self.process.status() == psutil.STATUS_RUNNING  # also one that gets next to nothing of a busy processor
        used, read = 0.0, self.process.io_counters().read_bytes  # pages of swap and of network file systems as well
        woken = resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw - resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw
        for child in self.process.children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                runs |= child.status() == psutil.STATUS_RUNNING
                used += sum(child.cpu_times()[:2])
                read += child.io_counters().read_bytes
                woken += child.num_ctx_switches().voluntary
        before, self.seen = self.seen, (used, read, woken)
        if runs or before is None or read != before[1]:
            return False
        return abs(used - before[0]) < SHARE * passed and abs(woken - before[2]) < WAKES * passed

    def frame(self) -> FrameType | None:
        """Where the thread of the steps is."""
        return sys._current_frames().get(Steps.current.thread) if Steps.current is not None else None

    def stack(self) -> str:
        """The calls that the thread of the steps is in, the innermost last."""
        return "".join(traceback.format_stack(self.frame()))


def _collectives() -> int:
    """How many collectives of all processes this one has begun, whether or not they are over."""
    group: Any = torch.distributed.group.WORLD if torch.distributed.is_available() else None
    try:
        return int(group._get_sequence_number_for_group()) if group is not None else 0
    except (RuntimeError, AttributeError):  # a backend that does not count, or a torch that has named it otherwise
        return 0


_LIBRARY = sysconfig.get_path("stdlib") + os.sep


def _line(frame: FrameType | None) -> str:
    """The innermost line that is not of Python's own library: that waits in `select` for anything."""
    inner = frame
    while frame is not None and frame.f_code.co_filename.startswith(("<", _LIBRARY)):
        if "-packages" in frame.f_code.co_filename:
            break
        frame = frame.f_back
    frame = frame or inner
    return (
        f"{frame.f_code.co_filename}:{frame.f_lineno} ({frame.f_code.co_name})"
        if frame is not None
        else "an unknown line"
    )
