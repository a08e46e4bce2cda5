"""What several processes have to agree on: the main one's tensors, and the main one's failures."""

import contextlib
import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor

from mgd_timm.distributed import watchdog
from mgd_timm.storage.lock import WAIT_SECONDS, Lock

PATIENCE = InitProcessGroupKwargs(timeout=timedelta(hours=1))  # the others wait while one writes a store
_FIRST, _POLL = 24 * 3600.0, 0.1  # seconds that a machine's main process may take before the others
_firsts = itertools.count()

T = TypeVar("T")


def join() -> Accelerator:
    """The processes of this launch, for a script that looks around before its first run; a run finds them joined."""
    accelerator = Accelerator(kwargs_handlers=[PATIENCE])
    watchdog.start(accelerator)
    return accelerator


def leave() -> None:
    """Part from the other processes, at the end of a command; left to the exit of Python, a process may end in an abort
    (gloo)."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    watchdog.stop()


def share(tensors: Iterable[Tensor], accelerator: Accelerator) -> None:
    """Overwrite tensors by those of the main process.

    DDP keeps parameters equal, but each process has BatchNorm statistics of its own between two forwards.
    """
    if accelerator.num_processes > 1:
        with torch.no_grad():
            for tensor in tensors:
                torch.distributed.broadcast(tensor.data, 0)


@contextlib.contextmanager
def local_main_first(accelerator: Accelerator) -> Iterator[None]:
    """The main process of each machine goes first, all day if it decodes or waits for another run; all processes enter
    together.

    Accelerate's own lets the others wait in a collective, for as long as that may take.

    Raises:
        TimeoutError: A main process took longer.
    """
    if accelerator.num_processes == 1:
        yield
        return
    machines = sum(gather_object([accelerator.is_local_main_process]))
    store, key = torch.distributed.distributed_c10d._get_default_store(), f"mgd_timm/first/{next(_firsts)}"
    deadline = time.monotonic() + _FIRST
    while not accelerator.is_local_main_process and store.add(key, 0) < machines:
        if time.monotonic() > deadline:
            raise TimeoutError(
                f"the first process of a machine has read images for {_FIRST / 3600:g} hours: does it hang?"
            )
        time.sleep(_POLL)
    yield
    if accelerator.is_local_main_process:
        store.add(key, 1)


def of_main(accelerator: Accelerator, action: Callable[[], T]) -> T:
    """What an action gives on the main process, on all; what it raises is raised on all: they would wait for one that
    is gone."""
    found: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            found[0] = action()
        except Exception as error:  # raised again below, on every process
            found[1] = error
    if accelerator.num_processes > 1:
        broadcast_object_list(found)
    answer, failure = found
    if failure is not None:
        raise failure
    return answer


def on_main(accelerator: Accelerator, action: Callable[[], object]) -> None:
    """As `of_main`, where what the action gives is for the main process alone."""

    def act() -> None:
        action()

    of_main(accelerator, act)


def decided(accelerator: Accelerator, value: bool) -> bool:
    """The main process's answer, on all."""
    return of_main(accelerator, lambda: value)


def any_process(accelerator: Accelerator, mine: bool) -> bool:
    """Whether any process says so, on all."""
    flag = torch.tensor([float(mine)], device=accelerator.device)
    return bool(accelerator.reduce(flag, "sum").item() > 0)


@contextlib.contextmanager
def held_by_main(lock: Lock, accelerator: Accelerator) -> Iterator[None]:
    """The main process holds the lock while all go through the body, whose last step has to be one of all of them
    together."""
    try:
        while not of_main(accelerator, lambda: lock.try_acquire(WAIT_SECONDS)):
            pass
        yield
    finally:
        lock.release()
