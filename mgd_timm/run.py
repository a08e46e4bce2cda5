"""A whole run: images, teacher, heads, student, export. What the command line and `mgd_timm.distill` call."""

import json
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from torch import nn

from mgd_timm import checkpoint
from mgd_timm.build import (
    build_accelerator,
    build_objective,
    build_student,
    build_teacher,
    check_label_spaces,
    defaults_of,
    load_model,
    needs_maps,
    parse_criteria,
    set_seed,
    teacher_view,
)
from mgd_timm.data import Defaults, Images, cache_folder, load_images
from mgd_timm.distiller import Distiller, Teacher
from mgd_timm.export import describe, export, versions
from mgd_timm.features import Batch, FeatureTap, Pair, choose_maps
from mgd_timm.fit import Fitted, Metrics, Upkeep, fit
from mgd_timm.fit import evaluate as evaluate_logits
from mgd_timm.granularity import GranularityHeads, HeadFitting, stable_excitation
from mgd_timm.optimizer_state import module_digest
from mgd_timm.recipe import Data, Heads, Optim, Recipe, as_dict, differences, digest, unknown
from mgd_timm.stored import StoredOutputs, store_outputs

FAR_BELOW = 3.0  # points of top-1: the paper's heads are within about 1 of their teacher


@dataclass(frozen=True)
class Result:
    """What a run leaves: the student in eval mode on the CPU, and the numbers of summary.json."""

    student: nn.Module
    summary: dict[str, Any]


def run(recipe: Recipe, *, teacher: nn.Module | None = None, student: nn.Module | None = None, quiet: bool = False) -> Result:
    """Carry out a recipe; a module given as teacher or student stands for the recipe's name.

    Raises:
        ValueError: What build, data, criteria and fit refuse.
        FileExistsError: The output folder exists and the run is not resumed.
        Stopped: A signal; the state was saved.
    """
    torch.set_float32_matmul_precision("high")  # matters on GPUs alone
    if recipe.teacher is not None:
        parse_criteria(recipe)  # a wrong word is said before the first image is read
    folder = Path(recipe.output)
    _refuse_existing(folder, recipe)
    recipe, accelerator = build_accelerator(recipe)
    say = accelerator.print
    if recipe.teacher is not None and teacher is None:
        teacher = build_teacher(recipe)
    images = load_images(
        recipe.data, recipe.seed, defaults_of(recipe, teacher, student), say=say, main_first=accelerator.local_main_process_first
    )
    if student is None:
        set_seed(recipe.seed, 3)
        student = build_student(recipe, images)
    if teacher is not None:
        check_label_spaces(teacher, student, images)
    elif student.num_classes != images.num_classes:
        raise ValueError(f"the model has {student.num_classes} classes, the data {images.num_classes}: they must agree.")
    if accelerator.is_main_process:
        _start_folder(folder, recipe)
    accelerator.wait_for_everyone()
    tag = "mgd_timm" if recipe.teacher is None else f"{recipe.method}_distilled" if recipe.method != "none" else "distilled"
    about = {"input_size": images.input_size, "mean": images.mean, "std": images.std, "class_names": images.class_names}
    describe(student, **about, license=recipe.license, tag=tag)  # type: ignore[arg-type]
    accelerator.init_trackers("mgd_timm", config={name: str(value) for name, value in as_dict(recipe).items()})
    summary: dict[str, Any] = {}
    fitted, trained = _train_student(recipe, images, teacher, student, accelerator, summary, quiet)
    summary = {"top1": fitted.last.get("top1"), "best_top1": fitted.best if fitted.best_epoch else None} | summary
    summary |= {"best_epoch": fitted.best_epoch, "last": fitted.last, "updates": fitted.updates, "classes": images.num_classes}
    if images.val is not None and images.test is not None:
        summary["test"] = _evaluate_model(trained, images.test, accelerator, recipe)
        summary["val_top1"], summary["top1"] = summary["top1"], summary["test"]["top1"]
    summary["parameters"] = sum(p.numel() for p in trained.parameters())
    if accelerator.is_main_process:
        provenance = {"recipe": as_dict(recipe), "data_sha256": images.train.digest, "metrics": summary}
        if teacher is not None:
            provenance["teacher_sha256"] = module_digest(teacher)
        export(trained, folder / "export", provenance=provenance, overwrite=True)
        text = json.dumps({**summary, "versions": versions()}, indent=2) + "\n"
        checkpoint.write_text(folder / "summary.json", text)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    _say_headline(summary, folder, say)
    return Result(trained.to("cpu").eval(), summary)


