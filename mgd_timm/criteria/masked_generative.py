"""Masked generative distillation (Yang et al. 2022), which also goes by the three letters of this package's own
method."""

from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mgd_timm.criteria.adapters import pool_larger
from mgd_timm.criteria.base import Criterion, Need, at_least_float32
from mgd_timm.criteria.ft import last_maps
from mgd_timm.features import Batch, Features, Pair

Masked = Literal["channels", "positions"]


def masked(maps: Float[Tensor, "b c h w"], ratio: float, what: Masked) -> Float[Tensor, "b c h w"]:
    """The map, with channels or positions of every sample set to 0, each with the probability `ratio`."""
    batch, channels, height, width = maps.shape
    size = (batch, channels, 1, 1) if what == "channels" else (batch, 1, height, width)
    return maps * (torch.rand(size, device=maps.device) >= ratio)


def generation_loss(generated: Float[Tensor, "b c h w"], teacher: Float[Tensor, "b c h w"]) -> Float[Tensor, ""]:
    """Squared difference, summed over a sample's elements, mean over the batch."""
    return (at_least_float32(generated) - at_least_float32(teacher)).pow(2).sum() / len(teacher)


class MaskedGenerative(Criterion):
    """Masked generative distillation: 1/B |G(M A(F_s)) - F_t|^2 on the last maps; a masked student generates the
    teacher's map.

    M sets random channels (or positions) of the student's map to 0, drawn anew on every call; A is a 1x1 convolution
    where channels differ; G is a 3x3 convolution, a ReLU and a 3x3 convolution.

    Reference: Yang, Li, Shao, Shi, Yuan, Yuan, "Masked Generative Distillation" (arXiv 2205.01529); official code
    yzd-v/MGD (cls/mmcls/distillation/losses/mgd.py).

    Weight: 7e-5 (official configurations for ImageNet, ResNet-34 to 18 and ResNet-50 to MobileNet), masked ratio 0.15
    of channels.

    Differs: as the official code for classification, which masks channels where the paper masks positions
    (mask="positions" does so). Sizes that differ are bridged by average pooling of the larger map (there: refused). The
    loss is a sum over elements: a weight that suits one size of map does not suit another.

    Args:
        pair: Shapes of both networks; each shows 1 map or more, the deepest is read.
        ratio: Probability that a channel or position is masked, 0 <= ratio < 1.
        mask: What is masked.

    Raises:
        ValueError: No maps, or a ratio out of range.
    """

    weight: ClassVar[float] = 7e-5
    needs: ClassVar[frozenset[Need]] = frozenset({"maps"})

    def __init__(self, pair: Pair, *, ratio: float = 0.15, mask: Masked = "channels") -> None:
        super().__init__(pair)
        if not 0 <= ratio < 1:
            raise ValueError(f"ratio={ratio}: expected 0 <= ratio < 1.")
        if mask not in ("channels", "positions"):
            raise ValueError(f"mask={mask!r}: expected 'channels' or 'positions'.")
        self.ratio, self.mask = ratio, mask
        (c_s, *_), (c_t, *_) = last_maps("MaskedGenerative", pair)
        self.align = nn.Conv2d(c_s, c_t, 1) if c_s != c_t else nn.Identity()
        self.generation = nn.Sequential(nn.Conv2d(c_t, c_t, 3, padding=1), nn.ReLU(), nn.Conv2d(c_t, c_t, 3, padding=1))

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Float[Tensor, ""]:
        """Scalar, at least float32; draws from torch's generator of the device."""
        aligned, target = pool_larger(self.align(student.maps[-1]), teacher.maps[-1])
        return generation_loss(self.generation(masked(aligned, self.ratio, self.mask)), target)
