"""OFA-KD: one-for-all distillation between architectures (Hao et al. 2023)."""

import torch
from einops import rearrange
from jaxtyping import Float, Int
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from mgd_timm.criteria.adapters import MapShape, damp_gradient
from mgd_timm.criteria.base import Criterion, at_least_float32, check_one_label_space, target_classes
from mgd_timm.criteria.standardisation import standardise
from mgd_timm.features import Batch, Features, Pair
from mgd_timm.recipe.granularity import check_temperature


def enhanced_divergence(
    student_logits: Float[Tensor, "b k"],
    teacher_logits: Float[Tensor, "b k"],
    targets: Int[Tensor, " b"],
    eps: float,
    temperature: float,
) -> Float[Tensor, " b"]:
    """Return the cross-entropy of each sample with the teacher's distribution, its target class y enhanced.

    - sum_k ((p_t(k) + [k = y])^eps - [k = y]) log p_s(k), with p = softmax(z / T).
    """
    log_student = torch.log_softmax(at_least_float32(student_logits) / temperature, 1)
    teacher = torch.softmax(at_least_float32(teacher_logits) / temperature, 1)
    target = torch.zeros_like(teacher).scatter(1, targets[:, None], 1.0)
    return -(((teacher + target) ** eps - target) * log_student).sum(1)


def _separable(inputs: int, outputs: int) -> list[nn.Module]:
    """Build two depthwise-separable 3x3 convolutions with BatchNorm and ReLU. The first one halves the sides."""
    layers: list[nn.Module] = []
    for stride, width in ((2, inputs), (1, outputs)):
        layers.append(nn.Conv2d(inputs, inputs, 3, stride, padding=1, groups=inputs, bias=False))
        layers += [nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    return layers


def map_branch(channels: int, deeper: int, width: int, num_classes: int) -> nn.Sequential:
    """Build a branch from a convolutional map to logits: `_separable` layers per deeper stage (or a 1x1 convolution),
    mean, classifier."""
    layers: list[nn.Module] = []
    for left in reversed(range(deeper)):
        layers += _separable(channels, 2 * channels if left else width)
        channels *= 2
    layers = layers or [nn.Conv2d(channels, width, 1)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, num_classes))


