"""Fake quantisation: compute with float numbers that are rounded as the int8 file of a model has them.

onnxruntime's static quantisation (QDQ, U8S8, per channel) rounds the weights of convolutions and linear layers to int8,
with a scale for each output channel, and what these layers take and return to uint8, with one range for each tensor.
Here modules round at the same places, and gradients pass through the rounding, so that weights learn to bear it.

Why modules, and neither torchao's PT2E nor NNCF: both capture a graph of the model's forward, and criteria need timm's
own methods (`forward_intermediates`, `forward_head`); PT2E's graph also fails for some networks (resnet18). Modules
stay in the one training loop, work for every network of convolutions and linear layers, and come off without a trace:
the student is exported as ever. The rounding itself is torch's own (`fake_quantize_per_channel_affine`).

Differs from the int8 file: sums and products between layers (residuals, gates) are rounded only where a convolution or
linear layer reads them, biases are not rounded, BatchNorm is not folded, and weights that a module changes in its
forward (StdConv2d), or that are not of a Conv2d or Linear, are not rounded as the file has them. In bfloat16 (--amp)
rounded numbers are rounded once more to its 8 bits.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrize

from mgd_timm.features import FeatureTap

_WEIGHTED = (nn.Conv2d, nn.Linear)
_RELUS = (nn.ReLU, nn.ReLU6)  # the int8 file has one range for what comes out of these, and none before
_INPUT, _OUTPUT = "quantised_input", "quantised_output"


class WeightRounding(nn.Module):
    """Rounds a weight to int8, symmetric, with a scale for each output channel: that of its largest weight.

    BatchNorm multiplies whole output channels, and so do the scales: rounding before or after it is folded is the same.
    """

    def __init__(self) -> None:
        super().__init__()
        self.active = False

    def forward(self, weight: Float[Tensor, "out *rest"]) -> Float[Tensor, "out *rest"]:
        """Return the rounded weight, or the weight itself while inactive."""
        if not self.active:
            return weight
        largest = weight.detach().float().flatten(1).abs().amax(1)
        scale = (largest / 127).clamp_min(torch.finfo(torch.float32).tiny)
        zero = torch.zeros_like(scale, dtype=torch.int32)
        return torch.fake_quantize_per_channel_affine(weight, scale, zero, 0, -127, 127)


class TensorRounding(nn.Module):
    """Rounds a tensor to uint8, with one range, which holds 0: from the smallest to the largest number observed."""

    low: Tensor
    high: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.active = self.observing = False
        self.register_buffer("low", torch.zeros(()))
        self.register_buffer("high", torch.zeros(()))

    def forward(self, tensor: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Return the rounded tensor, or the tensor itself while inactive."""
        if self.observing:
            low, high = tensor.detach().float().aminmax()
            self.low.copy_(torch.minimum(self.low, low))
            self.high.copy_(torch.maximum(self.high, high))
        if not self.active:
            return tensor
        scale = ((self.high - self.low) / 255).clamp_min(torch.finfo(torch.float32).tiny)
        zero = (-self.low / scale).round().to(torch.int32)
        return torch.fake_quantize_per_tensor_affine(tensor, scale, zero, 0, 255)


@dataclass(frozen=True)
class Places:
    """The modules whose input, output and weight are rounded."""

    inputs: list[nn.Module] = field(default_factory=list)
    outputs: list[nn.Module] = field(default_factory=list)
    weights: list[nn.Module] = field(default_factory=list)


