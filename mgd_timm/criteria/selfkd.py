"""SelfKD: a network learns from heads on its own stages, without a teacher (Lin and Li 2021; Zhang et al. 2019)."""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mgd_timm.criteria.base import Criterion, at_least_float32, check_parts, convert_soft_labels, kl_divergence
from mgd_timm.features import Batch, Features, Pair
from mgd_timm.recipe.granularity import check_temperature


class SelfKD(Criterion):
    """Self-distillation: auxiliary heads on the student's stages learn the labels, and a head on the features of all
    stages teaches them and the student's own classifier. There is no teacher.

    With e_k = W_k pool(F_k) for each map but the deepest, the embedding f, z_k = head_k(relu(e_k)) and z* =
    head(relu(e_1), ..., relu(e_K), f): L = sum_k CE(z_k, y) + CE(z*, y) + kd (KL(z* || z) + sum_k KL(z* || z_k)) + hint
    sum_k mean((e_k - f)^2). Targets (z*, and f in the last term) have no gradient; the divergences are at temperature T
    and multiplied by T^2. With form=byot the student's own logits z take the place of z*, which is left out: L = sum_k
    (CE(z_k, y) + kd KL(z || z_k) + hint mean((e_k - f)^2)). The loss of z itself is the task's. The heads are not
    exported.

    Reference: Lin, Li, "Extracting knowledge from features with multilevel abstraction" (arXiv 2112.13642); form=byot:
    Zhang et al., "Be Your Own Teacher: Improve the Performance of Convolutional Neural Networks via Self Distillation"
    (arXiv 1905.08094).

    Weight: 1, kd 1, hint 0.03, T 3, all of this package, with 1 for the task loss.

    Differs: of Lin and Li only the abstract was read, so the equations are this package's. Zhang et al. weight the
    labels by 1 - alpha and the divergence by alpha, sum squares for the hint, and have convolutions in their heads;
    here a head is two linear layers on a pooled map, so that it fits any network.

    Args:
        pair: Shapes; only the student's are used. It has 2 or more maps, the deepest of which is not read, as the
            embedding is.
        form: Who teaches: "fused", a head on the features of all stages, or "byot", the student's own classifier.
        temperature: T > 0.
        kd: Weight of the divergences.
        hint: Weight of the squared differences from the embedding.

    Raises:
        ValueError: The student has fewer than 2 maps or 2 classes, or a value is out of range.
    """

    weight = 1.0
    needs = frozenset()
    student_needs = frozenset({"embedding", "maps"})
    note = "inspired by arXiv 2112.13642 (abstract) and 1905.08094; equations and constants ours"

    def __init__(
        self,
        pair: Pair,
        *,
        form: Literal["fused", "byot"] = "fused",
        temperature: float = 3.0,
        kd: float = 1.0,
        hint: float = 0.03,
    ) -> None:
        super().__init__(pair)
        classes, width, maps = pair.student.num_classes, pair.student.embed_dim, pair.student.maps
        if len(maps) < 2:
            raise ValueError(
                f"SelfKD needs 2 or more maps of the student, as its shallow stages learn from the deepest, and there "
                f"are {len(maps)} {maps}. Choose --maps stages, --maps all or --maps 4 (in Python maps='stages')."
            )
        if classes < 2:
            raise ValueError(f"SelfKD compares classes, and the data has {classes}: use data with 2 classes or more.")
        self.kd, self.hint = check_parts(kd=kd, hint=hint)
        self.temperature = check_temperature(temperature)
        shallow = maps[:-1]
        self.projections = nn.ModuleList(nn.Linear(channels, width) for channels, *_ in shallow)
        self.heads = nn.ModuleList(nn.Linear(width, classes) for _ in shallow)
        self.fused = nn.Linear(len(maps) * width, classes) if form == "fused" else None

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Float[Tensor, ""]:
        """Return the loss, at least float32. The teacher is not read."""
        deepest = student.embedding
        pooled = [maps.mean((2, 3)) for maps in student.maps[:-1]]
        levels = [project(one) for project, one in zip(self.projections, pooled, strict=True)]
        hidden = [level.relu() for level in levels]
        logits = [head(one) for head, one in zip(self.heads, hidden, strict=True)]
        supervised, taught, target = logits, logits, student.logits
        if self.fused is not None:
            target = self.fused(torch.cat([*hidden, deepest], 1))
            supervised, taught = [*logits, target], [*logits, student.logits]
        labels = convert_soft_labels(batch.labels, at_least_float32(target).dtype)
        task = [F.cross_entropy(at_least_float32(one), labels) for one in supervised]
        learnt = [kl_divergence(one, target.detach(), self.temperature) for one in taught]
        hints = [F.mse_loss(at_least_float32(level), at_least_float32(deepest.detach())) for level in levels]
        return torch.stack(task).sum() + self.kd * torch.stack(learnt).sum() + self.hint * torch.stack(hints).sum()
