"""The batch size of a step that memory admits, found by trial; the global batch stays, in more steps."""

from collections.abc import Callable

import torch
from accelerate import Accelerator
from accelerate.utils.memory import clear_device_cache, find_executable_batch_size, should_reduce_batch_size
from torch import nn

from mgd_timm.distributed.collectives import any_process
from mgd_timm.recipe.derived import num_micro_batches
from mgd_timm.recipe.optim import Optim


def executable_batch_size(
    attempt: Callable[[int], None], trainee: nn.Module, optim: Optim, accelerator: Accelerator, batch_size: int
) -> int:
    """The largest of `batch_size`, a half, a quarter, ... of which every process has memory for an update; what is
    found is said.

    The trainee is afterwards as it was before, so that `fit` with what is found is a run that was started with it.
    Evaluation, which has a batch size of its own, is not tried.

    Args:
        attempt: Carries out an update with a batch size, without a word to other processes.
        trainee: Whose state it changes.
        optim: With its global batch.
        accelerator: Processes.
        batch_size: To start at.

    Raises:
        ValueError: Not even 2 samples fit.
    """
    before = {name: tensor.detach().to("cpu", copy=True) for name, tensor in trainee.state_dict().items()}
    processes, whole = accelerator.num_processes, optim.global_batch_size
    assert whole is not None
    size = min(batch_size, -(-whole // processes))  # more is not asked of a step

    def halve() -> int:
        nonlocal size
        if size < 4:
            raise ValueError(
                f"out of memory with {size} images in a step of a process: choose a smaller student, images "
                "(--img-size) or --amp."
            )
        size //= 2
        steps = num_micro_batches(size, processes, whole) // processes
        accelerator.print(
            f"out of memory with {2 * size} images in a step of a process: {size}, in {steps} steps per update of "
            f"{whole} as before"
        )
        return size

    def runs_short(batch_size: int) -> bool:
        try:
            attempt(batch_size)
        except (RuntimeError, MemoryError) as error:
            if not isinstance(error, MemoryError) and not should_reduce_batch_size(error):
                raise
            return True
        return False

    def search(batch_size: int) -> int:
        accelerator.gradient_accumulation_steps = num_micro_batches(batch_size, processes, whole) // processes
        short = runs_short(batch_size)
        accelerator.free_memory()
        trainee.zero_grad(set_to_none=True)
        clear_device_cache(garbage_collection=True)
        trainee.load_state_dict(before)
        if any_process(accelerator, short):  # one that has room would wait for one that has not
            raise torch.OutOfMemoryError("a process is out of memory.")
        return batch_size

    return int(
        find_executable_batch_size(search, size, halve)()
    )  # as a decorator with options accelerate 1.10 loses one
