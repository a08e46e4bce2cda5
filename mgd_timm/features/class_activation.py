"""Class activation maps: a network's classifier at every position of its last map (CAT-KD)."""

from typing import Any, cast

import torch
from torch import Tensor, nn

from mgd_timm.features.probe import Classify, Probe, apply_classifier, apply_conv_classifier, eval_without_gradients


def class_activation_maps(model: nn.Module, classify: Classify, final: Any, embed_dim: int) -> Tensor | None:
    """Apply the classifier at every position of the last map.

    Args:
        model: A timm model.
        classify: Its function from the embedding to the logits.
        final: The output of `forward_features`, channels first or last.
        embed_dim: Width of the embedding.

    Returns:
        Maps [batch, classes, height, width]; None if `final` is not a map with the embedding's width, or there are
        several classifiers.
    """
    if not isinstance(final, Tensor) or final.ndim != 4 or classify not in (apply_classifier, apply_conv_classifier):
        return None
    if final.shape[1] == embed_dim:
        final = final.permute(0, 2, 3, 1)
    if final.shape[3] != embed_dim:
        return None
    rows = final.flatten(0, 2)
    logits = classify(model, final, rows)
    return cast(Tensor, logits.unflatten(0, final.shape[:3]).permute(0, 3, 1, 2))


def check_class_activation_maps(model: nn.Module, name: str, probe: Probe) -> None:
    """Raise ValueError unless the class activation maps exist and their mean over positions is the logits."""
    if probe.logits is None:
        raise ValueError(
            f"{name} has no classifier, so it has no class activation maps (CAT-KD). Choose another network or another "
            "criterion."
        )
    with eval_without_gradients(model):
        maps = class_activation_maps(model, probe.classify, probe.final, probe.embed_dim)
    fits = maps is not None and (maps.is_meta or torch.allclose(maps.mean((2, 3)), probe.logits, rtol=1e-3, atol=1e-4))
    if not fits:
        raise ValueError(
            f"{name}'s logits are not the mean over positions of its classifier on the last map: it has no class "
            "activation maps (CAT-KD). Choose a network that pools and then classifies, such as a resnet, or another "
            "criterion."
        )
