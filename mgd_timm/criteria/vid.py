"""VID: variational information distillation (Ahn et al. 2019)."""

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mgd_timm.criteria.adapters import paired_maps, pool_larger
from mgd_timm.criteria.base import Criterion, at_least_float32
from mgd_timm.features import Batch, Features, Pair

SMALLEST = 1e-5  # lower bound of the variance of a channel


def variational_loss(
    mean: Float[Tensor, "b c h w"], target: Float[Tensor, "b c h w"], rho: Float[Tensor, " c"]
) -> Float[Tensor, ""]:
    """Return the mean of ((target - mean)^2 / s2 + log s2) / 2, with the channel's variance s2 = softplus(rho) +
    1e-5."""
    variance = (F.softplus(at_least_float32(rho)) + SMALLEST)[:, None, None]
    return 0.5 * ((at_least_float32(mean) - at_least_float32(target)).pow(2) / variance + variance.log()).mean()


class Conditional(nn.Module):
    """Gaussian of a teacher's map given the student's: three 1x1 convolutions compute the mean, and each channel has a
    learned `rho`."""

    def __init__(self, student_channels: int, teacher_channels: int, variance: float) -> None:
        super().__init__()
        widths = (student_channels, teacher_channels, teacher_channels, teacher_channels)
        one, two, three = (nn.Conv2d(i, o, 1, bias=False) for i, o in pairwise(widths))
        self.mean = nn.Sequential(one, nn.ReLU(), two, nn.ReLU(), three)
        start = variance - SMALLEST
        inverse_softplus = start + math.log(-math.expm1(-start))
        self.rho = nn.Parameter(torch.full((teacher_channels,), inverse_softplus))

    def forward(self, student: Float[Tensor, "b c h w"], teacher: Float[Tensor, "b c2 h2 w2"]) -> Float[Tensor, ""]:
        """Return the negative log-likelihood of the teacher's map. The larger map is average-pooled to the smaller
        size."""
        student, teacher = pool_larger(student, teacher)
        return variational_loss(self.mean(student), teacher, self.rho)


class VID(Criterion):
    """Variational information distillation: sum over map pairs of mean(((F_t - mu(F_s))^2 / s^2 + log s^2) / 2).

    mu is a small network of 1x1 convolutions, s^2 = softplus(rho) + 1e-5 is a learned variance per channel of the
    teacher. The loss is the negative of a lower bound of the mutual information of both maps. It can be negative.

    Reference: Ahn, Hu, Damianou, Lawrence, Dai, "Variational Information Distillation for Knowledge Transfer" (arXiv
    1904.05835), the Gaussian model of the teacher's maps; RepDistiller (distiller_zoo/VID.py).

    Weight: 1 (RepDistiller's script; the MGD authors').

    Differs: same as RepDistiller, whose loss is from the authors' code: mu has no BatchNorm and the teacher's number of
    hidden channels, and the loss is a mean over all elements where the paper (from memory) has a sum. Maps of different
    sizes are pooled on both axes (there: square maps). For RepDistiller's pairing of maps see fitnet.

    Args:
        pair: Shapes of both networks, with the same number of maps, 1 or more.
        variance: Initial value of all s^2, above 1e-5.

    Raises:
        ValueError: A network has no maps, the numbers of maps differ, or the variance is out of range.
    """

    weight = 1.0
    needs = frozenset({"maps"})

    def __init__(self, pair: Pair, *, variance: float = 5.0) -> None:
        super().__init__(pair)
        if not SMALLEST < variance < float("inf"):
            raise ValueError(f"variance={variance}: expected a finite number above {SMALLEST}.")
        self.conditionals = nn.ModuleList(Conditional(s[0], t[0], variance) for s, t in paired_maps("VID", pair))

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Float[Tensor, ""]:
        """Return the loss, at least float32."""
        pairs = zip(self.conditionals, student.maps, teacher.maps, strict=True)
        return torch.stack([conditional(s, t) for conditional, s, t in pairs]).sum()
