"""KD: soft targets (Hinton et al. 2015)."""

from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from mgd_timm.criteria.base import Criterion, Need, check_temperature, kl_divergence
from mgd_timm.features import Batch, Features, Pair


class KD(Criterion):
    """Knowledge distillation: T^2 KL(softmax(z_t / T) || softmax(z_s / T)).

    Reference: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network" (arXiv 1503.02531).

    Weight: 0.8 beside 0.2 of the task (the MGD authors' script; RepDistiller: 0.9 and 0.1).

    Differs: nothing.

    Args:
        pair: Shapes of both networks; the numbers of classes must agree.
        temperature: T > 0; 4 as in RepDistiller and the MGD authors' scripts.

    Raises:
        ValueError: floats of classes that differ, or a temperature that is not positive.
    """

    weight: ClassVar[float] = 0.8
    needs: ClassVar[frozenset[Need]] = frozenset({"logits"})

    def __init__(self, pair: Pair, *, temperature: float = 4.0) -> None:
        super().__init__(pair)
        if pair.student.num_classes != pair.teacher.num_classes:
            raise ValueError(
                f"KD needs one label space: the student has {pair.student.num_classes} classes, the teacher "
                f"{pair.teacher.num_classes}. Retrain the teacher's classifier for these classes (mgd-timm train) "
                "or use a criterion that needs no logits."
            )
        self.temperature = check_temperature(temperature)

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Float[Tensor, ""]:
        """Scalar divergence, at least float32."""
        return kl_divergence(student.logits, teacher.logits, self.temperature)
