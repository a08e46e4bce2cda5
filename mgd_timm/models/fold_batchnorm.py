"""Fold BatchNorm into the convolutions before it: a frozen network is faster, with the same features."""

import copy
from typing import Any

from timm.layers import BatchNormAct2d, Conv2dSame
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from mgd_timm.features import FeatureTap

_CONVOLUTIONS = (nn.Conv2d, Conv2dSame)  # of these exactly: a subclass may standardise its weight in forward
_NORMS = (nn.BatchNorm2d, BatchNormAct2d)


def fold_batchnorm(tap: FeatureTap) -> FeatureTap | None:
    """Copy a tap and fold its BatchNorms into the weights of the convolutions before them, for inference.

    A forward pass finds the convolution before each BatchNorm. The copy's features of a fixed image are compared with
    the tap's: a fold that changes them by more than float32 rounding is left out, such as that of a convolution whose
    output is used elsewhere too.

    Args:
        tap: Unchanged.

    Returns:
        The copy in eval mode; None if nothing can be folded.
    """
    expected = _features(tap)
    chosen = _find_safe_folds(tap, list(range(len(_find_pairs(tap)))), expected)
    return _fold(tap, chosen, expected) if chosen else None


def _find_safe_folds(tap: FeatureTap, chosen: list[int], expected: list[Tensor]) -> list[int]:
    """Return those of the chosen folds that keep the features, by bisection."""
    if not chosen or _fold(tap, chosen, expected) is not None:
        return chosen
    half = len(chosen) // 2
    if not half:
        return []
    return _find_safe_folds(tap, chosen[:half], expected) + _find_safe_folds(tap, chosen[half:], expected)


def _fold(tap: FeatureTap, chosen: list[int], expected: list[Tensor]) -> FeatureTap | None:
    """Return a copy with the chosen folds; None if its features differ from the expected ones."""
    copied = copy.deepcopy(tap).eval()
    pairs = _find_pairs(copied)
    parents = {id(child): (parent, name) for parent in copied.modules() for name, child in parent.named_children()}
    for convolution, norm in (pairs[index] for index in chosen):
        convolution.weight, convolution.bias = fuse_conv_bn_weights(
            convolution.weight, convolution.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
        )
        parent, name = parents[id(norm)]
        setattr(parent, name, norm.act if isinstance(norm, BatchNormAct2d) else nn.Identity())
    for before, after in zip(expected, _features(copied), strict=True):
        scale = before.abs().max().clamp_min(1e-6)
        # A network on the meta device has no values: every fold that its structure admits is accepted.
        if not before.is_meta and not bool(((before - after).abs().max() / scale) < 1e-4):
            return None
    return copied


def _features(tap: FeatureTap) -> list[Tensor]:
    features = tap.probe()
    parts = [features.logits, features.embedding, *features.maps]
    parts += [features.cam] if features.cam is not None else []
    return [part for part in parts if part.numel()]  # logits have no columns without a classifier


def _find_pairs(tap: FeatureTap) -> list[tuple[Any, Any]]:
    """Return pairs of a convolution and the BatchNorm that takes its output, each called once in a forward pass."""
    outputs: dict[int, tuple[nn.Module, Tensor]] = {}  # by id; holding the tensor keeps its id unique
    calls: dict[int, int] = {}
    pairs: list[tuple[Any, Any]] = []

    def record(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        calls[id(module)] = calls.get(id(module), 0) + 1
        if type(module) in _CONVOLUTIONS:
            outputs[id(output)] = (module, output)
        elif id(inputs[0]) in outputs and module.running_mean is not None and module.affine:
            pairs.append((outputs[id(inputs[0])][0], module))

    handles = [m.register_forward_hook(record) for m in tap.modules() if type(m) in (*_CONVOLUTIONS, *_NORMS)]
    tap.probe()
    for handle in handles:
        handle.remove()
    normed = [id(convolution) for convolution, _ in pairs]
    return [(c, n) for c, n in pairs if calls[id(c)] == calls[id(n)] == 1 and normed.count(id(c)) == 1]
