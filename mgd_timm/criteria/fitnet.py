"""FitNet: hints from a middle layer (Romero et al. 2015)."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mgd_timm.criteria.adapters import paired_maps, pool_larger
from mgd_timm.criteria.base import Criterion, at_least_float32
from mgd_timm.features import Batch, Features, Pair


class HintAdapter(nn.Module):
    """Convolution, BatchNorm and ReLU from the student's map to the teacher's channels and size.

    The convolution is 1x1 if the sizes are equal, 3x3 with stride 2 if the student's sides are double, transposed 4x4
    if they are half, without padding if the student's sides are larger by up to 6 pixels, and otherwise 1x1 after
    adaptive average pooling (or bilinear upsampling).

    Args:
        student: (channels, height, width) of the student's map.
        teacher: (channels, height, width) of the teacher's map.
        relu: End with a ReLU.
    """

    def __init__(self, student: tuple[int, int, int], teacher: tuple[int, int, int], *, relu: bool = True) -> None:
        super().__init__()
        (c_s, *side_s), (c_t, *side_t) = student, teacher
        extra = [s - t for s, t in zip(side_s, side_t, strict=True)]
        self.size: tuple[int, int] | None = None
        conv: nn.Module
        if side_s == [2 * t for t in side_t]:
            conv = nn.Conv2d(c_s, c_t, 3, stride=2, padding=1)
        elif [2 * s for s in side_s] == side_t:
            conv = nn.ConvTranspose2d(c_s, c_t, 4, stride=2, padding=1)
        elif all(0 <= e <= 6 for e in extra):
            conv = nn.Conv2d(c_s, c_t, (1 + extra[0], 1 + extra[1]))
        else:
            self.size = (side_t[0], side_t[1])
            conv = nn.Conv2d(c_s, c_t, 1)
        self.conv, self.norm = conv, nn.BatchNorm2d(c_t)
        self.activation = nn.ReLU() if relu else nn.Identity()

    def forward(self, maps: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c2 h2 w2"]:
        """Return the student's map in the teacher's shape."""
        if self.size is not None:
            shrinks = maps.shape[2] >= self.size[0] and maps.shape[3] >= self.size[1]
            maps = (
                F.adaptive_avg_pool2d(maps, self.size) if shrinks else F.interpolate(maps, self.size, mode="bilinear")
            )
        return self.activation(self.norm(self.conv(maps)))


class FitNet(Criterion):
    """Hint learning: mean((r(F_s) - F_t)^2) on one map, where r is the student's adapter.

    Reference: Romero et al., "FitNets: Hints for Thin Deep Nets" (arXiv 1412.6550), equation 3.

    Weight: 100 (RepDistiller; the MGD authors' script).

    Differs: one stage (the paper trains the hint first). The adapter is RepDistiller's, which the MGD authors use; its
    final ReLU cannot reach a teacher's negative values, for which use relu=False. RepDistiller's adapter depends on the
    height only, and is a convolution without padding for any larger student's map; here it depends on both axes, such a
    convolution reduces a side by up to 6 pixels, and other sizes are pooled or upsampled. RepDistiller's pairing of
    cifar_* networks, for all methods that follow it, is maps="mid", which recipes/cifar.py uses; maps="stages" includes
    the stem's map if no other map has its resolution. adapter=False is not the paper's.

    Args:
        pair: Shapes of both networks, with the same number of maps. Batches have 2 or more samples if the teacher's map
            has one position, because of BatchNorm.
        hint: Index of the tapped map, from 0. The default is the second one if there are several, which for cifar_*
            networks with maps="mid" is RepDistiller's.
        relu: End the adapter with a ReLU, as in RepDistiller.
        adapter: False compares channel by channel, as after --match-channels; the larger map is average-pooled.

    Raises:
        ValueError: A network has no maps, the numbers of maps differ, there is no map of that index, or channels differ
            without an adapter.
    """

    weight = 100.0
    needs = frozenset({"maps"})

    def __init__(self, pair: Pair, *, hint: int | None = None, relu: bool = True, adapter: bool = True) -> None:
        super().__init__(pair)
        maps = paired_maps("FitNet", pair)
        count = len(maps)
        self.hint = min(1, count - 1) if hint is None else hint
        if not 0 <= self.hint < count:
            raise ValueError(f"hint={hint}: {count} maps are tapped, choose 0 to {count - 1}.")
        (channels, *_), (theirs, *_) = maps[self.hint]
        if not adapter and channels != theirs:
            raise ValueError(
                f"adapter=False compares channel by channel: the student's map has {channels} channels, the teacher's "
                f"{theirs}. Match them (--match-channels 1000), or leave fitnet.adapter out."
            )
        self.adapter = HintAdapter(*maps[self.hint], relu=relu) if adapter else None

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Float[Tensor, ""]:
        """Return the loss, at least float32."""
        ours, theirs = student.maps[self.hint], teacher.maps[self.hint]
        ours, theirs = (self.adapter(ours), theirs) if self.adapter is not None else pool_larger(ours, theirs)
        return F.mse_loss(at_least_float32(ours), at_least_float32(theirs))
