"""FitNet: hints from a middle layer (Romero et al. 2015)."""

from typing import ClassVar

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mgd_timm.criteria.adapters import paired_maps
from mgd_timm.criteria.base import Criterion, Need, at_least_float32
from mgd_timm.features import Batch, Features, Pair


class HintAdapter(nn.Module):
    """Convolution, BatchNorm and ReLU from the student's map to the teacher's channels and size.

    The convolution is 1x1 where sizes agree, 3x3 of stride 2 where the student's side is double, transposed 4x4 where
    it is half, a valid one where the student is larger by up to 6 pixels, and else 1x1 after an adaptive average pool
    (or bilinear upsampling).

    Args:
        student: (channels, height, width) of the student's map.
        teacher: The same of the teacher's map.
        relu: End in a ReLU.
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
        """The student's map in the teacher's shape."""
        if self.size is not None:
            shrinks = maps.shape[2] >= self.size[0] and maps.shape[3] >= self.size[1]
            maps = (
                F.adaptive_avg_pool2d(maps, self.size) if shrinks else F.interpolate(maps, self.size, mode="bilinear")
            )
        return self.activation(self.norm(self.conv(maps)))


class FitNet(Criterion):
    """Hint learning: mean((r(F_s) - F_t)^2) on one map, r the student's adapter.

    Reference: Romero et al., "FitNets: Hints for Thin Deep Nets" (arXiv 1412.6550), equation 3.

    Weight: 100 (RepDistiller; the MGD authors' script).

    Differs: one stage (the paper fits the hint first), adapter as in RepDistiller, which the MGD authors use; its final
    ReLU cannot reach a teacher's negative values, relu=False lifts that. RepDistiller goes by height alone and has a
    valid convolution for any larger student's map; here both axes count, a convolution takes off up to 6 pixels, and
    all else is pooled or upsampled. RepDistiller's pairing of cifar_* networks, for every method that follows it, is
    maps="mid", which recipes/cifar.py uses; under "stages" the stem's map counts where it has a resolution of its own.

    Args:
        pair: Shapes of both networks; the numbers of maps must agree. Batches of 2 or more where the teacher's map has
            one
            position: there is BatchNorm.
        hint: Which of the tapped maps, counted from 0; the second one where there are several, which for cifar_*
            networks is RepDistiller's under maps="mid".
        relu: End the adapter in a ReLU, as in RepDistiller.

    Raises:
        ValueError: A different number of maps on each side, or no map of that index.
    """

    weight: ClassVar[float] = 100.0
    needs: ClassVar[frozenset[Need]] = frozenset({"maps"})

    def __init__(self, pair: Pair, *, hint: int | None = None, relu: bool = True) -> None:
        super().__init__(pair)
        maps = paired_maps("FitNet", pair)
        count = len(maps)
        self.hint = min(1, count - 1) if hint is None else hint
        if not 0 <= self.hint < count:
            raise ValueError(f"hint={hint}: {count} maps are tapped, choose 0 to {count - 1}.")
        self.adapter = HintAdapter(*maps[self.hint], relu=relu)

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Float[Tensor, ""]:
        """Scalar, at least float32."""
        adapted = self.adapter(student.maps[self.hint])
        return F.mse_loss(at_least_float32(adapted), at_least_float32(teacher.maps[self.hint]))
