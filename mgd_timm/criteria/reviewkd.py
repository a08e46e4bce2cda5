"""ReviewKD: knowledge review (Chen et al. 2021)."""

from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mgd_timm.criteria.adapters import damp_gradient, paired_maps
from mgd_timm.criteria.base import Criterion, Need, at_least_float32
from mgd_timm.features import Batch, Features, Pair


def hierarchical_context(student: Float[Tensor, "b c h w"], teacher: Float[Tensor, "b c h w"]) -> Float[Tensor, ""]:
    """Mean squared difference of whole maps, and of maps average-pooled to sides of 4, 2 and 1: weighted mean, by 1,
    1/2, 1/4, ...

    A side that is not smaller than the map's is left out.
    """
    student, teacher = at_least_float32(student), at_least_float32(teacher)
    losses, weights = [F.mse_loss(student, teacher)], [1.0]
    for side in (4, 2, 1):
        if side < min(student.shape[2:]):
            losses.append(F.mse_loss(F.adaptive_avg_pool2d(student, side), F.adaptive_avg_pool2d(teacher, side)))
            weights.append(weights[-1] / 2)
    return torch.stack([w * loss for w, loss in zip(weights, losses, strict=True)]).sum() / sum(weights)


class Fusion(nn.Module):
    """Attention-based fusion of a student's map with what came from the deeper ones, and its transfer to the teacher's
    channels.

    Args:
        channels: Of the student's map.
        width: Of what is passed on.
        teacher_channels: Of the teacher's map.
        deepest: Nothing comes from a deeper map.
    """

    def __init__(self, channels: int, width: int, teacher_channels: int, *, deepest: bool) -> None:
        super().__init__()
        enter, leave = (
            nn.Conv2d(channels, width, 1, bias=False),
            nn.Conv2d(width, teacher_channels, 3, padding=1, bias=False),
        )
        for conv in (enter, leave):
            nn.init.kaiming_uniform_(conv.weight, a=1)
        self.enter = nn.Sequential(enter, nn.BatchNorm2d(width))
        self.attention = None if deepest else nn.Conv2d(2 * width, 2, 1)
        self.leave = nn.Sequential(leave, nn.BatchNorm2d(teacher_channels))

    def forward(
        self, maps: Float[Tensor, "b c h w"], deeper: Float[Tensor, "b d _ _"] | None, size: tuple[int, int]
    ) -> tuple[Float[Tensor, "b c2 h2 w2"], Float[Tensor, "b d h2 w2"]]:
        """What is compared with the teacher's map, and what is passed on, both at the teacher's size."""
        fused = damp_gradient(self.enter(maps), maps)
        if self.attention is not None:
            assert deeper is not None
            deeper = F.interpolate(deeper, fused.shape[2:], mode="nearest")
            own, passed = self.attention(torch.cat([fused, deeper], dim=1)).sigmoid().chunk(2, dim=1)
            fused = fused * own + deeper * passed
        if tuple(fused.shape[2:]) != size:
            fused = F.interpolate(fused, size, mode="nearest")
        return self.leave(fused), fused


class ReviewKD(Criterion):
    """Knowledge review: sum over levels of HCL(ABF(F_s of this and all deeper levels), F_t), the embedding being the
    deepest level.

    ABF, the fusion, goes from deep to shallow: a student's map and what came from below it are added by a learned
    attention, and a 3x3 convolution leads to the teacher's channels. HCL is the mean squared difference at several
    scales.

    Reference: Chen, Liu, Zhao, Jia, "Distilling Knowledge via Knowledge Review" (arXiv 2104.09044), attention-based
    fusion and hierarchical context loss; official code dvlab-research/ReviewKD (CIFAR-100/model/reviewkd.py).

    Weight: 1, rising from 0 over the first 20 epochs (official default): give reviewkd:1:20, there is no warm-up
    without it. The official one goes by whole epochs, min(1, epoch / 20), ours by updates. The official CIFAR-100
    script has 5 for most pairs (WRN, resnet32x4 to resnet8x4, ShuffleNetV1), 8 for resnet32x4 to ShuffleNetV2, 1 for
    resnet110 to resnet32 and 0.6 for resnet56 to resnet20; for ResNet-34 to 18 on ImageNet mdistiller has 1, over 1
    epoch.

    Differs: the official training taps the teacher's maps before their last activation and the student's after it
    (mdistiller: the teacher's always before, the student's by choice); here both are as tapped. The official width is
    the lesser of 512 and the student's embedding, as here (256 for its MobileNet on ImageNet). Sizes may be any, square
    or not (there: square).

    Args:
        pair: Shapes of both networks; the numbers of maps must agree and be at least 1. Batches of 2 or more: the
            deepest level has BatchNorm over samples alone.
        width: The most channels that are passed from level to level, 1 or more.

    Raises:
        ValueError: No maps, a different number of maps on each side, or a width below 1.
    """

    weight: ClassVar[float] = 1.0
    needs: ClassVar[frozenset[Need]] = frozenset({"maps", "embedding"})

    def __init__(self, pair: Pair, *, width: int = 512) -> None:
        super().__init__(pair)
        if width < 1:
            raise ValueError(f"width={width}: expected 1 or more.")
        shapes = paired_maps("ReviewKD", pair)[::-1]
        levels = [(pair.student.embed_dim, pair.teacher.embed_dim), *((s[0], t[0]) for s, t in shapes)]
        width = min(width, pair.student.embed_dim)
        self.fusions = nn.ModuleList(Fusion(s, width, t, deepest=i == 0) for i, (s, t) in enumerate(levels))

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Float[Tensor, ""]:
        """Scalar, at least float32."""
        ours, theirs = ([f.embedding[:, :, None, None], *f.maps[::-1]] for f in (student, teacher))
        losses, passed = [], None
        for fusion, one, other in zip(self.fusions, ours, theirs, strict=True):
            compared, passed = fusion(one, passed, (other.shape[2], other.shape[3]))
            losses.append(hierarchical_context(compared, other))
        return torch.stack(losses).sum()
