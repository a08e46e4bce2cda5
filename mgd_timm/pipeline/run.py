"""A whole run: images, teacher, heads, student, export. What the command line and `mgd_timm.distill` call."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import nn

from mgd_timm.criteria.terms import parse_terms
from mgd_timm.data.dataset import Images, Source, load_images
from mgd_timm.data.mixed_source import taught
from mgd_timm.distiller import LiveTeachers, Teacher, shard_teacher
from mgd_timm.distributed.collectives import local_main_first, on_main
from mgd_timm.distributed.launch import build_accelerator
from mgd_timm.export.timm_folder import export_model
from mgd_timm.models.build import set_memory_format
from mgd_timm.models.load import check_model_name
from mgd_timm.pipeline.checks import check_storable, check_taught
from mgd_timm.pipeline.connect import Networks, build_networks, defaults_of, load_teachers, suit_teachers
from mgd_timm.pipeline.run_folder import continued, fresh, start_folder
from mgd_timm.recipe.derived import resolved
from mgd_timm.recipe.options import as_dict
from mgd_timm.recipe.recipe import Recipe
from mgd_timm.storage.atomic_write import write_text_atomically
from mgd_timm.storage.versions import versions
from mgd_timm.teachers.classifier import fit_teacher_heads
from mgd_timm.teachers.heads import fit_heads
from mgd_timm.teachers.pretraining import fit_stages
from mgd_timm.training.checkpointer import Upkeep
from mgd_timm.training.evaluation import Metrics, evaluate_model, evaluate_taps
from mgd_timm.training.loop import Fitted, Teach, Watch, fit
from mgd_timm.training.optimizer_state import check_names


@dataclass(frozen=True)
class Result:
    """What a run leaves: the student in eval mode on the CPU, and the numbers of summary.json."""

    student: nn.Module
    summary: dict[str, Any]


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
        ValueError: What build, data, criteria and fit refuse.
        FileExistsError: The output folder exists and the run is not resumed.
        Stopped: A signal; the state was saved.
    """
    recipe = resolved(recipe)
    folder = Path(recipe.output)
    steps = recipe.optim.grad_accum_steps
    recipe = continued(folder, recipe) if recipe.resume else fresh(folder, recipe)
    check_names(recipe.optim)
    recipe, accelerator = build_accelerator(recipe, steps)
    teachers = _load_teachers(recipe, [teacher] if isinstance(teacher, nn.Module) else teacher or ())
    defaults = defaults_of(recipe, teachers[0] if teachers else None, student)
    in_turn = partial(local_main_first, accelerator)
    images = load_images(recipe.data, recipe.seed, defaults, say=accelerator.print, main_first=in_turn)
    suit_teachers(teachers, recipe, images)
    networks = build_networks(recipe, images, accelerator, teachers, student, fitted=recipe.fit_teacher_head == "none")
    on_main(accelerator, lambda: start_folder(folder, recipe, images, accelerator.print, steps))
    accelerator.init_trackers("mgd_timm", config={name: str(value) for name, value in as_dict(recipe).items()})
    summary: dict[str, Any] = {}
    if teachers and recipe.fit_teacher_head != "none":
        summary["teacher_head"] = fit_teacher_heads(teachers, images, recipe, accelerator, quiet=quiet)
        # Connected anew, as BatchNorm was folded and classifiers copied before. What the run is known by stays: how
        # they were made.
        networks = replace(
            build_networks(recipe, images, accelerator, teachers, student), fingerprint=networks.fingerprint
        )
    _report_teachers(networks.teachers, images, accelerator, recipe, summary)
    fitted, trained = _train_student(recipe, images, networks, accelerator, summary, quiet)
    summary = {"top1": fitted.last.get("top1"), "best_top1": fitted.best if fitted.best_epoch else None} | summary
    summary |= {
        "best_epoch": fitted.best_epoch,
        "last": fitted.last,
        "updates": fitted.updates,
        "seconds": round(fitted.seconds, 2),
    }
    if images.val is not None and images.test is not None:
        summary["test"] = evaluate_model(trained, images.test, accelerator, recipe.data.validation_batch_size)
        summary["val_top1"], summary["top1"] = summary["top1"], summary["test"]["top1"]
    summary["parameters"] = sum(p.numel() for p in trained.parameters())
    if networks.peer is not None:
        summary["peer"] = _peer_summary(networks.peer.model, fitted, images, recipe, accelerator)
    provenance = {"recipe": as_dict(recipe), "data_sha256": images.train.digest, "metrics": summary}
    if networks.teachers:
        digests = [one.digest for one in networks.teachers]
        provenance["teacher_sha256"] = digests[0] if len(digests) == 1 else digests

    def leave() -> None:
        export_model(trained, folder / "export", provenance=provenance, overwrite=True)
        if networks.peer is not None:
            own = {**provenance, "metrics": summary["peer"]}
            export_model(networks.peer.model, folder / "export_peer", provenance=own, overwrite=True)
        write_text_atomically(folder / "summary.json", json.dumps({**summary, "versions": versions()}, indent=2) + "\n")

    on_main(accelerator, leave)
    for tracker in accelerator.trackers:  # not end_training, which would part the processes: another run may follow
        tracker.finish()
    _say_headline(summary, folder, accelerator.print)
    first = "import mgd_timm.models; " if networks.student.name.startswith("cifar_") else ""
    accelerator.print(f"load it: {first}timm.create_model('local-dir:{folder / 'export'}', pretrained=True)")
    return Result(trained.to("cpu").eval(), summary)


