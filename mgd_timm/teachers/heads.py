"""The granularity heads of a teacher: fitted once, cached by a digest of all that made them, and measured."""

from dataclasses import dataclass, replace

from accelerate import Accelerator
from torch import Tensor, nn

from mgd_timm.data.rng import set_seed
from mgd_timm.data.sources import Source
from mgd_timm.distiller import LiveTeachers, Teacher
from mgd_timm.features import Batch, Features, extract_with_rotations
from mgd_timm.granularity import GranularityHeads, HeadFitting, stable_excitation
from mgd_timm.recipe.heads import Heads
from mgd_timm.recipe.optim import Optim
from mgd_timm.recipe.options import as_dict
from mgd_timm.teachers.outputs.memory import OutputsOnce, StoredOutputs, read_outputs, store_outputs
from mgd_timm.teachers.outputs.store import TeacherStore
from mgd_timm.teachers.pretraining import RunContext, load_or_fit
from mgd_timm.training.evaluation import Metrics, evaluate
from mgd_timm.training.loop import Evaluate, fit
from mgd_timm.training.options import FitOptions
from mgd_timm.training.step import Teach

FAR_BELOW = 3.0  # points of top-1: the paper's heads are within about 1 of their teacher


@dataclass(frozen=True)
class FittedHeads:
    """Heads, and their top-1 accuracies: "teacher", each granularity's, and "top1" of the stable logits."""

    heads: GranularityHeads
    metrics: Metrics


