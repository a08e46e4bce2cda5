"""FT: factor transfer (Kim et al. 2018)."""

from collections.abc import Sequence
from itertools import pairwise

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mgd_timm.criteria.adapters import check_positions, damp_gradient, pool_larger, tapped_maps
from mgd_timm.criteria.at import attention
from mgd_timm.criteria.base import Criterion, at_least_float32
from mgd_timm.features import Batch, Features, Pair


def factor_transfer(student: Float[Tensor, "b c h w"], teacher: Float[Tensor, "b c2 h2 w2"]) -> Float[Tensor, ""]:
    """Return the mean absolute difference of both factors' attentions. The larger factor is average-pooled to the
    smaller size."""
    student, teacher = pool_larger(at_least_float32(student), at_least_float32(teacher))
    return (attention(student) - attention(teacher)).abs().mean()


def layers(
    widths: Sequence[int], conv: type[nn.Conv2d] | type[nn.ConvTranspose2d], *, norm: bool = False
) -> nn.Sequential:
    """Build 3x3 convolutions of these widths, each followed by LeakyReLU(0.1).

    Args:
        widths: Channels of the input and of each layer's output.
        conv: Class of the convolutions.
        norm: Add BatchNorm before each LeakyReLU.
    """
    stack = nn.Sequential()
    for inputs, outputs in pairwise(widths):
        stack.append(conv(inputs, outputs, 3, padding=1))
        if norm:
            stack.append(nn.BatchNorm2d(outputs))
        stack.append(nn.LeakyReLU(0.1))
    return stack


class Paraphraser(nn.Module):
    """An autoencoder of a frozen teacher's last map, trained without labels: mean((decoder(encoder(F_t)) - F_t)^2).

    Args:
        channels: Channels of the teacher's map.
        factor_channels: Channels of the factor, the output of the encoder.
    """

    def __init__(self, channels: int, factor_channels: int) -> None:
        super().__init__()
        widths = (channels, channels, factor_channels, factor_channels)
        self.encoder = layers(widths, nn.Conv2d)
        self.decoder = layers(widths[::-1], nn.ConvTranspose2d)

    def forward(self, batch: Batch, teacher: Features) -> tuple[dict[str, Float[Tensor, ""]], Float[Tensor, "b k"]]:
        """Return the loss "reconstruction", and the teacher's logits. `batch` is not used."""
        target = teacher.maps[-1]
        rebuilt = self.decoder(self.encoder(target))
        return {"reconstruction": F.mse_loss(at_least_float32(rebuilt), at_least_float32(target))}, teacher.logits


class FT(Criterion):
    """Factor transfer: mean |q(T(F_s)) - q(P(F_t))| on the last maps, q = normalised mean over channels of squares.

    P, the paraphraser's encoder, is half of an autoencoder of the teacher's map, pre-trained before the run and then
    frozen. T, the translator, is trained with the student.

    Reference: Kim, Park, Kwak, "Paraphrasing Complex Network: Network Compression via Factor Transfer" (arXiv
    1802.04977); RepDistiller (distiller_zoo/FT.py, models/util.py).

    Weight: 200 (RepDistiller's script), k=0.5. The paraphraser is pre-trained for 30 epochs, at a learning rate of 0.01
    or less unless fitting_lr is given (RepDistiller: 0.01 for resnet and WRN students, otherwise the run's).

    Differs: same as RepDistiller: it compares q of the factors (the paper, from memory, and Knowledge-Distillation-Zoo:
    the factors themselves, of unit norm), and the paraphraser has no BatchNorm (an option there). Factors of different
    sizes are pooled on both axes (there: square maps). If the student's maps hardly vary over batch and positions (root
    mean square below 0.001), the translator's gradient is scaled down: its three BatchNorm layers would multiply it by
    up to 1e7. A factor with a root mean square below 0.001 is not scaled up to unit norm.

    Args:
        pair: Shapes of both networks, each with 1 or more maps. The deepest ones are used, and have 2 or more positions
            at the smaller of both sizes.
        k: Channels of the factor per channel of the teacher's map, positive.

    Raises:
        ValueError: A network has no maps, the deepest maps have only one position in common, or k leaves no channel.
    """

    weight = 200.0
    needs = frozenset({"maps"})
    fits = "teacher"

    def __init__(self, pair: Pair, *, k: float = 0.5) -> None:
        super().__init__(pair)
        student, teacher = tapped_maps("FT", pair)
        check_positions("FT", [(student[-1], teacher[-1])])
        student_channels, channels = student[-1][0], teacher[-1][0]
        factor = int(channels * k) if 0 < k < float("inf") else 0
        if factor < 1:
            raise ValueError(f"k={k}: expected a finite number with 1 channel or more of the teacher's {channels}.")
        self.paraphraser = Paraphraser(channels, factor)
        self.translator = layers((student_channels, student_channels, factor, factor), nn.Conv2d, norm=True)
        self.train()

    def fitting(self) -> nn.Module:
        """Return the paraphraser, which is trainable until the next call of `train`."""
        return self.paraphraser.requires_grad_(True)

    def train(self, mode: bool = True) -> "FT":
        """Set the mode; the paraphraser stays frozen, in eval mode and without gradients."""
        super().train(mode)
        self.paraphraser.eval().requires_grad_(False)
        return self

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Float[Tensor, ""]:
        """Return the loss, at least float32."""
        factor = damp_gradient(self.translator(student.maps[-1]), student.maps[-1])
        return factor_transfer(factor, self.paraphraser.encoder(teacher.maps[-1]))
