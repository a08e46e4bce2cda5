"""Masked generative distillation (Yang et al. 2022), also called MGD, but not the MGD of this package."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mgd_timm.criteria.adapters import pool_larger, tapped_maps
from mgd_timm.criteria.base import Criterion, at_least_float32
from mgd_timm.features import Batch, Features, Pair

Masked = Literal["channels", "positions"]


def masked(maps: Float[Tensor, "b c h w"], ratio: float, what: Masked) -> Float[Tensor, "b c h w"]:
    """Set channels or positions of each sample to 0, each with the probability `ratio`."""
    batch, channels, height, width = maps.shape
    size = (batch, channels, 1, 1) if what == "channels" else (batch, 1, height, width)
    return maps * (torch.rand(size, device=maps.device) >= ratio)


def generation_loss(generated: Float[Tensor, "b c h w"], teacher: Float[Tensor, "b c h w"]) -> Float[Tensor, ""]:
    """Return the squared difference, summed over a sample's elements, mean over the batch."""
    return (at_least_float32(generated) - at_least_float32(teacher)).pow(2).sum() / len(teacher)


class MaskedGenerative(Criterion):
    """Masked generative distillation: 1/B |G(M A(F_s)) - F_t|^2 on the last maps: the teacher's map is generated from
    the masked student's.

    M sets random channels (or positions) of the student's map to 0, drawn in each call; A is a 1x1 convolution if
    channels differ; G is a 3x3 convolution, a ReLU and a 3x3 convolution.

    Reference: Yang, Li, Shao, Shi, Yuan, Yuan, "Masked Generative Distillation" (arXiv 2205.01529); official code
    yzd-v/MGD (cls/mmcls/distillation/losses/mgd.py).

    Weight: 7e-5 (official configurations for ImageNet, ResNet-34 to 18 and ResNet-50 to MobileNet), masked ratio 0.15
    of channels.

    Differs: same as the official code for classification, which masks channels where the paper masks positions
    (mask="positions"). If sizes differ, the larger map is average-pooled (there: an error). The loss is a sum over
    elements: the right weight depends on the size of the map.

    Args:
        pair: Shapes of both networks, each with 1 or more maps. The deepest ones are used.
        ratio: Probability that a channel or position is masked, 0 <= ratio < 1.
        mask: What to mask, "channels" or "positions".

    Raises:
        ValueError: A network has no maps, or ratio or mask is out of range.
    """

    weight = 7e-5
    needs = frozenset({"maps"})

    def __init__(self, pair: Pair, *, ratio: float = 0.15, mask: Masked = "channels") -> None:
        super().__init__(pair)
        if not 0 <= ratio < 1:
            raise ValueError(f"ratio={ratio}: expected 0 <= ratio < 1.")
        if mask not in ("channels", "positions"):
            raise ValueError(f"mask={mask!r}: expected 'channels' or 'positions'.")
        self.ratio, self.mask = ratio, mask
        c_s, c_t = (maps[-1][0] for maps in tapped_maps("MaskedGenerative", pair))
        self.align = nn.Conv2d(c_s, c_t, 1) if c_s != c_t else nn.Identity()
        self.generation = nn.Sequential(nn.Conv2d(c_t, c_t, 3, padding=1), nn.ReLU(), nn.Conv2d(c_t, c_t, 3, padding=1))

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Float[Tensor, ""]:
        """Return the loss, at least float32. Draw from torch's generator of the device."""
        aligned, target = pool_larger(self.align(student.maps[-1]), teacher.maps[-1])
        return generation_loss(self.generation(masked(aligned, self.ratio, self.mask)), target)