def _say_headline(summary: dict[str, Any], folder: Path, say: Callable[[str], None]) -> None:
    top1 = summary["top1"]
    if top1 is not None:
        best = f"; best {summary['best_top1']:.2f} % in epoch {summary['best_epoch']}" if summary["best_top1"] is not None else ""
        say(f"top-1 {top1:.2f} % after the last epoch{best}")
    say(f"student: {folder / 'export'} (timm.create_model('local-dir:{folder / 'export'}', pretrained=True))")


def _train_student(
    recipe: Recipe,
    images: Images,
    teacher: nn.Module | None,
    student: nn.Module,
    accelerator: Accelerator,
    summary: dict[str, Any],
    quiet: bool,
) -> tuple[Fitted, nn.Module]:
    """Fit heads where the method needs them, then the student; gives the trained model, its moving average where there is one."""
    tap = _tap(student, images.input_size, recipe)
    shapes = tap.shapes(images.input_size[1:])
    device, say = accelerator.device, accelerator.print
    teach = None
    seen = shapes
    if teacher is not None:
        view = teacher_view(teacher, images)
        size = view.size or (images.input_size[1], images.input_size[2])
        teacher_tap = _tap(teacher, (images.input_size[0], *size), recipe)
        seen = teacher_tap.shapes(size)
        bare = Teacher(teacher_tap, view=view).to(device)
        if recipe.channels_last:
            bare.to(memory_format=torch.channels_last)
        _report_teacher(bare, images, accelerator, recipe, summary)
        whole = bare
        if recipe.method != "none":
            heads = fit_heads(bare, seen.embed_dim, images, recipe, accelerator, summary, quiet=quiet)
            whole = Teacher(teacher_tap, heads, view=view).to(device)

        def teach(batch: Batch) -> Any:
            return whole(batch.images)

    pair = Pair(shapes, seen, images.num_samples, images.train.labels, teacher_tap.classifier if teacher is not None else None)
    set_seed(recipe.seed, 4)
    distiller = Distiller(tap, build_objective(recipe, pair)).to(device)
    if recipe.channels_last:
        distiller.to(memory_format=torch.channels_last)
    say(f"student {tap.name}: {sum(p.numel() for p in student.parameters()):,} parameters, {images.input_size} images")
    watched = images.watched
    if watched is None:
        say("no split to evaluate on: the accuracy shown is the training one; --val-split 0.1 cuts one off.")

    def watch(averaged: nn.Module | None) -> Metrics:
        assert watched is not None
        taps = {"student": tap} if averaged is None else {"student": averaged, "raw": tap}
        found = _evaluate_taps(taps, watched, accelerator, recipe)
        extra = {f"raw_{name}": value for name, value in found.get("raw", {}).items() if name != "n"}
        return {**found["student"], **extra}

    upkeep = Upkeep(
        folder=Path(recipe.output),
        identity=identity(recipe, images),
        stage="train" if recipe.teacher is None else "distil",
        resume=recipe.resume,
        checkpoint_interval=recipe.checkpoint_interval,
        checkpoint_hist=recipe.checkpoint_hist,
        log_interval=recipe.log_interval,
        quiet=quiet,
    )
    fitted = fit(
        distiller,
        images.train,
        recipe.optim,
        accelerator,
        seed=recipe.seed,
        batch_size=recipe.data.batch_size,
        teach=teach,
        watch=watch if watched is not None else None,
        averaged=tap,
        upkeep=upkeep,
    )
    final = fitted.averaged.model if fitted.averaged is not None else student
    assert isinstance(final, nn.Module)
    return fitted, final


def identity(recipe: Recipe, images: Images) -> dict[str, Any]:
    """What decides the weights: the recipe's values, and the images by digest."""
    return {**as_dict(recipe, digest_only=True), "images": images.train.digest, "mean": list(images.mean), "std": list(images.std)}


def _tap(model: nn.Module, input_size: tuple[int, int, int], recipe: Recipe) -> FeatureTap:
    if recipe.teacher is None or not needs_maps(parse_criteria(recipe)):
        return FeatureTap(model, input_size=input_size)
    sizes = FeatureTap(model, input_size=input_size).all_maps(input_size[1:])
    return FeatureTap(model, choose_maps(sizes, recipe.maps), input_size=input_size)


# -- evaluation -------------------------------------------------------------------------------------------------------------------


