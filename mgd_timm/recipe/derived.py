"""What a recipe leaves open, filled in: by its other options, and by the processes that carry it out."""

import dataclasses
import math

from mgd_timm.recipe.recipe import Recipe


def resolved(recipe: Recipe) -> Recipe:
    """The recipe with what it leaves open about its teacher store filled in; the recipe itself where there is none."""
    if recipe.teacher_store is None:
        return recipe
    return dataclasses.replace(
        recipe,
        teacher_augmentations=recipe.teacher_augmentations or recipe.optim.epochs,
        teacher_augmentation_seed=recipe.teacher_augmentation_seed or 0,
        teacher_top_k=recipe.teacher_top_k or 0,
    )


def with_global_batch(recipe: Recipe, processes: int, steps: int = 1) -> Recipe:
    """The recipe with its global batch: its own, or what batch size, processes and steps per update make.

    The steps themselves are then left open, as they follow from the global batch on any number of processes.

    Args:
        recipe: Of the run.
        processes: That run.
        steps: Per update, where the recipe names neither them nor a global batch.

    Raises:
        ValueError: A global batch smaller than 2 images for each process, or contradicted by the steps per update.
    """
    size, optim = recipe.data.batch_size, recipe.optim
    whole = optim.global_batch_size or size * processes * (optim.grad_accum_steps or steps)
    if whole < 2 * processes:
        raise ValueError(
            f"global_batch_size={whole} on {processes} processes: expected at least 2 images for each, "
            f"{2 * processes}. Start fewer processes, or choose a larger one."
        )
    needed = -(-whole // (size * processes))
    if optim.grad_accum_steps not in (None, needed):
        raise ValueError(
            f"grad_accum_steps={optim.grad_accum_steps} contradicts global_batch_size={whole}: {size} images on "
            f"{_count(processes, 'process')} in {_count(optim.grad_accum_steps or 1, 'step')} are "
            f"{size * processes * (optim.grad_accum_steps or 1)}, and {whole} take {_count(needed, 'step')}. Leave "
            "grad_accum_steps out, or choose another batch_size."
        )
    return dataclasses.replace(recipe, optim=dataclasses.replace(optim, global_batch_size=whole, grad_accum_steps=None))


def _count(number: int, word: str) -> str:
    return f"{number} {word}{'' if number == 1 else 'es' if word.endswith('s') else 's'}"


def num_slots(batch_size: int, processes: int, global_batch: int) -> int:
    """The slots of a whole update: those of as few steps of all processes as hold the global batch."""
    return processes * math.ceil(global_batch / (batch_size * processes))


def slot_size(batch_size: int, processes: int, global_batch: int) -> int:
    """Samples in the largest slot of a whole update; the others hold as many, or one fewer."""
    return math.ceil(global_batch / min(num_slots(batch_size, processes, global_batch), global_batch // 2))
