"""Distil, train and evaluate from Python."""

import copy
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from os import PathLike
from pathlib import Path
from typing import Any

from timm.models import get_model_input_config
from torch import nn

from mgd_timm.data.contact_sheet import draw_contact_sheet
from mgd_timm.data.dataset import describe_data, load_images
from mgd_timm.export import timm_folder
from mgd_timm.export.formats import check_max_drop, parse_formats
from mgd_timm.export.load_file import ExportedFile, is_exported_file, load_file
from mgd_timm.export.rebuild import check_rebuild
from mgd_timm.features.tap import model_name
from mgd_timm.models.build import set_memory_format
from mgd_timm.models.checks import check_module, check_trainable
from mgd_timm.models.load import load_model
from mgd_timm.models.pretrained_cfg import read_defaults
from mgd_timm.models.unwrap import unwrap
from mgd_timm.pipeline.evaluation_images import load_evaluation_images
from mgd_timm.pipeline.export_files import EvaluationData, export_files
from mgd_timm.pipeline.measure_files import FileResult
from mgd_timm.pipeline.plan import accelerator_of
from mgd_timm.pipeline.run import run
from mgd_timm.pipeline.run_folder import Origin, check_outside_data, read_origin, read_provenance
from mgd_timm.pipeline.torch_defaults import torch_defaults as _torch_defaults
from mgd_timm.recipe.data import OF_SHOWING, OF_TRAINING, Data
from mgd_timm.recipe.options import as_dict, expand_home, unknown
from mgd_timm.recipe.recipe import OF_DISTILLING, Recipe, make_recipe
from mgd_timm.storage.cache import cache_folder
from mgd_timm.storage.digests import module_digest
from mgd_timm.training.evaluation import evaluate_model
from mgd_timm.training.noise import check_noise, evaluate_noise

Model = str | PathLike[str] | nn.Module
"""A model's name on the command line, its folder, or a module."""


@_torch_defaults()
def distill(
    teacher: Model | Sequence[Model] | None = None,
    student: Model = "cifar_resnet8x05",
    data: str | PathLike[str] | Data = "embedded",
    *,
    output: str | PathLike[str] = "runs/distill",
    **options: Any,
) -> nn.Module:
    """Distil a teacher into a student.

    Args:
        teacher: A model with weights: 'embedded' (the default), a timm name, local-dir:PATH, hf-hub:ID, a run folder,
            or a module; a list of these for several teachers. With `peer`, none by default. Two students then teach
            each other, beside a teacher if there is one, and the first is returned. With criterion="selfkd" alone the
            default is none too: the student teaches itself.
        student: A timm name, or a module that timm built, which is trained in place. Teacher modules are copied. What
            torch.compile, DistributedDataParallel or peft wrap around a module is taken off.
        data: 'embedded', a hub id, a folder of parquet files or of images in class folders, or a Data, whose values
            `options` replace.
        output: Folder of the run; must not exist or must be empty, unless resume=True.
        **options: The command line's flags, with underscores: method="mas", criterion=("at",), epochs=20, lr=0.05, ...

    Returns:
        The student (with `model_ema`, its moving average), on the CPU and in eval mode.

    Raises:
        ValueError: An unknown option, model, criterion or data set, or networks and data that do not fit.
        FileExistsError: The output folder is not empty, and resume is not set.
    """
    student = _checked(student, "student")
    if isinstance(student, nn.Module):
        check_trainable(student, "student")
    names: dict[str, Any] = {"student": _name_of(student), "output": output}
    several: Sequence[Any] = teacher if isinstance(teacher, list | tuple) else [] if teacher is None else [teacher]
    teachers = [_checked(one, "teacher") for one in several]
    if teacher is not None:
        names["teacher"] = [_name_of(one) for one in teachers]
    recipe = make_recipe(**names, **_with_data(options, data))
    modules = [one if isinstance(one, nn.Module) else None for one in teachers]
    student_module = student if isinstance(student, nn.Module) else None
    return run(recipe, teacher=modules, student=student_module).student


@_torch_defaults()
def train(
    model: Model,
    data: str | PathLike[str] | Data = "embedded",
    *,
    output: str | PathLike[str] = "runs/train",
    **options: Any,
) -> nn.Module:
    """Train a model without a teacher, and return it on the CPU and in eval mode.

    Args:
        model: A timm name, or a module that timm built.
        data: As for `distill`.
        output: As for `distill`.
        **options: As for `distill`, without those of distillation. `student_pretrained=True` starts from timm's
            weights, `student_checkpoint=FILE` from a file.

    Raises:
        ValueError: As for `distill`.
        FileExistsError: The output folder is not empty, and resume is not set.
    """
    model = _checked(model, "model")
    if isinstance(model, nn.Module):
        check_trainable(model, "model")
    for name in options:
        if name in OF_DISTILLING:
            raise ValueError(f"option {name!r} is for mgd_timm.distill only: mgd_timm.train does not take it.")
    names: dict[str, Any] = {"student": _name_of(model), "output": output}
    recipe = make_recipe(teacher=None, method="none", **names, **_with_data(options, data))
    return run(recipe, student=model if isinstance(model, nn.Module) else None).student


