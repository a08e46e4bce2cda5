"""Refuse options out of their range, and options of a recipe that contradict each other.

What needs the criteria, the networks, the images or the processes is refused where these are known (pipeline.checks).
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal, get_origin

from mgd_timm.recipe.options import check_choice, flag, plain_model_name

if TYPE_CHECKING:
    from mgd_timm.recipe.data import Data
    from mgd_timm.recipe.heads import Heads
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
    """Raise ValueError for a warm-up that does not fit the epochs or the scheduler."""
    if not 0 <= optim.warmup_epochs <= optim.epochs:
        raise ValueError(
            f"warmup_epochs={optim.warmup_epochs}: expected 0 to {optim.epochs}, the number of epochs "
            "(--warmup-epochs, --epochs)."
        )
    if optim.sched == "rsqrt" and not optim.warmup_epochs:
        raise ValueError(
            "sched='rsqrt' decays on the time scale of its warm-up, and there is none: give --warmup-epochs 1 or more."
        )
    if optim.sched in ("wsd", "rsqrt") and optim.warmup_epochs == optim.epochs:
        raise ValueError(
            f"sched={optim.sched!r}: warmup_epochs={optim.warmup_epochs} of epochs={optim.epochs} leaves no epoch for "
            "the decay. Lower --warmup-epochs, or raise --epochs."
        )


def check_milestones(
    name: str, milestones: tuple[float, ...] | None, sched: str, length_name: str, length: int
) -> None:
    """Raise ValueError if multistep reaches none of its milestones."""
    if milestones is None or sched != "multistep" or any(milestone <= length for milestone in milestones):
        return
    raise ValueError(
        f"{name}={milestones}: all are after {length_name}={length}, so the learning rate would never decay. Give "
        f"smaller ones, or leave {flag(name)} out."
    )


def check_code_divergence(heads: "Heads") -> None:
    """Raise ValueError for a weight of the codes' reverse divergence where their divergence has none."""
    if heads.code_divergence != "bdd":
        why = f"it is for bdd, and code_divergence={heads.code_divergence!r}"
        _refuse(heads, ("code_reverse_weight",), why, ", or give --code-divergence bdd")


def check_channels(data: "Data") -> None:
    """Raise ValueError unless each channel has a mean and a standard deviation, of pixels in [0, 1]."""
    for name in ("mean", "std"):
        values = getattr(data, name)
        if values is not None and len(values) != data.in_chans:
            raise ValueError(f"{name}={values}: expected {data.in_chans} values, one per channel (--in-chans).")
        if values is not None:
            check_statistics(name, values)


def check_statistics(name: str, values: Sequence[float]) -> None:
    """Raise ValueError for a mean or standard deviation per channel that is not of pixels in [0, 1]."""
    if max(values) > 1:
        divided = " ".join(f"{value / 255:.4g}" for value in values)
        raise ValueError(
            f"{name}={tuple(values)}: expected 1 at most, of pixels in [0, 1]. Divide those of pixels in 0 to 255 by "
            f"255: {flag(name)} {divided}."
        )


def check_crop(data: "Data") -> None:
    """Raise ValueError unless the ranges of a random crop are two numbers in order."""
    for name in ("scale", "ratio"):
        values = getattr(data, name)
        if len(values) != 2 or values[0] > values[1]:
            raise ValueError(
                f"{name}={values}: expected two numbers, the smaller one first, as in {flag(name)} 0.5 1.0."
            )


def check_streaming(data: "Data") -> None:
    """Raise ValueError for options of streams without --streaming, and for options that a stream cannot have."""
    if data.streaming:
        why = "it needs random access to the images, and a stream is read in order"
        _refuse(data, ("val_split", "max_bad", "aug_repeats"), why, ", or leave --streaming out")
    else:
        why = "it is for streamed images only; other images are counted"
        _refuse(data, ("num_samples", "num_classes"), why, ", or give --streaming")


def check_recipe(recipe: "Recipe") -> None:
    """Raise ValueError for options of a recipe that contradict each other."""
    check_maps(recipe)
    check_frozen_backbone(recipe)
    check_peer(recipe)
    check_self_distillation(recipe)
    check_teachers(recipe)
    check_teacher_weights(recipe)
    check_teacher_classes(recipe)
    check_qat(recipe)
    check_teacher_sequence(recipe)
    check_teacher_trajectory(recipe)
    check_kept_checkpoints(recipe)
    check_for_student(recipe)


def check_maps(recipe: "Recipe") -> None:
    """Raise ValueError unless the maps are a known word or a number of them."""
    maps = recipe.maps
    if maps not in MAP_WORDS and not (maps.isdecimal() and int(maps)):
        raise ValueError(f"maps={maps!r}: expected {', '.join(MAP_WORDS)} or a number of maps, 1 or more (--maps).")


