"""Logit standardisation (Sun et al. 2024): standardise the logits that any logit criterion compares."""

from jaxtyping import Float
from torch import Tensor, nn

from mgd_timm.criteria.base import SMALLEST_SPREAD, Criterion, at_least_float32
from mgd_timm.features import Batch, Features


def standardise(logits: Float[Tensor, "b k"]) -> Float[Tensor, "b k"]:
    """Shift and scale each sample's logits to mean 0 and standard deviation 1: (z - mean(z)) / (std(z) + 1e-7).

    The standard deviation divides by K - 1 (official code; the paper divides by K), and 1e-7 is the official code's. A
    deviation below 0.1 counts as 0.1, which bounds the gradient.

    Args:
        logits: Raw scores of 3 or more classes. For 2 classes the result only tells which logit is larger, and has no
            gradient.

    Returns:
        Standardised logits, 0 where all logits of a sample are equal.
    """
    logits = at_least_float32(logits)
    deviation = logits.std(1, keepdim=True) + 1e-7
    return (logits - logits.mean(1, keepdim=True)) / deviation.clamp_min(SMALLEST_SPREAD)


def _standardised(features: Features) -> Features:
    rotated = features.rotated
    if rotated is not None:
        rotated = rotated._replace(logits=standardise(rotated.logits))
    return features._replace(logits=standardise(features.logits), rotated=rotated)


class Standardised(Criterion):
    """Any logit criterion on standardised logits: L(Z(z_s), Z(z_t)), Z(z) = (z - mean(z)) / std(z) per sample.

    The temperature becomes a base temperature, in units of the standard deviation of each network's logits: the student
    learns the relations among logits, not their scale. It learns nothing from 2 classes, whose Z is always +-0.7.

    Reference: Sun et al., "Logit Standardization in Knowledge Distillation" (arXiv 2403.01427), the Z-score
    pre-process.

    Weight: the weight of the wrapped criterion. The official code uses 9 for KD with 0.1 for the task loss, and for DKD
    9 times its alpha and beta; both at T = 2.

    Differs: same as the official code for KD and DKD, but logits with a standard deviation below 0.1 are divided by 0.1
    (official: by the deviation + 1e-7). Otherwise students whose classifier starts at zero (timm's resmlp, mixer, gmlp
    and gmixer) get gradients of 1e6 and diverge. Logits that a criterion computes itself (OFA's branches) are
    standardised too. Under MAS the stable excitation is averaged first and then standardised.

    Args:
        criterion: A criterion that reads the teacher's logits, with 3 or more classes. It must not be used elsewhere.

    Raises:
        ValueError: The criterion does not read the teacher's logits, is already standardised, or has fewer than 3
            classes.
    """

    def __init__(self, criterion: Criterion) -> None:
        nn.Module.__init__(self)
        name = type(criterion).__name__
        if criterion.standardised:
            raise ValueError(f"{name}'s logits are standardised already: wrap a criterion in Standardised only once.")
        if "logits" not in criterion.needs:
            raise ValueError(
                f"{name} reads no logits of the teacher: there is nothing to standardise. Use it without Standardised."
            )
        if criterion.num_classes < 3:
            raise ValueError(
                f"{name} of {criterion.num_classes} classes, standardised, teaches nothing: two logits with mean 0 and "
                "standard deviation 1 only tell which one is larger. Use 3 classes or more, or do not standardise."
            )
        for name in (*Criterion.__annotations__, "num_classes"):
            setattr(self, name, getattr(criterion, name))
        self.standardised = criterion.standardised = True
        self.criterion = criterion

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Float[Tensor, ""]:
        """Return the criterion's loss on features with standardised logits."""
        loss: Tensor = self.criterion(_standardised(student), _standardised(teacher), batch)
        return loss

    def sample_values(self, student: Features, teacher: Features, batch: Batch) -> Float[Tensor, " b"]:
        """Return the criterion's loss of each sample on features with standardised logits."""
        return self.criterion.sample_values(_standardised(student), _standardised(teacher), batch)

    def parts(self, student: Features, teacher: Features, batch: Batch) -> dict[str, Float[Tensor, ""]]:
        """Return the parts of the criterion's loss on features with standardised logits."""
        return self.criterion.parts(_standardised(student), _standardised(teacher), batch)

    def teacher_parts(self, teacher: Features, batch: Batch) -> dict[str, Float[Tensor, ""]]:
        """Return the criterion's, which no logits of the teacher are in: only the student learns standardised ones."""
        return self.criterion.teacher_parts(teacher, batch)
