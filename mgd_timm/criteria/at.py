"""AT: attention transfer (Zagoruyko and Komodakis 2017)."""

from typing import ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from jaxtyping import Float
from torch import Tensor

from mgd_timm.criteria.adapters import check_positions, paired_maps, pool_larger
from mgd_timm.criteria.base import SMALLEST_RMS, Criterion, Need, at_least_float32, smallest_norm
from mgd_timm.features import Batch, Features, Pair


def attention(maps: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n"]:
    """Where a map is active: mean over channels of its squares, flattened, of unit L2 norm per sample."""
    energy = rearrange(reduce(maps.pow(2), "b c h w -> b h w", "mean"), "b h w -> b (h w)")
    return F.normalize(energy, dim=1, eps=SMALLEST_RMS * smallest_norm(energy.shape[1]))


def attention_transfer(student: Float[Tensor, "b c h w"], teacher: Float[Tensor, "b c2 h2 w2"]) -> Float[Tensor, ""]:
    """Mean squared difference of both attentions, the larger map average-pooled to the smaller one's size."""
    student, teacher = pool_larger(at_least_float32(student), at_least_float32(teacher))
    return (attention(student) - attention(teacher)).pow(2).mean()


class AT(Criterion):
    """Attention transfer: sum over map pairs of mean((q(F_s) - q(F_t))^2), q = normalised mean over channels of F^2.

    Reference: Zagoruyko, Komodakis, "Paying More Attention to Attention" (arXiv 1612.03928), equation 2; the official
    code squares and averages over all elements where the paper has a norm.

    Weight: 1000 (RepDistiller; the MGD authors' script).

    Differs: as the official code and RepDistiller. Maps of unequal size are pooled on both axes (there: square maps).
    RepDistiller's pairing of maps: see fitnet.

    Args:
        pair: Shapes of both networks; the numbers of maps must agree and be at least 1, with 2 positions or more in
            common.

    Raises:
        ValueError: No maps, a different number of maps on each side, or a pair of one position.
    """

    weight: ClassVar[float] = 1000.0
    needs: ClassVar[frozenset[Need]] = frozenset({"maps"})

    def __init__(self, pair: Pair) -> None:
        super().__init__(pair)
        check_positions("AT", paired_maps("AT", pair))

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Float[Tensor, ""]:
        """Scalar, at least float32."""
        pairs = zip(student.maps, teacher.maps, strict=True)
        return torch.stack([attention_transfer(s, t) for s, t in pairs]).sum()