class FakeQuantisation:
    """The rounding of a tap's model: added when this is made, inactive until `calibrate`, gone after `remove`.

    Ranges are buffers of the modules, and so in state dicts.

    Args:
        tap: Its model is changed.

    Raises:
        ValueError: As `find_places`.
    """

    def __init__(self, tap: FeatureTap) -> None:
        self.tap, self.places = tap, find_places(tap)
        device = next(tap.parameters()).device
        self._handles = []
        for module in self.places.inputs:
            module.add_module(_INPUT, TensorRounding().to(device))
            self._handles.append(module.register_forward_pre_hook(_round_input))
        for module in self.places.outputs:
            module.add_module(_OUTPUT, TensorRounding().to(device))
            self._handles.append(module.register_forward_hook(_round_output))
        for module in self.places.weights:
            parametrize.register_parametrization(module, "weight", WeightRounding())

    def set_active(self, active: bool) -> None:
        """Round, or compute in float."""
        for module in self.tap.modules():
            if isinstance(module, WeightRounding | TensorRounding):
                module.active = active

    @torch.no_grad()
    def calibrate(self, batches: Iterable[Tensor]) -> None:
        """Take the ranges of tensors from a float pass over images, as the quantiser of files does; then round.

        Args:
            batches: Normalised images, [batch, channels, height, width].
        """
        roundings = [module for module in self.tap.modules() if isinstance(module, TensorRounding)]
        training = self.tap.training
        self.tap.eval()
        self.set_active(False)
        for rounding in roundings:
            rounding.low.zero_()
            rounding.high.zero_()
            rounding.observing = True
        for images in batches:
            self.tap(images)
        for rounding in roundings:
            rounding.observing = False
        self.set_active(True)
        self.tap.train(training)

    def remove(self) -> None:
        """Take the rounding off: the model is as it was before, with the float weights that it has learnt."""
        for handle in self._handles:
            handle.remove()
        for module in self.places.inputs:
            delattr(module, _INPUT)
        for module in self.places.outputs:
            delattr(module, _OUTPUT)
        for module in self.places.weights:
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)
            module.register_parameter("bias", module._parameters.pop("bias"))  # in the order of before


def _round_input(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return (cast(nn.Module, getattr(module, _INPUT))(inputs[0]), *inputs[1:])


def _round_output(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:  # noqa: ARG001
    return getattr(module, _OUTPUT)(output)


def find_places(tap: FeatureTap) -> Places:
    """Find in a forward pass where to round.

    A convolution or linear layer rounds its weight; its input, where the module that made it returns it, so that all
    that read it read the rounded one; and its output, behind the BatchNorm that is folded into it, unless a ReLU
    follows, whose own output is rounded where it is read.

    Raises:
        ValueError: The model calls no convolution and no linear layer, or one with a parametrized weight.
    """
    search = _Search()
    handles = [module.register_forward_pre_hook(search.before) for module in tap.model.modules()]
    handles += [module.register_forward_hook(search.after) for module in tap.model.modules()]
    tap.probe()
    for handle in handles:
        handle.remove()
    if not search.weights:
        raise ValueError(f"{tap.name} has no convolution (Conv2d) and no linear layer to quantise: leave --qat out.")
    if any(parametrize.is_parametrized(module) for module in search.weights):
        raise ValueError(
            f"{tap.name} has parametrized weights (torch.nn.utils.parametrize), which the rounding of --qat would take "
            "off: merge them first (remove_parametrizations), or leave --qat out."
        )
    return Places(
        list(search.inputs), list(search.read | dict.fromkeys(search.products.values())), list(search.weights)
    )


class _Search:
    """Hooks of one forward pass. A tensor that is changed in place counts as another one."""

    def __init__(self) -> None:
        self.weights = dict[nn.Module, None]()
        self.inputs = dict[nn.Module, None]()  # weighted modules whose input no module returned
        self.read = dict[nn.Module, None]()  # innermost modules whose output a weighted one reads
        self.makers = dict[tuple[int, int], nn.Module]()  # by tensor: the innermost module that returned it
        self.products = dict[tuple[int, int], nn.Module]()  # the same of weighted modules, or of their BatchNorm
        self.in_norm = False  # BatchNorm of a product has begun; timm's BatchNormAct2d holds its activation
        self.held: list[Tensor] = []  # else another tensor could get the id of one that is gone

    def before(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Note what a module reads."""
        if not args or not isinstance(args[0], Tensor):
            return
        key = (id(args[0]), args[0]._version)
        if isinstance(module, _RELUS):
            self.products.pop(key, None)
        elif isinstance(module, nn.modules.batchnorm._BatchNorm):
            self.in_norm = self.products.pop(key, None) is not None
        elif isinstance(module, _WEIGHTED):
            self.weights[module] = None
            if key in self.makers:
                self.read[self.makers[key]] = None
            else:
                self.inputs[module] = None

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:  # noqa: ARG002
        """Note what an innermost module returns."""
        if not isinstance(output, Tensor) or list(module.children()):
            return
        self.held.append(output)
        key = (id(output), output._version)
        self.makers[key] = module
        if isinstance(module, _WEIGHTED) or self.in_norm:
            self.products[key] = module
            self.in_norm = False
