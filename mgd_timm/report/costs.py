"""What a network costs: parameters, multiply-accumulates, bytes, latency."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

BATCHES = (1, 64)
REPETITIONS = 20
LONGEST = 2.0
"""Seconds after which a measurement of the latency ends, once it has three repetitions."""


@dataclass(frozen=True)
class Costs:
    """What a network costs.

    Args:
        parameters: Number of weights.
        macs: Multiply-accumulates of one image, in convolutions, linear layers and attention.
        size: Bytes of all tensors of the state dict.
        latency: Median milliseconds of a forward pass, by batch size.
    """

    parameters: int
    macs: int
    size: int
    latency: dict[int, float]


def measure_costs(model: nn.Module, input_size: tuple[int, int, int], batches: Sequence[int] = BATCHES) -> Costs:
    """Measure a network in eval mode, on its device and with torch's number of threads.

    Args:
        model: The network.
        input_size: (channels, height, width) of its images.
        batches: Batch sizes whose latency is measured.
    """
    device = next(model.parameters()).device
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    with torch.no_grad():
        with FlopCounterMode(display=False) as counter:
            model(torch.zeros(1, *input_size, device=device))
        latency = {size: _milliseconds(model, torch.zeros(size, *input_size, device=device)) for size in batches}
    for module, mode in modes:
        module.training = mode
    return Costs(
        sum(parameter.numel() for parameter in model.parameters()),
        counter.get_total_flops() // 2,  # torch counts a multiplication and an addition
        sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values()),
        latency,
    )


def _milliseconds(model: nn.Module, images: torch.Tensor) -> float:
    times: list[float] = []
    model(images)  # the first call allocates, and chooses kernels
    while len(times) < 3 or (len(times) < REPETITIONS and sum(times) < LONGEST):
        _wait(images.device)
        start = time.perf_counter()
        model(images)
        _wait(images.device)
        times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
