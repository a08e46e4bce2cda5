"""What is fitted before a run: kept by a digest of all that made it, and found again by it.

Granularity heads (head_fitting), modules of a criterion on the frozen teacher (FT's paraphraser), and the student's
backbone by a criterion alone (AB, FSP): each is `fit` with another trainee.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import nn

from mgd_timm.criteria import CRITERIA, Criterion, Objective
from mgd_timm.criteria.terms import Term, build_criterion, fitted_first, hyper_parameters
from mgd_timm.data.dataset import Images, cache_folder
from mgd_timm.data.mixed_source import MIXED
from mgd_timm.data.rng import set_seed
from mgd_timm.distiller import Distiller, LiveTeachers, Teacher
from mgd_timm.distributed.collectives import held_by_main, of_main, on_main, share
from mgd_timm.features import FeatureTap, Pair, match_number_of_maps
from mgd_timm.granularity import MAG
from mgd_timm.models.build import build_tap, set_memory_format
from mgd_timm.models.fold_batchnorm import fold_batchnorm
from mgd_timm.recipe.options import as_dict, digest
from mgd_timm.recipe.recipe import Recipe
from mgd_timm.storage import checkpoint
from mgd_timm.storage.digests import module_digest
from mgd_timm.storage.lock import Lock
from mgd_timm.training.checkpointer import Upkeep
from mgd_timm.training.evaluation import Metrics
from mgd_timm.training.loop import fit


def found_or_fitted(
    kind: str, kept: nn.Module, made_of: dict[str, Any], accelerator: Accelerator, fit_fresh: Callable[[], Metrics]
) -> tuple[Metrics, bool]:
    """Give a module its fitted weights: from the cache where a digest of all that makes them matches, else fitted and
    kept there.

    One run at a time fits them: others that need the same wait, and take them.

    Args:
        kind: The folder of the cache.
        kept: Whose state is fitted; on the accelerator's device.
        made_of: All that decides the weights, as JSON values.
        accelerator: Processes.
        fit_fresh: Fits `kept`, and gives metrics.

    Returns:
        The metrics, and whether they were found.

    Raises:
        OSError: They cannot be written.
    """
    place = cache_folder() / kind / digest(made_of)[:32]
    found = _found(place, kind, kept, accelerator, print)
    if found is not None:
        return found, True
    with held_by_main(Lock(place, f"fitted {kind} ({place})", accelerator.print), accelerator):
        found = _found(place, kind, kept, accelerator, lambda _: None)  # another run's, meanwhile
        if found is not None:
            return found, True
        metrics = fit_fresh()
        fresh = checkpoint.State({kind: kept.state_dict()}, {"made_of": made_of, "metrics": metrics})
        on_main(accelerator, lambda: checkpoint.save(place, 1, fresh))
    return metrics, False


def _found(
    place: Path, kind: str, kept: nn.Module, accelerator: Accelerator, say: Callable[[str], None]
) -> Metrics | None:
    """The metrics of what the cache keeps, whose weights are given to `kept`; None where it keeps none."""
    # One process looks and decides: others may have a disk of their own.
    seen: list[checkpoint.State | None] = [None]

    def look() -> Metrics | None:
        seen[0] = checkpoint.load_newest(place, say)
        return dict(seen[0].values["metrics"]) if seen[0] is not None else None

    metrics = of_main(accelerator, look)
    if metrics is None:
        return None
    if seen[0] is not None:
        kept.load_state_dict(dict(seen[0].tensors[kind]))
    share(kept.state_dict().values(), accelerator)
    return metrics


def shown_by_teacher(teacher: Teacher, images: Images, recipe: Recipe, accelerator: Accelerator) -> dict[str, Any]:
    """What decides the teacher's features in a fitting stage: network, images, view, precision."""
    return {
        "teacher": [teacher.tap.name, teacher.digest],
        "folded": recipe.fold_teacher,
        "compiled": recipe.compile,
        "channels_last": recipe.channels_last,
        "view": teacher.describe_input(),
        "images": [images.train.digest, list(images.mean), list(images.std), list(images.input_size)],
        "shown": {k: v for k, v in as_dict(recipe.data, digest_only=True).items() if k not in MIXED},
        "seed": recipe.seed,
        "precision": str(accelerator.mixed_precision),
    }


@dataclass(frozen=True)
class Stage:
    """What a criterion has fitted before the run.

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


def criterion_stages(recipe: Recipe, objective: Objective | MAG, teacher: Teacher) -> list[Stage]:
    """The stages that fit modules of the objective's own criteria on the teacher."""
    plain = objective.objective if isinstance(objective, MAG) else objective
    # RepDistiller's rate for its paraphraser, which it keeps from rising with the run's.
    lr = min(0.01, recipe.optim.lr) if recipe.fitting_lr is None else recipe.fitting_lr
    stages = []
    for name, term in fitted_first(recipe, "teacher").items():
        trainee = cast(Criterion, cast(Objective, plain).criteria[name]).fitting()
        assert trainee is not None
        trainee.requires_grad_(False)  # but while the stage goes on
        stages.append(Stage(name, term, trainee, trainee, teacher, lr))
    return stages


