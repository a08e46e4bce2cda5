"""DKD: decoupled knowledge distillation (Zhao et al. 2022)."""

from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mgd_timm.criteria.base import Criterion, Need, at_least_float32, kl_divergence
from mgd_timm.criteria.kd import check_one_label_space
from mgd_timm.features import Batch, Features, Pair
from mgd_timm.recipe.granularity import check_temperature


def target_classes(labels: Int[Tensor, " b"] | Float[Tensor, "b k"]) -> Int[Tensor, " b"]:
    """Class ids; of a distribution over classes (mixup, smoothing) its likeliest class, the first where several are."""
    return labels.argmax(1) if labels.is_floating_point() else labels.long()


def decoupled(
    logits: Float[Tensor, "b k"], targets: Int[Tensor, " b"], temperature: float
) -> tuple[Float[Tensor, "b 2"], Float[Tensor, "b k2"]]:
    """Logits over (target, all other classes) at T = 1, and those of the other classes alone, not yet divided by T."""
    logits = at_least_float32(logits)
    target = logits.gather(1, targets[:, None])
    columns = torch.arange(logits.shape[1] - 1, device=logits.device)
    others = logits.gather(1, columns + (columns >= targets[:, None]))
    return torch.cat([target / temperature, (others / temperature).logsumexp(1, keepdim=True)], 1), others


def decoupled_divergence(
    student_logits: Float[Tensor, "b k"],
    teacher_logits: Float[Tensor, "b k"],
    targets: Int[Tensor, " b"],
    alpha: float,
    beta: float,
    temperature: float,
) -> Float[Tensor, ""]:
    """T^2 (alpha TCKD + beta NCKD): divergences of target against the rest, and among the other classes; mean over the
    batch."""
    (binary_s, others_s), (binary_t, others_t) = (
        decoupled(z, targets, temperature) for z in (student_logits, teacher_logits)
    )
    target_part = kl_divergence(binary_s, binary_t, 1.0) * temperature**2
    return alpha * target_part + beta * kl_divergence(others_s, others_t, temperature)


def check_parts(**weights: float) -> tuple[float, ...]:
    """The weights of a criterion's parts; ValueError unless they are finite, none below 0 and one above."""
    if not all(0 <= weight < float("inf") for weight in weights.values()) or not any(weights.values()):
        words = ", ".join(f"{name}={weight}" for name, weight in weights.items())
        raise ValueError(f"{words}: expected finite numbers, 0 or more, and not all 0.")
    return tuple(weights.values())


class DKD(Criterion):
    """Decoupled KD: alpha TCKD + beta NCKD, both T^2 KL: of the target class against the rest, and among the other
    classes.

    TCKD = KL(b_t || b_s) with b = (p_y, 1 - p_y), NCKD = KL(q_t || q_s) with q_k = p_k / (1 - p_y), k != y, p =
    softmax(z / T).

    Reference: Zhao et al., "Decoupled Knowledge Distillation" (arXiv 2203.08679), section 3.3.

    Weight: 1 beside 1 of the task, alpha 1, beta 8, T 4 (mdistiller, CIFAR-100, resnet32x4 -> resnet8x4; beta 6 for
    wrn_40_2 and vgg13 pairs, 2 for resnet56 and resnet110; ImageNet, T 1: beta 0.5 for ResNet-34 -> 18, 2 for ResNet-50
    -> MobileNet). There it rises over 20 epochs, 1 on ImageNet: give dkd:1:20, there is no warm-up without it. The
    official one goes by whole epochs, min(1, epoch / 20), ours by updates.

    Differs: as the official code, in logarithms throughout (there probabilities are summed, then log, and the target is
    taken out by subtracting 1000 from its logit). Labels that are distributions (mixup) count as their likeliest class.
    With 2 classes NCKD is 0.

    Args:
        pair: Shapes of both networks; the numbers of classes must agree.
        alpha: Weight of TCKD, 0 or more.
        beta: Weight of NCKD, 0 or more.
        temperature: T > 0.

    Raises:
        ValueError: Numbers of classes that differ, a hyper-parameter out of range, or 2 classes without alpha.
    """

    weight: ClassVar[float] = 1.0
    needs: ClassVar[frozenset[Need]] = frozenset({"logits"})

    def __init__(self, pair: Pair, *, alpha: float = 1.0, beta: float = 8.0, temperature: float = 4.0) -> None:
        super().__init__(pair)
        check_one_label_space("DKD", pair)
        self.alpha, self.beta = check_parts(alpha=alpha, beta=beta)
        self.temperature = check_temperature(temperature)
        if self.num_classes < 3 and not alpha:
            raise ValueError("alpha=0 with 2 classes: beside the target there is one class, so NCKD is 0; raise alpha.")

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Float[Tensor, ""]:
        """Scalar divergence, at least float32."""
        targets = target_classes(batch.labels)
        return decoupled_divergence(student.logits, teacher.logits, targets, self.alpha, self.beta, self.temperature)
