"""A whole run: images, teacher, heads, student, export. What the command line and `mgd_timm.distill` call."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from accelerate import Accelerator
from torch import nn

from mgd_timm.criteria.base import needs_rotations
from mgd_timm.data.dataset import Images, load_images
from mgd_timm.data.mixed_source import mixed_source
from mgd_timm.data.sources import Source
from mgd_timm.distiller import LiveTeachers, Teacher, shard_teacher
from mgd_timm.distributed.collectives import run_on_main
from mgd_timm.features import FeatureTap
from mgd_timm.models.build import set_memory_format
from mgd_timm.pipeline.checks import check_recipe
from mgd_timm.pipeline.connect import Networks, connect, find_defaults, finish_teachers, log_remarks, teachers_of
from mgd_timm.pipeline.evaluate_teachers import evaluate_teachers
from mgd_timm.pipeline.fit_criteria import fit_criteria
from mgd_timm.pipeline.learn_int8 import learn_int8
from mgd_timm.pipeline.load_teachers import adapt_teachers_to_data, load_teachers
from mgd_timm.pipeline.plan import (
    accelerator_of,
    classifier_fit_of,
    context_of,
    fix_global_batch,
    store_options_of,
    terms_of,
)
from mgd_timm.pipeline.results import log_results, provenance_of, summarise, summarise_peer, write_results
from mgd_timm.pipeline.run_folder import check_new_folder, check_outside_data, match_resumed_run, start_folder
from mgd_timm.pipeline.turns import Turn, merge_fits, summarise_turns, turns_of
from mgd_timm.recipe.data import with_absolute_folder
from mgd_timm.recipe.derived import with_store_defaults, with_unfolded_trajectory
from mgd_timm.recipe.options import as_dict, digest
from mgd_timm.recipe.recipe import Recipe
from mgd_timm.storage.cache import cache_folder
from mgd_timm.storage.digests import module_digest
from mgd_timm.teachers.channel_matching import match_channels
from mgd_timm.teachers.classifier import fit_classifiers
from mgd_timm.teachers.heads import fit_heads, outputs_once
from mgd_timm.teachers.outputs.stored_source import StoredSource, open_store, stored_teacher
from mgd_timm.teachers.pretraining import RunContext
from mgd_timm.teachers.trajectory import FollowedTeacher, SnapshotWriter, check_last_snapshot, read_trajectory
from mgd_timm.training.evaluation import Metrics, evaluate_taps
from mgd_timm.training.loop import Evaluate, Fitted, fit
from mgd_timm.training.options import FitOptions
from mgd_timm.training.step import Teach


@dataclass(frozen=True)
class Result:
    """What a run leaves: the student in eval mode on the CPU, and the numbers of summary.json."""

    student: nn.Module
    summary: dict[str, Any]


@dataclass(frozen=True)
class _Pretrained:
    """Teachers with their heads, what of it belongs into the summary, and the sha256 of each teacher's heads."""

    teachers: list[Teacher]
    metrics: dict[str, Any]
    heads_sha256: list[str]


@dataclass(frozen=True)
class _Trained:
    """Each turn's results, what of the fits before belongs into the summary, the sha256 of each teacher's heads, and
    the last turn's source and teacher."""

    fits: list[Fitted]
    metrics: dict[str, Any]
    heads_sha256: list[str]
    source: Source
    teach: Teach | None


