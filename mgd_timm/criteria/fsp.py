"""FSP: flow of the solution procedure (Yim et al. 2017)."""

from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mgd_timm.criteria.adapters import ChannelAdapter, paired_maps, pool_larger
from mgd_timm.criteria.base import Criterion, at_least_float32
from mgd_timm.features import Batch, Features, Pair


def flow(lower: Float[Tensor, "b c h w"], upper: Float[Tensor, "b c2 h2 w2"]) -> Float[Tensor, "b c2 c"]:
    """Return the products of all channels of two maps of one network, mean over positions. The larger map is
    average-pooled."""
    lower, upper = pool_larger(at_least_float32(lower), at_least_float32(upper))
    with torch.autocast(lower.device.type, enabled=False):
        return upper.flatten(2) @ lower.flatten(2).mT / (lower.shape[2] * lower.shape[3])


class FSP(Criterion):
    """Flow of the solution procedure: sum over neighbouring maps of mean((G(F_s,i, F_s,i+1) - G(F_t,i, F_t,i+1))^2).

    G is the matrix of products of the channels of two maps, mean over positions. The student's backbone is pre-trained
    with this loss before the run, which then does not use it.

    Reference: Yim, Joo, Bae, Kim, "A Gift from Knowledge Distillation: Fast Optimization, Network Minimization and
    Transfer Learning" (CVPR 2017), the FSP matrix and its loss; RepDistiller (distiller_zoo/FSP.py).

    Weight: 1, as in RepDistiller's pre-training; its script sets 50 and does not use the loss in the run. Pre-training
    has 30 epochs at the run's learning rate.

    Differs: RepDistiller includes the stem's map (3 matrices for its resnets): use maps="all" for this. The paper and
    RepDistiller need equal channels; here a 1x1 convolution and BatchNorm adapt the student's map if they differ. The
    larger of two neighbours is average-pooled as in RepDistiller (the paper, from memory: max-pooled), on both axes. G
    is a matrix product; RepDistiller's broadcast keeps all products in memory.

    Args:
        pair: Shapes of both networks, with the same number of maps, 2 or more. Batches have 2 or more samples if a
            student's map has one position and other channels than the teacher's, because of BatchNorm.

    Raises:
        ValueError: There are fewer than 2 maps, or the numbers of maps differ.
    """

    weight = 1.0
    needs = frozenset({"maps"})
    fits = "student"

    def __init__(self, pair: Pair) -> None:
        super().__init__(pair)
        shapes = paired_maps("FSP", pair, fewest=2)
        self.adapters = nn.ModuleList(ChannelAdapter(s[0], t[0]) for s, t in shapes)

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Float[Tensor, ""]:
        """Return the loss, at least float32."""
        adapted = [adapter(m) for adapter, m in zip(self.adapters, student.maps, strict=True)]
        steps = zip(pairwise(adapted), pairwise(teacher.maps), strict=True)
        return torch.stack([(flow(*s) - flow(*t)).pow(2).mean() for s, t in steps]).sum()
