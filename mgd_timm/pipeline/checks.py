"""Refuse recipes and networks that contradict each other, before anything is written."""

from collections.abc import Sequence

from torch import nn

from mgd_timm.criteria.terms import Terms
from mgd_timm.data.dataset import Images
from mgd_timm.distributed.sharding import fsdp_requested
from mgd_timm.features.tap import model_name
from mgd_timm.models.checks import find_class_conflict
from mgd_timm.models.load import check_model_name
from mgd_timm.recipe.recipe import Recipe
from mgd_timm.teachers.channel_matching import check_solver
from mgd_timm.training.optimizer import check_names


def check_recipe(recipe: Recipe, terms: Terms) -> None:
    """Refuse what can be refused without data and networks.

    Raises:
        ValueError: An unknown name, or options that contradict each other.
    """
    check_names(recipe.optim)
    check_mixed_images(recipe, terms)
    check_own_step(recipe, terms)
    if recipe.data.streaming:
        check_streaming(recipe, terms)
    if recipe.peer is not None:
        check_model_name(recipe.peer)
        check_two_networks(recipe, terms)
    if recipe.teacher is not None and recipe.teacher_store is not None:
        check_storable(terms)
    if recipe.qat and fsdp_requested():
        raise ValueError(
            "qat with FSDP: it rounds whole weights, and FSDP shards them. Leave --qat out, or launch without FSDP "
            "(accelerate launch --multi_gpu)."
        )
    if recipe.method == "none" and recipe.heads.code_divergence != "forward":
        raise ValueError(
            f"code_divergence={recipe.heads.code_divergence!r} with method='none', which has no codes: give --method "
            "mag or mas, or leave --code-divergence out."
        )
    if recipe.match_channels is not None:
        check_channels_are_matched(terms)
    if recipe.teacher_trajectory is not None:
        check_followable(terms)
    if recipe.for_student is not None:
        check_model_name(recipe.for_student)
        if fsdp_requested():
            raise ValueError(
                "for_student with FSDP: its branches are not sharded. Leave --for-student out, or launch without FSDP "
                "(accelerate launch --multi_gpu)."
            )


def check_own_step(recipe: Recipe, terms: Terms) -> None:
    """Raise ValueError for options that a criterion with a step of its own does not go with."""
    name = next((name for name, term in terms.active.items() if term.kind.own_step), None)
    if name is None:
        return
    refused = {
        "FSDP": (fsdp_requested(), "launch without FSDP (accelerate launch --multi_gpu)"),
        "find_batch_size": (recipe.optim.find_batch_size, "give a --batch-size in place of --find-batch-size"),
        "amp_dtype='float16'": (recipe.amp and recipe.amp_dtype == "float16", "give --amp-dtype bfloat16"),
        "qat": (recipe.qat, "leave --qat out"),
        "several teachers": (len(recipe.teacher or ()) > 1, "name one --teacher"),
    }
    for option, (given, way_out) in refused.items():
        if given:
            raise ValueError(
                f"criterion {name!r} with {option}: its own step, which differentiates through a step of the student, "
                f"does not go with it. Leave {name} out, or {way_out}."
            )


def check_two_networks(recipe: Recipe, terms: Terms) -> None:
    """Raise ValueError for what does not go with two students, or with a teacher that trains along."""
    name = terms.trained_teacher
    if name is None:
        if recipe.optim.model_ema:
            raise ValueError(
                f"model_ema=True: it averages one student, and with peer={recipe.peer!r} there are two. Leave "
                "--model-ema out."
            )
        return
    if recipe.method != "none":
        raise ValueError(
            f"method={recipe.method!r} with criterion {name!r}: the heads of MAG and MAS are fitted on a frozen "
            f"teacher, and that of {name} trains in the run. Leave --method out, or {name}."
        )
    mutual = [term.criterion for term in terms.active.values() if term.kind.peers and not term.kind.trains_teacher]
    if mutual:
        raise ValueError(
            f"criterion {name!r} with {', '.join(mutual)}, by which the two networks teach each other: with {name} "
            "only the student is taught. Leave one of them out."
        )
    if "task" not in terms.active:
        raise ValueError(
            f"task_weight=0 with criterion {name!r}, whose teacher learns its logits from the task's loss: give a "
            "positive --task-weight."
        )


