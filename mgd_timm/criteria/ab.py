"""AB: activation boundaries (Heo et al. 2019)."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mgd_timm.criteria.adapters import paired_maps
from mgd_timm.criteria.base import Criterion, at_least_float32
from mgd_timm.criteria.fitnet import HintAdapter
from mgd_timm.features import Batch, Features, Pair


def activation_boundary(
    student: Float[Tensor, "b c h w"], teacher: Float[Tensor, "b c h w"], margin: float
) -> Float[Tensor, ""]:
    """Return the squared distance to the teacher's side of 0 plus a margin, summed over a sample's elements, mean over
    the batch."""
    values = at_least_float32(student)
    return torch.where(teacher > 0, margin - values, margin + values).relu().pow(2).sum() / len(values)


class AB(Criterion):
    """Activation boundaries: 3/1000 sum_i 2^(i-n+1) / B sum(relu(m - s)^2 where t > 0, relu(m + s)^2 elsewhere), i =
    0..n-1.

    t and s = r(F_s) are a map's values before its activation, r is the student's connector: the student learns which of
    the teacher's neurons are active. The student's backbone is pre-trained with this loss before the run, which then
    does not use it.

    Reference: Heo, Lee, Yun, Choi, "Knowledge Transfer via Distillation of Activation Boundaries Formed by Hidden
    Neurons" (arXiv 1811.03233), the piecewise differentiable loss; RepDistiller (distiller_zoo/AB.py, models/util.py).

    Weight: 1, as in RepDistiller's pre-training; its script also sets 1 and does not use the loss in the run. Margin 1,
    the factors 2^(i-n+1) and 3/1000 and 30 epochs at the run's learning rate are RepDistiller's too.

    Differs: same as RepDistiller, which has no connector if both maps have the same shape, and otherwise the
    convolution of its FitNet with BatchNorm. As in fitnet, where RepDistiller's pairing of maps is described, the
    adapter depends on both axes (there: height), a convolution without padding reduces a side by up to 6 pixels (there:
    any number), and other sizes are pooled or upsampled (there: an error).

    Args:
        pair: Shapes of both networks, with the same number of maps, 1 or more. Batches have 2 or more samples if a
            teacher's map has one position and the student's another shape, because of BatchNorm.
        margin: m > 0, how far from 0 a student's neuron should be.

    Raises:
        ValueError: A network has no maps, the numbers of maps differ, or the margin is out of range.
    """

    weight = 1.0
    needs = frozenset({"maps"})
    preact = True
    fits = "student"

    def __init__(self, pair: Pair, *, margin: float = 1.0) -> None:
        super().__init__(pair)
        if not 0 < margin < float("inf"):
            raise ValueError(f"margin={margin}: expected a positive, finite number.")
        self.margin = margin
        shapes = paired_maps("AB", pair)
        self.connectors = nn.ModuleList(nn.Identity() if s == t else HintAdapter(s, t, relu=False) for s, t in shapes)

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Float[Tensor, ""]:
        """Return the loss, at least float32."""
        count = len(self.connectors)
        triples = enumerate(zip(self.connectors, student.maps, teacher.maps, strict=True))
        parts = [
            2.0 ** (i - count + 1) * activation_boundary(connect(s), t, self.margin) for i, (connect, s, t) in triples
        ]
        return torch.stack(parts).sum() * 3 / 1000
