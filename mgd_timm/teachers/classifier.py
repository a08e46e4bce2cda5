"""A teacher of other classes, fitted to the data's labels before it teaches: a linear probe on its embedding, or
fine-tuning."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch.nn.functional as F
from accelerate import Accelerator
from jaxtyping import Float
from torch import Tensor, nn

from mgd_timm.data.dataset import Images
from mgd_timm.distiller import Teacher
from mgd_timm.distributed.collectives import on_main
from mgd_timm.features import Batch, Features, FeatureTap
from mgd_timm.models.build import build_tap, set_memory_format
from mgd_timm.models.checks import find_class_conflict
from mgd_timm.models.input_adapter import build_input_adapter
from mgd_timm.recipe.options import as_dict
from mgd_timm.recipe.recipe import Optim, Recipe
from mgd_timm.teachers.outputs.memory import store_outputs
from mgd_timm.teachers.pretraining import found_or_fitted, shown_by_teacher
from mgd_timm.training.checkpointer import Upkeep
from mgd_timm.training.evaluation import Metrics
from mgd_timm.training.loop import fit

PROBE_LR = 1e-3


def needs_new_head(model: nn.Module, images: Images) -> bool:
    """Whether a model's classifier is not of the data's classes, by their number or by their names."""
    return (
        getattr(model, "num_classes", 0) != images.num_classes
        or find_class_conflict(model, "teacher", images.class_names) is not None
    )


def new_head(model: nn.Module, images: Images) -> None:
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

    def __init__(self, tap: FeatureTap, view: nn.Module) -> None:
        super().__init__()
        self.tap, self.view = tap, view

    def forward(
        self,
        batch: Batch,
        teacher: Features | None = None,  # noqa: ARG002 - there is none
    ) -> tuple[dict[str, Float[Tensor, ""]], Float[Tensor, "b k"]]:
        """The labels' loss, and the logits."""
        logits = self.tap(self.view(batch.images)).logits
        return {"task": F.cross_entropy(logits, batch.labels)}, logits


def fit_teacher_heads(
    models: Sequence[nn.Module], images: Images, recipe: Recipe, accelerator: Accelerator, *, quiet: bool = False
) -> list[Metrics]:
    """Fit teachers to the labels, in place: found again by a digest of all that makes them, as everything that is
    fitted first.

    "probe" trains the classifier on the embeddings of `heads_views` stored views of each image, with AdamW; "finetune"
    trains the whole network on the images by the run's rule. Both for `fitting_epochs` passes over the images, at
    `fitting_lr`.

    Returns:
        The training loss of each.

    Raises:
        ValueError: A probe of a network whose classifier is no one module on its embedding.
    """
    found = []
    for number, model in enumerate(models, start=1):
        name = "teacher_head" if len(models) == 1 else f"teacher_head_{number}"
        view = build_input_adapter(model, images.mean, images.std, images.input_size, recipe.teacher_img_size)
        tap = build_tap(model, (images.input_size[0], *(view.size or images.input_size[1:])), None)
        teacher = Teacher(tap, input_adapter=view).to(accelerator.device)
        set_memory_format(teacher, tap.name, recipe.channels_last, accelerator.device)
        found.append(_fit_one(name, teacher, images, recipe, accelerator, quiet))
    return found


def _fit_one(
    name: str, teacher: Teacher, images: Images, recipe: Recipe, accelerator: Accelerator, quiet: bool
) -> Metrics:
    probe, model = recipe.fit_teacher_head == "probe", teacher.tap.model
    check_probe(teacher.tap, recipe)
    if probe:
        passes = -(-recipe.fitting_epochs // recipe.heads.heads_views)
        optim = Optim(epochs=passes, opt="adamw", lr=recipe.fitting_lr or PROBE_LR, weight_decay=1e-4)
        optim = replace(optim, global_batch_size=recipe.heads.heads_batch_size)
    else:
        epochs = recipe.fitting_epochs
        optim = replace(
            recipe.optim, epochs=epochs, model_ema=False, warmup_epochs=min(recipe.optim.warmup_epochs, epochs)
        )
        optim = replace(optim, lr=recipe.fitting_lr or recipe.optim.lr / 10)
    made_of = {
        **shown_by_teacher(teacher, images, recipe, accelerator),
        "head": recipe.fit_teacher_head,
        "optim": as_dict(optim, digest_only=True),
    }
    made_of["views"] = recipe.heads.heads_views if probe else None
    folder = Path(recipe.output) / name

    def fit_fresh() -> Metrics:
        on_main(accelerator, lambda: folder.mkdir(parents=True, exist_ok=True))
        upkeep = Upkeep(
            folder=folder,
            fingerprint=made_of,
            stage=name,
            resume=recipe.resume,
            log_interval=recipe.log_interval,
            quiet=quiet,
            track=False,
            advice="Lower --fitting-lr, or clip gradients (--clip-grad 1).",
        )
        if probe:
            upkeep = replace(upkeep, memory_advice="give a smaller --heads-batch-size.")
        trainee: nn.Module = (
            _Probe(cast(nn.Module, teacher.tap.classifier))
            if probe
            else _FineTuning(teacher.tap, teacher.input_adapter)
        )
        trainee.requires_grad_(True)
        try:
            options: dict[str, Any] = {"seed": recipe.seed, "upkeep": upkeep}
            if probe:
                views, size = recipe.heads.heads_views, recipe.data.validation_batch_size
                stored = store_outputs(
                    lambda batch: teacher(batch.images), images.train, views, accelerator, size, quiet
                )
                batch_size = max(
                    2, -(-recipe.heads.heads_batch_size // accelerator.num_processes)
                )  # one step of all processes
                return fit(
                    trainee, stored, optim, accelerator, batch_size=batch_size, teach=stored.features, **options
                ).losses
            size = recipe.data.batch_size
            return fit(trainee, images.train, optim, accelerator, batch_size=size, **options).losses
        finally:
            teacher.requires_grad_(False)
            teacher.eval()

    losses, found = found_or_fitted(name, model, made_of, accelerator, fit_fresh)
    said = "from the cache" if found else f"{recipe.fitting_epochs} epoch{'s' if recipe.fitting_epochs > 1 else ''}"
    accelerator.print(
        f"teacher {teacher.tap.name}: {recipe.fit_teacher_head}, {said}; last loss of the labels {losses['task']:.4g}"
    )
    return losses


def check_probe(tap: FeatureTap, recipe: Recipe) -> None:
    """Raise ValueError where the recipe asks for a probe, and logits do not follow from the embedding by one module."""
    if recipe.fit_teacher_head == "probe" and tap.classifier is None:
        raise ValueError(
            f"fit_teacher_head='probe': no single module maps the embedding of {tap.name} to logits: choose 'finetune'."
        )
