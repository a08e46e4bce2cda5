"""Refuse options out of their range, and options of a recipe that contradict each other.

What needs the criteria, the networks, the images or the processes is refused where these are known (pipeline.checks).
"""

import dataclasses
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal, get_origin

from mgd_timm.recipe.options import check_choice, flag

if TYPE_CHECKING:
    from mgd_timm.recipe.data import Data
    from mgd_timm.recipe.optim import Optim
    from mgd_timm.recipe.recipe import Recipe

MAP_WORDS = ("stages", "last", "mid", "all")


def check_options(part: Any) -> None:
    """Raise ValueError for an option of a dataclass that is not among its choices or out of its range."""
    for field in dataclasses.fields(part):
        value = getattr(part, field.name)
        if get_origin(field.type) is Literal:
            check_choice(field.name, value, field.type)
        numbers = [one for one in (value if isinstance(value, tuple) else (value,)) if _is_number(one)]
        if numbers and not all(number in field.metadata["range"] for number in numbers):
            each = " in each place" if isinstance(value, tuple) else ""
            raise ValueError(f"{field.name}={value}: expected {field.metadata['range']}{each} ({flag(field.name)}).")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def check_warmup(optim: "Optim") -> None:
    """Raise ValueError for a warm-up that does not fit the run, or the schedule."""
    if not 0 <= optim.warmup_epochs <= optim.epochs:
        raise ValueError(
            f"warmup_epochs={optim.warmup_epochs}: expected 0 to {optim.epochs}, a part of the epochs "
            "(--warmup-epochs, --epochs)."
        )
    if optim.sched == "rsqrt" and not optim.warmup_epochs:
        raise ValueError(
            "sched='rsqrt' without a warm-up, whose length is its time scale: give --warmup-epochs 1 or more."
        )
    if optim.sched in ("wsd", "rsqrt") and optim.warmup_epochs == optim.epochs:
        raise ValueError(
            f"sched={optim.sched!r}: warmup_epochs={optim.warmup_epochs} of epochs={optim.epochs} leave no epoch in "
            "which the learning rate decays. Lower --warmup-epochs, or raise --epochs."
        )


def check_milestones(
    name: str, milestones: tuple[float, ...] | None, sched: str, length_name: str, length: int
) -> None:
    """Raise ValueError where multistep reaches none of its milestones."""
    if milestones is None or sched != "multistep" or any(milestone <= length for milestone in milestones):
        return
    raise ValueError(
        f"{name}={milestones}: none is reached in {length_name}={length}, so the learning rate would never decay. "
        f"Give smaller ones, or leave {flag(name)} out: the default follows the length."
    )


def check_channels(data: "Data") -> None:
    """Raise ValueError for images that are neither grey nor colour, and for statistics of other channels."""
    if data.in_chans not in (1, 3):
        raise ValueError(f"in_chans={data.in_chans}: expected 3 (colour) or 1 (grey) (--in-chans).")
    for name in ("mean", "std"):
        values = getattr(data, name)
        if values is not None and len(values) != data.in_chans:
            raise ValueError(f"{name}={values}: expected {data.in_chans} values, one per channel (--in-chans).")


def check_crop(data: "Data") -> None:
    """Raise ValueError for a range of a random crop that is no pair of numbers in order."""
    for name in ("scale", "ratio"):
        values = getattr(data, name)
        if len(values) != 2 or values[0] > values[1]:
            raise ValueError(
                f"{name}={values}: expected two numbers, the smaller one first, as in {flag(name)} 0.5 1.0."
            )


def check_streaming(data: "Data") -> None:
    """Raise ValueError for options of streams without a stream, and for options that a stream cannot have."""
    for name in ("num_samples", "num_classes"):
        if getattr(data, name) is not None and not data.streaming:
            raise ValueError(
                f"{name}={getattr(data, name)} is for streamed images; other images are counted. Give --streaming, or "
                f"leave {flag(name)} out."
            )
    for name in ("val_split", "max_bad", "aug_repeats"):
        if data.streaming and getattr(data, name):
            raise ValueError(
                f"{name}={getattr(data, name)} needs any image at any time, and a stream gives one after the other: "
                f"leave {flag(name)} or --streaming out."
            )


def check_recipe(recipe: "Recipe") -> None:
    """Raise ValueError for options of a recipe that contradict each other."""
    check_maps(recipe)
    check_frozen_backbone(recipe)
    check_peer(recipe)
    check_no_teacher(recipe)
    check_teacher_weights(recipe)
    check_teacher_classes(recipe)
    check_several_teachers(recipe)
    check_teacher_store(recipe)
    check_sharded_teacher(recipe)


def check_maps(recipe: "Recipe") -> None:
    """Raise ValueError unless the maps are a known word or a number of them."""
    maps = recipe.maps
    if maps not in MAP_WORDS and not (maps.isdecimal() and int(maps)):
        raise ValueError(f"maps={maps!r}: expected {', '.join(MAP_WORDS)} or a number of maps, 1 or more (--maps).")


