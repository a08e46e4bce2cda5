"""How a student was trained, in the words of a card."""

import re
from typing import Any

from mgd_timm.criteria import CRITERIA
from mgd_timm.criteria.terms import Term
from mgd_timm.hub.markdown import escape, pairs
from mgd_timm.hub.metadata import base_model, dataset_name
from mgd_timm.hub.student import Student
from mgd_timm.pipeline.plan import terms_of
from mgd_timm.pipeline.turns import turns_of
from mgd_timm.recipe.data import Data
from mgd_timm.recipe.recipe import Recipe

MGD = "https://arxiv.org/abs/2108.06681"
METHODS = {
    "mag": "MAG: the student also learns the codes of an abstract and a detailed head on the teacher",
    "mas": (
        "MAS: the student also learns the codes of an abstract and a detailed head on the teacher, and the mean of "
        "the teacher's logits and both heads' in place of the teacher's logits"
    ),
}


def training_table(student: Student, recipe: Recipe) -> str:
    """Return the options of the run that decide the weights."""
    optim, data, versions = recipe.optim, recipe.data, student.origin.get("versions", {})
    metrics = student.origin.get("metrics", {})
    decay = f", milestones {_numbers(optim.milestones)}" if optim.sched == "multistep" else ""
    warmup = f", {_count(optim.warmup_epochs, 'epoch', 'epochs')} of warm-up" if optim.warmup_epochs else ""
    used = ("python", "torch", "timm", "mgd-timm", "accelerate")
    rows = [
        ("data", escape(dataset_name(recipe)) + _images(student)),
        ("starting weights", _start(recipe)),
        *_taught_rows(recipe),
        ("epochs", _epochs(recipe)),
        ("updates", f"{metrics['updates']:,}") if "updates" in metrics else None,
        ("images per update", f"{optim.global_batch_size or data.batch_size}"),
        ("optimizer", f"{_optimizer(recipe)}, weight decay {optim.weight_decay:g}"),
        ("learning rate", f"{optim.lr:g}, {escape(optim.sched)}{decay}{warmup}"),
        ("gradient clipping", f"{optim.clip_grad:g}") if optim.clip_grad is not None else None,
        ("moving average", f"decay {optim.model_ema_decay:g}; it is what is exported") if optim.model_ema else None,
        ("regularisation", _regularisation(recipe)),
        ("augmentation", _augmentation(student, data)),
        ("precision", _precision(student, recipe)),
        ("seed", f"{recipe.seed}"),
        ("versions", escape(", ".join(f"{name} {versions[name]}" for name in used if versions.get(name)), 200)),
    ]
    return pairs([row for row in rows if row is not None and row[1]])


def _images(student: Student) -> str:
    return f", {student.origin['train_images']:,} training images" if "train_images" in student.origin else ""


def _precision(student: Student, recipe: Recipe) -> str:
    found = student.origin.get("precision", recipe.amp_dtype if recipe.amp else "no")
    return "float32" if found == "no" else escape(f"mixed, {found}")


def _start(recipe: Recipe) -> str:
    base = base_model(recipe)
    if base is not None:
        return f"[{base}](https://huggingface.co/{base})"
    if recipe.student_pretrained:
        return f"timm's of `{recipe.student}`"
    return "a file of the author's" if recipe.student_checkpoint is not None else "random"


def _taught_rows(recipe: Recipe) -> list[tuple[str, str]]:
    """Return the rows of method and criteria."""
    terms = terms_of(recipe).active
    rows = [("method", f"{METHODS[recipe.method]} ([paper]({MGD}))")] if recipe.method in METHODS else []
    rows += [("taught", text) for text in [_how_taught(recipe)] if text]
    rows += [(f"loss `{name}`", _describe_term(name, term)) for name, term in terms.items()]
    if recipe.method in METHODS:
        heads = recipe.heads
        for one in heads.granularities:
            rows.append((f"loss `{one.name}`", f"weight {one.weight:g}, a head of {one.dim} dimensions"))
        passes = f"{_count(heads.heads_epochs, 'pass', 'passes')} over the images" + (
            ", live" if heads.heads_protocol == "live" else ""
        )
        rows.append(("heads", f"fitted on the frozen teacher first: {passes}"))
    return rows