def check_frozen_backbone(recipe: "Recipe") -> None:
    """Raise ValueError for options that need a trained backbone where it is frozen, or the reverse."""
    if recipe.train_only == "all":
        if recipe.adapt_batchnorm:
            raise ValueError(
                "adapt_batchnorm: it is for a frozen backbone only. Give --train-only classifier, or leave "
                "--adapt-batchnorm out."
            )
        return
    if recipe.teacher is not None or recipe.peer is not None:
        other = f"teacher {_list(recipe.teacher)}" if recipe.teacher is not None else f"peer {recipe.peer!r}"
        raise ValueError(
            f"train_only='classifier' with the {other}: distillation trains the backbone. Train without a teacher "
            "(mgd-timm train)."
        )
    dropout = [name for name in ("drop", "drop_path") if getattr(recipe, name)]
    _refuse(recipe, dropout, "a frozen backbone (train_only='classifier') has no dropout")


def check_peer(recipe: "Recipe") -> None:
    """Raise ValueError for options of a second student without one, or that do not go with one in place of a
    teacher."""
    if recipe.peer is None:
        names = ("peer_pretrained", "peer_checkpoint", "peer_lr_scale")
        _refuse(recipe, names, "there is no peer", ", or name a --peer")
        return
    _refuse(
        recipe, ("match_channels",), f"it matches one student's channels, and with peer={recipe.peer!r} there are two"
    )
    if recipe.method == "mas" and recipe.teacher is None:
        raise ValueError(
            f"method='mas' with peer={recipe.peer!r}: MAS needs fitted heads, and two students have none. Choose "
            "--method mag (with dml: MGD-DML) or none, or name a --teacher."
        )


def check_qat(recipe: "Recipe") -> None:
    """Raise ValueError for options of the int8 stage without it, or where it cannot train the student."""
    if not recipe.qat:
        _refuse(recipe, ("qat_epochs", "qat_lr"), "it is for --qat only", ", or give --qat")
        return
    if recipe.peer is not None:
        raise ValueError(
            f"qat with peer={recipe.peer!r}: it trains one student, and there are two. Leave --qat out, and give it to "
            "a run of one of them (--teacher)."
        )
    if recipe.train_only == "classifier":
        raise ValueError(
            "qat with train_only='classifier': a frozen backbone cannot learn to compute in int8. Leave --qat or "
            "--train-only out."
        )


def needs_no_teacher(criterion: Iterable[str]) -> bool:
    """Return whether words of --criterion name selfkd, and no other criterion than the task beside it."""
    names = {word.partition(":")[0].strip() for words in criterion for word in words.split(",")}
    return "selfkd" in names and names <= {"ce", "selfkd"}


def check_self_distillation(recipe: "Recipe") -> None:
    """Raise ValueError for options that do not go with a student that teaches itself."""
    if recipe.teacher is not None or recipe.peer is not None or not needs_no_teacher(recipe.criterion):
        return
    if recipe.method != "none":
        raise ValueError(
            f"method={recipe.method!r} with criterion {_list(recipe.criterion)}, which has no teacher: MAG and MAS "
            "need one. Name it with --teacher NAME, or leave --method out."
        )
    why = f"criterion {_list(recipe.criterion)} trains the stages of the student"
    _refuse(recipe, ("train_only",), why)


def check_for_student(recipe: "Recipe") -> None:
    """Raise ValueError for options of training a teacher for a student without it, or where it cannot train."""
    name, weights = recipe.for_student, recipe.for_student_weights
    if name is None:
        names = [f"for_student_{option}" for option in ("weights", "temperature", "divergence")]
        _refuse(recipe, names, "it is for --for-student only", ", or give --for-student NAME")
        return
    if recipe.teacher is not None or recipe.peer is not None or needs_no_teacher(recipe.criterion):
        raise ValueError(
            f"for_student={name!r} is for a teacher that is trained with the labels alone: give it to mgd-timm train, "
            "and the run's folder to mgd-timm distill --teacher."
        )
    if len(weights) != 3 or not weights[0]:
        raise ValueError(
            f"for_student_weights={weights}: expected 3 numbers, of the labels (more than 0), the divergence and the "
            "branches' labels, as in --for-student-weights 1 3 1."
        )
    _refuse(recipe, ("train_only",), f"for_student={name!r} trains the backbone")
    _refuse(recipe, ("qat",), f"for_student={name!r} trains a teacher, and --qat is for students")


def check_teachers(recipe: "Recipe") -> None:
    """Raise ValueError for options of a teacher, of one teacher, of several or of stored outputs without these."""
    teachers = recipe.teacher
    if teachers is None:
        names = ["teacher_checkpoint", "teacher_weights", "teacher_classes", "fit_teacher_head", "teacher_img_size"]
        names += ["teacher_resize", "teacher_store", "shard_teacher", "sample_weight", "match_channels"]
        names += ["teachers_as", "teacher_epochs", "teacher_trajectory"]
        way_out = "" if needs_no_teacher(recipe.criterion) else ", or name one with --teacher"
        _refuse(recipe, names, "there is no teacher", way_out)
    elif not teachers:
        raise ValueError("teacher=(): name one with --teacher, or train without one (mgd-timm train).")
    elif len(teachers) > 1:
        why = f"it is for one teacher, and there are {len(teachers)}"
        _refuse(recipe, ("teacher_store", "teacher_checkpoint"), why)
    else:
        _refuse(recipe, ("teacher_weights",), "it is for several teachers, and there is one", ", or give --kd-weight")
    if recipe.sample_weight == "none":
        why = "it is for weighted samples only"
        _refuse(recipe, ("sample_weight_temperature",), why, ", or give --sample-weight entropy")
    if recipe.teacher_store is None:
        names = ["teacher_augmentations", "teacher_augmentation_seed", "teacher_top_k"]
        _refuse(recipe, names, "it is for stored teacher outputs only", ", or give --teacher-store FOLDER")
    else:
        _refuse(recipe, ("shard_teacher",), f"teacher_store={recipe.teacher_store!r} replaces the teacher in memory")