def check_frozen_backbone(recipe: "Recipe") -> None:
    """Raise ValueError for what changes a backbone where the classifier alone is trained."""
    if recipe.train_only == "all":
        if recipe.adapt_batchnorm:
            raise ValueError(
                "adapt_batchnorm: BatchNorm follows the images wherever all is trained. Give --train-only classifier, "
                "or leave --adapt-batchnorm out."
            )
        return
    if recipe.teacher is not None or recipe.peer is not None:
        beside = f"teacher {_list(recipe.teacher)}" if recipe.teacher is not None else f"peer {recipe.peer!r}"
        raise ValueError(
            f"train_only='classifier' beside the {beside}: distillation trains the backbone. Train without a teacher "
            "(mgd-timm train)."
        )
    if recipe.drop or recipe.drop_path:
        raise ValueError(
            f"drop={recipe.drop}, drop_path={recipe.drop_path}: a frozen backbone (train_only='classifier') has no "
            "dropout. Leave --drop and --drop-path out."
        )


def check_peer(recipe: "Recipe") -> None:
    """Raise ValueError for what a second student in place of a teacher does not go with."""
    peer = recipe.peer
    if peer is None:
        return
    if recipe.teacher is not None:
        raise ValueError(
            f"peer={peer!r} stands in place of a teacher, and there is one, {_list(recipe.teacher)}: leave --peer or "
            "--teacher out."
        )
    if recipe.teacher_checkpoint is not None:
        raise ValueError(
            f"teacher_checkpoint={recipe.teacher_checkpoint!r} beside peer={peer!r}: there is no teacher. Leave "
            "--teacher-checkpoint out."
        )
    if recipe.optim.model_ema:
        raise ValueError(f"model_ema beside peer={peer!r}: one of two students is not averaged. Leave --model-ema out.")
    if recipe.method == "mas":
        raise ValueError(
            f"method='mas' beside peer={peer!r}: MAS needs fitted heads, and two students have none. Choose --method "
            "mag (with dml: MGD-DML) or none."
        )


def check_no_teacher(recipe: "Recipe") -> None:
    """Raise ValueError for options of a teacher where there is none."""
    if recipe.teacher is not None and not recipe.teacher:
        raise ValueError("teacher=(): name one with --teacher, or train without one (mgd-timm train).")
    if recipe.teacher is not None:
        return
    if recipe.teacher_store is not None:
        raise ValueError(
            f"teacher_store={recipe.teacher_store!r}: there is no teacher whose outputs it would hold. Leave "
            "--teacher-store out."
        )
    for name in ("teacher_classes", "fit_teacher_head", "teacher_img_size", "teacher_resize"):
        field = next(field for field in dataclasses.fields(recipe) if field.name == name)
        if getattr(recipe, name) != field.default:
            raise ValueError(f"{name}={getattr(recipe, name)!r}: there is no teacher. Leave {flag(name)} out.")


def check_teacher_weights(recipe: "Recipe") -> None:
    """Raise ValueError unless weights of teachers are one for each of several."""
    weights, names = recipe.teacher_weights, recipe.teacher or ()
    if weights is None:
        return
    if len(weights) != len(names):
        raise ValueError(
            f"teacher_weights={weights}: expected a positive number for each of the teachers {list(names)} "
            "(--teacher-weights)."
        )
    if len(names) == 1:
        raise ValueError(
            f"teacher_weights={weights} are of several teachers, and there is one. Leave --teacher-weights out, or "
            "give --kd-weight."
        )


def check_teacher_classes(recipe: "Recipe") -> None:
    """Raise ValueError unless classes of teachers are one for all or one for each, and leave what is fitted visible."""
    names, classes = recipe.teacher or (), recipe.teacher_classes or ()
    if names and classes and len(classes) not in (1, len(names)):
        raise ValueError(
            f"teacher_classes={list(classes)}: {len(classes)} for {len(names)} "
            f"{'teachers' if len(names) > 1 else 'teacher'} ({_list(names)}): give --teacher-classes once for all, or "
            "once for each in their order ('auto' for one that has the data's classes)."
        )
    if "none" in classes and recipe.fit_teacher_head != "none":
        raise ValueError(
            f"teacher_classes='none' beside fit_teacher_head={recipe.fit_teacher_head!r}: the fitted classifier would "
            "not be used. Leave --teacher-classes or --fit-teacher-head out."
        )


def check_several_teachers(recipe: "Recipe") -> None:
    """Raise ValueError for options of one teacher where there are several."""
    if len(recipe.teacher or ()) > 1:
        for name in ("teacher_store", "teacher_checkpoint"):
            if getattr(recipe, name) is not None:
                raise ValueError(
                    f"{name}={getattr(recipe, name)!r} is of one teacher, and there are {len(recipe.teacher or ())}: "
                    f"leave {flag(name)} out."
                )


def check_teacher_store(recipe: "Recipe") -> None:
    """Raise ValueError for options of stored teacher outputs where none are stored."""
    for name in ("teacher_augmentations", "teacher_augmentation_seed", "teacher_top_k"):
        if getattr(recipe, name) is not None and recipe.teacher_store is None:
            raise ValueError(
                f"{name}={getattr(recipe, name)} belongs to stored teacher outputs: give --teacher-store FOLDER, or "
                f"leave {flag(name)} out."
            )


def check_sharded_teacher(recipe: "Recipe") -> None:
    """Raise ValueError where there is no teacher in memory to shard."""
    if recipe.shard_teacher and (recipe.teacher is None or recipe.teacher_store is not None):
        why = "there is no teacher" if recipe.teacher is None else f"teacher_store={recipe.teacher_store!r} replaces it"
        raise ValueError(f"shard_teacher: {why}, so there is nothing to shard. Leave --shard-teacher out.")


def _list(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))
