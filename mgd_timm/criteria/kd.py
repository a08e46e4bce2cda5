"""KD: soft targets (Hinton et al. 2015), with a choice of the direction of the divergence."""

from jaxtyping import Float
from torch import Tensor

from mgd_timm.criteria.base import Criterion, check_one_label_space, kl_divergence_per_sample
from mgd_timm.features import Batch, Features, Pair
from mgd_timm.recipe.granularity import Divergence, check_divergence, check_temperature


def soft_divergence(
    student_logits: Float[Tensor, "b k"],
    teacher_logits: Float[Tensor, "b k"],
    temperature: float,
    divergence: Divergence = "forward",
    *,
    reverse_weight: float = 1.0,
    reverse_temperature: float | None = None,
) -> Float[Tensor, " b"]:
    """Return the divergence of the softened distributions p_t and p_s of each sample, times T^2.

    forward: KL(p_t || p_s), large where p_t is large and p_s small. reverse: KL(p_s || p_t), large where p_s is large
    and p_t small. balanced: the mean of both. bdd: forward plus reverse_weight times reverse, each at its own
    temperature.

    Args:
        student_logits, teacher_logits: Raw scores, in any float dtype; computed in at least float32.
        temperature: T > 0.
        divergence: Direction.
        reverse_weight: Weight of bdd's reverse divergence.
        reverse_temperature: Its temperature; by default the same.
    """
    if divergence == "reverse":
        return kl_divergence_per_sample(teacher_logits, student_logits, temperature)
    forward = kl_divergence_per_sample(student_logits, teacher_logits, temperature)
    if divergence == "forward":
        return forward
    if divergence == "balanced":
        return (forward + kl_divergence_per_sample(teacher_logits, student_logits, temperature)) / 2
    reverse = kl_divergence_per_sample(teacher_logits, student_logits, reverse_temperature or temperature)
    return forward + reverse_weight * reverse


class KD(Criterion):
    """Knowledge distillation: T^2 KL(softmax(z_t / T) || softmax(z_s / T)).

    Reference: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network" (arXiv 1503.02531).
    divergence="reverse": Gu et al., "MiniLLM" (arXiv 2306.08543). divergence="balanced": half of Jeffreys' symmetric
    divergence ("An invariant form for the prior probability in estimation problems", 1946); in distillation Amara et
    al., "BD-KD: Balancing the Divergences for Online Knowledge Distillation" (arXiv 2212.12965). divergence="bdd":
    Qi et al., "Balance Divergence for Knowledge Distillation" (arXiv 2501.07804).

    Weight: 0.8 with 0.2 for the task loss (the MGD authors' script; RepDistiller: 0.9 and 0.1). The divergence is
    summed over classes and averaged over the batch. Code that also averages over classes, such as DeiT's for soft
    distillation, has a loss that is smaller by the number of classes.

    Differs: same as the paper if divergence is forward. MiniLLM's divergence is over generated sequences. BD-KD weights
    the two directions per sample by the difference of the entropies; here each direction counts one half. bdd is T^2
    KL(p_t || p_s) + reverse_weight T_r^2 KL(p_s || p_t): that a reverse divergence compensates the forward one, with
    temperatures that balance them, is the paper's; how the two are added, and all constants, are ours.

    Args:
        pair: Shapes of both networks, with the same number of classes.
        temperature: T > 0; 4 as in RepDistiller and the MGD authors' scripts.
        divergence: forward, reverse, balanced (Jeffreys) or bdd (balance divergence).
        reverse_weight: Weight of bdd's reverse divergence; with 0 it is forward.
        reverse_temperature: Temperature T_r > 0 of bdd's reverse divergence; None: as temperature.

    Raises:
        ValueError: The networks have different numbers of classes, the temperature is not positive, or the divergence
            is unknown.
    """

    weight = 0.8
    needs = frozenset({"logits"})
    per_sample = True
    note = "divergence=bdd: inspired by arXiv 2501.07804; constants ours"

    def __init__(
        self,
        pair: Pair,
        *,
        temperature: float = 4.0,
        divergence: Divergence = "forward",
        reverse_weight: float = 1.0,
        reverse_temperature: float | None = None,
    ) -> None:
        super().__init__(pair)
        check_one_label_space("KD", pair)
        check_divergence(divergence, reverse_weight, reverse_temperature)
        self.temperature = check_temperature(temperature)
        self.divergence: Divergence = divergence
        self.reverse_weight, self.reverse_temperature = reverse_weight, reverse_temperature

    def sample_values(self, student: Features, teacher: Features, batch: Batch) -> Float[Tensor, " b"]:
        """Return the loss of each sample, at least float32."""
        return soft_divergence(
            student.logits,
            teacher.logits,
            self.temperature,
            self.divergence,
            reverse_weight=self.reverse_weight,
            reverse_temperature=self.reverse_temperature,
        )