def _checked(model: Model, what: str) -> str | nn.Module:
    if isinstance(model, nn.Module):
        model = unwrap(model)
        check_module(model, what)
        return model
    if isinstance(model, str | PathLike):
        return expand_home(str(model), what)
    raise ValueError(f"{what}={model!r}: expected a timm name, a folder or a module that timm built.")


def _with_data(options: dict[str, Any], data: str | PathLike[str] | Data) -> dict[str, Any]:
    of_data: dict[str, Any] = as_dict(data) if isinstance(data, Data) else {"dataset": str(data)}
    if "dataset" in options:
        of_data["data_dir"] = None
    return {**of_data, **options}


def _name_of(model: str | nn.Module) -> str:
    if isinstance(model, str):
        return model
    return f"module:{model_name(model)}:{module_digest(model)[:16]}"


def evaluate(
    model: Model,
    data: str | PathLike[str] | Data | None = None,
    *,
    noise: float | Sequence[float] = (),
    noise_seeds: int = 5,
    verify: bool = True,
    **options: Any,
) -> dict[str, Any]:
    """Evaluate a model on the evaluation split of a data set, without noise and, if `noise` is given, with it.

    Args:
        model: A run folder, an exported folder, a timm name with weights, a module, or an exported file (.onnx, .pt2,
            OpenVINO's .xml, .pte), whose run and data are found from the recipe.json beside it or in the folder above.
        data: As for `distill`; by default the run's, or the embedded data for a model that is not of a run. An export
            away from its run folder does not know where local data are. The test split is evaluated; without one, the
            validation split.
        noise: Standard deviations, from 0 to 1, of Gaussian noise that is added to pixels in [0, 1] before they are
            normalised. The sum is not clipped. Noise depends on noise seed, image and pixel alone, so it is the same
            for all models.
        noise_seeds: Number of noise seeds to average over.
        verify: Refuse an exported folder whose weights are not those that its recipe.json has the digest of.
        **options: `seed` and `amp` (by default those of the run) and options of Data that evaluation uses, such as
            img_size, which replace those of `data`. By default images are shown as the run showed them: of the same
            size, mean, std, crop and interpolation.

    Returns:
        "top1" and "top5" (in %), "loss" (the cross-entropy) and "n", the number of images. With `noise` also "noise",
        which holds for each standard deviation, as a string: "top1", "top5" and "loss" averaged over the noise seeds,
        "top1_std" between the seeds, and "seeds", their number.

    Raises:
        ValueError: No such model, data or option, classes that differ, noise that is not from 0 to 1, or no noise seed.
    """
    return evaluate_named(model, data, noise=noise, noise_seeds=noise_seeds, verify=verify, **options).metrics


@dataclass(frozen=True)
class Evaluation:
    """Metrics of a model as `evaluate` returns them, and the name or folder of the data."""

    metrics: dict[str, Any]
    data: str


@_torch_defaults()
def evaluate_named(
    model: Model,
    data: str | PathLike[str] | Data | None = None,
    *,
    noise: float | Sequence[float] = (),
    noise_seeds: int = 5,
    verify: bool = True,
    **options: Any,
) -> Evaluation:
    """Evaluate as `evaluate` does, and return the name of the data as well."""
    sigmas = check_noise(noise, noise_seeds)
    model = _checked(model, "model")
    _check_evaluation_options(options)
    network, origin = _load(model, verify=verify)
    found = _evaluation_data(network, origin, data, options)
    recipe, accelerator, source = found.recipe, found.accelerator, found.source
    set_memory_format(network, model_name(network), recipe.channels_last, accelerator.device)
    size = recipe.data.validation_batch_size
    if not sigmas:
        return Evaluation(dict(evaluate_model(network, source, accelerator, size, bar=True)), found.name)
    clean, noisy = evaluate_noise(
        network, source, accelerator, size, std=found.images.std, noise=sigmas, seeds=noise_seeds, bar=True
    )
    return Evaluation({**clean, "noise": noisy}, found.name)


