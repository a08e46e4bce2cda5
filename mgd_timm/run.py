"""A whole run: images, teacher, heads, student, export. What the command line and `mgd_timm.distill` call."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import yaml
from accelerate import Accelerator
from torch import nn

from mgd_timm import checkpoint
from mgd_timm.build import (
    build_accelerator,
    build_student,
    build_tap,
    build_teacher,
    check_label_spaces,
    check_model_name,
    defaults_of,
    identity,
    lay_out,
    set_seed,
    teacher_view,
)
from mgd_timm.criteria import Criterion, Objective
from mgd_timm.data import Images, Source, load_images
from mgd_timm.distiller import Distiller, MutualLearning, Teacher, live
from mgd_timm.evaluation import evaluate_model, evaluate_taps
from mgd_timm.export import describe, export_model, versions
from mgd_timm.features import FeatureTap, Pair
from mgd_timm.fit import Fitted, Metrics, Upkeep, Watch, compile_mode, fit
from mgd_timm.fitting import Stage, criterion_stages, fit_stages, student_stages
from mgd_timm.folding import folded
from mgd_timm.granularity import MAG
from mgd_timm.head_fitting import fit_heads
from mgd_timm.optimizer_state import check_names, module_digest
from mgd_timm.processes import on_main
from mgd_timm.recipe import PARTS, Recipe, as_dict, differences, flatten, make_recipe, resolved
from mgd_timm.teacher_store import StoredViews, check_storable, open_store
from mgd_timm.terms import build_objective, criterion_names, needs, parse_terms


@dataclass(frozen=True)
class Result:
    """What a run leaves: the student in eval mode on the CPU, and the numbers of summary.json."""

    student: nn.Module
    summary: dict[str, Any]


def run(recipe: Recipe, *, teacher: nn.Module | None = None, student: nn.Module | None = None, quiet: bool = False) -> Result:
    """Carry out a recipe; a module given as teacher or student stands for the recipe's name.

    All that can be refused is refused before the output folder is made.

    Raises:
        ValueError: What build, data, criteria and fit refuse.
        FileExistsError: The output folder exists and the run is not resumed.
        Stopped: A signal; the state was saved.
    """
    recipe = resolved(recipe)
    folder = Path(recipe.output)
    _refuse_existing(folder, recipe)
    check_names(recipe.optim)
    recipe, accelerator = build_accelerator(recipe)
    images, networks = _build(recipe, accelerator, teacher, student)
    on_main(accelerator, lambda: _start_folder(folder, recipe, accelerator.print))
    accelerator.init_trackers("mgd_timm", config={name: str(value) for name, value in as_dict(recipe).items()})
    summary: dict[str, Any] = {}
    if networks.teacher is not None:
        _report_teacher(networks.teacher, images, accelerator, recipe, summary)
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
    if networks.teacher is not None:
        provenance["teacher_sha256"] = networks.identity["teacher_sha256"]

    def leave() -> None:
        export_model(trained, folder / "export", provenance=provenance, overwrite=True)
        if networks.peer is not None:
            own = {**provenance, "metrics": summary["peer"]}
            export_model(networks.peer.model, folder / "export_peer", provenance=own, overwrite=True)
        checkpoint.write_text(folder / "summary.json", json.dumps({**summary, "versions": versions()}, indent=2) + "\n")

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
        best = f"; best {summary['best_top1']:.2f} % in epoch {summary['best_epoch']}" if summary["best_top1"] is not None else ""
        say(f"top-1 {top1:.2f} % after the last epoch{best}")
    if summary.get("peer", {}).get("top1") is not None:
        say(f"peer: top-1 {summary['peer']['top1']:.2f} % after the last epoch")
    say(f"exported: {folder / 'export'}" + (f" and {folder / 'export_peer'}" if "peer" in summary else ""))


def _peer_summary(model: nn.Module, fitted: Fitted, images: Images, recipe: Recipe, accelerator: Accelerator) -> dict[str, Any]:
    """The peer's numbers, named as the student's in the summary."""
    last = {name.removeprefix("peer_"): value for name, value in fitted.last.items() if name.startswith("peer_")}
    found: dict[str, Any] = {"top1": last.get("top1"), "last": last, "parameters": sum(p.numel() for p in model.parameters())}
    if images.val is not None and images.test is not None:
        found["test"] = evaluate_model(model, images.test, accelerator, recipe.data.validation_batch_size)
        found["val_top1"], found["top1"] = found["top1"], found["test"]["top1"]
    return found


@dataclass(frozen=True)
class _Networks:
    """The networks of a run, connected: taps, objective, and the teacher as yet without heads."""

    student: FeatureTap
    objective: Objective | MAG
    teacher: Teacher | None
    peer: FeatureTap | None
    peer_objective: Objective | MAG | None
    stages: list[Stage]
    identity: dict[str, Any]
    stored: StoredViews | None


def _build(
    recipe: Recipe, accelerator: Accelerator, teacher: nn.Module | None, student: nn.Module | None
) -> tuple[Images, _Networks]:
    """Read the images and connect the networks; whatever does not fit is refused here."""
    if recipe.teacher is not None or recipe.peer is not None:
        parse_terms(recipe)  # a wrong word is said before the first image is read
    if recipe.peer is not None:
        check_model_name(recipe.peer)
    if recipe.teacher is not None:
        if recipe.teacher_store is not None:
            check_storable(recipe)
        teacher = build_teacher(recipe) if teacher is None else teacher
    defaults = defaults_of(recipe, teacher, student)
    first = accelerator.local_main_process_first
    images = load_images(recipe.data, recipe.seed, defaults, say=accelerator.print, main_first=first)
    drawn = student is None and not recipe.student_pretrained and recipe.student_checkpoint is None
    if student is None:
        set_seed(recipe.seed, 3)
        student = build_student(recipe, images)
    if teacher is not None:
        check_label_spaces(teacher, student, images)
    elif student.num_classes != images.num_classes:
        raise ValueError(f"the model has {student.num_classes} classes, the data {images.num_classes}: they must agree.")
    _describe(student, images, recipe)
    own_maps = recipe.maps if needs(recipe, "maps", student=True) else None
    tap = build_tap(student, images.input_size, own_maps, cam=needs(recipe, "cams"))
    if recipe.train_only == "classifier":
        tap.freeze_backbone(adapt_batchnorm=recipe.adapt_batchnorm)
        if drawn:
            accelerator.print("warning: the frozen backbone has random weights: give --pretrained or --initial-checkpoint FILE.")
    shapes = seen = tap.shapes(images.input_size[1:])
    whole = classifier = stored = None
    if teacher is not None:
        whole, classifier = _connect_teacher(recipe, accelerator, teacher, images)
        seen = whole.tap.shapes(whole.size(images.input_size[1:]))
    other = _connect_peer(recipe, images) if recipe.peer is not None else None
    if other is not None:
        seen = other.shapes(images.input_size[1:])
    pair = Pair(shapes, seen, images.num_samples, images.trained_labels(), classifier)
    own = identity(recipe, images, accelerator, student, teacher, other.model if other is not None else None)
    set_seed(recipe.seed, 4)
    objective = build_objective(recipe, pair)
    peers = build_objective(recipe, pair._replace(student=seen, teacher=shapes)) if other is not None else None
    for role, own_terms in (("", objective), ("peer_", peers)):
        for name, term in (_criteria(own_terms) if own_terms is not None else {}).items():
            if term.remark() is not None:
                accelerator.print(f"{role}{name}: {term.remark()}")
    stages = []
    if whole is not None and teacher is not None:
        stages = criterion_stages(recipe, objective, whole) + student_stages(recipe, tap, whole, teacher, images, pair)
    if whole is not None and not stages and not objective.needs:
        accelerator.print("warning: nothing of the teacher is learnt: every weight but the task's is 0.")
    if whole is not None and recipe.teacher_store is not None:
        stored = open_store(recipe, whole, images, accelerator)
    return images, _Networks(tap, objective, whole, other, peers, stages, own, stored)


def _connect_teacher(
    recipe: Recipe, accelerator: Accelerator, model: nn.Module, images: Images
) -> tuple[Teacher, nn.Module | None]:
    """The frozen teacher as yet without heads, and the classifier of its network."""
    view = teacher_view(model, images)
    size = view.size or (images.input_size[1], images.input_size[2])
    maps = recipe.maps if needs(recipe, "maps") else None
    tap = build_tap(model, (images.input_size[0], *size), maps, cam=needs(recipe, "cams"))
    classifier, own_digest = tap.classifier, module_digest(model)
    if recipe.fold_teacher:
        tap = folded(tap) or tap
    teacher = Teacher(tap, view=view, digest=own_digest).to(accelerator.device)
    lay_out(teacher, tap, recipe, accelerator)
    return teacher, classifier


def _connect_peer(recipe: Recipe, images: Images) -> FeatureTap:
    """The second student, from the seed."""
    assert recipe.peer is not None
    set_seed(recipe.seed, 6)
    drawn = replace(recipe, student=recipe.peer, student_pretrained=False, student_checkpoint=None)
    try:
        peer = build_student(drawn, images)
    except ValueError as error:
        raise ValueError(f"peer: {error}") from error
    _describe(peer, images, recipe)
    maps = recipe.maps if needs(recipe, "maps") else None
    return build_tap(peer, images.input_size, maps, cam=needs(recipe, "cams"))


def _criteria(objective: Objective | MAG) -> dict[str, Criterion]:
    plain = objective.objective if isinstance(objective, MAG) else objective
    return {name: term for name, term in plain.criteria.items() if isinstance(term, Criterion)}


def _describe(model: nn.Module, images: Images, recipe: Recipe) -> None:
    describe(
        model,
        input_size=images.input_size,
        mean=images.mean,
        std=images.std,
        class_names=images.class_names,
        license=recipe.license,
        tag=weights_tag(recipe),
    )


def _trainee(networks: _Networks) -> Distiller | MutualLearning:
    if networks.peer is None or networks.peer_objective is None:
        return Distiller(networks.student, networks.objective)
    return MutualLearning(networks.student, networks.peer, networks.objective, networks.peer_objective)


def weights_tag(recipe: Recipe) -> str:
    """timm's tag of the weights: method, hosts and data, as in mas_kd_cifar100."""
    place = Path(recipe.data.data_dir or recipe.data.dataset).name
    words = [place]
    if recipe.teacher is not None or recipe.peer is not None:
        words = [*([recipe.method] if recipe.method != "none" else []), *criterion_names(recipe), place]
    return re.sub(r"[^a-z0-9]+", "_", "_".join(words).lower()).strip("_")


