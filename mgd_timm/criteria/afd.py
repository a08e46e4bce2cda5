"""AFD: attention-based feature distillation (Ji, Heo, Park 2021)."""

from collections.abc import Sequence
from itertools import product

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor, nn

from mgd_timm.criteria.adapters import check_positions, tapped_maps
from mgd_timm.criteria.at import energy, unit_energy
from mgd_timm.criteria.base import Criterion, at_least_float32
from mgd_timm.features import Batch, Features, Pair


def attended_difference(
    student: Sequence[Float[Tensor, "b _ _ _"]],
    teacher: Sequence[Float[Tensor, "b _ _ _"]],
    attention: Float[Tensor, "b t s"],
) -> Float[Tensor, ""]:
    """Return the mean squared difference of normalised energies at the teacher's size, weighted over student maps and
    summed over teacher maps."""
    energies = [energy(m) for m in student]
    pooled = {}
    for size in dict.fromkeys((m.shape[2], m.shape[3]) for m in teacher):
        resized = torch.cat([F.adaptive_avg_pool2d(one, size) for one in energies], dim=1)
        pooled[size] = unit_energy(resized)
    parts = []
    for index, m in enumerate(teacher):
        differences = (pooled[m.shape[2], m.shape[3]] - unit_energy(energy(m))).pow(2).mean(2)
        parts.append((attention[:, index] * differences).sum(1).mean())
    return torch.stack(parts).sum()


class AFD(Criterion):
    """Attention-based feature distillation: sum_t mean_b sum_s a(t, s) mean_hw (q(F_s) - q(F_t))^2, every map with
    every map.

    q = normalised mean over channels of F^2; the student's is average-pooled to the teacher's size. a = softmax over
    the student's maps of (query_t W_t key_s + p_t p_s) / sqrt(d), computed from the channel means of both: which map
    learns from which is learned.

    Reference: Ji, Heo, Park, "Show, Attend and Distill: Knowledge Distillation via Attention-based Feature Matching"
    (arXiv 2102.02973); official code clovaai/attention-feature-distillation (distill/AFD.py).

    Weight: 200 with kd at 0.9 and temperature 4 (official script), d = 128.

    Differs: same as the official code, which compares the maps of all blocks. This code compares the tapped maps, any
    number of each network, as maps are not paired; maps=all is nearest to the official code. If the student has one
    map, the attention is 1, and AFD is attention transfer (AT) from each of the teacher's maps. The attention is
    computed outside autocast. A map of a sample with a root mean square below 0.001 is not scaled up to unit norm: q
    and its gradient tend to 0 with it.

    Args:
        pair: Shapes of both networks, each with 1 or more maps. Any two have 2 or more positions at the smaller of both
            sizes. Batches have 2 or more samples because of BatchNorm.
        dim: d, the width of keys and queries, 1 or more.

    Raises:
        ValueError: A network has no maps, two maps have only one position in common, or dim is below 1.
    """

    weight = 200.0
    needs = frozenset({"maps"})

    def __init__(self, pair: Pair, *, dim: int = 128) -> None:
        super().__init__(pair)
        student, teacher = tapped_maps("AFD", pair)
        check_positions("AFD", product(student, teacher))
        if dim < 1:
            raise ValueError(f"dim={dim}: expected 1 or more.")
        self.dim = dim
        self.keys = nn.ModuleList(nn.Sequential(nn.Linear(m[0], dim), nn.BatchNorm1d(dim), nn.ReLU()) for m in student)
        self.queries = nn.ModuleList(nn.Sequential(nn.Linear(m[0], dim), nn.BatchNorm1d(dim)) for m in teacher)
        self.bilinear = nn.Sequential(nn.Linear(dim, dim * len(teacher)), nn.BatchNorm1d(dim * len(teacher)))
        self.student_positions = nn.Parameter(nn.init.xavier_normal_(torch.empty(len(student), dim)))
        self.teacher_positions = nn.Parameter(nn.init.xavier_normal_(torch.empty(len(teacher), dim)))

    def attention(
        self, student: Sequence[Float[Tensor, "b _ _ _"]], teacher: Sequence[Float[Tensor, "b _ _ _"]]
    ) -> Float[Tensor, "b t s"]:
        """Return how much each student map learns from each teacher map; the sum over student maps is 1."""
        keys = torch.stack([key(m.mean((2, 3))) for key, m in zip(self.keys, student, strict=True)], dim=1)
        queries = torch.stack([query(m.mean((2, 3))) for query, m in zip(self.queries, teacher, strict=True)], dim=1)
        keys = rearrange(self.bilinear(keys.flatten(0, 1)), "(b s) (t d) -> b s t d", s=len(student), t=len(teacher))
        positions = self.teacher_positions @ self.student_positions.T
        return torch.softmax((einsum(keys, queries, "b s t d, b t d -> b t s") + positions) / self.dim**0.5, dim=2)

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Float[Tensor, ""]:
        """Return the loss, at least float32."""
        ours, theirs = ([at_least_float32(m) for m in f.maps] for f in (student, teacher))
        with torch.autocast(ours[0].device.type, enabled=False):
            return attended_difference(ours, theirs, self.attention(ours, theirs))
