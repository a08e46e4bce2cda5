"""Logit standardisation (Sun et al. 2024): a transform of logits around any criterion that compares them."""

from jaxtyping import Float
from torch import Tensor, nn

from mgd_timm.criteria.base import SMALLEST_SPREAD, Criterion, at_least_float32
from mgd_timm.features import Batch, Features


def standardise(logits: Float[Tensor, "b k"], eps: float = 1e-7) -> Float[Tensor, "b k"]:
    """Every sample's logits at mean 0 and standard deviation 1: (z - mean(z)) / (std(z) + eps), at least float32.

    The deviation divides by K - 1 (official code; the paper by K), and eps is the official code's.

    Args:
        logits: Raw scores of 3 classes or more: of 2 the result says which is larger, and has no gradient. Where they
            are all equal it is 0 and its gradient about 1 / eps.
        eps: Added to the deviation.
    """
    logits = at_least_float32(logits)
    deviation = logits.std(1, keepdim=True) + eps
    return (logits - logits.mean(1, keepdim=True)) / deviation.clamp_min(SMALLEST_SPREAD)


class Standardised(Criterion):
    """Any logit criterion on standardised logits: L(Z(z_s), Z(z_t)), Z(z) = (z - mean(z)) / std(z) per sample.

    The temperature becomes a base temperature, in units of each network's own deviation: only the relations among
    logits are taught. Of 2 classes nothing is: Z is +-0.7 whatever they are.

    Reference: Sun et al., "Logit Standardization in Knowledge Distillation" (arXiv 2403.01427), the Z-score
    pre-process.

    Weight: the criterion's own. Official: KD with weight 9 beside 0.1 of the task, DKD with 9 times its alpha and beta,
    both at T 2.

    Differs: as the official code for KD and DKD. What a criterion computes itself (the logits of OFA's branches) is
    standardised as well. Under MAS the stable excitation is standardised after its mean is taken.

    Args:
        criterion: Reads the teacher's logits, of 3 classes or more; from now on it belongs to this one.

    Raises:
        ValueError: A criterion that reads no logits of the teacher, or one that is standardised already; fewer than 3
            classes.
    """

    def __init__(self, criterion: Criterion) -> None:
        nn.Module.__init__(self)
        name = type(criterion).__name__
        if criterion.standardised:
            raise ValueError(f"{name}'s logits are standardised already: once is enough.")
        if "logits" not in criterion.needs:
            raise ValueError(
                f"{name} reads no logits of the teacher: there is nothing to standardise, use it as it is."
            )
        if criterion.num_classes < 3:
            raise ValueError(
                f"{name} of {criterion.num_classes} classes, standardised, teaches nothing: two logits of mean 0 and "
                f"deviation 1 "
                "are the same for every image, up to which is larger. Give 3 classes or more, or leave the logits as "
                "they are."
            )
        for what in (
            "weight",
            "needs",
            "student_needs",
            "relational",
            "preact",
            "fits",
            "peers",
            "synchronised",
            "num_classes",
        ):
            setattr(self, what, getattr(criterion, what))
        self.standardised = criterion.standardised = True
        self.criterion = criterion

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Float[Tensor, ""]:
        """The criterion's scalar of features whose logits are standardised."""
        student, teacher = (shown._replace(logits=standardise(shown.logits)) for shown in (student, teacher))
        return self.criterion(student, teacher, batch)

    def fitting(self) -> nn.Module | None:
        """The criterion's own."""
        return self.criterion.fitting()

    def remark(self) -> str | None:
        """The criterion's own."""
        return self.criterion.remark()
