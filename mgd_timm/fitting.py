"""What is fitted before a run: kept by a digest of all that made it, and found again by it.

Granularity heads (head_fitting), modules of a criterion on the frozen teacher (FT's paraphraser), and the student's backbone by a
criterion alone (AB, FSP): each is `fit` with another trainee.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import nn

from mgd_timm import checkpoint
from mgd_timm.build import build_tap, lay_out, set_seed
from mgd_timm.criteria import CRITERIA, Criterion, Objective
from mgd_timm.data import Images, cache_folder
from mgd_timm.distiller import Distiller, Teacher, live
from mgd_timm.evaluation import Metrics
from mgd_timm.features import FeatureTap, Pair, TeacherView
from mgd_timm.fit import Upkeep, compile_mode, fit
from mgd_timm.granularity import MAG
from mgd_timm.optimizer_state import module_digest
from mgd_timm.processes import decided, on_main, share
from mgd_timm.recipe import Recipe, as_dict, digest
from mgd_timm.terms import Term, build_criterion, fitted_first


def found_or_fitted(
    kind: str, kept: nn.Module, made_of: dict[str, Any], accelerator: Accelerator, fit_fresh: Callable[[], Metrics]
) -> tuple[Metrics, bool]:
    """Give a module its fitted weights: from the cache where a digest of all that makes them matches, else fitted and kept there.

    Args:
        kind: The folder of the cache.
        kept: Whose state is fitted; on the accelerator's device.
        made_of: All that decides the weights, as JSON values.
        accelerator: Processes.
        fit_fresh: Fits `kept`, and gives metrics.

    Returns:
        The metrics, and whether they were found.
    """
    place = cache_folder() / kind / digest(made_of)[:32]
    # One process looks and decides: others may have a disk of their own.
    state = checkpoint.newest(place, print) if accelerator.is_main_process else None
    found = decided(accelerator, state is not None)
    metrics: Metrics = {}
    if found:
        if state is not None:
            kept.load_state_dict(dict(state.tensors[kind]))
            metrics = dict(state.values["metrics"])
        share(kept.state_dict().values(), accelerator)
    else:
        metrics = fit_fresh()
        fresh = checkpoint.State({kind: kept.state_dict()}, {"made_of": made_of, "metrics": metrics})
        on_main(accelerator, lambda: checkpoint.save(place, 1, fresh))
    return metrics, found


def shown_by_teacher(teacher: Teacher, images: Images, recipe: Recipe, accelerator: Accelerator) -> dict[str, Any]:
    """What decides the teacher's features in a fitting stage: weights, images, view, precision."""
    return {
        "teacher": teacher.digest,
        "folded": recipe.fold_teacher,
        "compiled": recipe.compile,
        "view": teacher.view.values() if isinstance(teacher.view, TeacherView) else repr(teacher.view),
        "images": [images.train.digest, list(images.mean), list(images.std), list(images.input_size)],
        "watched": images.watched.digest if images.watched is not None else None,
        "shown": as_dict(recipe.data, digest_only=True),
        "seed": recipe.seed,
        "precision": str(accelerator.mixed_precision),
        "processes": accelerator.num_processes,
    }


@dataclass(frozen=True)
class StudentStage:
    """A stage that fits the student's backbone by one criterion alone: its trainee, and the teacher as that criterion sees it."""

    name: str
    term: Term
    trainee: Distiller
    teacher: Teacher


def student_stages(recipe: Recipe, student: FeatureTap, teacher: Teacher, images: Images, pair: Pair) -> list[StudentStage]:
    """The stages that the recipe's criteria ask for, connected; whatever does not fit is refused here.

    Raises:
        ValueError: Networks without the maps that a criterion compares.
    """
    stages = []
    for name, term in fitted_first(recipe, "student").items():
        preact = CRITERIA[term.criterion].preact
        theirs = (images.input_size[0], *teacher.size(images.input_size[1:]))
        tap = build_tap(student.model, images.input_size, recipe.maps, preact=preact)
        seen = build_tap(teacher.tap.model, theirs, recipe.maps, preact=preact)
        set_seed(recipe.seed, 7)
        own = pair._replace(student=tap.shapes(images.input_size[1:]), teacher=seen.shapes(theirs[1:]))
        criterion = build_criterion(term, own, recipe)
        trainee = Distiller(tap, Objective(**{name: (1.0, criterion)}))
        stages.append(StudentStage(name, term, trainee, Teacher(seen, view=teacher.view, digest=teacher.digest)))
    return stages


