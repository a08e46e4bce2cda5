"""Unpack a recipe once into what the other wings take."""

from collections.abc import Sequence
from pathlib import Path

from accelerate import Accelerator

from mgd_timm.criteria import Objective
from mgd_timm.criteria.terms import TermOptions, Terms, parse_terms, task_alone
from mgd_timm.data.dataset import Images
from mgd_timm.features import Pair
from mgd_timm.granularity import MAG
from mgd_timm.objective import SeveralTeachers, build_objective, build_several
from mgd_timm.recipe.recipe import Recipe
from mgd_timm.teachers.classifier import ClassifierFit
from mgd_timm.teachers.outputs.stored_source import StoreOptions
from mgd_timm.teachers.pretraining import RunContext


def terms_of(recipe: Recipe) -> Terms:
    """Return the terms of a recipe's loss. Raise ValueError as `parse_terms`."""
    if recipe.teacher is None and recipe.peer is None:
        return task_alone(recipe.smoothing)
    options = TermOptions(
        epochs=recipe.optim.epochs,
        method=recipe.method,
        peer=recipe.peer is not None,
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
