"""DIST: distillation from a stronger teacher (Huang et al. 2022)."""

from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from mgd_timm.criteria.base import SMALLEST_SPREAD, Criterion, Need, at_least_float32, check_temperature
from mgd_timm.criteria.dkd import check_parts
from mgd_timm.criteria.kd import check_one_label_space
from mgd_timm.features import Batch, Features, Pair


def pearson_distance(one: Float[Tensor, "n m"], two: Float[Tensor, "n m"], eps: float = 1e-8) -> Float[Tensor, ""]:
    """1 - mean over rows of Pearson's correlation of both rows of probabilities.

    The standard deviation of a row counts as at least 0.1 of its mean: the correlation of a row that hardly varies
    falls to 0, and its gradient stays bounded.

    Args:
        one, two: Probabilities.
        eps: Added to the product of both norms (official code).
    """
    deviations, norms = [], []
    for rows in (one, two):
        mean = rows.mean(1, keepdim=True)
        deviation = rows - mean
        smallest = SMALLEST_SPREAD * rows.shape[1] ** 0.5 * mean.squeeze(1)
        deviations.append(deviation)
        norms.append(torch.maximum(torch.linalg.vector_norm(deviation, dim=1), smallest))
    return 1 - ((deviations[0] * deviations[1]).sum(1) / (norms[0] * norms[1] + eps)).mean()


def relation_distance(
    student_logits: Float[Tensor, "b k"],
    teacher_logits: Float[Tensor, "b k"],
    beta: float,
    gamma: float,
    temperature: float,
) -> Float[Tensor, ""]:
    """T^2 (beta inter + gamma intra): Pearson distances of the softened probabilities, along classes and along the
    batch."""
    student, teacher = (torch.softmax(at_least_float32(z) / temperature, 1) for z in (student_logits, teacher_logits))
    return (beta * pearson_distance(student, teacher) + gamma * pearson_distance(student.T, teacher.T)) * temperature**2


class DIST(Criterion):
    """Relations instead of values: beta inter + gamma intra, each 1 - Pearson's correlation of softened probabilities,
    times T^2.

    inter = 1 - mean_b r(Y_s[b, :], Y_t[b, :]), intra = 1 - mean_k r(Y_s[:, k], Y_t[:, k]), Y = softmax(z / T).

    Relational: the intra-class term compares the samples of a batch; under several processes each sees its local batch.

    Reference: Huang et al., "Knowledge Distillation from A Stronger Teacher" (arXiv 2205.10536), section 4.

    Weight: 2 beside 1 of the task, beta 1, gamma 1 (the authors' configurations), T 1 (their ImageNet ones; 4 on
    CIFAR-100).

    Differs: as the official code, which adds 1e-8 to the product of both norms: a class whose probabilities hardly vary
    over the batch counts less, and where one side is constant the correlation is 0. With 2 classes a sample's inter is
    0 or 2, without a gradient.

    Args:
        pair: Shapes of both networks; the numbers of classes must agree.
        beta: Weight of the inter-class relation, 0 or more.
        gamma: Weight of the intra-class relation, 0 or more.
        temperature: T > 0.

    Raises:
        ValueError: Numbers of classes that differ, a hyper-parameter out of range, or 2 classes without gamma.
    """

    weight: ClassVar[float] = 2.0
    needs: ClassVar[frozenset[Need]] = frozenset({"logits"})
    relational: ClassVar[bool] = True

    def __init__(self, pair: Pair, *, beta: float = 1.0, gamma: float = 1.0, temperature: float = 1.0) -> None:
        super().__init__(pair)
        check_one_label_space("DIST", pair)
        self.beta, self.gamma = check_parts(beta=beta, gamma=gamma)
        self.temperature = check_temperature(temperature)
        if self.num_classes < 3 and not gamma:
            raise ValueError(
                "gamma=0 with 2 classes: the correlation of two numbers is 1 or -1, so inter teaches nothing; raise "
                "gamma."
            )

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Float[Tensor, ""]:
        """Scalar distance, at least float32."""
        return relation_distance(student.logits, teacher.logits, self.beta, self.gamma, self.temperature)
