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

from mgd_timm.recipe.recipe import PROCESS_TIMEOUT
from mgd_timm.storage.lock import Lock

_meetings = itertools.count()

T = TypeVar("T")


def timeout_after(seconds: float) -> InitProcessGroupKwargs:
    """The process group's timeout: a collective that not all processes join fails. A process's first Accelerator sets
    it."""
    return InitProcessGroupKwargs(timeout=timedelta(seconds=seconds))


def join(process_timeout: float = PROCESS_TIMEOUT) -> Accelerator:
    """The processes of this launch, for a script that looks around before its first run; a run finds them joined.

    Args:
        process_timeout: Seconds, as of `Recipe`.
    """
    return Accelerator(kwargs_handlers=[timeout_after(process_timeout)])


def leave() -> None:
    """Part from the other processes, at the end of a command; left to the exit of Python, a process may end in an abort
    (gloo)."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def broadcast_tensors(tensors: Iterable[Tensor], accelerator: Accelerator) -> None:
    """Overwrite tensors by those of the main process.

    DDP keeps parameters equal, but each process has BatchNorm statistics of its own between two forwards.
    """
    if accelerator.num_processes > 1:
        with torch.no_grad():
            for tensor in tensors:
                torch.distributed.broadcast(tensor.data, 0)


def wait_by_polling(arrived: bool, count: int) -> None:
    """Wait until `count` processes have arrived here, by polling the store: in a collective, the wait would time out.

    Args:
        arrived: Whether this process is one of them, or only waits for them.
        count: How many processes arrive. All processes call this, in the same order among other calls of it.
    """
    store, key = torch.distributed.distributed_c10d._get_default_store(), f"mgd_timm/meeting/{next(_meetings)}"
    if arrived:
        store.add(key, 1)
    pause = 0.001
    while store.add(key, 0) < count:
        time.sleep(pause)
        pause = min(2 * pause, 0.1)


@contextlib.contextmanager
def local_main_first(accelerator: Accelerator) -> Iterator[None]:
    """The main process of each machine goes first, all day if it decodes or waits for another run; all processes enter
    together.

    Accelerate's own lets the others wait in a collective, which times out. The body has no collective.
    """
    if accelerator.num_processes == 1:
        yield
        return
    first = accelerator.is_local_main_process
    machines = sum(gather_object([first]))
    if not first:
        wait_by_polling(False, machines)
    yield
    if first:
        wait_by_polling(True, machines)  # of a machine that is done early too: a collective may follow


def broadcast_from_main(accelerator: Accelerator, action: Callable[[], T]) -> T:
    """What an action gives on the main process, on all; what it raises is raised on all: they would wait for one that
    is gone. It may take longer than a collective.
    """
    found: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            found[0] = action()
        except Exception as error:  # raised again below, on every process
            found[1] = error
    if accelerator.num_processes > 1:
        wait_by_polling(accelerator.is_main_process, 1)
        broadcast_object_list(found)
    answer, failure = found
    if failure is not None:
        raise failure
    return answer


def run_on_main(accelerator: Accelerator, action: Callable[[], object]) -> None:
    """As `broadcast_from_main`, where what the action gives is for the main process alone."""

    def act() -> None:
        action()

    broadcast_from_main(accelerator, act)


def any_process(accelerator: Accelerator, mine: bool) -> bool:
    """Whether any process says so, on all."""
    flag = torch.tensor([float(mine)], device=accelerator.device)
    return bool(accelerator.reduce(flag, "sum").item() > 0)


@contextlib.contextmanager
def lock_on_main(lock: Lock, accelerator: Accelerator) -> Iterator[None]:
    """The main process holds the lock while all go through the body, whose last step has to be one of all of them
    together."""
    try:
        run_on_main(accelerator, lock.try_acquire)
        yield
    finally:
        lock.release()