def _epochs(recipe: Recipe) -> str:
    counts = [turn.recipe.optim.epochs for turn in turns_of(recipe)]
    return (
        f"{sum(counts)}: {' + '.join(map(str, counts))}, one number per teacher" if len(counts) > 1 else f"{counts[0]}"
    )


def _how_taught(recipe: Recipe) -> str:
    """Return what a run's options say of its teachers besides the losses, in words; empty where there is nothing."""
    parts = []
    if recipe.teachers_as == "sequence" and len(recipe.teacher or ()) > 1:
        parts.append("by one teacher after the other")
    if recipe.teacher_trajectory is not None:
        parts.append("by snapshots of the teacher's own training, in their order")
    if recipe.peer is not None:
        parts.append(f"together with a second network, {escape(recipe.peer)}")
    if recipe.for_student is not None:
        parts.append(f"to be a teacher for {escape(recipe.for_student)}, with branches into its tail")
    if recipe.match_channels is not None:
        parts.append("with the teacher's channels re-ordered to the student's")
    if recipe.sample_weight != "none":
        parts.append("with samples weighted by the teacher's certainty")
    if recipe.method != "none" and recipe.heads.code_divergence != "forward":
        parts.append(f"with the {recipe.heads.code_divergence} divergence of the codes")
    return "; ".join(parts)


def _describe_term(name: str, term: Term) -> str:
    options = dict(term.options)
    if name == "kd":
        options.setdefault("temperature", 4.0)
    parts = [f"weight {term.weight:g}", *(f"{key} {value}" for key, value in options.items())]
    parts += [f"rising over {_count(term.warmup, 'epoch', 'epochs')}"] if term.warmup else []
    reference = "" if name in ("task", "kd") else f" ({escape(reference_of(term.criterion), 400)})"
    about = {"task": "cross-entropy with the labels: ", "kd": "KL divergence of logits: "}.get(name, "")
    return about + escape(", ".join(parts)) + reference


def reference_of(criterion: str) -> str:
    """Return the paper of a criterion, as its docstring cites it."""
    found = re.search(r"Reference: (.*?\))", CRITERIA[criterion].__doc__ or "", re.DOTALL)
    return " ".join(found[1].split()) if found else criterion


def _optimizer(recipe: Recipe) -> str:
    words = {"momentum": "SGD with momentum", "sgd": "SGD with Nesterov momentum"}
    if recipe.optim.opt in words:
        return f"{words[recipe.optim.opt]} {recipe.optim.momentum:g}"
    return escape(recipe.optim.opt)


def _regularisation(recipe: Recipe) -> str:
    values = {
        "label smoothing": recipe.smoothing,
        "dropout": recipe.drop,
        "stochastic depth": recipe.drop_path,
    }
    return ", ".join(f"{name} {value:g}" for name, value in values.items() if value)


def _augmentation(student: Student, data: Data) -> str:
    """Return the augmentations that are on."""
    small = student.config["pretrained_cfg"].get("crop_mode") == "squash"  # as runs on small images write it
    shown: dict[str, Any] = {
        "horizontal flip": data.hflip,
        "padding before a random crop": data.pad if small else None,
        "random crop of the area": None if small else "-".join(f"{value:g}" for value in data.scale),
        "auto-augment": data.aa,
        "colour jitter": data.color_jitter,
        "random erasing": data.reprob,
        "mixup": data.mixup,
        "cutmix": data.cutmix,
        "repeated": data.aug_repeats,
    }
    return escape(", ".join(f"{name} {value}" for name, value in shown.items() if value), 300)


def _count(number: float, one: str, several: str) -> str:
    return f"{number:g} {one if number == 1 else several}"


def _numbers(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:g}" for value in values)
