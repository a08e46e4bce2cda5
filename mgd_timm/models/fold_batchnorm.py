"""A frozen network made faster without another result: BatchNorm folded into the convolutions before it."""

import copy
from typing import Any

from timm.layers import BatchNormAct2d, Conv2dSame
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from mgd_timm.features import FeatureTap

_CONVOLUTIONS = (nn.Conv2d, Conv2dSame)  # of these exactly: a subclass may standardise its weight in forward
_NORMS = (nn.BatchNorm2d, BatchNormAct2d)


def fold_batchnorm(tap: FeatureTap) -> FeatureTap | None:
    """A copy of a tap whose BatchNorms stand in the weights of the convolutions before them, for inference.

    Which convolution a BatchNorm follows is seen on a forward pass, so no layer is named. What is folded is checked:
    the copy's features of the same image are compared with the tap's, and a fold that changes them by more than float32
    rounding (of a convolution whose output is read elsewhere too) is left out. The tap itself is left alone.

    Returns:
        The copy in eval mode; None where nothing can be folded.
    """
    expected = _features(tap)
    chosen = _sound(tap, list(range(len(_follows(tap)))), expected)
    return _fold(tap, chosen, expected) if chosen else None


def _sound(tap: FeatureTap, chosen: list[int], expected: list[Tensor]) -> list[int]:
    """The folds among the chosen that leave the features as they are, by halves."""
    if not chosen or _fold(tap, chosen, expected) is not None:
        return chosen
    half = len(chosen) // 2
    return _sound(tap, chosen[:half], expected) + _sound(tap, chosen[half:], expected) if half else []


def _fold(tap: FeatureTap, chosen: list[int], expected: list[Tensor]) -> FeatureTap | None:
    """A copy with the chosen folds; None if its features differ."""
    twin = copy.deepcopy(tap).eval()
    follows = _follows(twin)
    parents = {id(child): (parent, name) for parent in twin.modules() for name, child in parent.named_children()}
    for convolution, norm in (follows[index] for index in chosen):
        convolution.weight, convolution.bias = fuse_conv_bn_weights(
            convolution.weight, convolution.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
        )
        parent, name = parents[id(norm)]
        setattr(parent, name, norm.act if isinstance(norm, BatchNormAct2d) else nn.Identity())
    for one, other in zip(expected, _features(twin), strict=True):
        scale = one.abs().max().clamp_min(1e-6)
        # Without values (a network on meta) every fold that its structure admits is taken.
        if not one.is_meta and not bool(((one - other).abs().max() / scale) < 1e-4):
            return None
    return twin


def _features(tap: FeatureTap) -> list[Tensor]:
    shown = tap.probe()
    parts = [shown.logits, shown.embedding, *shown.maps, *([shown.cam] if shown.cam is not None else [])]
    return [part for part in parts if part.numel()]  # there are no logits without a classifier


def _follows(tap: FeatureTap) -> list[tuple[Any, Any]]:
    """Pairs of a convolution and the BatchNorm whose only input is its output, each called once in a forward pass."""
    made: dict[int, tuple[nn.Module, Tensor]] = {}  # the tensor is held, so that no other gets its id
    calls: dict[int, int] = {}
    found: list[tuple[Any, Any]] = []

    def note(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        calls[id(module)] = calls.get(id(module), 0) + 1
        if type(module) in _CONVOLUTIONS:
            made[id(output)] = (module, output)
        elif (
            id(inputs[0]) in made
            and getattr(module, "running_mean", None) is not None
            and getattr(module, "affine", False)
        ):
            found.append((made[id(inputs[0])][0], module))

    handles = [m.register_forward_hook(note) for m in tap.modules() if type(m) in (*_CONVOLUTIONS, *_NORMS)]
    tap.probe()
    for handle in handles:
        handle.remove()
    normed = [id(convolution) for convolution, _ in found]
    return [(c, n) for c, n in found if calls[id(c)] == calls[id(n)] == 1 and normed.count(id(c)) == 1]
