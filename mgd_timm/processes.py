"""What several processes have to agree on: the main one's tensors, and the main one's failures."""

from collections.abc import Callable, Iterable
from datetime import timedelta

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import broadcast_object_list
from torch import Tensor

from mgd_timm import watchdog

PATIENCE = InitProcessGroupKwargs(timeout=timedelta(hours=1))  # the others wait while one decodes, or writes a store


def join() -> Accelerator:
    """The processes of this launch, for a script that looks around before its first run; a run finds them joined."""
    accelerator = Accelerator(kwargs_handlers=[PATIENCE])
    watchdog.start(accelerator)
    return accelerator


def leave() -> None:
    """Part from the other processes, at the end of a command; left to the exit of Python, a process may end in an abort (gloo)."""
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


def on_main(accelerator: Accelerator, action: Callable[[], object]) -> None:
    """Carry something out on the main process; what it raises is raised on all, or they would wait for a process that is gone."""
    failure: list[Exception | None] = [None]
    if accelerator.is_main_process:
        try:
            action()
        except Exception as error:  # raised again below, on every process
            failure[0] = error
    if accelerator.num_processes > 1:
        broadcast_object_list(failure)
    if failure[0] is not None:
        raise failure[0]


def decided(accelerator: Accelerator, value: bool) -> bool:
    """The main process's answer, on all."""
    answer = [value]
    if accelerator.num_processes > 1:
        broadcast_object_list(answer)
    return answer[0]


def any_process(accelerator: Accelerator, mine: bool) -> bool:
    """Whether any process says so, on all."""
    flag = torch.tensor([float(mine)], device=accelerator.device)
    return bool(accelerator.reduce(flag, "sum").item() > 0)
