"""The teachers of a run with their weights, and with the data's classes and the images' size."""

import copy
from collections.abc import Sequence
from typing import Any, cast

from timm.models import get_model_input_config
from torch import nn

from mgd_timm.data.dataset import Images
from mgd_timm.data.rng import set_seed
from mgd_timm.models.classes import select_classes
from mgd_timm.models.load import check_no_checkpoint, load_model
from mgd_timm.recipe.recipe import Recipe
from mgd_timm.teachers.classifier import needs_new_classifier, reset_classifier


def load_teachers(recipe: Recipe, given: Sequence[nn.Module | None] = ()) -> list[nn.Module]:
    """Load the recipe's teachers; a module that is given is copied and stands for its name.

    Raises:
        ValueError: As `load_model`.
    """
    names = recipe.teacher or ()
    modules = list(given) or [None] * len(names)
    for name, module in zip(names, modules, strict=True):
        if module is not None:
            check_no_checkpoint(recipe.teacher_checkpoint, name)
    # What is given is the caller's, and the run may give its teachers other classes, other weights or another size.
    return [
        copy.deepcopy(module) if module is not None else load_named_teacher(recipe, name)
        for name, module in zip(names, modules, strict=True)
    ]


def load_named_teacher(recipe: Recipe, name: str) -> nn.Module:
    """Load one of the recipe's teachers."""
    needs_classifier = recipe.fit_teacher_head == "none" and recipe.teacher_classes != ("none",)
    return load_model(
        name,
        recipe.teacher_checkpoint,
        in_chans=recipe.data.in_chans,
        classifier_required=needs_classifier,
        verify=recipe.verify,
    )


def adapt_teachers_to_data(models: Sequence[nn.Module], recipe: Recipe, images: Images) -> None:
    """Give teachers, in place, the data's classes and the images' size where the recipe says how.

    Raises:
        ValueError: Classes that are not found among the teacher's, or a network that cannot take another size.
    """
    for position, model in enumerate(models):
        spec = recipe.classes_of(position)
        if spec not in (None, "none"):
            try:
                select_classes(model, str(spec), images.class_names)
            except ValueError as error:
                if len(models) == 1:
                    raise
                raise ValueError(f"teacher {(recipe.teacher or ())[position]!r}: {error}") from error
        if recipe.fit_teacher_head != "none" and needs_new_classifier(model, images):
            set_seed(recipe.seed, 7)
            reset_classifier(model, images)
        if recipe.teacher_resize == "positions":
            _resize_positions(model, recipe.teacher_img_size or images.input_size[1])
    _check_size(models, recipe)


def _check_size(models: Sequence[nn.Module], recipe: Recipe) -> None:
    """Raise ValueError for a size at which no teacher would see the images."""
    side, inputs = recipe.teacher_img_size, [get_model_input_config(model) for model in models]
    sizes = [config["input_size"][-1] for config in inputs if config["fixed_input_size"]]
    if side is not None and len(sizes) == len(models) and side not in sizes:
        raise ValueError(
            f"teacher_img_size={side}: the teacher is fixed to {sizes[0]} pixels, at which it sees the images. Leave "
            "it out, or let its position embeddings be resized (--teacher-resize positions)."
        )


def _resize_positions(model: nn.Module, side: int) -> None:
    config = get_model_input_config(model)
    if not config["fixed_input_size"] or tuple(config["input_size"][1:]) == (side, side):
        return
    name = type(model).__name__
    way_out = f"let the images be resized to its {config['input_size'][-1]} pixels (--teacher-resize images)."
    if not hasattr(model, "set_input_size"):
        raise ValueError(f"teacher_resize='positions': {name} cannot be set to another input size: {way_out}")
    try:
        cast(Any, model).set_input_size(img_size=(side, side))
    except Exception as error:  # an architecture may refuse in any way
        raise ValueError(
            f"teacher_resize='positions': {name} cannot be set to {side} pixels ({error}): {way_out}"
        ) from error
