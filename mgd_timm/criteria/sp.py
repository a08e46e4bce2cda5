"""SP: similarity-preserving distillation (Tung and Mori 2019)."""

import torch
from jaxtyping import Float
from torch import Tensor

from mgd_timm.criteria.adapters import tapped_maps
from mgd_timm.criteria.base import Criterion, at_least_float32, smallest_norm
from mgd_timm.features import Batch, Features, Pair


def similarity(maps: Float[Tensor, "b c h w"]) -> Float[Tensor, "b b"]:
    """Return the inner products of all samples' flattened maps, each row with unit L2 norm.

    The smallest norm of a row is that of a sample with a root mean square of 0.001 beside samples of typical norm.
    """
    flat = maps.flatten(1)
    products = flat @ flat.T
    smallest = smallest_norm(flat.shape[1])
    typical = (flat.square().sum() / len(flat)).clamp_min(smallest**2).sqrt()
    norms = torch.linalg.vector_norm(products, dim=1, keepdim=True)
    return products / torch.maximum(norms, smallest * typical)


def similarity_preserving(student: Float[Tensor, "b c h w"], teacher: Float[Tensor, "b c2 h2 w2"]) -> Float[Tensor, ""]:
    """Return the mean squared difference of both similarity matrices. Channels and sizes may differ."""
    # In half precision the Gram matrix overflows, and similar rows become equal.
    with torch.autocast(student.device.type, enabled=False):
        return (similarity(at_least_float32(student)) - similarity(at_least_float32(teacher))).pow(2).mean()


class SP(Criterion):
    """Similarity preserving: ||G_t - G_s||_F^2 / b^2 on the last maps, G = Q Q^T with rows of unit norm, Q the
    flattened maps.

    It compares the samples of a batch: with several processes, each process uses its local batch.

    Reference: Tung, Mori, "Similarity-Preserving Knowledge Distillation" (arXiv 1907.09682), section 3.

    Weight: 3000 (RepDistiller; the MGD authors' script).

    Differs: the paper sums over several layers; RepDistiller, the MGD authors and this code use the last map of each
    network. A row of G is not scaled up to unit norm if the sample's map is nearly zero (root mean square below 0.001):
    the row and its gradient tend to 0 with the map.

    Args:
        pair: Shapes of both networks, each with 1 or more maps. The last one is used.

    Raises:
        ValueError: A network has no maps.
    """

    weight = 3000.0
    needs = frozenset({"maps"})
    relational = True

    def __init__(self, pair: Pair) -> None:
        super().__init__(pair)
        tapped_maps("SP", pair)

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Float[Tensor, ""]:
        """Return the loss, at least float32."""
        return similarity_preserving(student.maps[-1], teacher.maps[-1])
