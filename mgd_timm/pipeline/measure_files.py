"""Measure exported files beside the PyTorch model: accuracy, agreement, size and latency, as rows of a table."""

import time
from collections.abc import Callable, Mapping
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
_ROUNDS = 10
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
    return {
        name: Accuracy(row["top1"], 100 * equal[name] / row["n"], int(row["n"])) for name, row in found.items()
    }


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
