"""DIST: distillation from a stronger teacher (Huang et al. 2022)."""

import torch
from jaxtyping import Float
from torch import Tensor

from mgd_timm.criteria.base import SMALLEST_SPREAD, Criterion, at_least_float32, check_one_label_space, check_parts
from mgd_timm.features import Batch, Features, Pair
from mgd_timm.recipe.granularity import check_temperature


def pearson_distance(one: Float[Tensor, "n m"], two: Float[Tensor, "n m"]) -> Float[Tensor, ""]:
    """Return 1 - the mean over rows of Pearson's correlation.

    A row's standard deviation counts as at least 0.1 times its mean: if a row varies less, its correlation tends to 0,
    and its gradient is bounded.

    Args:
        one, two: Probabilities, 0 or more.
    """
    deviations, norms = [], []
    for rows in (one, two):
        mean = rows.mean(1, keepdim=True)
        deviation = rows - mean
        smallest = SMALLEST_SPREAD * rows.shape[1] ** 0.5 * mean.squeeze(1)
        deviations.append(deviation)
        norms.append(torch.maximum(torch.linalg.vector_norm(deviation, dim=1), smallest))
    product = norms[0] * norms[1] + 1e-8  # as in the official code
    return 1 - ((deviations[0] * deviations[1]).sum(1) / product).mean()


def relation_distance(
    student_logits: Float[Tensor, "b k"],
    teacher_logits: Float[Tensor, "b k"],
    beta: float,
    gamma: float,
    temperature: float,
) -> Float[Tensor, ""]:
    """Return T^2 (beta inter + gamma intra), the Pearson distances of softened probabilities over classes and over the
    batch."""
    student, teacher = (torch.softmax(at_least_float32(z) / temperature, 1) for z in (student_logits, teacher_logits))
    return (beta * pearson_distance(student, teacher) + gamma * pearson_distance(student.T, teacher.T)) * temperature**2


class DIST(Criterion):
    """Relations instead of values: T^2 (beta inter + gamma intra), each 1 - Pearson's correlation of softened
    probabilities.

    inter = 1 - mean_b r(Y_s[b, :], Y_t[b, :]), intra = 1 - mean_k r(Y_s[:, k], Y_t[:, k]), Y = softmax(z / T).

    The intra-class term compares the samples of a batch: with several processes, each process uses its local batch.

    Reference: Huang et al., "Knowledge Distillation from A Stronger Teacher" (arXiv 2205.10536), section 4.

    Weight: 2 with 1 for the task loss, beta 1, gamma 1 (the authors' configurations), T 1 (their ImageNet
    configurations; 4 on CIFAR-100).

    Differs: same as the official code, which adds 1e-8 to the product of both norms, except for rows of probabilities
    (of a sample or of a class) whose standard deviation is below 0.1 of their mean: they are divided by the norm that
    this deviation gives. Their correlation and gradient are smaller than in the official code, where students whose
    classifier starts at zero get gradients of 1e6 and diverge. With 2 classes a sample's inter-class term is 0 or 2 and
    has no gradient, unless both probabilities are nearly equal.

    Args:
        pair: Shapes of both networks, with the same number of classes.
        beta: Weight of the inter-class relation, 0 or more.
        gamma: Weight of the intra-class relation, 0 or more.
        temperature: T > 0.

    Raises:
        ValueError: The networks have different numbers of classes, a value is out of range, or gamma is 0 with 2
            classes.
    """

    weight = 2.0
    needs = frozenset({"logits"})
    relational = True

    def __init__(self, pair: Pair, *, beta: float = 1.0, gamma: float = 1.0, temperature: float = 1.0) -> None:
        super().__init__(pair)
        check_one_label_space("DIST", pair)
        self.beta, self.gamma = check_parts(beta=beta, gamma=gamma)
        self.temperature = check_temperature(temperature)
        if self.num_classes < 3 and not gamma:
            raise ValueError(
                "gamma=0 with 2 classes: the correlation of two numbers is 1 or -1, so the inter-class term has "
                "no gradient: set gamma above 0."
            )

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Float[Tensor, ""]:
        """Return the loss, at least float32."""
        return relation_distance(student.logits, teacher.logits, self.beta, self.gamma, self.temperature)
