"""What `import mgd_timm` offers to call: distil, train, evaluate."""

import json
from collections.abc import Sequence
from dataclasses import fields, replace
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

from timm.models import get_model_input_config
from torch import nn

from mgd_timm.data.dataset import load_images
from mgd_timm.distributed.collectives import local_main_first
from mgd_timm.distributed.launch import build_accelerator
from mgd_timm.models.build import check_channels, check_class_names, check_module, load_model, shown_by
from mgd_timm.pipeline.run import run
from mgd_timm.pipeline.run_folder import read_recipe
from mgd_timm.recipe.data import OF_TRAINING
from mgd_timm.recipe.options import as_dict, unknown
from mgd_timm.recipe.recipe import OF_DISTILLING, Data, Recipe, flatten, make_recipe
from mgd_timm.storage.digests import module_digest
from mgd_timm.training.evaluation import check_noise, evaluate_model, evaluate_noise

Model = str | PathLike[str] | nn.Module
"""As the command line names a model, its folder, or a module."""


def distill(
    teacher: Model | Sequence[Model] | None = None,
    student: Model = "cifar_resnet8x05",
    data: str | PathLike[str] | Data = "embedded",
    *,
    output: str | PathLike[str] = "runs/distill",
    **options: Any,
) -> nn.Module:
    """Distil a teacher into a student and return the student, on the CPU and in eval mode.

    Args:
        teacher: A model with weights: 'embedded' (the default), a timm name, local-dir:PATH, hf-hub:ID, a run folder,
            or a module. A list of these: several teachers. None with a peer: two students then teach each other, and
            the first is returned.
        student: A timm name, or a module that timm built.
        data: 'embedded', a hub id, a folder of parquet files or of images in class folders; or a Data, whose values
            `options` replace.
        output: Folder of the run; must not exist.
        **options: As the command line's flags, with underscores: method="mas", criterion=("at",), epochs=20, lr=0.05,
            ...

    Raises:
        ValueError: An unknown option, model, criterion or data set, or networks and data that do not fit.
        FileExistsError: The output folder exists.
    """
    student = _model(student, "student")
    names: dict[str, Any] = {"student": _name_of(student), "output": output}
    several: Sequence[Any] = teacher if isinstance(teacher, list | tuple) else [] if teacher is None else [teacher]
    teachers = [_model(one, "teacher") for one in several]
    if teacher is not None:
        names["teacher"] = [_name_of(one) for one in teachers]
    recipe = make_recipe(**names, **_over(data, options))
    modules = [one if isinstance(one, nn.Module) else None for one in teachers]
    student_module = student if isinstance(student, nn.Module) else None
    return run(recipe, teacher=modules, student=student_module).student


def train(
    model: Model,
    data: str | PathLike[str] | Data = "embedded",
    *,
    output: str | PathLike[str] = "runs/train",
    **options: Any,
) -> nn.Module:
    """Train a model on its own (a teacher, or a student alone) and return it; arguments and errors as of `distill`."""
    model = _model(model, "model")
    for name in options:
        if name in OF_DISTILLING:
            raise ValueError(f"option {name!r} is not of mgd_timm.train: mgd_timm.distill takes it.")
    recipe = make_recipe(teacher=None, student=_name_of(model), output=output, **_over(data, options))
    return run(recipe, student=model if isinstance(model, nn.Module) else None).student


def _model(model: Model, what: str) -> str | nn.Module:
    if isinstance(model, nn.Module):
        check_module(model, what)
        return model
    if isinstance(model, str | PathLike):
        return str(model)
    raise ValueError(f"{what}={model!r}: expected a timm name, a folder or a module that timm built.")


def _over(data: str | PathLike[str] | Data, options: dict[str, Any]) -> dict[str, Any]:
    """Options, and beneath them those of the data."""
    beneath = as_dict(data) if isinstance(data, Data) else {"dataset": str(data)}
    if "dataset" in options:
        beneath |= {"data_dir": None}
    return {**beneath, **options}


def _name_of(model: str | nn.Module) -> str:
    if isinstance(model, str):
        return model
    architecture = getattr(model, "pretrained_cfg", {}).get("architecture", type(model).__name__)
    return f"module:{architecture}:{module_digest(model)[:16]}"


