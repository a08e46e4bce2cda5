"""NST: neuron selectivity transfer (Huang and Wang 2017)."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from mgd_timm.criteria.adapters import check_positions, paired_maps, pool_larger
from mgd_timm.criteria.base import Criterion, at_least_float32, smallest_norm
from mgd_timm.features import Batch, Features, Pair


def selectivity(maps: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c n"]:
    """Return where each channel is active: its flattened map with unit L2 norm.

    The root mean square of a channel counts as at least 0.001.
    """
    flat = maps.flatten(2)
    return F.normalize(flat, dim=2, eps=smallest_norm(flat.shape[2]))


def neuron_selectivity(student: Float[Tensor, "b c h w"], teacher: Float[Tensor, "b c2 h2 w2"]) -> Float[Tensor, ""]:
    """Return the squared maximum mean discrepancy of both networks' channels under k(a, b) = (a . b)^2, mean over the
    batch.

    mean k(t, t) + mean k(s, s) - 2 mean k(s, t) is equal to || S^T S / c_s - T^T T / c_t ||_F^2. The smaller products
    are computed, those of channels or those of positions.
    """
    with torch.autocast(student.device.type, enabled=False):
        student, teacher = pool_larger(at_least_float32(student), at_least_float32(teacher))
        (_, c_s, height, width), c_t = student.shape, teacher.shape[1]
        if height * width * (c_s + c_t) <= c_s**2 + c_t**2 + c_s * c_t:
            one, two = selectivity(student), selectivity(teacher)
            return (one.mT @ one / c_s - two.mT @ two / c_t).pow(2).sum((1, 2)).mean()
        # Divide the products by the norms: they have c x c elements, the maps c x h x w.
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
    """Return the mean of (a . b)^2 over all pairs of two networks' channels of unit norm."""
    return (one @ other.mT / (norm[:, :, None] * other_norm[:, None])).pow(2).mean()


class NST(Criterion):
    """Neuron selectivity transfer: sum over maps of mean k(f_t, f_t) + mean k(f_s, f_s) - 2 mean k(f_s, f_t), k(a, b) =
    (a . b)^2.

    f are all channels of a map, each flattened and of unit norm: a maximum mean discrepancy (MMD) within each sample.

    Reference: Huang, Wang, "Like What You Like: Knowledge Distill via Neuron Selectivity Transfer" (arXiv 1707.01219),
    section 4.

    Weight: 50 (RepDistiller).

    Differs: same values as RepDistiller, but computed by matrix products with b x c x c or b x hw x hw elements, where
    its broadcast has b x c x c x hw. A channel of a sample with a root mean square below 0.001 is not scaled up to unit
    norm (there: any channel above 1e-12 is): its products and gradient tend to 0 with it. Maps of different sizes are
    pooled on both axes (there: square maps). For RepDistiller's pairing of maps see fitnet.

    Args:
        pair: Shapes of both networks, with the same number of maps, 1 or more. Each pair has 2 or more positions at the
            smaller of both sizes.

    Raises:
        ValueError: A network has no maps, the numbers of maps differ, or a pair has only one position in common.
    """

    weight = 50.0
    needs = frozenset({"maps"})

    def __init__(self, pair: Pair) -> None:
        super().__init__(pair)
        check_positions("NST", paired_maps("NST", pair))

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Float[Tensor, ""]:
        """Return the loss, at least float32."""
        pairs = zip(student.maps, teacher.maps, strict=True)
        return torch.stack([neuron_selectivity(s, t) for s, t in pairs]).sum()
