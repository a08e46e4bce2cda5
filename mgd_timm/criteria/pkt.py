"""PKT: probabilistic knowledge transfer (Passalis and Tefas 2018)."""

import torch
from jaxtyping import Float
from torch import Tensor

from mgd_timm.criteria.base import Criterion, at_least_float32, smallest_norm
from mgd_timm.features import Batch, Features

EPS = 1e-7  # of the authors' code


def neighbours(embedding: Float[Tensor, "b d"]) -> Float[Tensor, "b b"]:
    """Return the probability that each sample picks each sample, itself included: (1 + cosine) / 2, rows of sum 1.

    The root mean square of an embedding counts as at least 0.001.
    """
    # vector_norm has gradient 0 at 0; that of the root of a sum of squares is nan.
    norms = torch.linalg.vector_norm(embedding, dim=1, keepdim=True) + EPS
    unit = embedding / norms.clamp_min(smallest_norm(embedding.shape[1]))
    similarity = (unit @ unit.T + 1) / 2
    return similarity / similarity.sum(1, keepdim=True)


def probabilistic_transfer(student: Float[Tensor, "b d"], teacher: Float[Tensor, "b d2"]) -> Float[Tensor, ""]:
    """Return the mean over all b^2 pairs of p_t log((p_t + eps) / (p_s + eps))."""
    with torch.autocast(student.device.type, enabled=False):
        one, two = neighbours(at_least_float32(student)), neighbours(at_least_float32(teacher))
        return (two * ((two + EPS) / (one + EPS)).log()).mean()


class PKT(Criterion):
    """Probabilistic transfer: mean of p_t log(p_t / p_s), p(j | i) = (1 + cos(e_i, e_j)) / 2 over its sum over j.

    It compares the samples of a batch: with several processes, each process uses its local batch.

    Reference: Passalis, Tefas, "Learning Deep Representations with Probabilistic Knowledge Transfer" (arXiv
    1803.10837), section 3.

    Weight: 30000 (RepDistiller).

    Differs: the paper (from memory) excludes j = i from p(j | i); the authors' code, RepDistiller and this code include
    it, and average over pairs, hence the large weight. An embedding with a root mean square below 0.001 is not scaled
    up to unit norm: its cosines and gradient tend to 0 with it.

    Args:
        pair: Shapes of both networks, with embeddings of any width.
    """

    weight = 30000.0
    needs = frozenset({"embedding"})
    relational = True

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Float[Tensor, ""]:
        """Return the loss, at least float32."""
        return probabilistic_transfer(student.embedding, teacher.embedding)
