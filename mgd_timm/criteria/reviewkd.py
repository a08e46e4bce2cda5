"""ReviewKD: knowledge review (Chen et al. 2021)."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mgd_timm.criteria.adapters import damp_gradient, paired_maps
from mgd_timm.criteria.base import Criterion, at_least_float32
from mgd_timm.features import Batch, Features, Pair


def hierarchical_context(student: Float[Tensor, "b c h w"], teacher: Float[Tensor, "b c h w"]) -> Float[Tensor, ""]:
    """Return the weighted mean of the maps' squared differences at full size and average-pooled to sides of 4, 2 and 1.

    The weights are 1, 1/2, 1/4, ... Sides that are not smaller than the map's are skipped.
    """
    student, teacher = at_least_float32(student), at_least_float32(teacher)
    losses, weights = [F.mse_loss(student, teacher)], [1.0]
    for side in (4, 2, 1):
        if side < min(student.shape[2:]):
            losses.append(F.mse_loss(F.adaptive_avg_pool2d(student, side), F.adaptive_avg_pool2d(teacher, side)))
            weights.append(weights[-1] / 2)
    return torch.stack([w * loss for w, loss in zip(weights, losses, strict=True)]).sum() / sum(weights)


class Fusion(nn.Module):
    """Attention-based fusion of a student's map with the fused deeper maps, and its projection to the teacher's
    channels.

    Args:
        channels: Channels of the student's map.
        width: Channels of the fused map.
        teacher_channels: Channels of the teacher's map.
        deepest: There is no deeper map to fuse with.
    """

    def __init__(self, channels: int, width: int, teacher_channels: int, *, deepest: bool) -> None:
        super().__init__()
        enter = nn.Conv2d(channels, width, 1, bias=False)
        leave = nn.Conv2d(width, teacher_channels, 3, padding=1, bias=False)
        for conv in (enter, leave):
            nn.init.kaiming_uniform_(conv.weight, a=1)
        self.enter = nn.Sequential(enter, nn.BatchNorm2d(width))
        self.attention = None if deepest else nn.Conv2d(2 * width, 2, 1)
        self.leave = nn.Sequential(leave, nn.BatchNorm2d(teacher_channels))

    def forward(
        self, maps: Float[Tensor, "b c h w"], deeper: Float[Tensor, "b d _ _"] | None, size: tuple[int, int]
    ) -> tuple[Float[Tensor, "b c2 h2 w2"], Float[Tensor, "b d h2 w2"]]:
        """Return the map to compare with the teacher's and the fused map for the next level, at the teacher's size."""
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

    ABF, the attention-based fusion, goes from deep to shallow: a learned attention adds a student's map and the fused
    deeper maps, and a 3x3 convolution projects the sum to the teacher's channels. HCL is the mean squared difference at
    several scales.

    Reference: Chen, Liu, Zhao, Jia, "Distilling Knowledge via Knowledge Review" (arXiv 2104.09044), attention-based
    fusion and hierarchical context loss; official code dvlab-research/ReviewKD (CIFAR-100/model/reviewkd.py).

    Weight: 1, multiplied by min(1, epoch / 20) in the official code (its default). Use reviewkd:1:20 for a warm-up over
    20 epochs, which rises with each update from 0; without it there is none. The official CIFAR-100 script has 5 for
    most pairs (WRN, resnet32x4 to resnet8x4, ShuffleNetV1), 8 for resnet32x4 to ShuffleNetV2, 1 for resnet110 to
    resnet32 and 0.6 for resnet56 to resnet20. On ImageNet mdistiller has 1 for ResNet-34 to 18 and 8 for ResNet-50 to
    MobileNet, without a warm-up: it is set to 1 epoch, and epochs are counted from 1.

    Differs: the official training taps the teacher's maps before their last activation and the student's after it
    (mdistiller: the teacher's always before, the student's by choice); here both are as tapped. The width is the
    smaller of 512 and the student's embedding width, as in the official code (256 for its MobileNet on ImageNet). Maps
    may have any size, square or not (there: square). If a student's map hardly varies over batch and positions (root
    mean square below 0.001), its gradient is scaled down: several BatchNorm layers would multiply it by 1e4 and more.

    Args:
        pair: Shapes of both networks, with the same number of maps, 1 or more. Batches have 2 or more samples because
            of BatchNorm over the embeddings.
        width: Largest number of channels that are passed from level to level, 1 or more.

    Raises:
        ValueError: A network has no maps, the numbers of maps differ, or width is below 1.
    """

    weight = 1.0
    needs = frozenset({"maps", "embedding"})

    def __init__(self, pair: Pair, *, width: int = 512) -> None:
        super().__init__(pair)
        if width < 1:
            raise ValueError(f"width={width}: expected 1 or more.")
        shapes = paired_maps("ReviewKD", pair)[::-1]
        levels = [(pair.student.embed_dim, pair.teacher.embed_dim), *((s[0], t[0]) for s, t in shapes)]
        width = min(width, pair.student.embed_dim)
        self.fusions = nn.ModuleList(Fusion(s, width, t, deepest=i == 0) for i, (s, t) in enumerate(levels))

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Float[Tensor, ""]:
        """Return the loss, at least float32."""
        ours, theirs = ([f.embedding[:, :, None, None], *f.maps[::-1]] for f in (student, teacher))
        losses, passed = [], None
        for fusion, one, other in zip(self.fusions, ours, theirs, strict=True):
            compared, passed = fusion(one, passed, (other.shape[2], other.shape[3]))
            losses.append(hierarchical_context(compared, other))
        return torch.stack(losses).sum()
