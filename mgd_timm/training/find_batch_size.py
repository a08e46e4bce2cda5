"""The batch size that memory admits, found by trial; the global batch stays, in more micro-batches."""

from collections.abc import Callable

import torch
from accelerate import Accelerator
from accelerate.utils.memory import clear_device_cache, find_executable_batch_size, should_reduce_batch_size
from torch import nn

from mgd_timm.distributed.collectives import any_process
from mgd_timm.recipe.derived import num_micro_batches


def find_batch_size(
    try_update: Callable[[int], None], trainee: nn.Module, accelerator: Accelerator, batch_size: int, global_batch: int
) -> int:
    """Return the largest batch size at which every process has memory for an update.

    Tried are `batch_size`, or a process's share of the global batch if that is smaller, then a half, a quarter, ...

    The trainee is afterwards as it was before, so that `fit` with the result is a run that was started with it.
    Evaluation, which has a batch size of its own, is not tried.

    Args:
        try_update: Builds the update for a batch size and carries it out. Only building may use collectives.
        trainee: The module whose state it changes.
        accelerator: Processes; its accumulation steps are set to those of the result.
        batch_size: To start at.
        global_batch: Samples of an update.

    Raises:
        ValueError: Not even 2 samples fit.
    """
    before = {name: tensor.detach().to("cpu", copy=True) for name, tensor in trainee.state_dict().items()}
    processes = accelerator.num_processes
    size = min(batch_size, -(-global_batch // processes))  # a micro-batch is never larger

    def steps_of(batch_size: int) -> int:
        return num_micro_batches(batch_size, processes, global_batch) // processes

    def halve() -> int:
        nonlocal size
        if size <= 2:
            raise ValueError(
                f"out of memory with {size} images in a step of a process: choose a smaller student, images "
                "(--img-size) or --amp."
            )
        previous, size = size, max(2, size // 2)
        accelerator.print(
            f"out of memory with {previous} images in a step of a process: {size}, in {steps_of(size)} steps per "
            f"update of {global_batch} as before"
        )
        return size

    def check(batch_size: int) -> int:
        accelerator.gradient_accumulation_steps = steps_of(batch_size)
        failed = _runs_out_of_memory(try_update, batch_size)
        accelerator.free_memory()
        trainee.zero_grad(set_to_none=True)
        clear_device_cache(garbage_collection=True)
        trainee.load_state_dict(before)
        if any_process(accelerator, failed):  # a process that has memory would wait for one that has not
            raise torch.OutOfMemoryError("a process is out of memory.")
        return batch_size

    # Not as a decorator with options: accelerate 1.10 loses one.
    return int(find_executable_batch_size(check, size, halve)())


def _runs_out_of_memory(try_update: Callable[[int], None], batch_size: int) -> bool:
    try:
        try_update(batch_size)
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, MemoryError) and not should_reduce_batch_size(error):
            raise
        return True
    return False
