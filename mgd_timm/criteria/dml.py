"""DML: deep mutual learning (Zhang et al. 2018)."""

from jaxtyping import Float
from torch import Tensor

from mgd_timm.criteria.base import Criterion, check_one_label_space, kl_divergence
from mgd_timm.features import Batch, Features, Pair


class DML(Criterion):
    """Mutual learning: KL(p_2 || p_1) of a student from the other one, T = 1. No gradient flows to the other one.

    Reference: Zhang et al., "Deep Mutual Learning" (arXiv 1706.00384), the losses of two networks.

    Weight: 1 with 1 for the task loss, for each of the two (paper; the MGD authors' script).

    Differs: same as the paper, mean over the batch. The MGD authors' code averages over batch and classes
    (element_mean=True), which is weaker by the number of classes: 100 on CIFAR-100. element_mean concerns only the
    logits: the losses of the granularities are means over the batch.

    Args:
        pair: Shapes of both students, the other one as teacher, with the same number of classes.
        element_mean: Also divide the divergence by the number of classes, as the MGD authors do.

    Raises:
        ValueError: The networks have different numbers of classes.
    """

    weight = 1.0
    needs = frozenset({"logits"})
    peers = True
    note = "beside a teacher: inspired by arXiv 2511.18826; constants ours"

    def __init__(self, pair: Pair, *, element_mean: bool = False) -> None:
        super().__init__(pair)
        check_one_label_space("DML", pair)
        self.share = pair.student.num_classes if element_mean else 1

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Float[Tensor, ""]:
        """Return the loss, at least float32."""
        return kl_divergence(student.logits, teacher.logits.detach(), 1.0) / self.share
