"""What criteria fit before the run: modules of their own on the frozen teacher (FT's paraphraser), or the student's
backbone by one criterion alone (AB, FSP)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import nn

from mgd_timm.criteria import Criterion, Objective
from mgd_timm.criteria.terms import Term, Terms, build_criterion, hyper_parameters
from mgd_timm.data.dataset import Images
from mgd_timm.data.rng import set_seed
from mgd_timm.data.sources import Source
from mgd_timm.distiller import Distiller, LiveTeachers, Teacher
from mgd_timm.features import FeatureTap, Pair, match_number_of_maps
from mgd_timm.granularity import MAG
from mgd_timm.models.build import set_memory_format
from mgd_timm.recipe.optim import Optim
from mgd_timm.recipe.options import as_dict
from mgd_timm.storage.digests import module_digest
from mgd_timm.teachers.outputs.memory import OutputsOnce, StoredPasses
from mgd_timm.teachers.pretraining import RunContext, epochs_text, load_or_fit
from mgd_timm.training.evaluation import Metrics
from mgd_timm.training.loop import fit
from mgd_timm.training.step import Teach


@dataclass(frozen=True)
class CriterionFit:
    """One fit of a criterion before the run.

    Args:
        name: The term's.
        term: As the recipe asks for it.
        trainee: What `fit` trains.
        kept: The part of it that the run goes on with.
        teacher: The teacher as the criterion sees it.
        lr: Learning rate.
    """

    name: str
    term: Term
    trainee: nn.Module
    kept: nn.Module
    teacher: Teacher
    lr: float


def fits_of_criteria(
    terms: Terms, objective: Objective | MAG, teacher: Teacher, lr: float | None, run_lr: float
) -> list[CriterionFit]:
    """Return the fits of modules of the objective's own criteria on the teacher.

    Without `lr`, the learning rate is that of the criterion's own rule, else min(0.01, run_lr); 0.01 is RepDistiller's
    for FT's paraphraser.
    """
    plain = objective.objective if isinstance(objective, MAG) else objective
    fits = []
    for name, term in terms.fitted_first("teacher").items():
        trainee = cast(Criterion, cast(Objective, plain).criteria[name]).fitting()
        assert trainee is not None
        trainee.requires_grad_(False)  # its own fit trains it, the run does not
        rule = term.kind.fitting_rule
        usual = rule.lr if rule is not None else min(0.01, run_lr)
        fits.append(CriterionFit(name, term, trainee, trainee, teacher, usual if lr is None else lr))
    return fits


def fits_of_student(
    terms: Terms, student: FeatureTap, teacher: Teacher, images: Images, pair: Pair, *, maps: str, seed: int, lr: float
) -> list[CriterionFit]:
    """Return the fits of the student's backbone by one criterion alone, whose maps may differ from the run's.

    Args:
        terms: Of the run.
        student: Of the run; its model is fitted in place.
        teacher: Of the run, its BatchNorm as yet not folded: folding is checked on the maps that are tapped.
        images: Of the run.
        pair: Of the run.
        maps: The recipe's word for maps.
        seed: Of the run.
        lr: Learning rate.

    Raises:
        ValueError: Networks without the maps that a criterion compares.
    """
    fits = []
    for name, term in terms.fitted_first("student").items():
        preact = term.kind.preact
        teacher_input = (images.input_size[0], *teacher.size(images.input_size[1:]))
        tap = FeatureTap(student.model, maps, input_size=images.input_size, preact=preact)
        teacher_tap = FeatureTap(teacher.tap.model, maps, input_size=teacher_input, preact=preact)
        match_number_of_maps(maps, tap, teacher_tap)
        set_seed(seed, 7)
        own = pair._replace(student=tap.shapes(images.input_size[1:]), teacher=teacher_tap.shapes(teacher_input[1:]))
        criterion = build_criterion(term, own, standardise_logits=terms.standardise_logits)
        trainee = Distiller(tap, Objective(**{name: (1.0, criterion)}))
        frozen = Teacher(teacher_tap, input_adapter=teacher.input_adapter, digest=teacher.digest)
        fits.append(CriterionFit(name, term, trainee, tap, frozen, lr))
    return fits


def fit_criteria(
    fits: Sequence[CriterionFit],
    optim: Optim,
    epochs: int,
    student_rates: Sequence[Any],
    context: RunContext,
    outputs: OutputsOnce | None = None,
) -> dict[str, Metrics]:
    """Fit the criteria's modules or the student, in place, and log the last losses.

    Args:
        fits: In this order.
        optim: The run's rule. Without a rule of the criterion's own, it is followed at a constant learning rate.
        epochs: Of each fit.
        student_rates: Dropout and stochastic depth of the student, which decide what is fitted of it.
        context: Of the run.
        outputs: The teacher's, with the images' rotations, on which criteria that rotate are fitted; None fits these on
            live images, as the others.

    Returns:
        The losses of each one's last epoch, by term.
    """
    found = {}
    device = context.accelerator.device
    for one in fits:
        one.trainee.to(device)
        one.teacher.to(device)
        for module in (one.trainee, one.teacher):
            tap = module.student if isinstance(module, Distiller) else one.teacher.tap
            set_memory_format(module, tap.name, context.channels_last, device)
        before = {parameter: parameter.requires_grad for parameter in one.trainee.parameters()}
        try:
            one.trainee.requires_grad_(True)
            if isinstance(one.trainee, Distiller):
                _freeze_unreached(one, context)
            found[one.name] = _fit_one(one, _rule_of(one, optim, epochs), student_rates, context, outputs)
        finally:
            for parameter, value in before.items():
                parameter.requires_grad_(value)
    return found


def _rule_of(one: CriterionFit, optim: Optim, epochs: int) -> Optim:
    own = one.term.kind.fitting_rule
    if own is None:
        return replace(optim, epochs=epochs, lr=one.lr, sched="constant", warmup_epochs=0, model_ema=False)
    of_run = {name: getattr(optim, name) for name in ("global_batch_size", "grad_accum_steps", "find_batch_size")}
    return replace(own.with_epochs(epochs), lr=one.lr, **of_run)


def _fit_one(
    one: CriterionFit,
    optim: Optim,
    student_rates: Sequence[Any],
    context: RunContext,
    outputs: OutputsOnce | None,
) -> Metrics:
    term, trainee = one.term, one.trainee
    outputs = outputs if term.kind.rotates else None
    defaults = {name: parameter.default for name, parameter in hyper_parameters(term.kind).items()}
    trained_shapes = [list(p.shape) for p in trainee.parameters() if p.requires_grad]
    made_of = {
        **context.teacher_fingerprint(one.teacher),
        "criterion": [term.criterion, defaults | dict(term.options)],
        "trainee": [module_digest(trainee), trained_shapes],
        "student": [trainee.student.name, *student_rates] if isinstance(trainee, Distiller) else None,
        "maps": [
            list(one.teacher.tap.indices),
            list(trainee.student.indices) if isinstance(trainee, Distiller) else [],
        ],
        "optim": as_dict(optim, digest_only=True),
    }
    if outputs is not None:
        made_of["augmentations"] = outputs.passes

    def fit_module() -> Metrics:
        source, teach = _live_or_stored(one, outputs, context.images.train)
        return fit(
            trainee,
            source,
            optim,
            context.accelerator,
            seed=context.seed,
            batch_size=context.data.batch_size,
            teach=teach,
            compile=context.compile,
            options=context.fit_options(f"fitting/{one.name}", made_of),
        ).losses

    fitted = load_or_fit(one.name, one.kept, made_of, context.accelerator, fit_module)
    losses = ", ".join(f"{name} {value:.4g}" for name, value in fitted.metrics.items())
    context.accelerator.print(
        f"{one.name}: fitted before the run, {epochs_text(fitted, optim.epochs)}; last loss: {losses}"
    )
    return fitted.metrics


def _live_or_stored(one: CriterionFit, outputs: OutputsOnce | None, images: Source) -> tuple[Source, Teach]:
    """Return what a criterion is fitted on: a pass of stored outputs in each epoch, or live images."""
    if outputs is None:
        return images, LiveTeachers(one.teacher, rotate=one.term.kind.rotates)
    stored = outputs()
    return StoredPasses(stored, len(images.ids)), stored.features


def _freeze_unreached(one: CriterionFit, context: RunContext) -> None:
    """Freeze parameters without a gradient, such as the classifier's: they must not decay, and DDP must not wait."""
    train = context.images.train
    batch = next(train.batches([train.ids[:2]], 0, context.accelerator.device))
    parameters = list(one.trainee.parameters())
    one.trainee.eval()  # BatchNorm's statistics stay as they are
    terms, _ = one.trainee(batch, one.teacher(batch.images))
    grads = torch.autograd.grad(torch.stack(list(terms.values())).sum(), parameters, allow_unused=True)
    for parameter, grad in zip(parameters, grads, strict=True):
        parameter.requires_grad_(grad is not None)
