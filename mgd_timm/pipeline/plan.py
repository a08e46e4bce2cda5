"""Unpack a recipe once into what the other layers take."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from accelerate import Accelerator

from mgd_timm.criteria import Objective
from mgd_timm.criteria.terms import TermOptions, Terms, parse_terms, task_alone
from mgd_timm.data.dataset import Images
from mgd_timm.distributed.launch import build_accelerator
from mgd_timm.features import Pair
from mgd_timm.granularity import MAG
from mgd_timm.objective import SeveralTeachers, build_objective, build_several
from mgd_timm.recipe.checks import needs_no_teacher
from mgd_timm.recipe.derived import num_micro_batches, with_global_batch
from mgd_timm.recipe.recipe import Recipe
from mgd_timm.teachers.classifier import ClassifierFit
from mgd_timm.teachers.outputs.stored_source import StoreOptions
from mgd_timm.teachers.pretraining import RunContext


def accelerator_of(recipe: Recipe) -> Accelerator:
    """Return the accelerator of a recipe's run.

    Raises:
        ValueError: As `build_accelerator`.
    """
    return build_accelerator(
        amp_dtype=recipe.amp_dtype if recipe.amp else None,
        grad_accum_steps=recipe.optim.grad_accum_steps or 1,
        log_with=recipe.log_with,
        folder=recipe.output,
        process_timeout=recipe.process_timeout,
        find_batch_size=recipe.optim.find_batch_size,
        shard_teacher=recipe.shard_teacher,
    )


def fix_global_batch(recipe: Recipe, accelerator: Accelerator, start_steps: int | None = None) -> Recipe:
    """Return the recipe with its global batch, set the accelerator's steps per update to those that make it, and log
    both.

    Args:
        recipe: Of the run.
        accelerator: Of the run; `accelerate launch` may have overridden the recipe's steps per update.
        start_steps: Steps per update of the start of a run that is continued; logged if others make its global batch.

    Raises:
        ValueError: As `with_global_batch`.
    """
    processes, given = accelerator.num_processes, accelerator.gradient_accumulation_steps
    asked, fixed = recipe.optim.grad_accum_steps, recipe.optim.global_batch_size is not None
    overridden = given != (asked or 1)
    if overridden and not fixed:
        recipe = replace(recipe, optim=replace(recipe.optim, grad_accum_steps=None))
    recipe = with_global_batch(recipe, processes, given)
    whole = recipe.optim.global_batch_size
    assert whole is not None
    steps = num_micro_batches(recipe.data.batch_size, processes, whole) // processes
    accelerator.gradient_accumulation_steps = steps
    accelerator.print(f"{whole} images per update in {steps} step{'s' if steps > 1 else ''}")
    if overridden and fixed and given != steps:
        accelerator.print(
            f"accelerate's {given} steps per update are not used: the global batch is given, and takes {steps}."
        )
    if asked is None and start_steps not in (None, steps):
        accelerator.print(
            f"grad_accum_steps={start_steps} is of the run's start: its {whole} images per update stay, in {steps} "
            "steps now."
        )
    return recipe


def terms_of(recipe: Recipe) -> Terms:
    """Return the terms of a recipe's loss. Raise ValueError as `parse_terms`."""
    alone = recipe.teacher is None and recipe.peer is None
    if alone and not needs_no_teacher(recipe.criterion):
        return task_alone(recipe.smoothing)
    options = TermOptions(
        epochs=recipe.optim.epochs,
        method=recipe.method,
        peer=recipe.peer is not None,
        alone=alone,
        task_weight=recipe.task_weight,
        kd_weight=recipe.kd_weight,
        kd_temperature=recipe.kd_temperature,
        smoothing=recipe.smoothing,
        standardise_logits=recipe.standardise_logits,
    )
    return parse_terms(recipe.criterion, recipe.criterion_options, options)


def objective_of(recipe: Recipe, terms: Terms, pairs: Sequence[Pair]) -> Objective | MAG | SeveralTeachers:
    """Build the recipe's objective.

    Args:
        recipe: Of the run.
        terms: Of its loss.
        pairs: The student with each of its teachers, with the peer, or with itself.

    Raises:
        ValueError: What criteria refuse about a pair.
    """
    granularities = recipe.heads.granularities
    if len(pairs) == 1:
        return build_objective(terms, pairs[0], recipe.method, granularities)
    mean = recipe.teachers_as == "mean"
    return build_several(terms, pairs, recipe.method, granularities, weights=recipe.teacher_weights, mean=mean)


def context_of(recipe: Recipe, images: Images, accelerator: Accelerator, *, quiet: bool = False) -> RunContext:
    """Return what everything that is trained in the run shares."""
    return RunContext(
        folder=Path(recipe.output),
        images=images,
        data=recipe.data,
        accelerator=accelerator,
        seed=recipe.seed,
        fold_teacher=recipe.fold_teacher,
        channels_last=recipe.channels_last,
        compile=recipe.compile,
        resume=recipe.resume,
        log_interval=recipe.log_interval,
        quiet=quiet,
    )


def classifier_fit_of(recipe: Recipe) -> ClassifierFit | None:
    """Return how teachers' classifiers are fitted; None where they are used as they are."""
    if recipe.fit_teacher_head == "none" or recipe.teacher is None:
        return None
    return ClassifierFit(
        how=recipe.fit_teacher_head,
        epochs=recipe.fitting_epochs,
        lr=recipe.fitting_lr,
        augmentations=recipe.heads.heads_augmentations,
        batch_size=recipe.heads.heads_batch_size,
        optim=recipe.optim,
    )


def store_options_of(recipe: Recipe) -> StoreOptions | None:
    """Return the options of the recipe's teacher store; None without one."""
    if recipe.teacher_store is None:
        return None
    return StoreOptions(
        folder=Path(recipe.teacher_store),
        passes=recipe.teacher_augmentations or recipe.optim.epochs,
        seed=recipe.teacher_augmentation_seed or 0,
        top_k=recipe.teacher_top_k or 0,
    )