def _train_student(
    recipe: Recipe, images: Images, networks: _Networks, accelerator: Accelerator, summary: dict[str, Any], quiet: bool
) -> tuple[Fitted, nn.Module]:
    """Fit heads where the method needs them, then the student; gives the trained model, its moving average where there is one."""
    tap, teacher, stored = networks.student, networks.teacher, networks.stored
    if teacher is not None and stored is not None:
        stored.fill(teacher, accelerator, recipe.data.validation_batch_size, quiet=quiet)
    if teacher is not None and recipe.method != "none":
        heads = fit_heads(teacher, images, recipe, accelerator, summary, stored=stored, quiet=quiet)
        teacher = Teacher(teacher.tap, heads, view=teacher.view, digest=teacher.digest).to(accelerator.device)
    networks.objective.to(accelerator.device)
    if networks.stages:
        summary["fitted"] = fit_stages(networks.stages, images, recipe, accelerator, quiet=quiet)
    if teacher is not None and stored is not None:
        teacher.tap.to("cpu")  # its outputs are there: the device's memory is the student's
    trainee = _trainee(networks).to(accelerator.device)
    if isinstance(trainee, Distiller):
        lay_out(trainee, tap, recipe, accelerator)
    for role, shown in {"student": tap, "peer": networks.peer}.items():
        if shown is not None:
            lay_out(shown, shown, recipe, accelerator)
            count = sum(p.numel() for p in shown.parameters())
            accelerator.print(f"{role} {shown.name}: {count:,} parameters, {'x'.join(map(str, images.input_size))} images")
    watched = images.watched
    if watched is None:
        accelerator.print("no split to evaluate on, only the training accuracy is known; --val-split 0.1 cuts one off.")

    teach = None
    if teacher is not None and stored is not None:
        teach = stored.teacher(teacher.heads)
    elif teacher is not None and networks.objective.needs:
        teach = live(teacher, recipe.data.batch_size, compile_mode(accelerator) if recipe.compile else None)
    upkeep = Upkeep(
        folder=Path(recipe.output),
        identity=networks.identity,
        stage="train" if teacher is None and networks.peer is None else "distil",
        resume=recipe.resume,
        checkpoint_interval=recipe.checkpoint_interval,
        checkpoint_hist=recipe.checkpoint_hist,
        log_interval=recipe.log_interval,
        quiet=quiet,
    )
    fitted = fit(
        trainee,
        images.train if stored is None else stored,
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


def _watcher(networks: _Networks, watched: Source, recipe: Recipe, accelerator: Accelerator) -> Watch:
    """Evaluates the student after an epoch (the averaged one where there is one) and what stands beside it, under its role."""

    def watch(averaged: nn.Module | None) -> Metrics:
        taps: dict[str, nn.Module] = {"student": networks.student}
        if averaged is not None:
            taps = {"student": averaged, "raw": networks.student}
        if networks.peer is not None:
            taps["peer"] = networks.peer
        found = evaluate_taps(taps, watched, accelerator, recipe.data.validation_batch_size)
        student = found.pop("student")
        return {**student, **{f"{role}_{name}": row[name] for role, row in found.items() for name in row if name != "n"}}

    return watch


def _report_teacher(teacher: Teacher, images: Images, accelerator: Accelerator, recipe: Recipe, summary: dict[str, Any]) -> None:
    if images.watched is None:
        return
    found = evaluate_taps({"teacher": teacher}, images.watched, accelerator, recipe.data.validation_batch_size)["teacher"]
    summary["teacher_top1"] = found["top1"]
    accelerator.print(f"teacher {teacher.tap.name}: top-1 {found['top1']:.2f} % on {int(found['n']):,} images")
    chance = 100 / images.num_classes
    if found["top1"] < 2 * chance:
        accelerator.print(
            f"warning: the teacher is near chance ({chance:.2f} %): are its weights those of these classes, in this order?"
        )


def _refuse_existing(folder: Path, recipe: Recipe) -> None:
    if recipe.resume and not (folder / "recipe.yaml").is_file():
        # Whoever restarts what was killed gives --resume from the first start on: that one may have been killed at once.
        if folder.exists() and (
            not folder.is_dir() or any(not path.name.startswith(checkpoint.ASIDE) for path in folder.iterdir())
        ):
            raise ValueError(f"{folder} holds no run to resume (no recipe.yaml), but other files: choose another --output.")
    elif recipe.resume:
        before = _digested(_read_yaml(folder / "recipe.yaml"))
        changed = differences(before, as_dict(recipe, digest_only=True))
        # What accelerate launch says of accumulation is known later; the checkpoint's own identity guards it.
        changed = [line for line in changed if not line.startswith("optim.grad_accum_steps")]
        if changed:
            raise ValueError(
                f"{folder} is a run of another recipe ({'; '.join(changed[:5])}): resume with the flags of its start, or choose "
                "another --output."
            )
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists: choose another --output, remove it, or continue it with --resume.")


def _read_yaml(path: Path) -> dict[str, Any]:
    """A written recipe.

    Raises:
        ValueError: It is damaged.
    """
    try:
        values = yaml.safe_load(path.read_bytes())
        if not isinstance(values, dict) or not all(isinstance(values.get(part, {}), dict) for part in PARTS):
            raise ValueError("not a recipe")
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error}): put it back, or start a new run with another --output.") from error
    return values


