"""EKD: evolutionary distillation from a teacher that trains along (Zhang et al. 2021)."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mgd_timm.criteria.adapters import paired_maps
from mgd_timm.criteria.base import (
    Criterion,
    at_least_float32,
    check_one_label_space,
    check_parts,
    convert_soft_labels,
    kl_divergence,
)
from mgd_timm.criteria.standardisation import standardise
from mgd_timm.features import Batch, Features, Pair
from mgd_timm.recipe.granularity import check_temperature


class GuidedModule(nn.Module):
    """1x1 convolution to a width, normalisation of each sample, ReLU and mean over positions; then a linear classifier.

    Args:
        channels: Of the map.
        width: Of the vector before the classifier.
        num_classes: Of the data.
    """

    def __init__(self, channels: int, width: int, num_classes: int) -> None:
        super().__init__()
        # No BatchNorm: the teacher's module runs twice in a step, and the last map may have one position.
        self.bottleneck = nn.Sequential(nn.Conv2d(channels, width, 1, bias=False), nn.GroupNorm(1, width), nn.ReLU())
        self.classifier = nn.Linear(width, num_classes)

    def forward(self, maps: Float[Tensor, "b c h w"]) -> tuple[Float[Tensor, "b d"], Float[Tensor, "b k"]]:
        """Return the vector and the logits, at least float32."""
        vector = at_least_float32(self.bottleneck(maps)).mean((2, 3))
        return vector, at_least_float32(self.classifier(vector))


class EKD(Criterion):
    """Evolutionary distillation: b KL(p_t || p_s) + sum over maps k of c KL(p_t,k || p_s,k) + d |g_s,k - g_t,k|^2 +
    CE(p_s,k, y), from a teacher that trains in the same run.

    A guided module on each map of both networks gives a vector g_k and class probabilities p_k. The divergences are at
    a temperature T, times T^2; all terms are means over the batch. The teacher (`--peer`) learns from the labels alone,
    by the task's loss and CE(p_t,k, y): no gradient of the student's loss reaches it or its guided modules. The guided
    modules are not exported.

    Reference: Zhang, Zhang, Li, Zeng, Ge, "Student Network Learning via Evolutionary Knowledge Distillation" (arXiv
    2103.13811).

    Weight: 1, with b = c = 1, d = 0.05 and T = 3 inside, beside 1 for the task loss of each network (ours).

    Differs: the form of the losses and of the guided modules is ours, after the abstract: modules between corresponding
    blocks, and a teacher that is trained at the same time.

    Args:
        pair: Shapes of the student and of the teacher that trains along, with the same classes and the same number of
            maps.
        logit_weight: b, 0 or more.
        guided_weight: c, 0 or more.
        feature_weight: d, 0 or more.
        temperature: T, positive.
        width: Width of g, 2 or more.

    Raises:
        ValueError: The numbers of classes or maps differ, or an option is out of range.
    """

    weight = 1.0
    needs = frozenset({"logits", "maps"})
    peers = True
    trains_teacher = True
    note = "inspired by arXiv 2103.13811; constants ours"

    def __init__(
        self,
        pair: Pair,
        *,
        logit_weight: float = 1.0,
        guided_weight: float = 1.0,
        feature_weight: float = 0.05,
        temperature: float = 3.0,
        width: int = 128,
    ) -> None:
        super().__init__(pair)
        check_one_label_space("EKD", pair)
        maps = paired_maps("EKD", pair)
        check_temperature(temperature)
        if width < 2:
            raise ValueError(f"width={width}: expected 2 or more.")
        self.shares = check_parts(logit_weight=logit_weight, guided_weight=guided_weight, feature_weight=feature_weight)
        self.temperature = temperature
        self.student_guides = nn.ModuleList(GuidedModule(own[0], width, self.num_classes) for own, _ in maps)
        self.teacher_guides = nn.ModuleList(GuidedModule(other[0], width, self.num_classes) for _, other in maps)

    def parts(self, student: Features, teacher: Features, batch: Batch) -> dict[str, Float[Tensor, ""]]:
        """Return the student's losses "logits", "guided", "features" and "labels", at least float32."""
        logit_weight, guided_weight, feature_weight = self.shares
        with torch.no_grad():
            targets = [guide(m) for guide, m in zip(self.teacher_guides, teacher.maps, strict=True)]
        guided = [guide(m) for guide, m in zip(self.student_guides, student.maps, strict=True)]
        both = list(zip(guided, targets, strict=True))
        divergences = [self._divergence(own, other) for (_, own), (_, other) in both]
        distances = [(own - other).square().sum(1).mean() for (own, _), (other, _) in both]
        return {
            "logits": logit_weight * kl_divergence(student.logits, teacher.logits.detach(), self.temperature),
            "guided": guided_weight * torch.stack(divergences).sum(),
            "features": feature_weight * torch.stack(distances).sum(),
            "labels": _label_loss([logits for _, logits in guided], batch),
        }

    def _divergence(self, student: Float[Tensor, "b k"], teacher: Float[Tensor, "b k"]) -> Float[Tensor, ""]:
        if self.standardised:
            student, teacher = standardise(student), standardise(teacher)
        return kl_divergence(student, teacher, self.temperature)

    def teacher_modules(self) -> list[nn.Module]:
        """Return the teacher's guided modules."""
        return [self.teacher_guides]

    def teacher_parts(self, teacher: Features, batch: Batch) -> dict[str, Float[Tensor, ""]]:
        """Return the label loss of the teacher's guided modules."""
        guided = [guide(m) for guide, m in zip(self.teacher_guides, teacher.maps, strict=True)]
        return {"": _label_loss([logits for _, logits in guided], batch)}

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Float[Tensor, ""]:
        """Return the sum of the student's parts."""
        return torch.stack(list(self.parts(student, teacher, batch).values())).sum()


def _label_loss(logits: list[Float[Tensor, "b k"]], batch: Batch) -> Float[Tensor, ""]:
    losses = [F.cross_entropy(one, convert_soft_labels(batch.labels, one.dtype)) for one in logits]
    return torch.stack(losses).sum()
