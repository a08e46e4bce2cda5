"""KD: soft targets (Hinton et al. 2015), with a choice of the direction of the divergence."""

from typing import Literal, get_args

from jaxtyping import Float
from torch import Tensor

from mgd_timm.criteria.base import Criterion, check_one_label_space, kl_divergence
from mgd_timm.features import Batch, Features, Pair
from mgd_timm.recipe.granularity import check_temperature

Divergence = Literal["forward", "reverse", "balanced"]


def soft_divergence(
    student_logits: Float[Tensor, "b k"],
    teacher_logits: Float[Tensor, "b k"],
    temperature: float,
    divergence: Divergence = "forward",
) -> Float[Tensor, ""]:
    """Return the divergence of the softened distributions p_t and p_s, times T^2, mean over the batch.

    forward: KL(p_t || p_s), large where p_t is large and p_s small. reverse: KL(p_s || p_t), large where p_s is large
    and p_t small. balanced: the mean of both.

    Args:
        student_logits, teacher_logits: Raw scores, in any float dtype; computed in at least float32.
        temperature: T > 0.
        divergence: Direction.
    """
    if divergence == "reverse":
        return kl_divergence(teacher_logits, student_logits, temperature)
    forward = kl_divergence(student_logits, teacher_logits, temperature)
    if divergence == "forward":
        return forward
    return (forward + kl_divergence(teacher_logits, student_logits, temperature)) / 2


class KD(Criterion):
    """Knowledge distillation: T^2 KL(softmax(z_t / T) || softmax(z_s / T)).

    Reference: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network" (arXiv 1503.02531).
    divergence="reverse": Gu et al., "MiniLLM" (arXiv 2306.08543). divergence="balanced": half of Jeffreys' symmetric
    divergence ("An invariant form for the prior probability in estimation problems", 1946); in distillation Amara et
    al., "BD-KD: Balancing the Divergences for Online Knowledge Distillation" (arXiv 2212.12965).

    Weight: 0.8 with 0.2 for the task loss (the MGD authors' script; RepDistiller: 0.9 and 0.1). The divergence is
    summed over classes and averaged over the batch. Code that also averages over classes, such as DeiT's for soft
    distillation, has a loss that is smaller by the number of classes.

    Differs: same as the paper if divergence is forward. MiniLLM's divergence is over generated sequences. BD-KD weights
    the two directions per sample by the difference of the entropies; here each direction counts one half.

    Args:
        pair: Shapes of both networks, with the same number of classes.
        temperature: T > 0; 4 as in RepDistiller and the MGD authors' scripts.
        divergence: forward, reverse or balanced, as `soft_divergence`.

    Raises:
        ValueError: The networks have different numbers of classes, the temperature is not positive, or the divergence
            is unknown.
    """

    weight = 0.8
    needs = frozenset({"logits"})

    def __init__(self, pair: Pair, *, temperature: float = 4.0, divergence: Divergence = "forward") -> None:
        super().__init__(pair)
        check_one_label_space("KD", pair)
        if divergence not in get_args(Divergence):
            raise ValueError(f"divergence={divergence!r}: expected {', '.join(get_args(Divergence))}.")
        self.temperature = check_temperature(temperature)
        self.divergence: Divergence = divergence

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Float[Tensor, ""]:
        """Return the loss, at least float32."""
        return soft_divergence(student.logits, teacher.logits, self.temperature, self.divergence)
