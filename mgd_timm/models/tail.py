"""The part of a timm model that follows one of its maps.

A tail is the model itself, with all that runs before the map taken out, called with the map: the model's own code then
runs what is left. The modules to take out are found in a forward pass, so there is no table of architectures. Networks
that add something of their own on the way (position embeddings, class tokens) have no such tail: on a probe image it
does not compute what the network computes.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mgd_timm.features import FeatureTap
from mgd_timm.features.probe import eval_without_gradients, probe_image
from mgd_timm.models.cifar.base import CifarNet

Layout = Callable[[Tensor], Tensor]
"""A map [batch, channels, height, width] as a network computes it between its blocks."""


def _channels_first(maps: Tensor) -> Tensor:
    return maps


def _channels_last(maps: Tensor) -> Tensor:
    return maps.permute(0, 2, 3, 1)


def _tokens(maps: Tensor) -> Tensor:
    return maps.flatten(2).transpose(1, 2)


_LAYOUTS: tuple[Layout, ...] = (_channels_first, _channels_last, _tokens)


class Tail(nn.Module):
    """What a model computes after one of its maps.

    Args:
        model: A timm model without the modules that run before the map.
        layout: Of the map between the model's blocks.
    """

    def __init__(self, model: nn.Module, layout: Layout) -> None:
        super().__init__()
        self.model, self.layout = model, layout

    def forward(self, maps: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k"]:
        """Return logits of a batch of maps."""
        logits: Tensor = self.model(self.layout(maps))
        return logits


class GenericTail(nn.Sequential):
    """A small network in place of a model's tail: for each map after the first a depthwise separable convolution to its
    channels and size, then pooling and a linear classifier.

    Args:
        maps: (channels, height, width) of the map that it takes, and of those after it.
        num_classes: Width of the logits.
    """

    def __init__(self, maps: tuple[tuple[int, int, int], ...], num_classes: int) -> None:
        super().__init__()
        for (channels, *_), (width, *size) in pairwise(maps):
            self.append(nn.AdaptiveAvgPool2d(tuple(size)))
            self.append(nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False))
            self.append(nn.BatchNorm2d(channels))
            self.append(nn.ReLU())
            self.append(nn.Conv2d(channels, width, 1, bias=False))
            self.append(nn.BatchNorm2d(width))
            self.append(nn.ReLU())
        self.append(nn.AdaptiveAvgPool2d(1))
        self.append(nn.Flatten())
        self.append(nn.Linear(maps[-1][0], num_classes))


def cut_tail(tap: FeatureTap, position: int) -> Tail | None:
    """Cut a model down to what follows one of its maps.

    Args:
        tap: Of the model, which is cut in place and of no other use afterwards.
        position: Of the map among the tap's.

    Returns:
        The tail; None if the model does not compute its logits from the map alone, or changes the map in place.
    """
    model = tap.model
    with eval_without_gradients(model), _shift_norms(model):
        images = probe_image(model, tap.input_size)
        maps = tap(images).maps[position]
        layout, front = _find_front(model, images, maps)
        if layout is None:
            return None
        expected = _trace(model, images)
        for name in front:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, nn.Sequential())  # the identity, of no blocks
        if isinstance(model, CifarNet):
            model.feature_info[-1]["reduction"] = 1  # by which it refuses images that are too small; a map is not one
        tail, version = Tail(model, layout), maps._version
        try:
            found = _trace(model, layout(maps))
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, TypeError, AttributeError, ValueError, AssertionError, IndexError):
            return None  # the model's code asks more of the modules that were taken out
    computes_the_same = all(_equal(found[name], expected[name]) for name in found)
    return tail if computes_the_same and maps._version == version else None


def _find_front(model: nn.Module, images: Tensor, maps: Tensor) -> tuple[Layout | None, list[str]]:
    """Return the layout of a map between the blocks of the model, and the modules that run before it, without those
    inside of others. No layout: no module returns the map."""
    ended: list[tuple[str, Layout | None]] = []  # modules in the order in which they end; a layout: it returned the map

    def add(name: str, output: Any) -> None:
        layouts = _LAYOUTS if isinstance(output, Tensor) else ()
        ended.append((name, next((one for one in layouts if _equal(one(maps), output)), None)))

    handles = [
        module.register_forward_hook(lambda _module, _inputs, output, name=name: add(name, output))
        for name, module in model.named_modules()
        if name
    ]
    try:
        model(images)
    finally:
        for handle in handles:
            handle.remove()
    first = next((i for i, (_, layout) in enumerate(ended) if layout is not None), None)
    if first is None:
        return None, []
    name, layout = ended[first]
    last = first
    for i in range(first, len(ended)):
        if ended[i][1] is not layout:
            break
        if name.startswith(f"{ended[i][0]}."):
            last = i  # the block or stage that ends with this module
    front = {name for name, _ in ended[: last + 1]}
    return layout, [name for name in front if not any(name.startswith(f"{other}.") for other in front)]


@contextmanager
def _shift_norms(model: nn.Module) -> Iterator[None]:
    """Change weights that are vectors until the exit: a new BatchNorm is the identity, so that a check would not see
    whether it runs once, twice or never."""
    vectors = [(weight, weight.clone()) for weight in model.parameters() if weight.ndim == 1]
    try:
        for weight, _ in vectors:
            weight += 0.2 * torch.arange(len(weight), dtype=weight.dtype).cos()
        yield
    finally:
        for weight, before in vectors:
            weight.copy_(before)


def _trace(model: nn.Module, inputs: Tensor) -> dict[str, Tensor | None]:
    """Return the logits, as "", and the gradient of a sum of them in each weight."""
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    with torch.enable_grad():
        logits = cast(Any, model)(inputs)
        total = (logits * torch.linspace(0, 1, logits.shape[1])).sum()
        gradients = torch.autograd.grad(total, list(weights.values()), allow_unused=True)
    return {"": logits.detach(), **dict(zip(weights, gradients, strict=True))}


def _equal(one: Tensor | None, other: Tensor | None) -> bool:
    """Return whether both are equal but for rounding. A weight without a gradient has no place in a tail."""
    if one is None or other is None or one.shape != other.shape:
        return False
    return torch.allclose(one, other, rtol=1e-3, atol=1e-4 * max(1e-3, other.abs().max().item()))