def evaluate(
    model: Model,
    data: str | PathLike[str] | Data | None = None,
    *,
    noise: float | Sequence[float] = (),
    noise_seeds: int = 5,
    **options: Any,
) -> dict[str, Any]:
    """Top-1, top-5 (in %) and cross-entropy of a model on a data set's evaluation split, and under noise where it is
    asked for.

    Args:
        model: A run folder, an exported folder, a timm name with weights, or a module.
        data: As of `distill`; by default the data of the run, with its validation cut, else the embedded data.
        noise: Standard deviations, from 0 to 1, of Gaussian noise that is added to pixels in [0, 1] before they are
            normalised, and not clipped. It depends on noise seed, image and pixel alone, so that models see the same.
        noise_seeds: Noise seeds that these metrics are averaged over.
        **options: Options of Data, such as img_size, which replace the run's, but for those of training; `seed` and
            `amp`.

    Returns:
        "top1", "top5", "loss" and "n", the number of images; with `noise` also "noise", of each standard deviation as a
        string: "top1", "top5" and "loss" averaged over the noise seeds, "top1_std" between them, and "seeds", their
        number.

    Raises:
        ValueError: No such model, data or option, classes that differ, noise that is not from 0 to 1, or no noise seed.
    """
    return evaluate_named(model, data, noise=noise, noise_seeds=noise_seeds, **options)[0]


def evaluate_named(
    model: Model,
    data: str | PathLike[str] | Data | None = None,
    *,
    noise: float | Sequence[float] = (),
    noise_seeds: int = 5,
    **options: Any,
) -> tuple[dict[str, Any], str]:
    """As `evaluate`, and the name of the data."""
    sigmas = check_noise(noise, noise_seeds)
    model = _model(model, "model")
    known = {f.name for f in fields(Data)} - OF_TRAINING | {"seed", "amp"}
    for name in options:
        if name in OF_TRAINING:
            raise ValueError(f"option {name!r} is of training alone: an evaluation does not take it.")
        if name not in known:
            raise unknown("option of an evaluation", name, known)
    before = _recipe_of(model) if isinstance(model, str) else None
    if before is not None:
        options = {"seed": before.seed, **options}
    if data is None:
        data = before.data if before is not None else Data()
    # What is of training alone stays out, as images of another size may refuse it (--aa).
    recipe = make_recipe(**{name: value for name, value in _over(data, options).items() if name not in OF_TRAINING})
    network = load_model(model) if isinstance(model, str) else model
    recipe, accelerator = build_accelerator(recipe)
    inputs = get_model_input_config(network)
    height, width = inputs["input_size"][1:]
    if recipe.data.img_size is None and inputs["fixed_input_size"] and height == width:
        recipe = replace(recipe, data=replace(recipe.data, img_size=height))
    shown = shown_by(getattr(network, "pretrained_cfg", {}) or {})
    images = load_images(
        recipe.data, recipe.seed, shown, say=accelerator.print, main_first=partial(local_main_first, accelerator)
    )
    check_channels(network, "model", images.input_size[0])
    if network.num_classes != images.num_classes:
        raise ValueError(
            f"the model has {network.num_classes} classes, the data {images.num_classes}: they must agree. The "
            "accuracy of a teacher's rows for the data's classes is printed by mgd-timm distill --teacher-classes."
        )
    check_class_names(network, "model", images.class_names)
    source = images.test if images.test is not None else images.val
    if source is None:
        raise ValueError(
            "the data has no split to evaluate on: name one with --eval-split, or cut one with --val-split 0.1."
        )
    size, place = recipe.data.validation_batch_size, recipe.data.data_dir or recipe.data.dataset
    if not sigmas:
        return dict(evaluate_model(network, source, accelerator, size, bar=True)), place
    clean, noisy = evaluate_noise(
        network, source, accelerator, size, std=images.std, noise=sigmas, seeds=noise_seeds, bar=True
    )
    return {**clean, "noise": noisy}, place


def _recipe_of(model: str) -> Recipe | None:
    """The recipe of a run folder or of an exported one, where it has one."""
    folder = Path(model.removeprefix("local-dir:"))
    if (folder / "recipe.yaml").is_file():
        return read_recipe(folder)
    path = folder / "recipe.json"
    try:
        values = json.loads(path.read_text())["recipe"] if path.is_file() else None
        return make_recipe(**flatten(values)) if values is not None else None
    except KeyError:
        return None
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: its recipe cannot be read ({error}): correct or remove the file.") from error
