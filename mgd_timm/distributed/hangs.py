"""Stacks of every rank before a hang ends: printed when a step has taken most of the process group's timeout.

A rank that hangs (a read that never returns, a deadlock) ends when a collective of the other ranks times out. The
stacks say which rank it is: the others wait in a collective.
"""

import contextlib
import faulthandler
from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate import Accelerator


@contextlib.contextmanager
def print_stacks_before_timeout(accelerator: Accelerator) -> Iterator[Callable[[], None]]:
    """Print the stacks of all threads of each rank, if a step of a loop takes 0.8 of the process group's timeout.

    The body is the loop and the collectives that follow it, so that ranks that wait for the last step print as well.

    Args:
        accelerator: Processes; nothing is printed for a single one, which has no timeout.

    Yields:
        A function to call at the start of each step, which restarts the clock.
    """
    if accelerator.num_processes == 1:
        yield lambda: None
        return
    # One rank after another, up to 0.9 of the timeout: printed at once, their lines would mix.
    share = 0.8 + 0.1 * accelerator.process_index / accelerator.num_processes
    store: Any = torch.distributed.distributed_c10d._get_default_store()
    seconds = share * store.timeout.total_seconds()

    def start_step() -> None:
        faulthandler.dump_traceback_later(seconds, file=2)  # the process's stderr, whatever Python's is replaced by

    try:
        yield start_step
    finally:
        faulthandler.cancel_dump_traceback_later()
