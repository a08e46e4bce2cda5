"""Features of a batch and of its rotations, from one forward pass."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from mgd_timm.features.contract import Features

ROTATIONS = 3  # of each image, besides itself


def rotate(images: Float[Tensor, "b c s s"]) -> Float[Tensor, "r c s s"]:
    """Return each image rotated by 90, 180 and 270 degrees, the three of an image one after the other.

    Args:
        images: Square images, of any number.
    """
    turned = [torch.rot90(images, quarters, (2, 3)) for quarters in range(1, ROTATIONS + 1)]
    return torch.stack(turned, 1).flatten(0, 1)


def extract_with_rotations(network: Callable[[Tensor], Features], images: Float[Tensor, "b c s s"]) -> Features:
    """Return a network's features of images, with those of their rotations as `rotated`.

    Images and rotations go through the network in one pass of 4b images, which costs four times as much: BatchNorm in
    train mode normalises all of them together.
    """
    count = len(images)
    both = network(torch.cat([images, rotate(images)]))
    return Features(
        both.logits[:count],
        both.embedding[:count],
        tuple(m[:count] for m in both.maps),
        {name: code[:count] for name, code in both.codes.items()},
        {name: view[:count] for name, view in both.views.items()},
        both.cam[:count] if both.cam is not None else None,
        rotated=Features(both.logits[count:], both.embedding[count:]),
    )
