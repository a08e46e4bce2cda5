"""Calibration: how far a network's confidence is from its accuracy.

Reference: Guo, Pleiss, Sun, Weinberger, "On Calibration of Modern Neural Networks" (ICML 2017), equation 3, with 15
bins of equal width.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

BINS = 15


@dataclass(frozen=True)
class Calibration:
    """Predictions by confidence, the largest probability, in bins (i / 15, (i + 1) / 15].

    Args:
        share: Of the images, in each bin.
        confidence: Mean in each bin, in [0, 1]; 0 in an empty one.
        accuracy: Of each bin, in [0, 1]; 0 in an empty one.
    """

    share: tuple[float, ...]
    confidence: tuple[float, ...]
    accuracy: tuple[float, ...]

    @property
    def error(self) -> float:
        """The expected calibration error, in [0, 1]: the mean over images of their bin's |accuracy - confidence|."""
        rows = zip(self.share, self.accuracy, self.confidence, strict=True)
        return sum(share * abs(accuracy - confidence) for share, accuracy, confidence in rows)


def measure_calibration(logits: Float[Tensor, "n k"], labels: Int[Tensor, " n"]) -> Calibration:
    """Return the calibration of logits."""
    confidence, predicted = logits.double().softmax(1).max(1)
    hits = (predicted == labels).double()
    # Confidence p is in bin ceil(15 p) - 1. Rounding may bring it to 1.0 and a little more.
    places = ((confidence * BINS).ceil().long() - 1).clamp(0, BINS - 1)
    zeros = torch.zeros(BINS, dtype=torch.float64)
    count = zeros.index_add(0, places, torch.ones_like(confidence))
    filled = count.clamp(min=1)
    return Calibration(
        tuple((count / len(labels)).tolist()),
        tuple((zeros.index_add(0, places, confidence) / filled).tolist()),
        tuple((zeros.index_add(0, places, hits) / filled).tolist()),
    )