def check_mixed_images(recipe: Recipe, terms: Terms) -> None:
    """Raise ValueError if images are mixed or repeated and an option needs single images."""
    data = recipe.data
    mixing = [f"{name}={getattr(data, name)}" for name in ("mixup", "cutmix") if getattr(data, name)]
    mixing += [f"aug_repeats={data.aug_repeats}"] if data.aug_repeats > 1 else []
    if mixing and recipe.teacher_store is not None:
        raise ValueError(
            f"{', '.join(mixing)} with teacher_store={recipe.teacher_store!r}: a store holds the teacher's outputs of "
            "single images, not of mixed or repeated ones. Leave --teacher-store out, or the other option."
        )
    rotating = rotating_criterion(terms)
    if mixing and rotating is not None:
        raise ValueError(
            f"{', '.join(mixing)} with criterion {rotating!r}, which compares each image with rotations of itself and "
            f"reads its class: leave {rotating} out, or the other option."
        )
    if mixing and "crd" in terms.active:
        raise ValueError(
            f"{', '.join(mixing)} with criterion 'crd', which stores one embedding of each image under its class: "
            "leave crd out, or the other option."
        )


def check_streaming(recipe: Recipe, terms: Terms) -> None:
    """Raise ValueError where something has to know an image of a stream again in the next epoch."""
    if recipe.fit_teacher_head == "probe":
        raise ValueError(
            "streaming with fit_teacher_head='probe', which stores the teacher's embedding of every image: give "
            "--fit-teacher-head finetune."
        )
    if recipe.teacher_store is not None:
        raise ValueError(
            f"streaming with teacher_store={recipe.teacher_store!r}, which holds outputs by image: leave --streaming "
            "or --teacher-store out."
        )
    fitted = recipe.method != "none" or rotating_criterion(terms) is not None
    if recipe.teacher is not None and fitted and recipe.heads.heads_protocol == "stored":
        raise ValueError(
            "streaming with heads_protocol='stored', which stores the teacher's outputs of all images: give "
            "--heads-protocol live and a few --heads-epochs, each a pass over the stream."
        )
    if recipe.match_channels is not None:
        raise ValueError(
            "streaming with match_channels, which shows both networks images before the first epoch: leave --streaming "
            "or --match-channels out."
        )
    if "crd" in terms.active:
        raise ValueError(
            "streaming with criterion 'crd', which stores an embedding of each image: choose another --criterion."
        )


def rotating_criterion(terms: Terms) -> str | None:
    """Return the name of a criterion with a weight that reads features of rotated images, or None."""
    return next((name for name, term in terms.active.items() if term.kind.rotates), None)


def check_rotates(terms: Terms, images: Images) -> None:
    """Raise ValueError for images that are not square, or without one class each, where a criterion rotates them."""
    name, (_, height, width) = rotating_criterion(terms), images.input_size
    if name is None:
        return
    if height != width:
        raise ValueError(
            f"criterion {name!r} rotates images by 90 degrees, and these are {height}x{width}: give square ones, such "
            f"as --img-size {min(height, width)}."
        )
    if images.train.labels.ndim == 2:
        raise ValueError(
            f"criterion {name!r} asks whether the teacher finds the class of an image, and the labels are "
            f"distributions over {images.num_classes} classes: use labels that are classes, or leave {name} out."
        )


def check_channels_are_matched(terms: Terms) -> None:
    """Raise ValueError if no criterion reads maps whose channels could be matched, one has maps of its own, or scipy is
    missing."""
    fitted = [term.criterion for term in terms.active.values() if term.kind.fits is not None]
    if fitted:
        raise ValueError(
            f"match_channels with {', '.join(fitted)}, fitted on the teacher's maps before the run: leave "
            "--match-channels or the criterion out."
        )
    if not terms.needs("maps"):
        raise ValueError(
            f"match_channels: none of {', '.join(terms.active)} reads the teacher's maps. Choose a criterion that does "
            "(--criterion afds), or leave --match-channels out."
        )
    check_solver()


def check_storable(terms: Terms) -> None:
    """Raise ValueError where a criterion with a weight reads of the teacher what a store does not hold."""
    rotating = rotating_criterion(terms)
    if rotating is not None:
        raise ValueError(
            f"criterion {rotating!r} reads the teacher's outputs of rotated images, and a teacher store holds those of "
            "the images themselves only: leave --teacher-store out."
        )
    for name, term in terms.active.items():
        lacking = sorted(term.kind.needs - {"logits", "embedding"})
        if lacking:
            raise ValueError(
                f"criterion {name!r} reads the teacher's {', '.join(lacking)}, and a teacher store holds its logits "
                "and embedding only: leave --teacher-store out."
            )


