"""DKD: decoupled knowledge distillation (Zhao et al. 2022)."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mgd_timm.criteria.base import (
    Criterion,
    at_least_float32,
    check_one_label_space,
    check_parts,
    kl_divergence_per_sample,
    target_classes,
)
from mgd_timm.features import Batch, Features, Pair
from mgd_timm.recipe.granularity import check_temperature


def decoupled(
    logits: Float[Tensor, "b k"], targets: Int[Tensor, " b"], temperature: float
) -> tuple[Float[Tensor, "b 2"], Float[Tensor, "b k2"]]:
    """Return logits over (target, all other classes), already divided by T, and logits of the other classes, not
    divided by T."""
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
) -> Float[Tensor, " b"]:
    """Return T^2 (alpha TCKD + beta NCKD) of each sample, the divergences of the target against the rest and among the
    other classes."""
    (binary_s, others_s), (binary_t, others_t) = (
        decoupled(z, targets, temperature) for z in (student_logits, teacher_logits)
    )
    target_part = kl_divergence_per_sample(binary_s, binary_t, 1.0) * temperature**2
    return alpha * target_part + beta * kl_divergence_per_sample(others_s, others_t, temperature)


class DKD(Criterion):
    """Decoupled KD: T^2 (alpha TCKD + beta NCKD), divergences of the target class against the rest and among the other
    classes.

    TCKD = KL(b_t || b_s) with b = (p_y, 1 - p_y), NCKD = KL(q_t || q_s) with q_k = p_k / (1 - p_y), k != y, p =
    softmax(z / T).

    Reference: Zhao et al., "Decoupled Knowledge Distillation" (arXiv 2203.08679), section 3.3.

    Weight: 1 with 1 for the task loss, alpha 1, beta 8, T 4 (mdistiller, CIFAR-100, resnet32x4 to resnet8x4, ShuffleV1
    and ShuffleV2, wrn_40_2 to ShuffleV1, ResNet-50 to MobileNetV2). Beta 6 for wrn_40_2 to wrn_16_2 and wrn_40_1 and
    for vgg13 to vgg8 and MobileNetV2, 2 for resnet56 and resnet110; on ImageNet, T 1, beta 0.5 for ResNet-34 to 18 and
    2 for ResNet-50 to MobileNet. On CIFAR-100 mdistiller multiplies the weight by min(1, epoch / 20), with epochs
    counted from 1; its ImageNet configurations have a warm-up of 1 epoch, which is none. Use dkd:1:20 for a warm-up
    over 20 epochs, which rises with each update from 0; without it there is none.

    Differs: same as the official code, but in logarithms throughout (there probabilities are summed before the
    logarithm, and the target is removed by subtracting 1000 from its logit). Labels that are distributions (mixup)
    count as their most likely class. With 2 classes NCKD is 0.

    Args:
        pair: Shapes of both networks, with the same number of classes.
        alpha: Weight of TCKD, 0 or more.
        beta: Weight of NCKD, 0 or more.
        temperature: T > 0.

    Raises:
        ValueError: The networks have different numbers of classes, a value is out of range, or alpha is 0 with 2
            classes.
    """

    weight = 1.0
    needs = frozenset({"logits"})
    per_sample = True

    def __init__(self, pair: Pair, *, alpha: float = 1.0, beta: float = 8.0, temperature: float = 4.0) -> None:
        super().__init__(pair)
        check_one_label_space("DKD", pair)
        self.alpha, self.beta = check_parts(alpha=alpha, beta=beta)
        self.temperature = check_temperature(temperature)
        if self.num_classes < 3 and not alpha:
            raise ValueError("alpha=0 with 2 classes: there is only one other class, so NCKD is 0; raise alpha.")

    def sample_values(self, student: Features, teacher: Features, batch: Batch) -> Float[Tensor, " b"]:
        """Return the loss of each sample, at least float32."""
        targets = target_classes(batch.labels)
        return decoupled_divergence(student.logits, teacher.logits, targets, self.alpha, self.beta, self.temperature)
