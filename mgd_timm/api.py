"""What `import mgd_timm` offers to call: distil, train, evaluate."""

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from torch import nn

from mgd_timm.build import build_accelerator, load_model
from mgd_timm.data import Defaults, load_images
from mgd_timm.evaluation import Metrics, evaluate_model
from mgd_timm.optimizer_state import module_digest
from mgd_timm.recipe import Data, make_recipe
from mgd_timm.run import read_recipe, run


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
    return evaluate_model(network, source, accelerator, recipe.data.validation_batch_size)