def student_stages(
    recipe: Recipe, student: FeatureTap, teacher: Teacher, model: nn.Module, images: Images, pair: Pair
) -> list[Stage]:
    """The stages that fit the student's backbone by one criterion alone, whose maps may be other ones than the run's.

    Args:
        recipe: Of the run.
        student: Of the run; its model is fitted in place.
        teacher: Of the run.
        model: The teacher's own network, before its BatchNorm was folded away, which is sure only for the maps that
            were looked at.
        images: Of the run.
        pair: Of the run.

    Raises:
        ValueError: Networks without the maps that a criterion compares.
    """
    lr = recipe.optim.lr if recipe.fitting_lr is None else recipe.fitting_lr
    stages = []
    for name, term in fitted_first(recipe, "student").items():
        preact = CRITERIA[term.criterion].preact
        theirs = (images.input_size[0], *teacher.size(images.input_size[1:]))
        tap = build_tap(student.model, images.input_size, recipe.maps, preact=preact)
        seen = build_tap(model, theirs, recipe.maps, preact=preact)
        match_number_of_maps(recipe.maps, tap, seen)
        set_seed(recipe.seed, 7)
        own = pair._replace(student=tap.shapes(images.input_size[1:]), teacher=seen.shapes(theirs[1:]))
        trainee = Distiller(tap, Objective(**{name: (1.0, build_criterion(term, own, recipe))}))
        if recipe.fold_teacher:
            seen = fold_batchnorm(seen) or seen
        twin = Teacher(seen, input_adapter=teacher.input_adapter, digest=teacher.digest)
        stages.append(Stage(name, term, trainee, tap, twin, lr))
    return stages


def fit_stages(
    stages: Sequence[Stage], images: Images, recipe: Recipe, accelerator: Accelerator, *, quiet: bool = False
) -> dict[str, Metrics]:
    """Carry out the stages before a run, in place; gives the losses of each one's last epoch, which are said."""
    found = {}
    for stage in stages:
        stage.trainee.to(accelerator.device)
        stage.teacher.to(accelerator.device)
        for module in (stage.trainee, stage.teacher):
            shown = module.student if isinstance(module, Distiller) else stage.teacher.tap
            set_memory_format(module, shown.name, recipe.channels_last, accelerator.device)
        before = {parameter: parameter.requires_grad for parameter in stage.trainee.parameters()}
        try:
            stage.trainee.requires_grad_(True)
            if isinstance(stage.trainee, Distiller):
                _freeze_unreached(stage, images, accelerator)
            found[stage.name] = _carry_out(stage, images, recipe, accelerator, quiet)
        finally:
            for parameter, value in before.items():
                parameter.requires_grad_(value)
    return found


def _carry_out(stage: Stage, images: Images, recipe: Recipe, accelerator: Accelerator, quiet: bool) -> Metrics:
    optim = replace(
        recipe.optim, epochs=recipe.fitting_epochs, lr=stage.lr, sched="constant", warmup_epochs=0, model_ema=False
    )
    kind = CRITERIA[stage.term.criterion]
    made_of = {
        **shown_by_teacher(stage.teacher, images, recipe, accelerator),
        "criterion": [
            stage.term.criterion,
            {n: p.default for n, p in hyper_parameters(kind).items()} | dict(stage.term.options),
        ],
        "trainee": [
            module_digest(stage.trainee),
            [list(p.shape) for p in stage.trainee.parameters() if p.requires_grad],
        ],
        "student": [stage.trainee.student.name, recipe.drop, recipe.drop_path]
        if isinstance(stage.trainee, Distiller)
        else None,
        "maps": [
            list(stage.teacher.tap.indices),
            list(getattr(getattr(stage.trainee, "student", None), "indices", ())),
        ],
        "optim": as_dict(optim, digest_only=True),
    }
    folder = Path(recipe.output) / "fitting" / stage.name

    def fit_fresh() -> Metrics:
        on_main(accelerator, lambda: folder.mkdir(parents=True, exist_ok=True))
        fitted = fit(
            stage.trainee,
            images.train,
            optim,
            accelerator,
            seed=recipe.seed,
            batch_size=recipe.data.batch_size,
            teach=LiveTeachers(stage.teacher),
            compile=recipe.compile,
            upkeep=Upkeep(
                folder=folder,
                fingerprint=made_of,
                stage=stage.name,
                resume=recipe.resume,
                log_interval=recipe.log_interval,
                quiet=quiet,
                track=False,
                advice="Lower --fitting-lr, or clip gradients (--clip-grad 1).",
            ),
        )
        return fitted.losses

    losses, found = found_or_fitted(stage.name, stage.kept, made_of, accelerator, fit_fresh)
    said = "from the cache" if found else f"{recipe.fitting_epochs} epoch{'s' if recipe.fitting_epochs > 1 else ''}"
    shown = ", ".join(f"{name} {value:.4g}" for name, value in losses.items())
    accelerator.print(f"{stage.name}: fitted before the run, {said}; last loss: {shown}")
    return losses


def _freeze_unreached(stage: Stage, images: Images, accelerator: Accelerator) -> None:
    """Freeze what the stage's loss gives no gradient, such as the classifier, which must neither decay nor be waited
    for."""
    batch = next(images.train.batches([images.train.ids[:2]], 0, accelerator.device))
    parameters = list(stage.trainee.parameters())
    stage.trainee.eval()  # BatchNorm's statistics stay as they are
    terms, _ = stage.trainee(batch, stage.teacher(batch.images))
    grads = torch.autograd.grad(torch.stack(list(terms.values())).sum(), parameters, allow_unused=True)
    for parameter, grad in zip(parameters, grads, strict=True):
        parameter.requires_grad_(grad is not None)
