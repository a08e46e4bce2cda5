"""NST: neuron selectivity transfer (Huang and Wang 2017)."""

from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from mgd_timm.criteria.adapters import check_positions, paired_maps, pool_larger
from mgd_timm.criteria.base import Criterion, Need, at_least_float32, smallest_norm
from mgd_timm.features import Batch, Features, Pair


def selectivity(maps: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c n"]:
    """Where each channel is active: its flattened map of unit L2 norm."""
    flat = maps.flatten(2)
    return F.normalize(flat, dim=2, eps=smallest_norm(flat.shape[2]))


def neuron_selectivity(student: Float[Tensor, "b c h w"], teacher: Float[Tensor, "b c2 h2 w2"]) -> Float[Tensor, ""]:
    """Squared maximum mean discrepancy of both networks' channels under (a . b)^2, mean over the batch.

    mean k(t, t) + mean k(s, s) - 2 mean k(s, t) is also || S^T S / c_s - T^T T / c_t ||_F^2: whichever products are
    smaller are made, those of channels or those of positions.
    """
    with torch.autocast(student.device.type, enabled=False):
        student, teacher = pool_larger(at_least_float32(student), at_least_float32(teacher))
        (_, c_s, height, width), c_t = student.shape, teacher.shape[1]
        if height * width * (c_s + c_t) <= c_s**2 + c_t**2 + c_s * c_t:
            one, two = selectivity(student), selectivity(teacher)
            return (one.mT @ one / c_s - two.mT @ two / c_t).pow(2).sum((1, 2)).mean()
        # Products first, norms afterwards: c x c numbers to divide instead of c x h x w.
        one, two = student.flatten(2), teacher.flatten(2)
        smallest = smallest_norm(height * width)
        norm_s, norm_t = (torch.linalg.vector_norm(m, dim=2).clamp_min(smallest) for m in (one, two))
        return (
            _kernel(two, norm_t, two, norm_t)
            + _kernel(one, norm_s, one, norm_s)
            - 2 * _kernel(one, norm_s, two, norm_t)
        )


def _kernel(
    one: Float[Tensor, "b c n"],
    norm: Float[Tensor, "b c"],
    other: Float[Tensor, "b c2 n"],
    other_norm: Float[Tensor, "b c2"],
) -> Float[Tensor, ""]:
    """Mean of (a . b)^2 over all pairs of two networks' channels of unit norm."""
    return (one @ other.mT / (norm[:, :, None] * other_norm[:, None])).pow(2).mean()


class NST(Criterion):
    """Neuron selectivity transfer: sum over maps of mean k(f_t, f_t) + mean k(f_s, f_s) - 2 mean k(f_s, f_t), k(a, b) =
    (a . b)^2.

    f are all channels of a map, each flattened and of unit norm: a maximum mean discrepancy (MMD) within every sample.

    Reference: Huang, Wang, "Like What You Like: Knowledge Distill via Neuron Selectivity Transfer" (arXiv 1707.01219),
    section 4.

    Weight: 50 (RepDistiller).

    Differs: as RepDistiller, from which only the way to compute it differs: matrix products of b x c x c or b x hw x hw
    numbers, where its broadcast has b x c x c x hw. Maps of unequal size are pooled on both axes (there: square maps).
    RepDistiller's pairing of maps: see fitnet.

    Args:
        pair: Shapes of both networks; the numbers of maps must agree and be at least 1, with 2 positions or more in
            common.

    Raises:
        ValueError: No maps, a different number of maps on each side, or a pair of one position.
    """

    weight: ClassVar[float] = 50.0
    needs: ClassVar[frozenset[Need]] = frozenset({"maps"})

    def __init__(self, pair: Pair) -> None:
        super().__init__(pair)
        check_positions("NST", paired_maps("NST", pair))

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Float[Tensor, ""]:
        """Scalar, at least float32."""
        pairs = zip(student.maps, teacher.maps, strict=True)
        return torch.stack([neuron_selectivity(s, t) for s, t in pairs]).sum()
