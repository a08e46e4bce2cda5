"""FT: factor transfer (Kim et al. 2018)."""

from collections.abc import Sequence
from itertools import pairwise
from typing import ClassVar, Literal

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mgd_timm.criteria.adapters import check_positions, damp_gradient, pool_larger
from mgd_timm.criteria.at import attention
from mgd_timm.criteria.base import Criterion, Need, at_least_float32
from mgd_timm.features import Batch, Features, Pair


def factor_transfer(student: Float[Tensor, "b c h w"], teacher: Float[Tensor, "b c2 h2 w2"]) -> Float[Tensor, ""]:
    """Mean absolute difference of both factors' attentions, the larger factor average-pooled to the smaller one's
    size."""
    student, teacher = pool_larger(at_least_float32(student), at_least_float32(teacher))
    return (attention(student) - attention(teacher)).abs().mean()


def layers(
    widths: Sequence[int], conv: type[nn.Conv2d] | type[nn.ConvTranspose2d], *, norm: bool = False
) -> nn.Sequential:
    """3x3 convolutions of these widths, each with LeakyReLU(0.1) and, if so wished, BatchNorm before it."""
    stack = nn.Sequential()
    for inputs, outputs in pairwise(widths):
        stack.append(conv(inputs, outputs, 3, padding=1))
        if norm:
            stack.append(nn.BatchNorm2d(outputs))
        stack.append(nn.LeakyReLU(0.1))
    return stack


class Paraphraser(nn.Module):
    """An autoencoder of a frozen teacher's last map: mean((decoder(encoder(F_t)) - F_t)^2), which needs no labels.

    Args:
        channels: Of the teacher's map.
        factor_channels: Of the factor, which is what the encoder gives.
    """

    def __init__(self, channels: int, factor_channels: int) -> None:
        super().__init__()
        widths = (channels, channels, factor_channels, factor_channels)
        self.encoder = layers(widths, nn.Conv2d)
        self.decoder = layers(widths[::-1], nn.ConvTranspose2d)

    def forward(self, batch: Batch, teacher: Features) -> tuple[dict[str, Float[Tensor, ""]], Float[Tensor, "b k"]]:
        """The loss "reconstruction", and the teacher's logits. `batch` is not read."""
        target = teacher.maps[-1]
        rebuilt = self.decoder(self.encoder(target))
        return {"reconstruction": F.mse_loss(at_least_float32(rebuilt), at_least_float32(target))}, teacher.logits


class FT(Criterion):
    """Factor transfer: mean |q(T(F_s)) - q(P(F_t))| on the last maps, q = normalised mean over channels of squares.

    P, the paraphraser's encoder, is half of an autoencoder of the teacher's map, fitted before the run and then frozen;
    T, the translator, is trained with the student.

    Reference: Kim, Park, Kwak, "Paraphrasing Complex Network: Network Compression via Factor Transfer" (arXiv
    1802.04977); RepDistiller (distiller_zoo/FT.py, models/util.py).

    Weight: 200 (RepDistiller's script), k=0.5; the paraphraser is fitted for 30 epochs, at a learning rate of 0.01 at
    most unless fitting_lr is given (RepDistiller: 0.01 for resnet and WRN students, else the run's).

    Differs: as RepDistiller: q of the factors is compared (the paper, from memory, and Knowledge-Distillation-Zoo:
    whole factors of unit norm), and the paraphraser has no BatchNorm (an option there). Factors of unequal size are
    pooled on both axes (there: square maps).

    Args:
        pair: Shapes of both networks; each shows 1 map or more, the deepest is read. Both have 2 positions or more in
            common.
        k: Channels of the factor per channel of the teacher's map, positive.

    Raises:
        ValueError: No maps, deepest maps of one position, or a k that leaves no channel.
    """

    weight: ClassVar[float] = 200.0
    needs: ClassVar[frozenset[Need]] = frozenset({"maps"})
    fits: ClassVar[Literal["teacher", "student"] | None] = "teacher"

    def __init__(self, pair: Pair, *, k: float = 0.5) -> None:
        super().__init__(pair)
        deepest = (student_channels, *_), (channels, *_) = last_maps("FT", pair)
        check_positions("FT", [deepest])
        if not 0 < k < float("inf") or int(channels * k) < 1:
            raise ValueError(
                f"k={k}: expected a finite number that leaves 1 channel or more of the teacher's {channels}."
            )
        factor = int(channels * k)
        self.paraphraser = Paraphraser(channels, factor)
        self.translator = layers((student_channels, student_channels, factor, factor), nn.Conv2d, norm=True)
        self.train()

    def fitting(self) -> nn.Module:
        """The paraphraser, which takes gradients until the next call of `train`."""
        return self.paraphraser.requires_grad_(True)

    def train(self, mode: bool = True) -> "FT":
        """As ever, but that the paraphraser is frozen, in eval mode and without gradients."""
        super().train(mode)
        self.paraphraser.eval().requires_grad_(False)
        return self

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Float[Tensor, ""]:
        """Scalar, at least float32."""
        factor = damp_gradient(self.translator(student.maps[-1]), student.maps[-1])
        return factor_transfer(factor, self.paraphraser.encoder(teacher.maps[-1]))


def last_maps(method: str, pair: Pair) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """(channels, height, width) of the deepest map of student and teacher.

    Raises:
        ValueError: One of them shows none.
    """
    student, teacher = pair.student.maps, pair.teacher.maps
    if not student or not teacher:
        raise ValueError(
            f"{method} reads the deepest maps: the student shows {len(student)} {student}, the teacher {len(teacher)} "
            f"{teacher}. "
            "Tap one of each: maps='last'."
        )
    return student[-1], teacher[-1]