def fit_criteria(
    objective: Objective | MAG,
    teacher: Teacher,
    stages: Sequence[StudentStage],
    images: Images,
    recipe: Recipe,
    accelerator: Accelerator,
    summary: dict[str, Any],
    *,
    quiet: bool = False,
) -> None:
    """Fit what the recipe's criteria need before the run: modules of their own, then the student's backbone; both in place.

    The losses of each stage's last epoch are said and put into `summary`.
    """
    plain = objective.objective if isinstance(objective, MAG) else objective

    def carry_out(name: str, term: Term, trainee: nn.Module, kept: nn.Module, shown: Teacher, lr: float) -> None:
        made_of = {
            **shown_by_teacher(shown, images, recipe, accelerator),
            "criterion": [term.criterion, dict(term.options)],
            "trainee": [module_digest(trainee), [list(p.shape) for p in trainee.parameters() if p.requires_grad]],
            "maps": [recipe.maps, list(shown.tap.indices)],
            "optim": [recipe.optim.opt, lr, recipe.optim.momentum, recipe.optim.weight_decay, recipe.fitting_epochs],
            "batch": [recipe.data.batch_size, recipe.optim.grad_accum_steps],
        }
        metrics, found = found_or_fitted(
            name,
            kept,
            made_of,
            accelerator,
            lambda: _fit_fresh(name, trainee, shown, lr, made_of, images, recipe, accelerator, quiet),
        )
        summary.setdefault("fitted", {})[name] = metrics
        losses = ", ".join(f"{key} {value:.4g}" for key, value in metrics.items())
        said = "from the cache" if found else f"{recipe.fitting_epochs} epoch{'s' if recipe.fitting_epochs > 1 else ''}"
        accelerator.print(f"{name}: fitted before the run, {said}; last loss: {losses}")

    for name, term in fitted_first(recipe, "teacher").items():
        fitting = cast(Criterion, plain.criteria[name]).fitting()
        assert fitting is not None
        fitting.to(accelerator.device).requires_grad_(True)
        # RepDistiller's rate, but for VGG students, where it is the run's.
        carry_out(name, term, fitting, fitting, teacher, 0.01 if recipe.fitting_lr is None else recipe.fitting_lr)
        fitting.requires_grad_(False)
    for stage in stages:
        stage.trainee.to(accelerator.device)
        shown = stage.teacher.to(accelerator.device)
        lay_out(stage.trainee, stage.trainee.student, recipe, accelerator)
        unreached = _freeze_unreached(stage, images, accelerator)
        lr = recipe.optim.lr if recipe.fitting_lr is None else recipe.fitting_lr
        carry_out(stage.name, stage.term, stage.trainee, stage.trainee.student, shown, lr)
        for parameter in unreached:
            parameter.requires_grad_(True)


def _freeze_unreached(stage: StudentStage, images: Images, accelerator: Accelerator) -> list[nn.Parameter]:
    """Freeze what the stage's loss gives no gradient, such as the classifier, which must neither decay nor be waited for."""
    batch = next(images.train.batches([images.train.ids[:2]], 0, accelerator.device))
    parameters = [p for p in stage.trainee.parameters() if p.requires_grad]
    stage.trainee.eval()  # BatchNorm's statistics stay as they are
    terms, _ = stage.trainee(batch, stage.teacher(batch.images))
    grads = torch.autograd.grad(torch.stack(list(terms.values())).sum(), parameters, allow_unused=True)
    unreached = [p for p, grad in zip(parameters, grads, strict=True) if grad is None]
    for parameter in unreached:
        parameter.requires_grad_(False)
    return unreached


def _fit_fresh(
    name: str,
    trainee: nn.Module,
    teacher: Teacher,
    lr: float,
    made_of: dict[str, Any],
    images: Images,
    recipe: Recipe,
    accelerator: Accelerator,
    quiet: bool,
) -> Metrics:
    folder = Path(recipe.output) / "fitting" / name
    on_main(accelerator, lambda: folder.mkdir(parents=True, exist_ok=True))
    optim = replace(
        recipe.optim, epochs=recipe.fitting_epochs, lr=lr, sched="constant", warmup_epochs=0, clip_grad=None, model_ema=False
    )
    fitted = fit(
        trainee,
        images.train,
        optim,
        accelerator,
        seed=recipe.seed,
        batch_size=recipe.data.batch_size,
        teach=live(teacher, recipe.data.batch_size, compile_mode(accelerator) if recipe.compile else None),
        compile=recipe.compile,
        upkeep=Upkeep(
            folder=folder,
            identity=made_of,
            stage=name,
            resume=recipe.resume,
            log_interval=recipe.log_interval,
            quiet=quiet,
            track=False,
        ),
    )
    return fitted.losses
