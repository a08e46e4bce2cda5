"""Values that follow from a recipe's other options and from the number of processes."""

import dataclasses
import math

from mgd_timm.recipe.optim import Optim
from mgd_timm.recipe.recipe import Recipe


def with_store_defaults(recipe: Recipe) -> Recipe:
    """Return the recipe with the defaults of its teacher store, or the recipe itself without a store."""
    if recipe.teacher_store is None:
        return recipe
    return dataclasses.replace(
        recipe,
        teacher_augmentations=recipe.teacher_augmentations or recipe.optim.epochs,
        teacher_augmentation_seed=recipe.teacher_augmentation_seed or 0,
        teacher_top_k=recipe.teacher_top_k or 0,
    )


def with_unfolded_trajectory(recipe: Recipe) -> Recipe:
    """Return the recipe without folding where a teacher's snapshots are loaded: they hold its BatchNorm."""
    return recipe if recipe.teacher_trajectory is None else dataclasses.replace(recipe, fold_teacher=False)


def with_global_batch(recipe: Recipe, processes: int, steps: int = 1) -> Recipe:
    """Return the recipe with its global batch: its own, or batch size x processes x micro-batches per update.

    The result names no micro-batches per update, as they follow from the global batch on any number of processes.

    Args:
        recipe: Of the run.
        processes: Number of processes.
        steps: Micro-batches of each process per update, if the recipe names neither them nor a global batch.

    Raises:
        ValueError: A global batch smaller than 2 images for each process, or contradicted by the micro-batches.
    """
    size, optim = recipe.data.batch_size, recipe.optim
    given = optim.grad_accum_steps
    global_batch = optim.global_batch_size or size * processes * (given or steps)
    if global_batch < 2 * processes:
        raise ValueError(
            f"global_batch_size={global_batch} on {processes} processes: expected at least 2 images for each, "
            f"{2 * processes}. Start fewer processes, or choose a larger --global-batch-size."
        )
    needed = num_micro_batches(size, processes, global_batch) // processes
    if given is not None and given != needed:
        raise ValueError(
            f"grad_accum_steps={given} contradicts global_batch_size={global_batch}: {size} images x {processes} "
            f"processes x {given} micro-batches = {size * processes * given}, expected {needed} micro-batches. Leave "
            "--grad-accum-steps out, or choose another --batch-size."
        )
    optim = dataclasses.replace(optim, global_batch_size=global_batch, grad_accum_steps=None)
    return dataclasses.replace(recipe, optim=optim)


def qat_optim(recipe: Recipe) -> Optim:
    """Return the optimizer's options for the int8 stage: those of the run, at a tenth of its epochs and learning rate
    unless the recipe says otherwise, along a cosine to 0, without warm-up and moving average."""
    return dataclasses.replace(
        recipe.optim,
        epochs=recipe.qat_epochs or max(1, round(recipe.optim.epochs / 10)),
        lr=recipe.qat_lr or recipe.optim.lr / 10,
        sched="cosine",
        min_lr=0.0,
        warmup_epochs=0,
        decay_milestones=None,
        model_ema=False,
    )


def num_micro_batches(batch_size: int, processes: int, global_batch: int) -> int:
    """Return the number of micro-batches of a full update over all processes: as few as hold the global batch."""
    return processes * math.ceil(global_batch / (batch_size * processes))


def micro_batch_size(batch_size: int, processes: int, global_batch: int) -> int:
    """Return the samples in the largest micro-batch of a full update; the others hold as many, or one fewer."""
    return math.ceil(global_batch / min(num_micro_batches(batch_size, processes, global_batch), global_batch // 2))
