"""What a network costs: parameters, multiply-accumulates, bytes, latency."""

import contextlib
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
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


@dataclass(frozen=True)
class Work:
    """What a network has and computes.

    Args:
        parameters: Number of weights.
        macs: Multiply-accumulates of one image, in convolutions, linear layers and attention.
        size: Bytes of all tensors of the state dict.
        activations: Elements that convolutions, linear layers and attention return for one image.
    """

    parameters: int
    macs: int
    size: int
    activations: int


def measure_costs(model: nn.Module, input_size: tuple[int, int, int], batches: Sequence[int] = BATCHES) -> Costs:
    """Measure a network in eval mode, on its device and with torch's number of threads.

    Args:
        model: The network.
        input_size: (channels, height, width) of its images.
        batches: Batch sizes whose latency is measured.
    """
    device = next(model.parameters()).device
    work = count_work(model, input_size)
    with torch.no_grad(), _eval_mode(model):
        latency = {size: _milliseconds(model, torch.zeros(size, *input_size, device=device)) for size in batches}
    return Costs(work.parameters, work.macs, work.size, latency)


def count_work(model: nn.Module, input_size: tuple[int, int, int]) -> Work:
    """Count what a network in eval mode has and computes, without timing it.

    Args:
        model: The network.
        input_size: (channels, height, width) of its images.
    """
    image = torch.zeros(1, *input_size, device=next(model.parameters()).device)
    with torch.no_grad(), _eval_mode(model), FlopCounterMode(display=False) as flops, _Outputs() as outputs:
        model(image)
    return Work(
        sum(parameter.numel() for parameter in model.parameters()),
        flops.get_total_flops() // 2,  # torch counts a multiplication and an addition
        sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values()),
        outputs.count,
    )


class _Outputs(TorchDispatchMode):
    """Counts the elements that convolutions and matrix products return."""

    COUNTED = {"convolution", "addmm", "mm", "bmm", "baddbmm"}

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._overloadpacket.__name__
        if name in self.COUNTED:
            self.count += out.numel()
        elif name.startswith("_scaled_dot_product"):
            self.count += out[0].numel()
        return out


@contextlib.contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    yield
    for module, mode in modes:
        module.training = mode


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
