"""RKD: relational knowledge distillation (Park et al. 2019)."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from mgd_timm.criteria.base import Criterion, at_least_float32, check_parts, smallest_norm
from mgd_timm.features import Batch, Features, Pair


def squared_distances(embedding: Float[Tensor, "b d"]) -> Float[Tensor, "b b"]:
    """Return the squared Euclidean distances between all samples.

    |a|^2 + |b|^2 - 2 <a, b>, computed in float64: in float32 the distance of two samples that are 1e-3 of the spread
    apart is lost in rounding. MPS has no float64.
    """
    wide = embedding if embedding.device.type == "mps" else embedding.double()
    centred = wide - wide.mean(0)
    norms = centred.square().sum(1)  # not the diagonal, whose gradient inductor gets wrong here (torch 2.15 on CPUs)
    return (norms[:, None] + norms - 2 * (centred @ centred.T)).to(embedding.dtype)


def relations(embedding: Float[Tensor, "b d"]) -> tuple[Float[Tensor, "b b"], Float[Tensor, "b b b"]]:
    """Return distances divided by their mean, and cosines of the angles at k between i and j, as [k, i, j].

    The mean is over pairs of different samples, and at least that of embeddings with a root mean square of 0.001. The
    cosine's directions e_i - e_k are divided by their length, or by 1e-4 of the mean distance (or of sqrt(dims)) if
    that is larger.

    <e_i - e_k, e_j - e_k> = (|e_k - e_i|^2 + |e_k - e_j|^2 - |e_i - e_j|^2) / 2, so that no b x b x d tensor is needed.
    """
    count, dims = embedding.shape
    squares = squared_distances(embedding)
    different = 1 - torch.eye(count, dtype=squares.dtype, device=squares.device)
    distances = squares.clamp(min=1e-12).sqrt() * different
    mean = distances.sum() / max(count * (count - 1), 1)
    smallest = 1e-4 * mean.clamp(min=dims**0.5)
    inverse = different * torch.maximum(squares, smallest.square()).rsqrt()
    inner = squares[:, :, None] + squares[:, None, :] - squares
    return distances / mean.clamp(min=smallest_norm(dims)), inner * (inverse / 2)[:, :, None] * inverse[:, None, :]


class RKD(Criterion):
    """Relational knowledge distillation: w_d Huber(distances of s, t) + w_a Huber(angles of s, t) between the samples
    of a batch.

    Distances are Euclidean and divided by their mean in each network; angles are cosines at each sample between any two
    others; Huber is smooth L1 with threshold 1, mean over all pairs and triples. It compares the samples of a batch:
    with several processes, each process uses its local batch.

    Reference: Park, Kim, Lu, Cho, "Relational Knowledge Distillation" (arXiv 1904.05068), section 3.2.

    Weight: 1 (RepDistiller), with w_d = 25 and w_a = 50 inside (RepDistiller; the authors' example uses the same ratio,
    1 to 2).

    Differs: same mathematics, but distances and cosines are computed from inner products, with tensors of b^3 elements
    instead of b^2 d: 0.54 GB each in float32 at b = 512, 0.07 GB at 256. The inner products, b^2 of them, are in
    float64 and the tensors of b^3 elements in float32: two samples that are 1e-3 of the spread apart have gradients
    with an error of about 1e-4 to 4e-4 (RepDistiller: 1e-6). Samples less than 1e-4 of the mean distance (or of
    sqrt(dims), if larger) apart have bounded gradients, where those of RepDistiller grow to 1e12; the same holds for
    distances if all embeddings are nearly equal.

    Args:
        pair: Shapes of both networks, with embeddings of any width.
        distance_weight: w_d, 0 or more.
        angle_weight: w_a, 0 or more.

    Raises:
        ValueError: A weight is negative or not finite, or both are 0.
    """

    weight = 1.0
    needs = frozenset({"embedding"})
    relational = True

    def __init__(self, pair: Pair, *, distance_weight: float = 25.0, angle_weight: float = 50.0) -> None:
        super().__init__(pair)
        self.distance_weight, self.angle_weight = check_parts(
            distance_weight=distance_weight, angle_weight=angle_weight
        )

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Float[Tensor, ""]:
        """Return the loss, at least float32."""
        with torch.autocast(student.embedding.device.type, enabled=False):
            distances, angles = relations(at_least_float32(student.embedding))
            distances_t, angles_t = relations(at_least_float32(teacher.embedding))
            far, wide = F.smooth_l1_loss(distances, distances_t), F.smooth_l1_loss(angles, angles_t)
        return self.distance_weight * far + self.angle_weight * wide