def _evaluate_taps(taps: dict[str, Any], source: Any, accelerator: Accelerator, recipe: Recipe) -> dict[str, Metrics]:
    modes = {name: tap.training for name, tap in taps.items()}
    for tap in taps.values():
        tap.eval()
    found = evaluate_logits(
        lambda batch: {name: tap(batch.images).logits for name, tap in taps.items()},
        tuple(taps),
        source,
        accelerator,
        recipe.data.validation_batch_size,
    )
    for name, tap in taps.items():
        tap.train(modes[name])
    return found


def _evaluate_model(model: nn.Module, source: Any, accelerator: Accelerator, recipe: Recipe) -> Metrics:
    model.to(accelerator.device).eval()

    def predict(batch: Batch) -> dict[str, torch.Tensor]:
        return {"model": model(batch.images)}

    return evaluate_logits(predict, ("model",), source, accelerator, recipe.data.validation_batch_size)["model"]


def _report_teacher(teacher: Teacher, images: Images, accelerator: Accelerator, recipe: Recipe, summary: dict[str, Any]) -> None:
    if images.watched is None:
        return
    found = _evaluate_taps({"teacher": teacher}, images.watched, accelerator, recipe)["teacher"]
    summary["teacher_top1"] = found["top1"]
    accelerator.print(f"teacher {teacher.tap.name}: top-1 {found['top1']:.2f} % on {int(found['n']):,} images")
    chance = 100 / images.num_classes
    if found["top1"] < 2 * chance:
        accelerator.print(
            f"warning: the teacher is near chance ({chance:.2f} %): are its weights those of these classes, in this order?"
        )


# -- heads ------------------------------------------------------------------------------------------------------------------------


def fit_heads(
    teacher: Teacher,
    embed_dim: int,
    images: Images,
    recipe: Recipe,
    accelerator: Accelerator,
    summary: dict[str, Any],
    *,
    quiet: bool = False,
) -> GranularityHeads:
    """Fitted heads of a teacher: from the cache where a digest of all that makes them matches, else fitted and kept there.

    Their accuracy is said and put into `summary`; a head far below the teacher is warned of.
    """
    heads_recipe = replace(recipe.heads, abstract_weight=1.0, detailed_weight=1.0)  # weights belong to the student's objective
    made_of = {
        "heads": as_dict(heads_recipe),
        "teacher": module_digest(teacher),
        "images": [images.train.digest, list(images.mean), list(images.std), list(images.input_size), recipe.data.val_split],
        "shown": [recipe.data.pad, recipe.data.hflip, recipe.seed, str(accelerator.mixed_precision)],
        "processes": accelerator.num_processes if recipe.heads.heads_protocol == "live" else 1,
    }
    set_seed(recipe.seed, 5)
    heads = GranularityHeads(embed_dim, images.num_classes, recipe.heads.granularities).to(accelerator.device)
    place = cache_folder() / "heads" / digest(made_of)[:32]
    # All processes look before any of them may write.
    state = checkpoint.newest(place, accelerator.print) if place.exists() else None
    accelerator.wait_for_everyone()
    if state is not None:
        heads.load_state_dict(dict(state.tensors["heads"]))
        metrics = dict(state.values["metrics"])
        accelerator.print("granularity heads: fitted before, from the cache")
    else:
        metrics = _fit_fresh_heads(heads, teacher, images, recipe, accelerator, quiet)
        if accelerator.is_main_process:
            checkpoint.save(place, 1, checkpoint.State({"heads": heads.state_dict()}, {"made_of": made_of, "metrics": metrics}))
        accelerator.wait_for_everyone()
    summary["heads"] = metrics
    shown = {name: value for name, value in metrics.items() if name in ("teacher", "top1", *(g.name for g in heads.granularities))}
    if shown:
        said = ", ".join(f"{'stable' if name == 'top1' else name} {value:.2f} %" for name, value in shown.items())
        accelerator.print(f"granularity heads, top-1: {said}")
    for name, value in shown.items():
        if value < shown["teacher"] - FAR_BELOW:
            accelerator.print(
                f"warning: {'the stable logits are' if name == 'top1' else f'the head {name!r} is'} "
                f"{shown['teacher'] - value:.1f} points below the teacher: raise --heads-epochs, --heads-views or its dim."
            )
    return heads


