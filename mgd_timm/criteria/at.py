"""AT: attention transfer (Zagoruyko and Komodakis 2017)."""

import torch
import torch.nn.functional as F
from einops import reduce
from jaxtyping import Float
from torch import Tensor

from mgd_timm.criteria.adapters import check_positions, paired_maps, pool_larger
from mgd_timm.criteria.base import SMALLEST_RMS, Criterion, at_least_float32, smallest_norm
from mgd_timm.features import Batch, Features, Pair


def energy(maps: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 1 h w"]:
    """Return the mean over channels of the squares."""
    return reduce(maps.pow(2), "b c h w -> b 1 h w", "mean")


def unit_energy(energies: Float[Tensor, "b m h w"]) -> Float[Tensor, "b m n"]:
    """Flatten energies over positions and divide them by their L2 norm.

    The root mean square of a map counts as at least 0.001.
    """
    smallest = SMALLEST_RMS * smallest_norm(energies.shape[2] * energies.shape[3])
    return F.normalize(energies.flatten(2), dim=2, eps=smallest)


def attention(maps: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n"]:
    """Return where a map is active: its energy with unit L2 norm per sample."""
    return unit_energy(energy(maps)).squeeze(1)


def attention_transfer(student: Float[Tensor, "b c h w"], teacher: Float[Tensor, "b c2 h2 w2"]) -> Float[Tensor, ""]:
    """Return the mean squared difference of both attentions. The larger map is average-pooled to the smaller size."""
    student, teacher = pool_larger(at_least_float32(student), at_least_float32(teacher))
    return (attention(student) - attention(teacher)).pow(2).mean()


class AT(Criterion):
    """Attention transfer: sum over map pairs of mean((q(F_s) - q(F_t))^2), q = normalised mean over channels of F^2.

    Reference: Zagoruyko, Komodakis, "Paying More Attention to Attention" (arXiv 1612.03928), equation 2. The official
    code averages squares over all elements where the paper has a norm.

    Weight: 1000 (RepDistiller; the MGD authors' script).

    Differs: same as the official code and RepDistiller, but a map of a sample with a root mean square below 0.001 is
    not scaled up to unit norm: its attention and gradient tend to 0 with it. Maps of different sizes are pooled on both
    axes (there: square maps). For RepDistiller's pairing of maps see fitnet.

    Args:
        pair: Shapes of both networks, with the same number of maps, 1 or more. Each pair has 2 or more positions at the
            smaller of both sizes.

    Raises:
        ValueError: A network has no maps, the numbers of maps differ, or a pair has only one position in common.
    """

    weight = 1000.0
    needs = frozenset({"maps"})

    def __init__(self, pair: Pair) -> None:
        super().__init__(pair)
        check_positions("AT", paired_maps("AT", pair))

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Float[Tensor, ""]:
        """Return the loss, at least float32."""
        pairs = zip(student.maps, teacher.maps, strict=True)
        return torch.stack([attention_transfer(s, t) for s, t in pairs]).sum()
