"""A teacher of other classes, fitted to the data's labels before it teaches: a linear probe on its embedding, or
fine-tuning."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mgd_timm.data.dataset import Images
from mgd_timm.distiller import Teacher
from mgd_timm.features import Batch, Features, FeatureTap
from mgd_timm.models.checks import find_class_conflict
from mgd_timm.recipe.optim import Optim
from mgd_timm.recipe.options import as_dict
from mgd_timm.teachers.outputs.memory import store_outputs
from mgd_timm.teachers.pretraining import RunContext, epochs_text, load_or_fit
from mgd_timm.training.evaluation import Metrics
from mgd_timm.training.loop import fit
from mgd_timm.training.options import FitOptions

PROBE_LR = 1e-3


def needs_new_classifier(model: nn.Module, images: Images) -> bool:
    """True unless a model's classifier is of the data's classes, by their number and by their names."""
    return (
        getattr(model, "num_classes", 0) != images.num_classes
        or find_class_conflict(model, "teacher", images.class_names) is not None
    )


def reset_classifier(model: nn.Module, images: Images) -> None:
    """Give a model a fresh classifier of the data's classes, in place.

    Raises:
        ValueError: An encoder that timm builds no classifier for.
    """
    if not hasattr(model, "reset_classifier"):
        raise ValueError(
            f"fit_teacher_head: {type(model).__name__} is an encoder that timm gives no classifier: use views of it "
            "in place of logits (--method mas --teacher-classes none), or criteria that read none."
        )
    cast(Any, model).reset_classifier(images.num_classes)
    config = {k: v for k, v in (getattr(model, "pretrained_cfg", {}) or {}).items() if k != "label_descriptions"}
    model.pretrained_cfg = {**config, "num_classes": images.num_classes, "label_names": images.class_names}  # type: ignore[assignment]


class _Probe(nn.Module):
    """Cross-entropy of a classifier on the frozen embedding."""

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, batch: Batch, teacher: Features) -> tuple[dict[str, Float[Tensor, ""]], Float[Tensor, "b k"]]:
        """The labels' loss, and the logits."""
        logits = self.classifier(teacher.embedding)
        return {"task": F.cross_entropy(logits, batch.labels)}, logits


class _FineTuning(nn.Module):
    """Cross-entropy of a whole network, which sees the images as the teacher will."""

    def __init__(self, tap: FeatureTap, input_adapter: nn.Module) -> None:
        super().__init__()
        self.tap, self.input_adapter = tap, input_adapter

    def forward(
        self,
        batch: Batch,
        teacher: Features | None = None,  # noqa: ARG002 - there is none
    ) -> tuple[dict[str, Float[Tensor, ""]], Float[Tensor, "b k"]]:
        """The labels' loss, and the logits."""
        logits = self.tap(self.input_adapter(batch.images)).logits
        return {"task": F.cross_entropy(logits, batch.labels)}, logits


@dataclass(frozen=True)
class ClassifierFit:
    """How teachers' classifiers are fitted to the data's labels.

    Args:
        how: "probe" or "finetune".
        epochs: Passes over the images.
        lr: None leaves it to the default: 1e-3 for a probe, a tenth of the run's for fine-tuning.
        augmentations: Stored augmentations of each image that a probe is trained on.
        batch_size: Of a probe, over all processes.
        optim: The run's rule, which fine-tuning follows.
    """

    how: Literal["probe", "finetune"]
    epochs: int
    lr: float | None
    augmentations: int
    batch_size: int
    optim: Optim

    def rule(self) -> Optim:
        """Optimizer and schedule of the fit."""
        if self.how == "probe":
            passes = -(-self.epochs // self.augmentations)
            optim = Optim(epochs=passes, opt="adamw", lr=self.lr or PROBE_LR, weight_decay=1e-4)
            return replace(optim, global_batch_size=self.batch_size)
        optim = self.optim.with_epochs(self.epochs)
        return replace(optim, lr=self.lr or self.optim.lr / 10, model_ema=False)


def fit_classifiers(teachers: Sequence[Teacher], options: ClassifierFit, context: RunContext) -> list[Metrics]:
    """Fit teachers to the labels, in place, or load them from the cache.

    "probe" trains the classifier on the embeddings of stored augmentations of each image, with AdamW; "finetune" trains
    the whole network on the images by the run's rule.

    Returns:
        The training loss of each.
    """
    found = []
    input_size = context.images.input_size
    for number, teacher in enumerate(teachers, start=1):
        name = "teacher_head" if len(teachers) == 1 else f"teacher_head_{number}"
        tap = FeatureTap(teacher.tap.model, input_size=(input_size[0], *teacher.size(input_size[1:])))
        found.append(
            _fit_one(name, Teacher(tap, input_adapter=teacher.input_adapter, digest=teacher.digest), options, context)
        )
    return found


def _fit_one(name: str, teacher: Teacher, options: ClassifierFit, context: RunContext) -> Metrics:
    optim = options.rule()
    made_of = {
        **context.teacher_fingerprint(teacher),
        "head": options.how,
        "optim": as_dict(optim, digest_only=True),
        "augmentations": options.augmentations if options.how == "probe" else None,
    }

    def fit_module() -> Metrics:
        try:
            if options.how == "probe":
                return _fit_probe(teacher, optim, options, context.fit_options(name, made_of), context)
            trainee = _FineTuning(teacher.tap, teacher.input_adapter).requires_grad_(True)
            return fit(
                trainee,
                context.images.train,
                optim,
                context.accelerator,
                seed=context.seed,
                batch_size=context.data.batch_size,
                options=context.fit_options(name, made_of),
            ).losses
        finally:
            teacher.requires_grad_(False)
            teacher.eval()

    fitted = load_or_fit(name, teacher.tap.model, made_of, context.accelerator, fit_module)
    context.accelerator.print(
        f"teacher {teacher.tap.name}: {options.how}, {epochs_text(fitted, options.epochs)}; last loss of the labels "
        f"{fitted.metrics['task']:.4g}"
    )
    return fitted.metrics


def _fit_probe(
    teacher: Teacher, optim: Optim, options: ClassifierFit, fit_options: FitOptions, context: RunContext
) -> Metrics:
    """Train the classifier on stored embeddings."""
    accelerator = context.accelerator
    stored = store_outputs(
        lambda batch: teacher(batch.images),
        context.images.train,
        options.augmentations,
        accelerator,
        context.data.validation_batch_size,
        context.quiet,
    )
    return fit(
        _Probe(cast(nn.Module, teacher.tap.classifier)).requires_grad_(True),
        stored,
        optim,
        accelerator,
        seed=context.seed,
        batch_size=max(2, -(-options.batch_size // accelerator.num_processes)),  # one step of all processes
        teach=stored.features,
        options=replace(fit_options, memory_hint="give a smaller --heads-batch-size."),
    ).losses


def check_probe(tap: FeatureTap) -> None:
    """Raise ValueError unless a single module maps the embedding to logits, as a probe needs."""
    if tap.classifier is None:
        raise ValueError(
            f"fit_teacher_head='probe': no single module maps the embedding of {tap.name} to logits: choose 'finetune'."
        )