def run(
    recipe: Recipe,
    *,
    teacher: nn.Module | Sequence[nn.Module | None] | None = None,
    student: nn.Module | None = None,
    quiet: bool = False,
) -> Result:
    """Carry out a recipe; modules given as teacher (or teachers) and student stand for the recipe's names.

    All that can be refused is refused before the output folder is made.

    Raises:
        ValueError: What models, data, criteria and training refuse.
        FileExistsError: The output folder exists and the run is not resumed.
        Stopped: A signal; the state was saved.
    """
    recipe = with_unfolded_trajectory(with_store_defaults(replace(recipe, data=with_absolute_folder(recipe.data))))
    folder, steps_per_update = Path(recipe.output), recipe.optim.grad_accum_steps
    written = {"--output": folder, "the cache (MGD_TIMM_CACHE)": cache_folder()}
    if recipe.teacher_store is not None:
        written["--teacher-store"] = Path(recipe.teacher_store)
    check_outside_data(recipe.data, written)
    if recipe.resume:
        recipe = match_resumed_run(folder, recipe)
    else:
        check_new_folder(folder)
    for turn in turns_of(recipe):
        check_recipe(turn.recipe, terms_of(turn.recipe))
    accelerator = accelerator_of(recipe)
    recipe = fix_global_batch(recipe, accelerator, steps_per_update)
    turns = turns_of(recipe)

    images, connected = _load(recipe, turns, accelerator, teacher, student)
    context = context_of(recipe, images, accelerator, quiet=quiet)
    classifier_fit = classifier_fit_of(recipe)
    if classifier_fit is None:  # otherwise the store belongs to weights that are fitted first
        connected = [finish_teachers(one, fold=recipe.fold_teacher, fitted=False) for one in connected]
        stored = _open_store(recipe, connected[0], images, accelerator)

    run_on_main(accelerator, lambda: start_folder(folder, recipe, images, accelerator.print, steps_per_update))
    accelerator.init_trackers("mgd_timm", config={name: str(value) for name, value in as_dict(recipe).items()})
    before: dict[str, Any] = {}
    if classifier_fit is not None:
        before["teacher_head"] = fit_classifiers(teachers_of(connected), classifier_fit, context)
        connected = [finish_teachers(one, fold=recipe.fold_teacher, fitted=True) for one in connected]
        stored = _open_store(recipe, connected[0], images, accelerator)
    before |= evaluate_teachers(teachers_of(connected), images, accelerator, recipe.data.validation_batch_size)
    found = _train_in_turns(turns, connected, stored, context)
    networks, fitted = connected[-1], merge_fits(turns, found.fits)
    if recipe.qat:
        fitted, before["qat"] = _learn_int8(turns[-1].recipe, networks, fitted, found.source, found.teach, context)
    trained = _final_model(networks, fitted)

    before |= found.metrics | summarise_turns(turns, found.fits)
    summary = summarise(fitted, trained, before, images, recipe, accelerator)
    if networks.peer is not None:
        summary["peer"] = summarise_peer(networks.peer.model, fitted, images, recipe, accelerator)
    provenance = provenance_of(recipe, connected, found.heads_sha256, images)
    run_on_main(accelerator, lambda: write_results(folder, networks, trained, summary, provenance))
    for tracker in accelerator.trackers:  # not end_training, which would part the processes: another run may follow
        tracker.finish()
    log_results(summary, folder, networks.student.name, accelerator.print)
    return Result(trained.to("cpu").eval(), summary)


def _load(
    recipe: Recipe,
    turns: Sequence[Turn],
    accelerator: Accelerator,
    teacher: nn.Module | Sequence[nn.Module | None] | None,
    student: nn.Module | None,
) -> tuple[Images, list[Networks]]:
    """Load the teachers and the images, and connect the networks of each turn, which share the student's model."""
    trajectory = read_trajectory(Path(recipe.teacher_trajectory)) if recipe.teacher_trajectory is not None else None
    models = load_teachers(recipe, [teacher] if isinstance(teacher, nn.Module) else teacher or ())
    loaded = [module_digest(model) for model in models]
    defaults = find_defaults(recipe, models[0] if models else None, student)
    images = load_images(recipe.data, recipe.seed, defaults, log=accelerator.print, accelerator=accelerator)
    adapt_teachers_to_data(models, recipe, images)
    connected: list[Networks] = []
    for place, turn in enumerate(turns):
        own = slice(None) if len(turns) == 1 else slice(place, place + 1)
        one = connect(turn.recipe, terms_of(turn.recipe), images, accelerator, models[own], student)
        fingerprint = one.fingerprint
        if connected:  # the student of a turn is what all earlier ones left
            fingerprint = fingerprint | {"earlier_turns": [digest(other.fingerprint) for other in connected]}
        if trajectory is not None:
            check_last_snapshot(one.teachers[0], trajectory)
            fingerprint = fingerprint | {"trajectory": [[shot.epoch, shot.sha256] for shot in trajectory.snapshots]}
        connected.append(replace(one, trajectory=trajectory, fingerprint=fingerprint, loaded_sha256=loaded[own]))
        student = one.student.model
    return images, connected


