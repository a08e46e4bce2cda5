"""Export a student to files of several formats, measure each, and leave out what loses too much accuracy."""

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from mgd_timm.data.dataset import Images
from mgd_timm.data.sources import Source
from mgd_timm.export.formats import FLOAT_ONNX, FORMATS, HALF_ONNX, INT8_ONNX
from mgd_timm.export.int8 import quantize_onnx, quantize_onnx_with_bias_correction
from mgd_timm.export.load_file import load_file
from mgd_timm.export.merge import merge_weights
from mgd_timm.export.timm_folder import export_model
from mgd_timm.export.write_files import (
    check_fits_onnx,
    export_program,
    refused_formats,
    write_executorch,
    write_half_onnx,
    write_onnx,
    write_openvino,
    write_pt2,
)
from mgd_timm.features.tap import model_name
from mgd_timm.pipeline.evaluation_images import load_evaluation_images
from mgd_timm.pipeline.measure_files import (
    PYTORCH,
    Accuracy,
    FileResult,
    file_size,
    format_table,
    measure_accuracy,
    measure_latency,
    weights_size,
)
from mgd_timm.recipe.recipe import Recipe
from mgd_timm.storage.atomic_write import write_atomically
from mgd_timm.storage.digests import sha256

CALIBRATION_IMAGES = 300
_CALIBRATION_BATCH = 25
_LARGEST_BATCH = 32
"""Images per evaluation step: each runtime keeps memory for the largest batch it has seen, and all are loaded."""
ONNXRUNTIME = "onnxruntime, static"
Log = Callable[[str], None]


class AccuracyDropError(ValueError):
    """Files lost more accuracy than allowed, and were left out of the folder, which has been written.

    Args:
        message: For the user.
        results: Of all files.
    """

    def __init__(self, message: str, results: list[FileResult]) -> None:
        super().__init__(message)
        self.results = results


@dataclass(frozen=True)
class EvaluationData:
    """Images that files are measured and calibrated on.

    Args:
        recipe: Of the evaluation.
        accelerator: Of one process.
        images: Of the recipe.
        source: Of the evaluation images.
        name: Of the data.
    """

    recipe: Recipe
    accelerator: Accelerator
    images: Images
    source: Source
    name: str


def load_calibration_batches(model: nn.Module, data: EvaluationData, log: Log) -> list[Tensor]:
    """Return training images as the model is shown evaluation images, in batches on the CPU.

    They are drawn at random from those that the model was trained on, with the recipe's seed.

    Args:
        model: Whose images they are.
        data: Of its evaluation.
        log: Logs one line.
    """
    recipe = data.recipe
    of_training = replace(recipe.data, eval_split=recipe.data.train_split, val_split=0.0)
    # Without augmentation, which the training split itself has.
    plain = load_evaluation_images(
        model, replace(recipe, data=of_training), data.accelerator, of_run=True, log=lambda _: None
    ).test
    assert plain is not None
    ids = data.images.train.ids
    generator = torch.Generator().manual_seed(recipe.seed)
    some = ids[torch.randperm(len(ids), generator=generator)[:CALIBRATION_IMAGES]].sort().values
    few = f", all that there are ({CALIBRATION_IMAGES} are advised)" if len(some) < CALIBRATION_IMAGES else ""
    log(f"int8: calibrated on {len(some)} training images{few}")
    return [batch.images.cpu() for batch in plain.batches(some.split(_CALIBRATION_BATCH), 0, data.accelerator.device)]


