"""AFDS: attentive feature distillation (Wang et al. 2020)."""

import torch
from einops import reduce
from jaxtyping import Float
from torch import Tensor, nn

from mgd_timm.criteria.adapters import ChannelAdapter, check_positions, paired_maps, pool_larger
from mgd_timm.criteria.base import Criterion, at_least_float32, smallest_norm
from mgd_timm.features import Batch, Features, Pair


def _unit(maps: Tensor) -> Tensor:
    """Divide each channel by its norm over positions. The root mean square of a channel counts as at least 0.001."""
    norms = torch.linalg.vector_norm(maps, dim=(2, 3), keepdim=True) + 1e-6
    return maps / norms.clamp_min(smallest_norm(maps.shape[2] * maps.shape[3]))


def attentive_difference(
    student: Float[Tensor, "b c h w"], teacher: Float[Tensor, "b c h2 w2"], attention: Float[Tensor, "b c"]
) -> Float[Tensor, ""]:
    """Return the mean squared difference of channels of unit norm, weighted by the attention over its sum."""
    student, teacher, attention = (at_least_float32(v) for v in (student, teacher, attention))
    student, teacher = pool_larger(student, teacher)
    per_channel = reduce((_unit(student) - _unit(teacher)).pow(2), "b c h w -> b c", "mean")
    return (attention / attention.sum(1, keepdim=True) * per_channel).sum(1).mean()


class ChannelAttention(nn.Sequential):
    """Weight of each channel of the teacher's map: sigmoid(1x1 convolution(ReLU(1x1 convolution(mean over
    positions))))."""

    def __init__(self, channels: int, hidden: int) -> None:
        convs = nn.Conv2d(channels, hidden, 1), nn.Conv2d(hidden, channels, 1)
        for conv in convs:
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
            assert conv.bias is not None
            nn.init.zeros_(conv.bias)
        super().__init__(nn.AdaptiveAvgPool2d(1), convs[0], nn.ReLU(), convs[1], nn.Flatten())

    def forward(self, maps: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c"]:
        """Return weights in (0, 1), at least float32."""
        return at_least_float32(super().forward(maps)).sigmoid()


class AFDS(Criterion):
    """Attentive feature distillation: mean over map pairs of mean_b sum_c rho_c mean_hw (F_s,c/|F_s,c| -
    F_t,c/|F_t,c|)^2.

    A small network, trained with the student, computes rho from the teacher's channel means; its sum over channels is
    1.

    Reference: Wang, Gao, Zhao, Li, Dou, Xu, "Pay Attention to Features, Transfer Learn Faster CNNs" (ICLR 2020,
    openreview ryxyCeHtPB), attentive feature distillation; AberHu/Knowledge-Distillation-Zoo (its AFD).

    Weight: 500 (the Zoo's CIFAR-10 script; its three stages are averaged).

    Differs: same as the Zoo, whose attention is two 1x1 convolutions and a sigmoid because the paper's was unstable.
    The paper's other half, feature selection by pruning, is not implemented. If channels differ, a 1x1 convolution and
    BatchNorm adapt the student's map; if sizes differ, the larger map is average-pooled (paper and Zoo: equal shapes
    only). A channel of a sample with a root mean square below 0.001 is not scaled up to unit norm, and the gradient of
    the adapter is scaled down if the student's maps hardly vary: dead channels would get gradients of 1e6.

    Args:
        pair: Shapes of both networks, with the same number of maps, 1 or more. Each pair has 2 or more positions at the
            smaller of both sizes.
        hidden: Width of the attention's hidden layer per channel of the teacher's map, positive (the Zoo's att_f).

    Raises:
        ValueError: A network has no maps, the numbers of maps differ, a pair has only one position in common, or
            `hidden` leaves no channel.
    """

    weight = 500.0
    needs = frozenset({"maps"})

    def __init__(self, pair: Pair, *, hidden: float = 1.0) -> None:
        super().__init__(pair)
        shapes = paired_maps("AFDS", pair)
        check_positions("AFDS", shapes)
        fewest = min(t[0] for _, t in shapes)
        if not 0 < hidden < float("inf") or int(fewest * hidden) < 1:
            raise ValueError(
                f"hidden={hidden}: expected a finite number that leaves 1 channel or more of the teacher's {fewest}."
            )
        self.adapters = nn.ModuleList(ChannelAdapter(s[0], t[0]) for s, t in shapes)
        self.attentions = nn.ModuleList(ChannelAttention(t[0], int(t[0] * hidden)) for _, t in shapes)

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Float[Tensor, ""]:
        """Return the loss, at least float32."""
        parts = zip(self.adapters, self.attentions, student.maps, teacher.maps, strict=True)
        return torch.stack([attentive_difference(adapt(s), t, attend(t)) for adapt, attend, s, t in parts]).mean()
