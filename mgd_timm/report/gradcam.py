"""Grad-CAM: where a class score comes from in a network's last map.

Reference: Selvaraju et al., "Grad-CAM: Visual Explanations from Deep Networks via Gradient-based Localization" (ICCV
2017), equations 1 and 2.
"""

import math
from collections.abc import Callable
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

Scores = Callable[[Tensor, Tensor], Tensor]
"""Class scores [batch, classes] of logits and embedding."""


def grad_cam(
    model: nn.Module, images: Float[Tensor, "b c h w"], classes: Int[Tensor, " b"], scores: Scores | None = None
) -> Float[Tensor, "b h2 w2"] | None:
    """Return the Grad-CAM of each image's class on the output of `forward_features`.

    Args:
        model: A timm model in eval mode.
        images: Normalised for the model.
        classes: One per image.
        scores: What to explain; by default the logits.

    Returns:
        Maps, 0 or more. None where that output has no positions, or the score does not depend on them (a vision
        transformer that classifies by a class token).
    """
    network = cast(Any, model)
    with torch.no_grad():
        final = network.forward_features(images)
    if not isinstance(final, Tensor):
        return None
    with torch.enable_grad():
        final = final.detach().requires_grad_()
        logits, embedding = network.forward_head(final), network.forward_head(final, pre_logits=True)
        found = logits if scores is None else scores(logits, embedding)
        (gradient,) = torch.autograd.grad(found.gather(1, classes[:, None]).sum(), final)
    values, slopes = _as_map(model, final.detach()), _as_map(model, gradient)
    if values is None or slopes is None or not slopes.any():
        return None
    return (slopes.mean((2, 3), keepdim=True) * values).sum(1).relu()


def _as_map(model: nn.Module, final: Tensor) -> Tensor | None:
    """Return the output of forward_features as [batch, channels, height, width]; None if it is no map."""
    width = cast(Any, model).num_features
    if final.ndim == 4:
        if final.shape[1] == width:
            return final
        return final.permute(0, 3, 1, 2) if final.shape[3] == width else None
    if final.ndim != 3:
        return None
    patches = final[:, getattr(model, "num_prefix_tokens", 0) :]
    side = math.isqrt(patches.shape[1])
    if side * side != patches.shape[1]:
        return None
    return patches.transpose(1, 2).unflatten(2, (side, side))