def _train_in_turns(
    turns: Sequence[Turn], connected: Sequence[Networks], stored: StoredSource | None, context: RunContext
) -> _Trained:
    """Train the student in each turn, with what is fitted before it."""
    fits, heads_sha256, metrics = list[Fitted](), list[str](), dict[str, Any]()
    if len(turns) > 1:  # a device holds one teacher at a time
        for teacher in teachers_of(connected):
            teacher.to("cpu")
    for number, (turn, networks) in enumerate(zip(turns, connected, strict=True), start=1):
        recipe, own = turn.recipe, replace(context, folder=turn.folder)
        for teacher in networks.teachers:
            teacher.to(context.accelerator.device)
        log_remarks(networks, terms_of(recipe), recipe.method, context.accelerator)
        pretrained = _pretrain(recipe, networks, stored, own)
        source = mixed_source(context.images, recipe.data, recipe.seed) if stored is None else stored
        teach = _teach_of(recipe, networks, pretrained.teachers, stored)
        fits.append(_train_student(turn, networks, source, teach, own, sum(fitted.updates for fitted in fits)))
        heads_sha256 += pretrained.heads_sha256
        found = pretrained.metrics
        metrics |= found if len(turns) == 1 else {f"{name}_{number}": row for name, row in found.items()}
        if number < len(turns):
            for teacher in networks.teachers:
                teacher.to("cpu")
    return _Trained(fits, metrics, heads_sha256, source, teach)


def _open_store(recipe: Recipe, networks: Networks, images: Images, accelerator: Accelerator) -> StoredSource | None:
    """Open the recipe's store of teacher outputs, which may not be filled yet."""
    options = store_options_of(recipe)
    return None if options is None else open_store(options, networks.teachers[0], images, accelerator)


def _pretrain(recipe: Recipe, networks: Networks, stored: StoredSource | None, context: RunContext) -> _Pretrained:
    """Fill the store, fit heads where the method needs them, and what criteria fit first."""
    teachers, metrics, heads_sha256 = list(networks.teachers), dict[str, Any](), list[str]()
    if recipe.match_channels is not None:
        teachers = [match_channels(one, networks.student, recipe.match_channels, context) for one in teachers]
    if stored is not None:
        stored.fill(teachers[0], context.accelerator, recipe.data.validation_batch_size, quiet=context.quiet)
    # One pass over a teacher serves its heads and a criterion that is fitted on rotations.
    once = [
        outputs_once(teacher, recipe.heads, context, rotate=needs_rotations(networks.objective)) for teacher in teachers
    ]
    if recipe.method != "none":
        for position, teacher in enumerate(teachers):
            name = "heads" if len(teachers) == 1 else f"heads_{position + 1}"
            store = stored.store if stored is not None else None
            fitted = fit_heads(teacher, recipe.heads, context, store=store, outputs=once[position], name=name)
            teachers[position], metrics[name] = teacher.with_heads(fitted.heads), fitted.metrics
            heads_sha256.append(module_digest(fitted.heads))
    networks.objective.to(context.accelerator.device)
    if networks.criterion_fits:
        rates = (recipe.drop, recipe.drop_path)
        outputs = once[0] if recipe.heads.heads_protocol == "stored" else None
        metrics["fitted"] = fit_criteria(
            networks.criterion_fits, recipe.optim, recipe.fitting_epochs, rates, context, outputs
        )
    if recipe.shard_teacher:
        teachers = [shard_teacher(teacher, context.accelerator) for teacher in teachers]
    if stored is not None:
        teachers[0].tap.to("cpu")  # its outputs are there: the device's memory is the student's
    return _Pretrained(teachers, metrics, heads_sha256)


def _teach_of(
    recipe: Recipe, networks: Networks, teachers: Sequence[Teacher], stored: StoredSource | None
) -> Teach | None:
    """Return what gives the teacher's features of a batch; None where nothing reads them."""
    if stored is not None:
        return stored_teacher(teachers[0].heads)
    if networks.trajectory is not None:
        return FollowedTeacher(teachers[0], networks.trajectory, recipe.optim.epochs)
    if not teachers or not networks.objective.needs:
        return None
    return LiveTeachers(*teachers, rotate=needs_rotations(networks.objective))


