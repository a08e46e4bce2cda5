"""Refuse recipes whose parts contradict each other, before anything is read or written."""

from mgd_timm.criteria import CRITERIA
from mgd_timm.criteria.terms import parse_terms
from mgd_timm.recipe.recipe import Recipe


def check_taught(recipe: Recipe) -> None:
    """Raise ValueError where what reads images one by one stands beside what mixes, repeats or streams them."""
    data = recipe.data
    if data.streaming:
        check_streamed(recipe)
    names = [name for name in ("mixup", "cutmix") if getattr(data, name)] + (
        ["aug_repeats"] if data.aug_repeats > 1 else []
    )
    if not names:
        return
    said = ", ".join(f"{name}={getattr(data, name)}" for name in names)
    if recipe.teacher_store is not None:
        raise ValueError(
            f"{said} beside teacher_store={recipe.teacher_store!r}: a store holds the teacher's outputs image by "
            "image, once a view. Leave one of both out."
        )
    if recipe.teacher is None and recipe.peer is None:
        return
    term = parse_terms(recipe).get("crd")
    if term is not None and term.weight:
        raise ValueError(
            f"{said} beside criterion 'crd', which keeps one embedding of each image, as of its class: leave one of "
            "both out."
        )


def check_streamed(recipe: Recipe) -> None:
    """A stream's images have no number by which they are known again in the next epoch."""
    if recipe.fit_teacher_head == "probe":
        raise ValueError(
            "streaming beside fit_teacher_head='probe', which keeps the teacher's embedding of every image: choose "
            "'finetune'."
        )
    if recipe.teacher_store is not None:
        raise ValueError(
            f"streaming beside teacher_store={recipe.teacher_store!r}, which holds outputs by image: leave one of "
            "both out."
        )
    if recipe.teacher is not None and recipe.method != "none" and recipe.heads.heads_protocol == "stored":
        raise ValueError(
            "streaming beside heads_protocol='stored', which keeps the teacher's outputs of all images: give "
            "--heads-protocol live and a few --heads-epochs, each a pass over the stream."
        )
    if (
        (recipe.teacher is not None or recipe.peer is not None)
        and "crd" in (terms := parse_terms(recipe))
        and terms["crd"].weight
    ):
        raise ValueError(
            "streaming beside criterion 'crd', which keeps an embedding of each image: choose another criterion."
        )


def check_storable(recipe: Recipe) -> None:
    """Raise ValueError where a criterion with a weight reads of the teacher what a store does not hold."""
    for name, term in parse_terms(recipe).items():
        lacking = sorted(CRITERIA[term.criterion].needs - {"logits", "embedding"}) if term.weight else []
        if lacking:
            raise ValueError(
                f"criterion {name!r} reads the teacher's {', '.join(lacking)}, and a teacher store holds its logits "
                "and embedding only: leave --teacher-store out."
            )
