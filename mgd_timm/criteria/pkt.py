"""PKT: probabilistic knowledge transfer (Passalis and Tefas 2018)."""

from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from mgd_timm.criteria.base import Criterion, Need, at_least_float32, smallest_norm
from mgd_timm.features import Batch, Features

EPS = 1e-7  # of the authors' code


def neighbours(embedding: Float[Tensor, "b d"]) -> Float[Tensor, "b b"]:
    """How likely each sample is to pick each other one, itself among them: cosine similarities in [0, 1], rows of sum
    1."""
    # vector_norm has a gradient at 0 (of 0), which the root of a sum of squares has not.
    norms = torch.linalg.vector_norm(embedding, dim=1, keepdim=True) + EPS
    unit = embedding / norms.clamp_min(smallest_norm(embedding.shape[1]))
    similarity = (unit @ unit.T + 1) / 2
    return similarity / similarity.sum(1, keepdim=True)


def probabilistic_transfer(student: Float[Tensor, "b d"], teacher: Float[Tensor, "b d2"]) -> Float[Tensor, ""]:
    """Mean over all b^2 pairs of p_t log((p_t + eps) / (p_s + eps))."""
    with torch.autocast(student.device.type, enabled=False):
        one, two = neighbours(at_least_float32(student)), neighbours(at_least_float32(teacher))
        return (two * ((two + EPS) / (one + EPS)).log()).mean()


class PKT(Criterion):
    """Probabilistic transfer: mean of p_t log(p_t / p_s), p(j | i) = (1 + cos(e_i, e_j)) / 2 over its sum over j.

    Compares the samples of a batch: under several processes it sees the local batch.

    Reference: Passalis, Tefas, "Learning Deep Representations with Probabilistic Knowledge Transfer" (arXiv
    1803.10837), section 3.

    Weight: 30000 (RepDistiller).

    Differs: the paper leaves j = i out of p(j | i) (from memory of it); the authors' code, RepDistiller and we keep it,
    and all average over pairs, which explains the size of the weight.

    Args:
        pair: Shapes of both networks; any embeddings.
    """

    weight: ClassVar[float] = 30000.0
    needs: ClassVar[frozenset[Need]] = frozenset({"embedding"})
    relational: ClassVar[bool] = True

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Float[Tensor, ""]:
        """Scalar, at least float32."""
        return probabilistic_transfer(student.embedding, teacher.embedding)
