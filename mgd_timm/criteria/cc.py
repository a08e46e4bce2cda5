"""CC: correlation congruence (Peng et al. 2019)."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mgd_timm.criteria.base import Criterion, at_least_float32
from mgd_timm.features import Batch, Features, Pair


def correlation_congruence(student: Float[Tensor, "b d"], teacher: Float[Tensor, "b d"]) -> Float[Tensor, ""]:
    """Return the mean over neighbours in the batch of <|s_i - t_i|, |s_(i+1) - t_(i+1)|>, 0 for a batch of one."""
    delta = (student - teacher).abs()
    return (delta[:-1] * delta[1:]).sum() / max(len(delta) - 1, 1)


class CC(Criterion):
    """Correlation congruence: mean over i of <d_i, d_(i+1)>, d_i = |W_s e_s,i - W_t e_t,i|, i and i+1 being neighbours
    in the batch.

    It compares the samples of a batch in their order: with several processes, each process uses its local batch.

    Reference: Peng et al., "Correlation Congruence for Knowledge Distillation" (arXiv 1904.01802), section 3, in
    RepDistiller's form, which is from the first author.

    Weight: 0.02 (RepDistiller), with embeddings of 128 dims.

    Differs: same as RepDistiller. The paper (from memory) uses a Gaussian kernel's Taylor expansion between all samples
    of a batch. Both linear layers are trained, as in RepDistiller: the teacher's can make the task easier for the
    student.

    Args:
        pair: Shapes of both networks, with embeddings of any width.
        dim: Width of the common space, 1 or more.

    Raises:
        ValueError: dim is below 1.
    """

    weight = 0.02
    needs = frozenset({"embedding"})
    relational = True

    def __init__(self, pair: Pair, *, dim: int = 128) -> None:
        super().__init__(pair)
        if dim < 1:
            raise ValueError(f"dim={dim}: expected 1 or more; 128 is RepDistiller's.")
        self.student_embed = nn.Linear(pair.student.embed_dim, dim)
        self.teacher_embed = nn.Linear(pair.teacher.embed_dim, dim)

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Float[Tensor, ""]:
        """Return the loss, at least float32."""
        with torch.autocast(student.embedding.device.type, enabled=False):
            one = self.student_embed(at_least_float32(student.embedding))
            two = self.teacher_embed(at_least_float32(teacher.embedding))
            return correlation_congruence(one, two)
