"""Measure exported files beside the PyTorch model: accuracy, agreement, size and latency, as rows of a table."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from mgd_timm.data.sources import Source
from mgd_timm.features import Batch
from mgd_timm.training.evaluation import evaluate

Predict = Callable[[Tensor], Tensor]
PYTORCH = "PyTorch"
"""Name of the model itself among files."""
BATCHES = (1, 64)
_ROUNDS = 7
_SECONDS = 2.0
"""Per network and batch size, after which a measurement of the latency ends, once it has three rounds."""


@dataclass(frozen=True)
class Accuracy:
    """What a network predicts on the evaluation images.

    Args:
        top1: In %.
        agreement: Share of images, in %, of which it predicts the same class as the PyTorch model.
        images: Number of images.
    """

    top1: float
    agreement: float
    images: int


@dataclass(frozen=True)
class FileResult:
    """What was measured of an exported file, or of the PyTorch model.

    Args:
        file: Path in the exported folder; "PyTorch" for the model itself.
        top1: In % of the evaluation images.
        drop: Points of top-1 below the PyTorch model.
        agreement: Share of images, in %, of which it predicts the same class as the PyTorch model.
        megabytes: Size of the file.
        latency: Median milliseconds by batch size.
        quantised_by: The way of quantisation; None for other files.
        kept: Whether it is in the folder.
        sha256: Of the file; None for the model itself.
        weights_sha256: Of the weights that OpenVINO keeps beside its file; else None.
    """

    file: str
    top1: float
    drop: float
    agreement: float
    megabytes: float
    latency: dict[int, float]
    quantised_by: str | None = None
    kept: bool = True
    sha256: str | None = None
    weights_sha256: str | None = None


@torch.no_grad()
def measure_accuracy(
    networks: Mapping[str, Predict], source: Source, accelerator: Accelerator, batch_size: int
) -> dict[str, Accuracy]:
    """Evaluate networks on the CPU, in one pass over the images, with a progress bar.

    Args:
        networks: By name; `PYTORCH` is among them.
        source: Of the evaluation images.
        accelerator: Of one process.
        batch_size: Images per step.
    """
    equal = dict.fromkeys(networks, 0)

    def predict(batch: Batch) -> dict[str, Tensor]:
        images = batch.images.cpu()
        logits = {name: network(images) for name, network in networks.items()}
        expected = logits[PYTORCH].argmax(1)
        for name, values in logits.items():
            equal[name] += int((values.argmax(1) == expected).sum())
        return {name: values.to(batch.images.device) for name, values in logits.items()}

    found = evaluate(predict, tuple(networks), source, accelerator, batch_size, bar=True)
    return {name: Accuracy(row["top1"], 100 * equal[name] / row["n"], int(row["n"])) for name, row in found.items()}


@torch.no_grad()
def measure_latency(networks: Mapping[str, Predict], input_size: tuple[int, int, int]) -> dict[str, dict[int, float]]:
    """Return the median milliseconds of one call of each network, by batch size, timed in turn."""
    found: dict[str, dict[int, float]] = {name: {} for name in networks}
    for size in BATCHES:
        for name, times in time_in_turn(networks, torch.zeros(size, *input_size)).items():
            found[name][size] = median(times)
    return found


def time_in_turn(networks: Mapping[str, Predict], images: Tensor) -> dict[str, list[float]]:
    """Return the milliseconds of calls of each network, one for each turn.

    Each turn begins with a call that is not timed, as another runtime's threads and data are in the caches.
    """
    times: dict[str, list[float]] = {name: [] for name in networks}
    end = time.perf_counter() + _SECONDS * len(networks)
    for turn in range(_ROUNDS):
        if turn >= 3 and time.perf_counter() > end:
            break
        for name, network in networks.items():
            network(images)
            start = time.perf_counter()
            network(images)
            times[name].append(1000 * (time.perf_counter() - start))
    return times


def file_size(path: Path) -> int:
    """Return the bytes of a file, with those of the weights that OpenVINO keeps beside it."""
    weights = path.with_suffix(".bin")
    return path.stat().st_size + (weights.stat().st_size if path.suffix == ".xml" and weights.is_file() else 0)


def weights_size(model: nn.Module) -> int:
    """Return the bytes of a model's state dict."""
    return sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())


def format_table(results: Sequence[FileResult], data: str, images: int) -> str:
    """Return the table of results as text.

    Args:
        results: Of the model and of each file.
        data: Name of the evaluation data.
        images: Number of evaluation images.
    """
    header = ["file", "top-1 %", "drop", "agree %", "MB", *(f"ms at {size}" for size in BATCHES), ""]
    table = [header]
    for row in results:
        numbers = [f"{row.top1:.2f}", f"{row.drop:+.2f}", f"{row.agreement:.2f}", f"{row.megabytes:.2f}"]
        notes = [*([row.quantised_by] if row.quantised_by else []), *([] if row.kept else ["LEFT OUT"])]
        table.append([row.file, *numbers, *(f"{row.latency[size]:.2f}" for size in BATCHES), "; ".join(notes)])
    widths = [max(len(line[i]) for line in table) for i in range(len(header))]
    lines = []
    for first, *cells, note in table:
        padded = [cell.rjust(width) for cell, width in zip(cells, widths[1:-1], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *padded, note]).rstrip())
    threads = torch.get_num_threads()
    lines.append(f"{images:,} evaluation images of {data}; milliseconds per call for 1 and for 64 images on this CPU,")
    lines.append(f"{threads} thread{'s' if threads > 1 else ''}, calls in turn")
    return "\n".join(lines)
