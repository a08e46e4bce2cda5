"""The accelerator of a run: device, processes and precision are accelerate's, the global batch is the recipe's."""

import os
from dataclasses import replace

import psutil
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

from mgd_timm.distributed.allocator import keep_freed_memory
from mgd_timm.distributed.collectives import timeout_after
from mgd_timm.distributed.sharding import check_sharding, sharded
from mgd_timm.recipe.derived import num_micro_batches, with_global_batch
from mgd_timm.recipe.options import unknown
from mgd_timm.recipe.recipe import Recipe


def build_accelerator(recipe: Recipe, start_steps: int | None = None) -> tuple[Recipe, Accelerator]:
    """The accelerator, and the recipe with its global batch: of the steps in force, as `accelerate launch` may override
    ours.

    Args:
        recipe: Of the run.
        start_steps: Per update, of the start of a run that is continued, where its recipe leaves them open: it is said
            if others make its global batch now.

    Raises:
        ValueError: A tracker that does not exist or is not installed, an engine that is not supported, fp16 on a CPU, a
            teacher to be cut up on one process, or what `with_global_batch` refuses.
    """
    for name in recipe.log_with:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise unknown("tracker", name, LOGGER_TYPE_TO_CLASS)
        if name not in [str(getattr(t, "value", t)) for t in get_available_trackers()]:
            raise ValueError(f"tracker {name!r} is not installed: pip install {name}, or leave --log-with {name} out.")
    # Its state outlives an Accelerator: a second run in one Python process may ask for another precision.
    AcceleratorState._reset_state(reset_partial_state=False)
    accelerator = Accelerator(
        mixed_precision={"bfloat16": "bf16", "float16": "fp16"}[recipe.amp_dtype] if recipe.amp else None,
        gradient_accumulation_steps=recipe.optim.grad_accum_steps or 1,
        log_with=list(recipe.log_with) or None,
        project_dir=recipe.output,
        kwargs_handlers=[timeout_after(recipe.process_timeout)],
    )
    check_sharding(accelerator)
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise ValueError(
            "fp16 on a CPU, where losses are not scaled and small gradients vanish: bfloat16 runs anywhere."
        )
    if recipe.optim.find_batch_size and (sharded() or recipe.shard_teacher):
        where = "under FSDP" if sharded() else "beside shard_teacher"
        raise ValueError(
            f"find_batch_size {where}: a trial step of one process alone is none. Give a batch size that fits."
        )
    if recipe.shard_teacher and accelerator.num_processes == 1:
        raise ValueError(
            "shard_teacher with one process: there is nobody to share the teacher with. Leave --shard-teacher out."
        )
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    start_steps = start_steps if recipe.optim.grad_accum_steps is None else None
    recipe = _with_batch(recipe, accelerator)
    if start_steps not in (None, accelerator.gradient_accumulation_steps):
        accelerator.print(
            f"grad_accum_steps={start_steps} is of the run's start: its {recipe.optim.global_batch_size} images per "
            f"update stay, in {accelerator.gradient_accumulation_steps} steps now."
        )
    asked = _asked_processes()
    if asked is not None and asked != accelerator.num_processes:
        accelerator.print(
            f"warning: {asked} processes were asked for and {accelerator.num_processes} run: on CPUs accelerate "
            f"launch needs mpirun; python -m torch.distributed.run --nproc_per_node {asked} -m mgd_timm ... with "
            "ACCELERATE_USE_CPU=1 does not."
        )
    return recipe, accelerator


def _with_batch(recipe: Recipe, accelerator: Accelerator) -> Recipe:
    """The recipe with its global batch, which is said with what it is made of."""
    processes, given = accelerator.num_processes, accelerator.gradient_accumulation_steps
    overridden, fixed = given != (recipe.optim.grad_accum_steps or 1), recipe.optim.global_batch_size is not None
    if overridden and not fixed:
        recipe = replace(recipe, optim=replace(recipe.optim, grad_accum_steps=None))
    recipe = with_global_batch(recipe, processes, given)
    assert recipe.optim.global_batch_size is not None
    micro_batches = num_micro_batches(recipe.data.batch_size, processes, recipe.optim.global_batch_size)
    steps = accelerator.gradient_accumulation_steps = micro_batches // processes
    cut_up = ", sharded (FSDP2)" if sharded() else ""
    accelerator.print(
        f"{processes} process{'es' if processes > 1 else ''} on {accelerator.device.type}{cut_up}, precision "
        f"{accelerator.mixed_precision}, {recipe.optim.global_batch_size} images per update in {steps} "
        f"step{'s' if steps > 1 else ''}"
    )
    if overridden and fixed and given != steps:
        accelerator.print(
            f"accelerate's {given} steps per update are left aside: the global batch is given, and makes {steps}."
        )
    return recipe


def _asked_processes() -> int | None:
    """The --num_processes of an `accelerate launch` that started this process; it may start fewer and say nothing."""
    if "LOCAL_RANK" in os.environ:
        return None
    try:
        parent = psutil.Process().parent()
        words = parent.cmdline() if parent is not None else []
    except psutil.Error:
        return None
    if not any("accelerate" in word for word in words) or not any(word.endswith("launch") for word in words):
        return None
    for word, following in zip(words, [*words[1:], ""], strict=True):
        name, _, value = word.partition("=")
        if name in ("--num_processes", "--num-processes", "-n") and (value or following).isdecimal():
            return int(value or following)
    return None