def outputs_once(teacher: Teacher, options: Heads, context: RunContext, *, rotate: bool = False) -> OutputsOnce:
    """Return the outputs of a teacher that its heads are fitted on under the "stored" protocol, as yet to be computed.

    Args:
        teacher: Without heads.
        options: Of the heads.
        context: Of the run.
        rotate: Store the embeddings of the images' rotations too.
    """
    size = context.data.validation_batch_size

    def store() -> StoredOutputs:
        return store_outputs(
            lambda batch: extract_with_rotations(teacher, batch.images) if rotate else teacher(batch.images),
            context.images.train,
            options.heads_augmentations,
            context.accelerator,
            max(1, size // 4) if rotate else size,
            context.quiet,
        )

    return OutputsOnce(options.heads_augmentations, store)


def fit_heads(
    teacher: Teacher,
    options: Heads,
    context: RunContext,
    *,
    store: TeacherStore | None = None,
    outputs: OutputsOnce | None = None,
    name: str = "heads",
) -> FittedHeads:
    """Fit a teacher's heads, or load them from the cache where a digest of all that makes them matches.

    Their accuracy is logged, with a warning where a head is far below the teacher.

    Args:
        teacher: Without heads.
        options: Of the heads and of their fit.
        context: Of the run.
        store: A filled store of the teacher's outputs. It is read instead of showing the teacher images again where the
            protocol is "stored" and it holds enough augmentations and all logits.
        outputs: The teacher's, which others are fitted on too; None for some of its own.
        name: What they are called in the run's folder.
    """
    outputs = outputs or outputs_once(teacher, options, context)
    images, accelerator = context.images, context.accelerator
    if store is not None and not _store_serves(store, options):
        store = None
    made_of = {
        # The weights and divergences of the code losses belong to the student's objective.
        "heads": as_dict(
            replace(
                options,
                abstract_weight=1.0,
                detailed_weight=1.0,
                code_divergence=Heads.code_divergence,
                code_reverse_weight=Heads.code_reverse_weight,
            )
        ),
        **context.teacher_fingerprint(teacher),
        "logits": teacher.has_logits,
        "evaluation": images.evaluation.digest
        if images.evaluation is not None
        else None,  # as metrics are cached with them
    }
    if store is not None:
        made_of["store"] = store.digest
    set_seed(context.seed, 5)
    heads = GranularityHeads(teacher.tap.embed_dim, images.num_classes, options.granularities)
    heads = heads.to(accelerator.device)

    def fit_module() -> Metrics:
        fit_options = context.fit_options(
            name,
            made_of,
            stage="heads",
            advice="Lower --heads-lr, or clip more (--heads-clip-grad).",
            memory_hint="give a smaller --heads-batch-size.",
        )
        return _fit_fresh(heads, teacher, options, context, _outputs_of(options, context, store, outputs), fit_options)

    fitted = load_or_fit("heads", heads, made_of, accelerator, fit_module)
    if fitted.from_cache:
        accelerator.print("granularity heads: loaded from the cache")
    _log_accuracy(heads, fitted.metrics, context)
    return FittedHeads(heads, fitted.metrics)


def _store_serves(store: TeacherStore, options: Heads) -> bool:
    """Return whether heads can be fitted on a store: at T=8 they need all logits, not the largest alone."""
    stored = options.heads_protocol == "stored"
    return stored and options.heads_augmentations <= store.passes and not store.layout.top_k


def _log_accuracy(heads: GranularityHeads, metrics: Metrics, context: RunContext) -> None:
    names = {"teacher": "teacher", **{g.name: g.name for g in heads.granularities}, "top1": "stable"}
    shown = {key: value for key, value in metrics.items() if key in names}
    if shown:
        values = ", ".join(f"{names[key]} {value:.2f} %" for key, value in shown.items())
        context.accelerator.print(f"granularity heads, top-1: {values}")
    for key, value in shown.items():
        if value < shown.get("teacher", value) - FAR_BELOW:
            context.accelerator.print(
                f"warning: {'the stable logits are' if key == 'top1' else f'the head {key!r} is'} "
                f"{shown['teacher'] - value:.1f} points below the teacher: raise --heads-epochs, "
                "--heads-augmentations or its dim."
            )


def _fit_fresh(
    heads: GranularityHeads,
    teacher: Teacher,
    options: Heads,
    context: RunContext,
    stored: StoredOutputs | None,
    fit_options: FitOptions,
) -> Metrics:
    images = context.images
    return train_heads(
        heads,
        stored if stored is not None else images.train,
        stored.features if stored is not None else LiveTeachers(teacher),
        options,
        context.accelerator,
        seed=context.seed,
        compile=context.compile,
        evaluate=_HeadsEvaluation(heads, teacher, context) if images.evaluation is not None else None,
        fit_options=fit_options,
    )


def train_heads(
    heads: GranularityHeads,
    source: Source,
    teach: Teach,
    options: Heads,
    accelerator: Accelerator,
    *,
    seed: int,
    compile: bool = False,
    evaluate: Evaluate | None = None,
    fit_options: FitOptions | None = None,
) -> Metrics:
    """Train heads by their options, in place.

    Args:
        heads: On the accelerator's device.
        source: Stored teacher outputs, or images.
        teach: Returns the teacher's features of a batch of the source.
        options: Of the fit.
        accelerator: Device, processes and precision.
        seed: Of the order of samples.
        compile: Compile the heads, and a live teacher.
        evaluate: Returns metrics after each epoch.
        fit_options: Checkpoints and logs.

    Returns:
        The metrics of the last epoch; empty without `evaluate`.

    Raises:
        NonFiniteError: A loss or weight that is not finite.
    """
    passes = options.heads_epochs
    optim = Optim(
        epochs=passes,
        lr=options.heads_lr,
        weight_decay=options.heads_weight_decay,
        sched=options.heads_sched,
        decay_milestones=options.milestones,
        clip_grad=options.heads_clip_grad,
        global_batch_size=options.heads_batch_size,
    )
    if isinstance(source, StoredOutputs):  # an epoch of all augmentations is as many passes
        optim = optim.with_epochs(-(-passes // options.heads_augmentations))
    return fit(
        HeadFitting(heads),
        source,
        optim,
        accelerator,
        seed=seed,
        batch_size=max(2, -(-options.heads_batch_size // accelerator.num_processes)),  # one step of all processes
        teach=teach,
        compile=compile,
        evaluate=evaluate,
        options=fit_options,
    ).last


def _outputs_of(
    options: Heads, context: RunContext, store: TeacherStore | None, outputs: OutputsOnce
) -> StoredOutputs | None:
    """The outputs that heads are fitted on; None where they are fitted on live images."""
    if store is not None:
        return read_outputs(store, context.images.train, options.heads_augmentations, context.accelerator)
    return outputs() if options.heads_protocol == "stored" else None


class _HeadsEvaluation:
    """Top-1 of the teacher, of each head and of the stable logits, on teacher outputs that are computed once."""

    def __init__(self, heads: GranularityHeads, teacher: Teacher, context: RunContext) -> None:
        assert context.images.evaluation is not None
        self.heads, self.accelerator = heads, context.accelerator
        self.batch_size = context.data.validation_batch_size
        names = [g.name for g in heads.granularities]
        self.names = (*(["teacher"] if teacher.has_logits else []), *names, "stable")
        self.stored = store_outputs(
            lambda batch: teacher(batch.images),
            context.images.evaluation,
            1,
            context.accelerator,
            self.batch_size,
            context.quiet,
        )

    def _predict(self, batch: Batch) -> dict[str, Tensor]:
        features: Features = self.stored.features(batch)
        views = self.heads.decode(self.heads.encode(features.embedding))
        return {"teacher": features.logits, **views, "stable": stable_excitation(features.logits, views)}

    def __call__(self, averaged: nn.Module | None) -> Metrics:  # noqa: ARG002 - heads have no moving average
        found = evaluate(self._predict, self.names, self.stored, self.accelerator, self.batch_size)
        return {"top1" if name == "stable" else name: found[name]["top1"] for name in self.names}