def _fit_fresh_heads(
    heads: GranularityHeads, teacher: Teacher, images: Images, recipe: Recipe, accelerator: Accelerator, quiet: bool
) -> Metrics:
    options = recipe.heads

    def look(batch: Batch) -> Any:
        return teacher(batch.images)

    stored: StoredOutputs | None = None
    if options.heads_protocol == "stored":
        stored = store_outputs(look, images.train, options.heads_views, accelerator, recipe.data.validation_batch_size, quiet)
    held = None
    if images.watched is not None:
        held = store_outputs(look, images.watched, 1, accelerator, recipe.data.validation_batch_size, quiet)
    names = ("teacher", *(g.name for g in heads.granularities), "stable")

    def watch(_: nn.Module | None) -> Metrics:
        assert held is not None

        def predict(batch: Batch) -> dict[str, torch.Tensor]:
            shown = held.features(batch)
            views = heads.decode(heads.encode(shown.embedding))
            return {"teacher": shown.logits, **views, "stable": stable_excitation(shown.logits, views)}

        found = evaluate_logits(predict, names, held, accelerator, recipe.data.validation_batch_size)
        return {"top1" if name == "stable" else name: found[name]["top1"] for name in names}

    passes = options.heads_epochs
    optim = Optim(
        epochs=-(-passes // options.heads_views) if stored is not None else passes,
        lr=options.heads_lr,
        weight_decay=options.heads_weight_decay,
    )
    folder = Path(recipe.output) / "heads"
    if accelerator.is_main_process:
        folder.mkdir(exist_ok=True)
    accelerator.wait_for_everyone()
    fitted = fit(
        HeadFitting(heads),
        stored if stored is not None else images.train,
        optim,
        accelerator,
        seed=recipe.seed,
        batch_size=options.heads_batch_size,
        teach=stored.features if stored is not None else look,
        watch=watch if held is not None else None,
        upkeep=Upkeep(
            folder=folder,
            identity=identity(recipe, images),
            stage="heads",
            resume=recipe.resume,
            log_interval=recipe.log_interval,
            quiet=quiet,
        ),
    )
    return fitted.last


# -- folders ----------------------------------------------------------------------------------------------------------------------


def _refuse_existing(folder: Path, recipe: Recipe) -> None:
    if recipe.resume:
        if not (folder / "recipe.yaml").is_file():
            raise ValueError(f"{folder} holds no run to resume (no recipe.yaml): check --output, or leave --resume out.")
        before = yaml.safe_load((folder / "recipe.yaml").read_text())
        now = as_dict(recipe)
        relevant = [
            d for d in differences(_digested(before), as_dict(recipe, digest_only=True)) if not d.startswith("optim.grad_accum")
        ]
        if relevant and now:
            raise ValueError(
                f"{folder} is a run of another recipe ({'; '.join(relevant[:5])}): resume with the flags of its start, or choose "
                "another --output."
            )
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists: choose another --output, remove it, or continue it with --resume.")


def _digested(values: dict[str, Any]) -> dict[str, Any]:
    """The part of a written recipe that decides the weights."""
    return {
        f.name: {
            g.name: values.get(f.name, {}).get(g.name) for g in fields(type(getattr(Recipe(), f.name))) if g.metadata["digest"]
        }
        if f.name in ("data", "optim", "heads")
        else values.get(f.name)
        for f in fields(Recipe)
        if f.metadata.get("digest", True)
    }


def _start_folder(folder: Path, recipe: Recipe) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint.sweep(folder)
    if not recipe.resume:
        text = yaml.safe_dump(as_dict(recipe), sort_keys=False)
        checkpoint.write_text(folder / "recipe.yaml", text)
        seen = json.dumps(versions(), indent=2) + "\n"
        checkpoint.write_text(folder / "versions.json", seen)


def read_recipe(folder: Path) -> Recipe:
    """The recipe of a run folder.

    Raises:
        ValueError: No run there.
    """
    path = folder / "recipe.yaml"
    if not path.is_file():
        raise ValueError(f"{folder} holds no run (no recipe.yaml).")
    return make_recipe(**_flatten(yaml.safe_load(path.read_text())))


def _flatten(values: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= value if name in ("data", "optim", "heads") else {name: value}
    return flat


PARTS: dict[str, type] = {"data": Data, "optim": Optim, "heads": Heads}


def make_recipe(**options: Any) -> Recipe:
    """A Recipe from flat options, named as the command line's flags with underscores.

    Raises:
        ValueError: An unknown option, with the nearest names, or a value out of range.
    """
    values: dict[str, dict[str, Any]] = {"recipe": {}, **{part: {} for part in PARTS}}
    homes = {f.name: "recipe" for f in fields(Recipe) if f.name not in PARTS}
    homes |= {f.name: part for part, kind in PARTS.items() for f in fields(kind)}
    for name, value in options.items():
        if name not in homes:
            raise unknown("option", name, homes)
        values[homes[name]][name] = tuple(value) if isinstance(value, list) else value
    parts = {part: kind(**values[part]) for part, kind in PARTS.items()}
    return Recipe(**values["recipe"], **parts)


# -- for Python -------------------------------------------------------------------------------------------------------------------


def distill(
    teacher: str | nn.Module = "embedded",
    student: str | nn.Module = "cifar_resnet8x05",
    data: str | Data = "embedded",
    *,
    output: str | Path = "runs/distill",
    **options: Any,
) -> nn.Module:
    """Distil a teacher into a student and return the student, on the CPU and in eval mode.

    Args:
        teacher: A model with weights: 'embedded', a timm name, local-dir:PATH, hf-hub:ID, a run folder, or a module.
        student: A timm name, or a module that timm built.
        data: 'embedded', a hub id, a folder of parquet files or of images in class folders; or a Data.
        output: Folder of the run; must not exist.
        **options: As the command line's flags, with underscores: method="mas", criterion=("at",), epochs=20, lr=0.05, ...

    Raises:
        ValueError: An unknown option, model, criterion or data set, or networks and data that do not fit.
        FileExistsError: The output folder exists.
    """
    names: dict[str, Any] = {"teacher": _name_of(teacher), "student": _name_of(student), "output": str(output)}
    recipe = make_recipe(**names, **({"dataset": data} if isinstance(data, str) else {}), **options)
    if isinstance(data, Data):
        recipe = replace(recipe, data=data)
    teacher_module = teacher if isinstance(teacher, nn.Module) else None
    student_module = student if isinstance(student, nn.Module) else None
    return run(recipe, teacher=teacher_module, student=student_module).student


def train(model: str | nn.Module, data: str | Data = "embedded", *, output: str | Path = "runs/train", **options: Any) -> nn.Module:
    """Train a model on its own (a teacher, or a student alone) and return it; arguments as of `distill`."""
    recipe = make_recipe(
        teacher=None, student=_name_of(model), output=str(output), **({"dataset": data} if isinstance(data, str) else {}), **options
    )
    if isinstance(data, Data):
        recipe = replace(recipe, data=data)
    return run(recipe, student=model if isinstance(model, nn.Module) else None).student


def _name_of(model: str | nn.Module) -> str:
    if isinstance(model, str):
        return model
    return f"module:{getattr(model, 'pretrained_cfg', {}).get('architecture', type(model).__name__)}:{module_digest(model)[:16]}"


def evaluate(model: str | nn.Module, data: str | Data | None = None, **options: Any) -> Metrics:
    """Top-1, top-5 (in %) and cross-entropy of a model on a data set's evaluation split.

    Args:
        model: A run folder, an exported folder, a timm name with weights, or a module.
        data: As of `distill`; by default the data of the run folder, else the embedded one.
        **options: Options of Data, such as img_size; `amp`.

    Raises:
        ValueError: No such model or data, or numbers of classes that differ.
    """
    folder = Path(model) if isinstance(model, str) else None
    recipe = make_recipe(**options)
    if data is None and folder is not None and (folder / "recipe.yaml").is_file():
        before = read_recipe(folder)
        names = {f.name for f in fields(Data)}
        recipe = replace(recipe, data=replace(before.data, **{k: v for k, v in options.items() if k in names}))
    elif isinstance(data, Data):
        recipe = replace(recipe, data=data)
    elif data is not None:
        recipe = replace(recipe, data=replace(recipe.data, dataset=data))
    network = load_model(model) if isinstance(model, str) else model
    recipe, accelerator = build_accelerator(recipe)
    config = getattr(network, "pretrained_cfg", {}) or {}
    known = Defaults(
        mean=tuple(config["mean"]) if config.get("mean") else None,
        std=tuple(config["std"]) if config.get("std") else None,
        img_size=int(config.get("input_size", (3, 224, 224))[-1]),
        interpolation=str(config.get("interpolation") or "bicubic"),
        crop_pct=float(config.get("crop_pct") or 0.875),
    )
    images = load_images(recipe.data, recipe.seed, known, say=accelerator.print, main_first=accelerator.local_main_process_first)
    if network.num_classes != images.num_classes:
        raise ValueError(f"the model has {network.num_classes} classes, the data {images.num_classes}: they must agree.")
    source = images.test if images.test is not None else images.val
    if source is None:
        raise ValueError("the data has no split to evaluate on: name one with --eval-split, or cut one with --val-split 0.1.")
    return _evaluate_model(network, source, accelerator, recipe)
