"""What several processes agree on: the main process's tensors, values and failures."""

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

_waits = itertools.count()

T = TypeVar("T")


def timeout_after(seconds: float) -> InitProcessGroupKwargs:
    """Return the process group's timeout, after which a collective fails. A process's first Accelerator sets it."""
    return InitProcessGroupKwargs(timeout=timedelta(seconds=seconds))


def join(process_timeout: float = PROCESS_TIMEOUT) -> Accelerator:
    """Join the processes of this launch, for a script that needs them before its first run.

    Args:
        process_timeout: Seconds, as of `Recipe`.
    """
    return Accelerator(kwargs_handlers=[timeout_after(process_timeout)])


def has_process_group() -> bool:
    """Return whether this process has joined a process group."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def several_processes() -> bool:
    """Return whether there are several processes."""
    return has_process_group() and torch.distributed.get_world_size() > 1


@torch.compiler.disable  # the host needs the number of rows of each process
def gathered(*tensors: Tensor) -> list[Tensor]:
    """Gather the rows of all processes on every process. Processes may have different numbers of rows."""
    size, count = torch.distributed.get_world_size(), len(tensors[0])
    counts = [torch.zeros(1, dtype=torch.int64, device=tensors[0].device) for _ in range(size)]
    torch.distributed.all_gather(counts, torch.full_like(counts[0], count))
    lengths = torch.cat(counts).tolist()
    found = []
    for tensor in tensors:
        padded = tensor.new_zeros(max(lengths), *tensor.shape[1:])
        padded[:count] = tensor
        parts = [torch.empty_like(padded) for _ in lengths]
        torch.distributed.all_gather(parts, padded)
        found.append(torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)]))
    return found


def leave() -> None:
    """Leave the process group at the end of a command: with gloo, a process that merely exits may abort."""
    if has_process_group():
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
    """Wait until `count` processes have arrived, by polling the store: a collective would time out.

    Args:
        arrived: Whether this process is one of them, or only waits for them.
        count: How many processes arrive. All processes call this, in the same order among other calls of it.
    """
    store, key = torch.distributed.distributed_c10d._get_default_store(), f"mgd_timm/wait/{next(_waits)}"
    if arrived:
        store.add(key, 1)
    pause = 0.001
    while store.add(key, 0) < count:
        time.sleep(pause)
        pause = min(2 * pause, 0.1)


@contextlib.contextmanager
def local_main_first(accelerator: Accelerator) -> Iterator[None]:
    """Let the main process of each machine go first, for hours if need be; all processes enter and leave it.

    Accelerate's own lets the others wait in a collective, which times out. The body must not contain a collective.
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
        wait_by_polling(True, machines)  # also on a machine that is done early: a collective may follow


def broadcast_from_main(accelerator: Accelerator, action: Callable[[], T]) -> T:
    """Call `action` on the main process, and return its result on all. It may take longer than a collective.

    What it raises is raised on all processes: they would wait for one that is gone.
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
    result, failure = found
    if failure is not None:
        raise failure
    return result


def run_on_main(accelerator: Accelerator, action: Callable[[], object]) -> None:
    """Call `action` on the main process as `broadcast_from_main` does, and drop its result."""

    def act() -> None:
        action()

    broadcast_from_main(accelerator, act)


def any_process(accelerator: Accelerator, flag: bool) -> bool:
    """Return whether the flag is set on any process."""
    total = accelerator.reduce(torch.tensor([float(flag)], device=accelerator.device), "sum")
    return bool(total.item() > 0)


@contextlib.contextmanager
def lock_on_main(lock: Lock, accelerator: Accelerator) -> Iterator[None]:
    """Hold the lock on the main process while all go through the body, which ends with a step of all together."""
    try:
        run_on_main(accelerator, lock.try_acquire)
        yield
    finally:
        lock.release()