def export_files(
    model: nn.Module,
    target: Path,
    formats: Sequence[str],
    data: EvaluationData,
    *,
    max_drop: float,
    provenance: Mapping[str, Any],
    log: Log,
) -> list[FileResult]:
    """Export a model to a folder of files, and measure each beside the model.

    The folder holds config.json, recipe.json and formats.json, the table as JSON, beside the files.

    Args:
        model: A timm model. Its copy is exported with the size, mean and std of the data's images.
        target: Folder to write; must not exist.
        formats: Names in `FORMATS`.
        data: Images of the evaluation and of the calibration.
        max_drop: Points of top-1 that a file may lose and stay in the folder.
        provenance: JSON values to write to recipe.json.
        log: Logs one line.

    Returns:
        A row for the model and for each file.

    Raises:
        AccuracyDropError: Files were left out of the folder.
        ValueError: The network cannot be exported to a format; nothing is written.
        OSError: The folder could not be written; nothing partial is left.
    """
    if data.accelerator.num_processes > 1:
        raise ValueError(
            "mgd-timm export measures latency in one process: start it without accelerate launch or torchrun."
        )
    model = copy.deepcopy(merge_weights(model)).cpu().eval()
    model.pretrained_cfg = {  # type: ignore[assignment]
        **model.pretrained_cfg,  # type: ignore[dict-item]
        "input_size": data.images.input_size,
        "mean": data.images.mean,
        "std": data.images.std,
    }
    if {"onnx", "int8"} & set(formats):
        check_fits_onnx(model)
    results: list[FileResult] = []

    def write(draft: Path) -> None:
        export_model(model, draft, provenance=provenance)
        files = _write_files(model, draft, formats, data, log)
        results.extend(_measure(model, draft, files, data, max_drop, log))
        _remove(draft, formats, results)
        _write_table(draft / "formats.json", results, data, max_drop)

    write_atomically(target, write)
    log(format_table(results, data.name, len(data.source.ids)))
    dropped = [row for row in results if not row.kept]
    if dropped:
        raise AccuracyDropError(_advice(dropped, target, max_drop), results)
    log(f"wrote {target}")
    return results


def _write_files(
    model: nn.Module, folder: Path, formats: Sequence[str], data: EvaluationData, log: Log
) -> dict[str, Path]:
    """Write the files of all formats but timm's, and return their paths by their names in the folder."""
    size = data.images.input_size
    needed = [name for name in formats if name not in ("timm", "executorch")]
    names = [file for name in formats if name != "timm" for file in FORMATS[name].files]
    for file in (*names, *([FLOAT_ONNX] if INT8_ONNX in names else [])):
        (folder / file).parent.mkdir(exist_ok=True)
    if needed:
        log(f"exporting {model_name(model)} to {', '.join(needed)}")
        with refused_formats(model, *needed):
            program = export_program(model, size)
    if FLOAT_ONNX in names or INT8_ONNX in names:
        with refused_formats(model, *(name for name in ("onnx", "int8") if name in formats)):
            write_onnx(program, folder / FLOAT_ONNX, _metadata(folder))
    if HALF_ONNX in names:
        with refused_formats(model, "onnx"):
            write_half_onnx(folder / FLOAT_ONNX, folder / HALF_ONNX)
    if INT8_ONNX in names:
        batches = load_calibration_batches(model, data, log)
        with refused_formats(model, "int8"):
            quantize_onnx(folder / FLOAT_ONNX, folder / INT8_ONNX, batches)
    if "openvino" in formats:
        with refused_formats(model, "openvino"):
            write_openvino(program, size, folder / FORMATS["openvino"].files[0])
    if "pt2" in formats:
        with refused_formats(model, "pt2"):
            write_pt2(program, folder / FORMATS["pt2"].files[0])
    if "executorch" in formats:
        log(f"exporting {model_name(model)} to executorch")
        with refused_formats(model, "executorch"):
            write_executorch(export_program(model, size, batch=1), folder / FORMATS["executorch"].files[0])
    return {name: folder / name for name in names}