def _digested(values: dict[str, Any]) -> dict[str, Any]:
    """The part of a written recipe that decides the weights."""
    return {
        f.name: {
            g.name: values.get(f.name, {}).get(g.name) for g in fields(type(getattr(Recipe(), f.name))) if g.metadata["digest"]
        }
        if f.name in PARTS
        else values.get(f.name)
        for f in fields(Recipe)
        if f.metadata.get("digest", True)
    }


def _start_folder(folder: Path, recipe: Recipe, say: Callable[[str], None]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint.sweep(folder)
    if recipe.resume and not (folder / "recipe.yaml").exists():
        say(f"{folder}: nothing to resume there, a new run starts")
    texts = {"recipe.yaml": lambda: yaml.safe_dump(as_dict(replace(recipe, resume=False)), sort_keys=False)}
    texts["versions.json"] = lambda: json.dumps(versions(), indent=2) + "\n"
    for name, text in texts.items():
        if not (folder / name).exists():  # of a start that was killed, or to be kept
            checkpoint.write_text(folder / name, text())


def read_recipe(folder: Path) -> Recipe:
    """The recipe of a run folder.

    Raises:
        ValueError: No run there.
    """
    path = folder / "recipe.yaml"
    if not path.is_file():
        raise ValueError(f"{folder} holds no run (no recipe.yaml).")
    return make_recipe(**flatten(_read_yaml(path)))
