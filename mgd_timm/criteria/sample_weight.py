"""Weights of samples by the teacher's certainty, and criteria whose samples are weighted by them."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mgd_timm.criteria.base import Criterion, at_least_float32
from mgd_timm.features import Batch, Features
from mgd_timm.recipe.granularity import check_temperature


@dataclass(frozen=True)
class EntropyWeight:
    """The teacher's certainty about each sample: w = 1 - H(p_t) / log K, with the entropy H of p_t = softmax(z_t / T).

    A term is then the mean over the batch of w times the sample's loss, not divided by the sum of the weights: a
    teacher that is certain of every sample teaches as without weights, and one whose classes are all equally likely
    teaches nothing. Under MAS the entropy is that of the stable excitation, which is what is taught; with several
    teachers that of their mean, or of each (`--teachers-as sum`), and of each for its own codes. Logits are not
    standardised for it.

    Weighted are the criteria that have a loss per sample, and the codes of MAG and MAS. Other criteria (relations of
    samples, memories, maps) stay as they are, and the run says which. The labels' loss and `dml` are never weighted.
    `metrics.jsonl` and the trackers have the weights' mean and standard deviation: if the mean is near 1, as of a
    teacher that has learnt the training images by heart, the weights have no effect, and a temperature above 1 spreads
    them.

    Reference: Gore, Dey, Mishra, "Uncertainty-Aware Dual-Student Knowledge Distillation for Efficient Image
    Classification" (arXiv 2511.18826).

    Differs: inspired by the paper, whose formula we have from its abstract and from third parties. The temperature, and
    which losses but KD's are weighted, are ours.

    Args:
        temperature: T > 0.

    Raises:
        ValueError: The temperature is not positive.
    """

    temperature: float = 1.0

    def __post_init__(self) -> None:
        check_temperature(self.temperature)

    @torch.no_grad()
    def __call__(self, teacher_logits: Float[Tensor, "b k"]) -> Float[Tensor, " b"]:
        """Return a weight in [0, 1] for each sample, 0 where all logits are equal, 1 where one class has it all."""
        scores = at_least_float32(teacher_logits) / self.temperature
        log_uniform = torch.log_softmax(torch.zeros_like(scores), 1)
        log_probabilities = torch.log_softmax(scores, 1)
        # sum p (log p + log K) / log K, which is exact at both ends; 1 - H / log K is not.
        divergence = (log_probabilities.exp() * (log_probabilities - log_uniform)).sum(1)
        return (divergence / -log_uniform[:, 0]).clamp(0, 1)


class Weighted(Criterion):
    """Any criterion with a loss per sample: the mean of each sample's loss times its weight.

    Args:
        criterion: A criterion that has a loss per sample. It must not be used elsewhere.
        sample_weight: Returns the weights from the teacher's logits.

    Raises:
        ValueError: The criterion has no loss per sample.
    """

    def __init__(self, criterion: Criterion, sample_weight: EntropyWeight) -> None:
        nn.Module.__init__(self)
        if not criterion.per_sample:
            raise ValueError(f"{type(criterion).__name__} has no loss per sample: use it without sample weights.")
        for name in (*Criterion.__annotations__, "num_classes"):
            setattr(self, name, getattr(criterion, name))
        self.criterion, self.sample_weight = criterion, sample_weight

    def sample_values(self, student: Features, teacher: Features, batch: Batch) -> Float[Tensor, " b"]:
        """Return the criterion's loss of each sample times its weight."""
        return self.sample_weight(teacher.logits) * self.criterion.sample_values(student, teacher, batch)
