"""The accelerator of a run: device, processes and precision are accelerate's."""

import os
from collections.abc import Sequence

import psutil
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

from mgd_timm.distributed.allocator import keep_freed_memory
from mgd_timm.distributed.collectives import timeout_after
from mgd_timm.distributed.sharding import check_sharding, is_sharding
from mgd_timm.recipe.options import unknown
from mgd_timm.recipe.recipe import PROCESS_TIMEOUT


def build_accelerator(
    *,
    amp_dtype: str | None = None,
    grad_accum_steps: int = 1,
    log_with: Sequence[str] = (),
    folder: str | None = None,
    process_timeout: float = PROCESS_TIMEOUT,
    find_batch_size: bool = False,
    shard_teacher: bool = False,
) -> Accelerator:
    """Return the accelerator of a run, and log its processes, device and precision.

    Args:
        amp_dtype: "bfloat16" or "float16" for mixed precision; None for that of `accelerate launch`.
        grad_accum_steps: Micro-batches of each process per update, unless `accelerate launch` names another number.
        log_with: Names of accelerate's trackers.
        folder: Where trackers write.
        process_timeout: Seconds that a collective waits for all processes.
        find_batch_size: A batch size will be searched.
        shard_teacher: The teacher will be sharded.

    Raises:
        ValueError: A tracker that does not exist or is not installed, an engine that is not supported, fp16 on a CPU,
            sharding together with a search of the batch size, or a teacher to be sharded on one process.
    """
    _check_trackers(log_with)
    # Its state outlives an Accelerator: a second run in one Python process may ask for another precision.
    AcceleratorState._reset_state(reset_partial_state=False)
    accelerator = Accelerator(
        mixed_precision={"bfloat16": "bf16", "float16": "fp16"}[amp_dtype] if amp_dtype is not None else None,
        gradient_accumulation_steps=grad_accum_steps,
        log_with=list(log_with) or None,
        project_dir=folder,
        kwargs_handlers=[timeout_after(process_timeout)],
    )
    processes, device, precision = accelerator.num_processes, accelerator.device.type, accelerator.mixed_precision
    check_sharding(accelerator)
    if precision == "fp16" and device == "cpu":
        raise ValueError(
            "fp16 on a CPU: losses are not scaled there, and small gradients vanish. Use --amp-dtype bfloat16."
        )
    if find_batch_size and (is_sharding() or shard_teacher):
        other = "FSDP" if is_sharding() else "--shard-teacher"
        raise ValueError(
            f"--find-batch-size with {other}: a process cannot try an update alone where networks are sharded. Give a "
            "--batch-size that fits."
        )
    if shard_teacher and processes == 1:
        raise ValueError("--shard-teacher with one process: expected several to share the teacher. Leave it out.")
    if device == "cpu":
        keep_freed_memory()
    sharded = ", sharded (FSDP2)" if is_sharding() else ""
    plural = "es" if processes > 1 else ""
    accelerator.print(f"{processes} process{plural} on {device}{sharded}, precision {precision}")
    _warn_of_missing_processes(accelerator)
    return accelerator


def _check_trackers(log_with: Sequence[str]) -> None:
    for name in log_with:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise unknown("tracker", name, LOGGER_TYPE_TO_CLASS)
        if name not in [str(getattr(t, "value", t)) for t in get_available_trackers()]:
            raise ValueError(f"tracker {name!r} is not installed: pip install {name}, or leave --log-with {name} out.")


def _warn_of_missing_processes(accelerator: Accelerator) -> None:
    """Warn if `accelerate launch` silently started another number of processes than it was asked for."""
    requested = _requested_processes()
    if requested is not None and requested != accelerator.num_processes:
        accelerator.print(
            f"warning: {requested} processes were asked for and {accelerator.num_processes} run: on CPUs accelerate "
            f"launch needs mpirun; python -m torch.distributed.run --nproc_per_node {requested} -m mgd_timm ... with "
            "ACCELERATE_USE_CPU=1 does not."
        )


def _requested_processes() -> int | None:
    """Return the --num_processes of an `accelerate launch` that started this process, if one did."""
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