def _train_student(
    turn: Turn, networks: Networks, source: Source, teach: Teach | None, context: RunContext, updates_before: int
) -> Fitted:
    recipe, images, accelerator = turn.recipe, context.images, context.accelerator
    trainee = networks.trainee().to(accelerator.device)
    if networks.peer is None:
        layers_of = recipe.for_student or networks.student.name
        set_memory_format(networks.objective, layers_of, recipe.channels_last, accelerator.device)
    for role, tap in networks.students().items():
        set_memory_format(tap, tap.name, recipe.channels_last, accelerator.device)
        count = sum(p.numel() for p in tap.parameters())
        size = "x".join(map(str, images.input_size))
        accelerator.print(f"{role} {tap.name}: {count:,} parameters, {size} images")
    if images.evaluation is None:
        accelerator.print("no evaluation split: use --val-split 0.1 to hold one out")
    end_epoch = None
    if recipe.keep_checkpoints is not None:
        count, epochs = recipe.keep_checkpoints, recipe.optim.epochs
        end_epoch = SnapshotWriter(Path(recipe.output), epochs, count, networks.student, accelerator).end_epoch
    return fit(
        trainee,
        source,
        recipe.optim,
        accelerator,
        seed=recipe.seed,
        batch_size=recipe.data.batch_size,
        teach=teach,
        evaluate=_evaluation_of(networks, images.evaluation, recipe, accelerator)
        if images.evaluation is not None
        else None,
        start_epoch=teach.start_epoch if isinstance(teach, FollowedTeacher) else None,
        end_epoch=end_epoch,
        averaged=networks.student,
        compile=recipe.compile,
        options=FitOptions(
            folder=turn.folder,
            metrics_folder=Path(recipe.output),
            epochs_before=turn.epochs_before,
            updates_before=updates_before,
            fingerprint=networks.fingerprint,
            stage=turn.stage,
            resume=recipe.resume,
            checkpoint_interval=recipe.checkpoint_interval,
            checkpoint_hist=recipe.checkpoint_hist,
            log_interval=recipe.log_interval,
            quiet=context.quiet,
        ),
    )


def _evaluation_of(networks: Networks, source: Source, recipe: Recipe, accelerator: Accelerator) -> Evaluate:
    """Return the evaluation after an epoch: of the student (its average, if there is one), and by role of the peer or
    the raw weights."""

    def evaluate_students(averaged: nn.Module | None) -> Metrics:
        taps: dict[str, nn.Module] = dict(networks.students())
        if averaged is not None:
            taps |= {"student": averaged, "raw": networks.student}
        found = evaluate_taps(taps, source, accelerator, recipe.data.validation_batch_size)
        student = found.pop("student")
        return {
            **student,
            **{f"{role}_{name}": row[name] for role, row in found.items() for name in row if name != "n"},
        }

    return evaluate_students


def _learn_int8(
    recipe: Recipe, networks: Networks, fitted: Fitted, source: Source, teach: Teach | None, context: RunContext
) -> tuple[Fitted, dict[str, Any]]:
    """Carry out the int8 stage on the student, or on its average. Return what training ended with, with the metrics
    after the stage, and the stage's part of the summary."""
    if fitted.averaged is not None:
        networks.student.load_state_dict(fitted.averaged.state_dict())
    if isinstance(teach, FollowedTeacher):
        teach.start_epoch(recipe.optim.epochs - 1)  # the trained teacher, also where a finished run was resumed
    found = learn_int8(recipe, networks, source, teach, context)
    return replace(fitted, last=found["after"]["float"], averaged=None), found


def _final_model(networks: Networks, fitted: Fitted) -> nn.Module:
    """The trained student: its moving average where there is one."""
    averaged = cast(FeatureTap | None, fitted.averaged)
    for tap in (networks.student, averaged):
        if tap is not None:
            tap.thaw()
    return (averaged or networks.student).model