def check_followable(terms: Terms) -> None:
    """Raise ValueError where a criterion with a weight reads more of a teacher than the logits of its snapshots, or
    none reads these."""
    for term in terms.active.values():
        beyond = ", ".join(sorted(term.kind.needs - {"logits"}))
        if beyond or term.kind.fits is not None:
            why = f"reads the teacher's {beyond}" if beyond else "is fitted on one teacher before the run"
            raise ValueError(
                f"criterion {term.criterion!r} {why}, and a student follows a trajectory by the teacher's logits: "
                "leave it or --teacher-trajectory out."
            )
    if not any("logits" in term.kind.needs for term in terms.active.values()):
        raise ValueError(
            f"teacher_trajectory: none of {', '.join(terms.active)} reads the teacher's logits, which are what changes "
            "along it. Name kd or another criterion of logits, or leave --teacher-trajectory out."
        )


def check_several_teachers(terms: Terms, count: int, *, mean: bool) -> None:
    """Raise ValueError for criteria that several teachers cannot serve together."""
    for term in terms.active.values():
        name, kind = term.criterion, term.kind
        if kind.fits is not None:
            raise ValueError(f"{name} is fitted on one teacher before the run, and there are {count}: leave it out.")
        beyond = ", ".join(sorted(kind.needs - {"logits"}))
        if not kind.needs and not mean and term is not terms.by_name["task"]:
            raise ValueError(
                f"{name} reads no teacher, and teachers_as='sum' has each criterion once for each of the {count}: give "
                f"--teachers-as mean, or leave {name} out."
            )
        if beyond and mean:
            raise ValueError(
                f"{name} reads a teacher's {beyond}, of which several have no mean: give --teachers-as sum."
            )


def logits_conflict(model: nn.Module, class_names: Sequence[str]) -> str | None:
    """Return what a teacher has instead of logits of the data's classes, or None if it has them."""
    count = int(getattr(model, "num_classes", 0) or 0)
    if not count:
        return "no classifier"
    if count != len(class_names):
        return f"{count} classes, the data {len(class_names)}"
    conflict = find_class_conflict(model, "teacher", class_names)
    return f"other classes ({conflict})" if conflict is not None else None


def check_teaches_without_logits(
    model: nn.Module, terms: Terms, recipe: Recipe, conflict: str, *, silent: bool
) -> None:
    """Raise ValueError where something reads the logits of a teacher that shows none of the data's classes.

    Under mas the views of a teacher without a classifier, or of one that is silent, are fitted on the labels and stand
    for its logits.

    Args:
        model: The teacher.
        terms: Of the run.
        recipe: Of the run.
        conflict: As `logits_conflict` has it; empty where its logits would be of the data's classes.
        silent: Its logits are left out on purpose (--teacher-classes none).
    """
    name = model_name(model)
    views_stand_in = recipe.method == "mas" and (silent or not getattr(model, "num_classes", 0))
    # Views stand in for the logits of the images themselves.
    reading = [term.criterion for term in terms.active.values() if "cams" in term.kind.needs or term.kind.rotates]
    if not views_stand_in:
        reading += ["--sample-weight"] if terms.sample_weight is not None else []
        others = [term for term in terms.active.values() if term.criterion not in reading]
        reading += [term.criterion for term in others if "logits" in term.kind.needs]
    if reading or (recipe.method == "mas" and not views_stand_in):
        has = conflict or "logits that --teacher-classes none leaves out"
        raise ValueError(
            f"the teacher {name} has {has}, and {', '.join(reading) or 'mas'} reads its logits. Ways out: its rows "
            "for the data's classes (--teacher-classes auto or FILE); a classifier fitted to it first "
            "(--fit-teacher-head probe or finetune); views of it that are fitted on the labels in place of its logits "
            "(--method mas --teacher-classes none); or criteria that read none (--criterion at --kd-weight 0 --method "
            "none or mag)."
        )
    if recipe.teacher_store is not None:
        raise ValueError(
            f"teacher_store={recipe.teacher_store!r}: the teacher {name} shows no logits of the data's classes, and a "
            "store holds them: leave --teacher-store out."
        )