def check_teacher_weights(recipe: "Recipe") -> None:
    """Raise ValueError unless there is one weight for each of several teachers."""
    weights, names = recipe.teacher_weights, recipe.teacher or ()
    if weights is not None and len(weights) != len(names):
        raise ValueError(
            f"teacher_weights={weights}: expected a positive number for each of the teachers {list(names)} "
            "(--teacher-weights)."
        )


def check_teacher_classes(recipe: "Recipe") -> None:
    """Raise ValueError unless there are classes once for all teachers or once for each, and a fitted head is used."""
    names, classes = recipe.teacher or (), recipe.teacher_classes or ()
    if names and classes and len(classes) not in (1, len(names)):
        raise ValueError(
            f"teacher_classes={list(classes)}: {len(classes)} values for {len(names)} "
            f"{'teachers' if len(names) > 1 else 'teacher'} ({_list(names)}): give --teacher-classes once for all, or "
            "once for each in their order ('auto' for one that has the data's classes)."
        )
    if "none" in classes and recipe.fit_teacher_head != "none":
        raise ValueError(
            f"teacher_classes='none' with fit_teacher_head={recipe.fit_teacher_head!r}: the fitted classifier would "
            "not be used. Leave --teacher-classes or --fit-teacher-head out."
        )


def check_teacher_sequence(recipe: "Recipe") -> None:
    """Raise ValueError unless teachers in sequence have one number of epochs each, and no options of a mixture."""
    if recipe.teachers_as != "sequence":
        why = "it is for teachers that teach one after the other"
        _refuse(recipe, ("teacher_epochs",), why, ", or give --teachers-as sequence")
        return
    why = "teachers_as='sequence' shows the student one teacher at a time"
    _refuse(recipe, ("teacher_weights",), why)
    _refuse(recipe, ("peer",), "with teachers_as='sequence' a second student would begin anew with each teacher")
    _refuse(recipe, ("teacher_store",), "a store holds the outputs of one teacher, and teachers_as='sequence' has more")
    epochs, names = recipe.teacher_epochs, recipe.teacher or ()
    if epochs is not None and len(epochs) != len(names):
        raise ValueError(
            f"teacher_epochs={epochs}: expected a number of epochs for each of the teachers {list(names)}, in their "
            "order (--teacher-epochs)."
        )


def check_teacher_trajectory(recipe: "Recipe") -> None:
    """Raise ValueError for options that need one set of a teacher's weights where its snapshots change them."""
    run = recipe.teacher_trajectory
    if run is None or recipe.teacher is None:
        return
    if recipe.teacher != (plain_model_name(run),):
        raise ValueError(
            f"teacher_trajectory={run!r} names the teacher, and there is also teacher {_list(recipe.teacher)}: leave "
            "--teacher out."
        )
    if recipe.method == "mas":
        raise ValueError(
            f"method='mas' with teacher_trajectory={run!r}: its target is the mean of a teacher's logits and of views "
            "that are fitted to that teacher alone. Choose --method none, or mag (with the trained teacher's codes)."
        )
    names = ["teacher_classes", "fit_teacher_head", "teacher_store", "shard_teacher"]
    names += ["teacher_resize"] if recipe.teacher_resize == "positions" else []
    _refuse(recipe, names, f"snapshots of teacher_trajectory={run!r} are loaded into the teacher as it was trained")


def check_kept_checkpoints(recipe: "Recipe") -> None:
    """Raise ValueError for more snapshots than epochs, and for snapshots of a student."""
    count = recipe.keep_checkpoints
    if count is None:
        return
    if recipe.teacher is not None or recipe.peer is not None:
        _refuse(recipe, ("keep_checkpoints",), "only a model that trains without a teacher (mgd-timm train) keeps them")
    if recipe.qat:
        _refuse(recipe, ("keep_checkpoints",), "the stage of --qat changes the weights after the last snapshot")
    if count > recipe.optim.epochs:
        raise ValueError(
            f"keep_checkpoints={count}: a snapshot is kept at the end of an epoch, and there are {recipe.optim.epochs} "
            "(--keep-checkpoints, --epochs)."
        )


def _refuse(options: Any, names: Iterable[str], why: str, instead: str = "") -> None:
    """Raise ValueError for the first of these options that does not have its default."""
    defaults = {field.name: field.default for field in dataclasses.fields(options)}
    for name in names:
        value = getattr(options, name)
        if value != defaults[name]:
            raise ValueError(f"{name}={value!r}: {why}. Leave {flag(name)} out{instead}.")


def _list(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))