def _say_headline(summary: dict[str, Any], folder: Path, say: Callable[[str], None]) -> None:
    top1 = summary["top1"]
    if top1 is not None:
        best = (
            f"; best {summary['best_top1']:.2f} % in epoch {summary['best_epoch']}"
            if summary["best_top1"] is not None
            else ""
        )
        say(f"top-1 {top1:.2f} % after the last epoch{best}")
    if summary.get("peer", {}).get("top1") is not None:
        say(f"peer: top-1 {summary['peer']['top1']:.2f} % after the last epoch")
    say(f"exported: {folder / 'export'}" + (f" and {folder / 'export_peer'}" if "peer" in summary else ""))


def _peer_summary(
    model: nn.Module, fitted: Fitted, images: Images, recipe: Recipe, accelerator: Accelerator
) -> dict[str, Any]:
    """The peer's numbers, named as the student's in the summary."""
    last = {name.removeprefix("peer_"): value for name, value in fitted.last.items() if name.startswith("peer_")}
    found: dict[str, Any] = {
        "top1": last.get("top1"),
        "last": last,
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    if images.val is not None and images.test is not None:
        found["test"] = evaluate_model(model, images.test, accelerator, recipe.data.validation_batch_size)
        found["val_top1"], found["top1"] = found["top1"], found["test"]["top1"]
    return found


def _load_teachers(recipe: Recipe, given: Sequence[nn.Module | None]) -> list[nn.Module]:
    """The teachers with their weights, after what can be refused without them."""
    if recipe.teacher is not None or recipe.peer is not None:
        parse_terms(recipe)  # a wrong word is said before the first image is read
    check_taught(recipe)
    if recipe.peer is not None:
        check_model_name(recipe.peer)
    if recipe.teacher is not None and recipe.teacher_store is not None:
        check_storable(recipe)
    return load_teachers(recipe, given)


def _train_student(
    recipe: Recipe, images: Images, networks: Networks, accelerator: Accelerator, summary: dict[str, Any], quiet: bool
) -> tuple[Fitted, nn.Module]:
    """Fit heads where the method needs them, then the student; gives the trained model, its moving average where there
    is one."""
    tap, teachers, stored = networks.student, list(networks.teachers), networks.stored
    if stored is not None:
        stored.fill(teachers[0], accelerator, recipe.data.validation_batch_size, quiet=quiet)
    if recipe.method != "none":
        for place, teacher in enumerate(teachers):
            name = "heads" if len(teachers) == 1 else f"heads_{place + 1}"
            heads = fit_heads(teacher, images, recipe, accelerator, summary, stored=stored, name=name, quiet=quiet)
            teachers[place] = teacher.with_heads(heads)
    networks.objective.to(accelerator.device)
    if networks.stages:
        summary["fitted"] = fit_stages(networks.stages, images, recipe, accelerator, quiet=quiet)
    if recipe.shard_teacher:
        teachers = [shard_teacher(teacher, accelerator) for teacher in teachers]
    if stored is not None:
        teachers[0].tap.to("cpu")  # its outputs are there: the device's memory is the student's
    trainee = networks.trainee().to(accelerator.device)
    if networks.peer is None:
        set_memory_format(trainee, tap.name, recipe.channels_last, accelerator.device)
    for role, shown in {"student": tap, "peer": networks.peer}.items():
        if shown is not None:
            set_memory_format(shown, shown.name, recipe.channels_last, accelerator.device)
            count = sum(p.numel() for p in shown.parameters())
            accelerator.print(
                f"{role} {shown.name}: {count:,} parameters, {'x'.join(map(str, images.input_size))} images"
            )
    watched = images.watched
    if watched is None:
        accelerator.print("no split to evaluate on, only the training accuracy is known; --val-split 0.1 cuts one off.")

    teach: Teach | None = None
    if stored is not None:
        teach = stored.teacher(teachers[0].heads)
    elif teachers and networks.objective.needs:
        teach = LiveTeachers(*teachers)
    upkeep = Upkeep(
        folder=Path(recipe.output),
        fingerprint=networks.fingerprint,
        stage="train" if not teachers and networks.peer is None else "distil",
        resume=recipe.resume,
        checkpoint_interval=recipe.checkpoint_interval,
        checkpoint_hist=recipe.checkpoint_hist,
        log_interval=recipe.log_interval,
        quiet=quiet,
    )
    fitted = fit(
        trainee,
        taught(images, recipe) if stored is None else stored,
        recipe.optim,
        accelerator,
        seed=recipe.seed,
        batch_size=recipe.data.batch_size,
        teach=teach,
        watch=_watcher(networks, watched, recipe, accelerator) if watched is not None else None,
        averaged=tap,
        compile=recipe.compile,
        upkeep=upkeep,
    )
    tap.thaw()
    final = (fitted.averaged or tap).model
    assert isinstance(final, nn.Module)
    return fitted, final


def _watcher(networks: Networks, watched: Source, recipe: Recipe, accelerator: Accelerator) -> Watch:
    """Evaluates the student after an epoch (the averaged one where there is one) and what stands beside it, under its
    role."""

    def watch(averaged: nn.Module | None) -> Metrics:
        taps: dict[str, nn.Module] = {"student": networks.student}
        if averaged is not None:
            taps = {"student": averaged, "raw": networks.student}
        if networks.peer is not None:
            taps["peer"] = networks.peer
        found = evaluate_taps(taps, watched, accelerator, recipe.data.validation_batch_size)
        student = found.pop("student")
        return {
            **student,
            **{f"{role}_{name}": row[name] for role, row in found.items() for name in row if name != "n"},
        }

    return watch


def _report_teachers(
    teachers: Sequence[Teacher], images: Images, accelerator: Accelerator, recipe: Recipe, summary: dict[str, Any]
) -> None:
    """Each teacher's accuracy on the data, before the first epoch."""
    found: list[float | None] = []
    for teacher in teachers if images.watched is not None else ():
        assert images.watched is not None
        if not teacher.shows_logits:
            accelerator.print(
                f"teacher {teacher.tap.name}: shows no logits of these classes, so that it has no accuracy"
            )
            found.append(None)
            continue
        row = evaluate_taps({"teacher": teacher}, images.watched, accelerator, recipe.data.validation_batch_size)[
            "teacher"
        ]
        found.append(row["top1"])
        accelerator.print(f"teacher {teacher.tap.name}: top-1 {row['top1']:.2f} % on {int(row['n']):,} images")
        if near_chance(row["top1"], images.num_classes):
            accelerator.print(
                f"warning: the teacher is near chance ({100 / images.num_classes:.2f} %): are its weights those of "
                "these classes, in this order?"
            )
    if any(top1 is not None for top1 in found):
        summary["teacher_top1"] = found[0] if len(teachers) == 1 else found


def near_chance(top1: float, num_classes: int) -> bool:
    """Whether an accuracy in % is less than twice chance; of few classes, less than a quarter of the way from chance to
    100."""
    chance = 100 / num_classes
    return top1 < chance + min(chance, (100 - chance) / 4)