def _metadata(folder: Path) -> dict[str, Any]:
    """Return what a file says about itself: the values of config.json that its user needs."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    known = config["pretrained_cfg"]
    inputs = {name: known[name] for name in ("input_size", "mean", "std", "interpolation", "crop_pct") if name in known}
    return {"architecture": config["architecture"], "label_names": config.get("label_names"), **inputs}


def _measure(
    model: nn.Module, folder: Path, files: Mapping[str, Path], data: EvaluationData, max_drop: float, log: Log
) -> list[FileResult]:
    """Return a row for the model and for each file; an int8 file that loses too much is quantised in another way."""
    networks: dict[str, Callable[[Tensor], Tensor]] = {PYTORCH: model}
    for name, path in files.items():
        with refused_formats(model, _format_of(name)):
            networks[name] = load_file(path)
            for batch in (1, 3):
                networks[name](torch.zeros(batch, *data.images.input_size))
    log(f"measuring {len(files)} file{'s' if len(files) > 1 else ''} beside PyTorch on {data.name}")
    found = _accuracy(networks, data)
    ways: dict[str, str] = {INT8_ONNX: ONNXRUNTIME}
    loss = found[PYTORCH].top1 - found[INT8_ONNX].top1 if INT8_ONNX in found else 0.0
    if loss > max_drop:
        log(f"int8: onnxruntime's loses {loss:.2f} points, more than {max_drop}: quantising it with NNCF, in minutes")
        corrected = folder / "corrected.onnx"
        batches = load_calibration_batches(model, data, lambda _: None)
        try:
            way = quantize_onnx_with_bias_correction(folder / FLOAT_ONNX, corrected, batches)
            other: Callable[[Tensor], Tensor] = load_file(corrected)
            again = _accuracy({PYTORCH: model, INT8_ONNX: other}, data)[INT8_ONNX]
        except Exception as error:  # NNCF may raise anything; the first file stays
            log(f"int8: NNCF failed ({type(error).__name__}: {' '.join(str(error).split())[:200]})")
        else:
            log(f"int8: NNCF's ({way}) loses {found[PYTORCH].top1 - again.top1:.2f} points")
            if again.top1 > found[INT8_ONNX].top1:
                corrected.replace(files[INT8_ONNX])
                networks[INT8_ONNX], found[INT8_ONNX], ways[INT8_ONNX] = other, again, f"NNCF, {way}"
        corrected.unlink(missing_ok=True)
    latency = measure_latency(networks, data.images.input_size)
    rows = []
    for name, accuracy in found.items():
        drop = round(found[PYTORCH].top1 - accuracy.top1, 6)  # not more than 1.0 by a rounding error
        size = file_size(files[name]) if name in files else weights_size(model)
        digest = sha256(files[name]) if name in files else None
        common = (name, accuracy.top1, drop, accuracy.agreement, size / 1e6, latency[name])
        weights = sha256(files[name].with_suffix(".bin")) if name.endswith(".xml") else None
        row = FileResult(*common, ways.get(name), kept=drop <= max_drop, sha256=digest, weights_sha256=weights)
        rows.append(row)
    return rows


def _accuracy(networks: Mapping[str, Callable[[Tensor], Tensor]], data: EvaluationData) -> dict[str, Accuracy]:
    batch = min(data.recipe.data.validation_batch_size, _LARGEST_BATCH)
    return measure_accuracy(networks, data.source, data.accelerator, batch)


def _format_of(file: str) -> str:
    return next(name for name, one in FORMATS.items() if file in one.files)


def _remove(folder: Path, formats: Sequence[str], results: Sequence[FileResult]) -> None:
    """Remove what is not to be in the folder: files that lost too much, and those that others were made from."""
    unwanted = [row.file for row in results if not row.kept]
    unwanted += [] if "timm" in formats else ["model.safetensors"]
    unwanted += [] if "onnx" in formats else [FLOAT_ONNX]
    for file in unwanted:
        (folder / file).unlink(missing_ok=True)
        if file.endswith(".xml"):
            (folder / file).with_suffix(".bin").unlink()
    for path in [path for path in folder.iterdir() if path.is_dir() and not any(path.iterdir())]:
        path.rmdir()


def _write_table(path: Path, results: Sequence[FileResult], data: EvaluationData, max_drop: float) -> None:
    about = {
        "data": Path(data.name).name,
        "images": len(data.source.ids),
        "input": {"size": data.images.input_size, "mean": data.images.mean, "std": data.images.std},
        "threads": torch.get_num_threads(),
        "max_drop": max_drop,
        "files": [asdict(row) for row in results],
    }
    path.write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


def _advice(dropped: Sequence[FileResult], target: Path, max_drop: float) -> str:
    lost = ", ".join(
        f"{row.file} loses {row.drop:.2f} points of top-1 ({row.top1 + row.drop:.2f} to {row.top1:.2f})"
        for row in dropped
    )
    worst = max(row.drop for row in dropped)
    return (
        f"{lost}: more than --max-drop {max_drop}, so {target} has been written without "
        f"{'it' if len(dropped) == 1 else 'them'}. Deploy another file, or accept the loss: another folder, with "
        f"--max-drop {min(worst + 0.01, 100):.2f}."
    )