@_torch_defaults()
def export_model(
    model: nn.Module,
    folder: str | PathLike[str],
    *,
    provenance: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Path:
    """Export a model as `mgd_timm.export.timm_folder.export_model` does, once timm is seen to rebuild it.

    Args:
        model: A timm model, also of torch.compile, DistributedDataParallel or peft.
        folder: Must not exist unless `overwrite`.
        provenance: JSON values to write to recipe.json.
        overwrite: Replace an earlier export.

    Returns:
        The folder.

    Raises:
        ValueError: timm.create_model would build another network from the export.
        FileExistsError: The folder exists; with `overwrite`, it holds files that no export has.
        OSError: The folder could not be written; nothing partial is left.
    """
    model = unwrap(model)
    check_rebuild(model, "model")
    if overwrite:
        timm_folder.check_replaceable(Path(expand_home(str(folder), "folder")))
    return timm_folder.export_model(model, Path(folder), provenance=provenance, overwrite=overwrite)


@_torch_defaults()
def export_formats(
    model: Model,
    folder: str | PathLike[str],
    to: str | Sequence[str] = "timm",
    data: str | PathLike[str] | Data | None = None,
    *,
    max_drop: float = 1.0,
    license: str | None = None,
    tag: str | None = None,
    verify: bool = True,
    log: Callable[[str], None] = print,
    **options: Any,
) -> list[FileResult]:
    """Export a trained model to files of several formats, and measure each beside the model.

    The files take normalised images and return logits. The int8 file is quantised by onnxruntime on 300 training
    images, and by NNCF with bias correction where that loses more than `max_drop`.

    Args:
        model: A run folder, an exported folder, 'embedded', a timm name with weights, or a module.
        folder: Folder to write; must not exist.
        to: Formats: timm, onnx, int8, openvino, pt2, executorch; a list, or one text with commas.
        data: As for `evaluate`. Not read for timm alone.
        max_drop: Points of top-1 below the PyTorch model that a file may lose; what loses more is not left in the
            folder.
        license: Licence of the weights; by default the run's.
        tag: timm's tag of the weights; by default the run's.
        verify: As for `evaluate`.
        log: Logs one line, and the table.
        **options: As for `evaluate`.

    Returns:
        A row for the model and for each file. For timm alone there are none.

    Raises:
        AccuracyDropError: Files lost too much; the folder holds the others. It is a ValueError with all `results`.
        ValueError: An unknown format, a missing library, data that are not known, or a network that cannot be exported
            to a format: nothing is written.
        FileExistsError: The folder exists.
        OSError: The folder could not be written; nothing partial is left.
    """
    formats = parse_formats(to)
    check_max_drop(max_drop)
    target = Path(expand_home(str(folder), "folder"))
    if os.path.lexists(target):
        raise FileExistsError(f"{target} exists: choose another folder.")
    nearest = next(parent for parent in target.absolute().parents if parent.exists())
    if not nearest.is_dir():
        raise NotADirectoryError(f"{target} would lie in {nearest}, which is a file: choose another folder.")
    model = _checked(model, "model")
    _check_evaluation_options(options)
    network, origin = _load(model, verify=verify)
    if isinstance(network, ExportedFile):
        raise ValueError(f"{model} is an exported file: give the run or the exported folder that it is from.")
    given = {name: value for name, value in (("license", license), ("tag", tag)) if value is not None}
    network = copy.copy(network)  # the caller's module keeps its own labels
    network.pretrained_cfg = {**network.pretrained_cfg, **given}  # type: ignore[dict-item, assignment]
    check_rebuild(network, "model")
    provenance = read_provenance(Path(model.removeprefix("local-dir:"))) if isinstance(model, str) else {}
    if formats == ("timm",):
        log(f"wrote {timm_folder.export_model(network, target, provenance=provenance)}")
        return []
    found = _evaluation_data(network, origin, data, {**options, "amp": False})
    check_outside_data(found.recipe.data, {"folder": target})
    return export_files(network, target, formats, found, max_drop=max_drop, provenance=provenance, log=log)


@_torch_defaults()
def inspect_data(
    data: str | PathLike[str] | Data = "embedded",
    *,
    model: str | None = None,
    sheet: str | PathLike[str] | None = None,
    seed: int = 0,
    log: Callable[[str], None] = print,
    **options: Any,
) -> dict[str, Any]:
    """Return what a run would train and evaluate on, without training.

    Args:
        data: As for `distill`.
        model: A timm name or a run folder, whose image size, mean and std the sheet is drawn with.
        sheet: File to write a contact sheet to, a PNG with images of each class as they are shown in training.
        seed: Seed of the validation split and of the sheet's augmentation.
        log: Logs one line.
        **options: Options of Data, which replace those of `data`.

    Returns:
        "train" and "eval" (None without an evaluation split), each with "split", "images" and "per_class"; "classes";
        "image_column" and "label_column" (None where there are no columns); "path", which is "memory" for images that
        are decoded once and kept, else "files"; "ignored_count", and in "ignored" the first files that are left out
        with the reasons; "duplicates", the number of evaluation images that are also training images, and
        "duplicate_examples".

    Raises:
        ValueError: Data that a run would refuse, but for corrupt images.
    """
    recipe = make_recipe(**_with_data(options, data))
    found = describe_data(recipe.data, seed, log=log)
    if sheet is not None:
        defaults = None
        if model is not None:
            defaults = read_defaults(getattr(load_model(model, verify=False), "pretrained_cfg", {}) or {})
        draw_contact_sheet(load_images(recipe.data, seed, defaults, log=log), Path(sheet))
    return found


def _load(model: str | nn.Module, *, verify: bool) -> tuple[nn.Module, Origin | None]:
    """Return a network and the run that it comes from, if that is known."""
    if isinstance(model, nn.Module):
        return model, None
    if is_exported_file(model):
        file = Path(model)
        origins = (read_origin(folder) for folder in (file.parent, file.absolute().parents[1]))
        return load_file(file), next((origin for origin in origins if origin is not None), None)
    return load_model(model, verify=verify), read_origin(Path(model.removeprefix("local-dir:")))


def _evaluation_data(
    network: nn.Module, origin: Origin | None, data: str | PathLike[str] | Data | None, options: dict[str, Any]
) -> EvaluationData:
    """Load the data of an evaluation, by default those of the model's run."""
    _check_data_is_known(origin, data, options)
    recipe = _evaluation_recipe(network, origin, data, options)
    check_outside_data(recipe.data, {"the cache (MGD_TIMM_CACHE)": cache_folder()})
    accelerator = accelerator_of(recipe)
    images = load_evaluation_images(network, recipe, accelerator, of_run=origin is not None)
    source = images.test if images.test is not None else images.val
    if source is None:
        raise ValueError(
            "the data has no split to evaluate on: name one with --eval-split, or hold one out with --val-split 0.1."
        )
    if origin is not None and _same_splits(recipe.data, origin.recipe.data):
        changes = origin.describe_changes(images.train.digest, source.digest)
        if changes is not None:
            accelerator.print(changes)
    return EvaluationData(recipe, accelerator, images, source, recipe.data.data_dir or recipe.data.dataset)


def _check_evaluation_options(options: dict[str, Any]) -> None:
    known = {f.name for f in fields(Data)} - OF_TRAINING | {"seed", "amp"}
    for name in options:
        if name in OF_TRAINING:
            raise ValueError(f"option {name!r} is for training only: mgd_timm.evaluate does not take it.")
        if name not in known:
            raise unknown("option of an evaluation", name, known)


def _evaluation_recipe(
    network: nn.Module, origin: Origin | None, data: str | PathLike[str] | Data | None, options: dict[str, Any]
) -> Recipe:
    """Return a recipe of the data and options of an evaluation, by default those of the model's run."""
    channels, height, width = get_model_input_config(network)["input_size"]
    shown: dict[str, Any] = {"in_chans": channels}
    if origin is not None:
        before = origin.recipe
        computed = {name: getattr(before, name) for name in ("seed", "amp", "amp_dtype", "channels_last")}
        options = {**computed, **options}
        shown = {name: getattr(before.data, name) for name in OF_SHOWING}
        data = before.data if data is None else data
    if isinstance(network, ExportedFile) and height == width:
        options = {"img_size": height, **options}
    if not isinstance(data, Data):
        options = {**shown, **options}
    of_data = _with_data(options, Data() if data is None else data)
    # Without options of training only, as images of another size may refuse them (--aa).
    return make_recipe(**{name: value for name, value in of_data.items() if name not in OF_TRAINING})


def _check_data_is_known(origin: Origin | None, data: Any, options: dict[str, Any]) -> None:
    """Raise ValueError where an export is to be evaluated on the run's local data, whose path it does not hold."""
    if origin is None or origin.has_paths or data is not None or {"data_dir", "dataset"} & set(options):
        return
    if origin.recipe.data.data_dir is not None:
        raise ValueError(
            f"the model was trained on local data ({origin.recipe.data.data_dir}), and an export away from its run "
            "folder does not say where they are: give --data-dir FOLDER."
        )


def _same_splits(one: Data, two: Data) -> bool:
    """Return whether two options of data name the same rows, up to where the folder lies."""
    names = ("dataset_config", "input_key", "target_key", "train_split", "eval_split", "streaming")
    places = {Path(data.data_dir or data.dataset).name for data in (one, two)}
    return len(places) == 1 and all(getattr(one, name) == getattr(two, name) for name in names)