class TokenBranch(nn.Module):
    """Branch from a map of tokens to logits: merging of 2 x 2 tokens while sides are 14 or more, transformer blocks,
    mean, classifier."""

    def __init__(self, shape: MapShape, deeper: int, num_classes: int) -> None:
        super().__init__()
        channels, *sides = shape
        self.merging = nn.ModuleList()
        while min(sides) >= 14 and not any(side % 2 for side in sides):
            sides = [side // 2 for side in sides]
            layers = nn.LayerNorm(4 * channels), nn.Linear(4 * channels, channels, bias=False), nn.GELU()
            self.merging.append(nn.Sequential(*layers))
        heads = 1 if channels % 4 else 4
        self.blocks = nn.Sequential(*(Block(channels, heads) for _ in range(max(deeper, 1))))
        self.classifier = nn.Linear(channels, num_classes)

    def forward(self, maps: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k"]:
        """Return logits."""
        for merge in self.merging:
            maps = rearrange(merge(rearrange(maps, "b c (h u) (w v) -> b h w (u v c)", u=2, v=2)), "b h w c -> b c h w")
        return self.classifier(self.blocks(rearrange(maps, "b c h w -> b (h w) c")).mean(1))


def _start(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    elif isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class OFA(Criterion):
    """One-for-all: the student's logits, and a branch's logits from each of its maps, learn the teacher's with an
    enhanced target.

    L = L_eps(z_s, z_t) + branch_weight sum_i L_eps(branch_i(F_s,i), z_t), L_eps = - sum_k ((p_t(k) + [k = y])^eps - [k
    = y]) log p_s(k). Only the teacher's logits are used, so that any architecture can teach any other.

    Reference: Hao et al., "One-for-All: Bridge the Gap Between Heterogeneous Architectures in Knowledge Distillation"
    (arXiv 2310.19444), the loss with adaptive target enhancement.

    Weight: 1 with 1 for the task loss, eps 1, T 1, branch_weight 1 (defaults of the official code; its README: eps 1.5
    for DeiT-T -> ResNet-18 on ImageNet, eps 1 on CIFAR-100, where the authors' issue threads have branch_weight 0.1).

    Differs: the loss is the official code's, which applies the exponent to all classes (paper: to the target only) and
    has no T^2. The branches are those of the official code: separable convolutions for maps that shrink, transformer
    blocks for maps of one size (ViT, mixers); its 4 stages are the tapped maps here. A single map is treated as
    convolutional, even a ViT's, because its shape is no evidence. A ViT's maps have no class token here, so that their
    branch averages tokens; merging keeps the width and always ends with GELU. Labels that are distributions (mixup)
    count as their most likely class. The smallest possible loss is the teacher's entropy, not 0. If a map hardly varies
    over batch and positions (root mean square below 0.001), the gradient of its branch is scaled down: its BatchNorm
    layers would multiply it by up to 316 each.

    Args:
        pair: Shapes of both networks, with the same number of classes; the student has 1 or more maps. Batches have 2
            or more samples if convolutions reduce a map to one position, because of BatchNorm.
        eps: Exponent, 1 or more; the larger it is, the more the target counts. One for all, or one per map and a last
            one for the logits.
        temperature: T > 0.
        branch_weight: Weight of the sum over branches, above 0.

    Raises:
        ValueError: The networks have different numbers of classes, the student has no maps, or a value is out of range.
    """

    weight = 1.0
    needs = frozenset({"logits"})
    per_sample = True
    student_needs = frozenset({"maps"})

    def __init__(
        self, pair: Pair, *, eps: float | tuple[float, ...] = 1.0, temperature: float = 1.0, branch_weight: float = 1.0
    ) -> None:
        super().__init__(pair)
        check_one_label_space("OFA-KD", pair)
        maps, classes = pair.student.maps, pair.student.num_classes
        if not maps:
            raise ValueError(
                "OFA-KD needs maps of the student, and there are none: choose --maps stages or --maps last (in Python "
                "maps='stages')."
            )
        self.eps = (eps,) * (len(maps) + 1) if isinstance(eps, float | int) else tuple(eps)
        if len(self.eps) != len(maps) + 1 or not all(1 <= value < float("inf") for value in self.eps):
            raise ValueError(
                f"eps={eps}: expected a number of 1 or more, or {len(maps) + 1} such numbers, one per map and one "
                "for the logits."
            )
        if not 0 < branch_weight < float("inf"):
            raise ValueError(
                f"branch_weight={branch_weight}: expected a positive, finite number; without branches use kd."
            )
        self.temperature, self.branch_weight = check_temperature(temperature), branch_weight
        width = max(pair.student.embed_dim, pair.teacher.embed_dim)
        tokens = len(maps) > 1 and len({shape[1:] for shape in maps}) == 1
        self.branches = nn.ModuleList()
        for deeper, shape in zip(reversed(range(len(maps))), maps, strict=True):
            branch = TokenBranch(shape, deeper, classes) if tokens else map_branch(shape[0], deeper, width, classes)
            self.branches.append(branch.apply(_start))

    def sample_values(self, student: Features, teacher: Features, batch: Batch) -> Float[Tensor, " b"]:
        """Return the loss of each sample, at least float32."""
        targets = target_classes(batch.labels)
        logits = [damp_gradient(branch(maps), maps) for branch, maps in zip(self.branches, student.maps, strict=True)]
        if self.standardised:
            logits = [standardise(own) for own in logits]
        *branches, final = (
            enhanced_divergence(one, teacher.logits, targets, eps, self.temperature)
            for one, eps in zip((*logits, student.logits), self.eps, strict=True)
        )
        return final + self.branch_weight * torch.stack(branches).sum(0)
