"""CE: cross-entropy with the labels, the loss of the task."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from mgd_timm.criteria.base import Criterion, at_least_float32, convert_soft_labels
from mgd_timm.features import Batch, Features, Pair


class CrossEntropy(Criterion):
    """The task: cross-entropy of the student's logits with class ids or distributions over classes, mean over the
    batch.

    -1/B sum_b sum_k y(b, k) log softmax(z_s)(b, k). The teacher is not used.

    Weight: 1, and 0.2 if kd is the only other term (the MGD authors' script).

    Args:
        pair: Shapes of both networks.
        smoothing: Label smoothing in [0, 1): y becomes (1 - smoothing) y + smoothing / K.

    Raises:
        ValueError: smoothing is outside [0, 1).
    """

    weight = 1.0
    needs = frozenset()

    def __init__(self, pair: Pair, *, smoothing: float = 0.0) -> None:
        super().__init__(pair)
        if not 0 <= smoothing < 1:
            raise ValueError(f"smoothing={smoothing}: expected 0 <= smoothing < 1.")
        self.smoothing = smoothing

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Float[Tensor, ""]:
        """Return the loss, at least float32."""
        logits = at_least_float32(student.logits)
        labels = convert_soft_labels(batch.labels, logits.dtype)
        return F.cross_entropy(logits, labels, label_smoothing=self.smoothing)
