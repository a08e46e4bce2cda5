"""Refuse recipes and networks that contradict each other, before anything is written."""

from collections.abc import Sequence

from torch import nn

from mgd_timm.criteria.terms import Terms
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
    if recipe.data.streaming:
        check_streaming(recipe, terms)
    if recipe.peer is not None:
        check_model_name(recipe.peer)
    if recipe.teacher is not None and recipe.teacher_store is not None:
        check_storable(terms)
    if recipe.qat and fsdp_requested():
        raise ValueError(
            "qat with FSDP: it rounds whole weights, and FSDP shards them. Leave --qat out, or launch without FSDP "
            "(accelerate launch --multi_gpu)."
        )
    if recipe.match_channels is not None:
        check_channels_are_matched(terms)
    if recipe.for_student is not None:
        check_model_name(recipe.for_student)
        if fsdp_requested():
            raise ValueError(
                "for_student with FSDP: its branches are not sharded. Leave --for-student out, or launch without FSDP "
                "(accelerate launch --multi_gpu)."
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
    if recipe.teacher is not None and recipe.method != "none" and recipe.heads.heads_protocol == "stored":
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
    for name, term in terms.active.items():
        lacking = sorted(term.kind.needs - {"logits", "embedding"})
        if lacking:
            raise ValueError(
                f"criterion {name!r} reads the teacher's {', '.join(lacking)}, and a teacher store holds its logits "
                "and embedding only: leave --teacher-store out."
            )


def check_several_teachers(terms: Terms, count: int, *, mean: bool) -> None:
    """Raise ValueError for criteria that several teachers cannot serve together."""
    for term in terms.active.values():
        name, kind = term.criterion, term.kind
        if kind.fits is not None:
            raise ValueError(f"{name} is fitted on one teacher before the run, and there are {count}: leave it out.")
        beyond = ", ".join(sorted(kind.needs - {"logits"}))
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
    reading = [term.criterion for term in terms.active.values() if "cams" in term.kind.needs]
    if not views_stand_in:
        reading += [term.criterion for term in terms.active.values() if "logits" in term.kind.needs]
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
