"""KDSVD: distillation of singular vectors (Lee, Kim and Song 2018)."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mgd_timm.criteria.adapters import ChannelAdapter, paired_maps
from mgd_timm.criteria.base import Criterion, at_least_float32, smallest_norm
from mgd_timm.features import Batch, Features, Pair


def bounded_inverse(values: Tensor, smallest: Tensor | float) -> Tensor:
    """Return 1 / values where |values| >= smallest, and values / smallest^2 below: bounded, and 0 at 0."""
    return values / values.abs().clamp_min(smallest).square()


class _RightVectors(torch.autograd.Function):
    """The first right singular vectors, with a gradient that is bounded if singular values are (nearly) equal or 0.

    PyTorch's own gradient is 0 / 0 if any two singular values are equal, as the zeros of two dead channels are.
    """

    @staticmethod
    def forward(ctx: Any, matrices: Tensor, count: int) -> tuple[Tensor, Tensor]:
        u, s, vh = torch.linalg.svd(matrices, full_matrices=False)
        ctx.save_for_backward(u, s, vh)
        values = s[:, :count]
        ctx.mark_non_differentiable(values)
        return vh[:, :count].mT, values

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        u, s, vh = ctx.saved_tensors
        grad = torch.zeros_like(vh.mT)
        grad[:, :, : grads[0].shape[2]] = grads[0]
        smallest = smallest_norm(u.shape[1] * vh.shape[2])
        gaps = s.square()[:, None, :] - s.square()[:, :, None]
        turned = vh @ grad
        within = (turned - turned.mT) * bounded_inverse(gaps, smallest * s[:, :1, None].clamp_min(smallest))
        inverse = bounded_inverse(s, smallest)  # no tensor of a number: a copy to the device would wait
        beyond = grad.mT - turned.mT @ vh  # the part outside the span of all right vectors
        return u @ (s[:, :, None] * within @ vh + inverse[:, :, None] * beyond), None


@torch.compiler.disable  # the decomposition synchronises with the device, which a CUDA graph does not allow
def right_vectors(maps: Float[Tensor, "b c h w"], count: int) -> tuple[Float[Tensor, "b c k"], Float[Tensor, "b k"]]:
    """Return the first right singular vectors of each sample's (positions x channels) matrix, and their singular
    values."""
    vectors, values = _RightVectors.apply(maps.flatten(2).mT, count)
    return vectors, values


def aligned(
    student: Float[Tensor, "b c m"], values: Float[Tensor, "b m"], teacher: Float[Tensor, "b c k"]
) -> Float[Tensor, "b c k"]:
    """Return for each teacher vector the student vector of largest |cosine|, with the sign that makes it positive.

    Vectors whose singular value is 0 up to rounding are an arbitrary basis of the null space: they are only chosen if
    there are no others.
    """
    cosines = student.mT @ teacher
    real = values > 8 * torch.finfo(values.dtype).eps * values[:, :1]
    best: Int[Tensor, "b 1 k"] = torch.where(real[:, :, None], cosines.abs(), -1).argmax(1, keepdim=True)
    chosen = student.gather(2, best.expand(-1, student.shape[1], -1))
    return chosen * cosines.gather(1, best).sign()


def vector_relations(after: Float[Tensor, "b c k"], before: Float[Tensor, "b c2 k"]) -> Float[Tensor, "b c c2 k"]:
    """Return exp(-(a - b)^2 / 8) for all pairs of entries of two maps' vectors."""
    return torch.exp(-(after[:, :, None] - before[:, None]).square() / 8)


class KDSVD(Criterion):
    """Singular vectors: sum over neighbouring maps of sum((R_s - R_t)^2) / b, R = exp(-(v_i - v_(i-1))^2 / 8) for any
    two channels.

    v are the first k right singular vectors of a map as a matrix of positions by channels, scaled by the teacher's
    singular values, which are divided by their norm. The student's are the closest ones among its first k + 3.

    Reference: Lee, Kim, Song, "Self-supervised Knowledge Distillation Using Singular Value Decomposition" (arXiv
    1807.06819), section 3, in RepDistiller's form of the authors' code.

    Weight: 1 with 1 for the task loss, k = 1 (the MGD authors' default; mdistiller's configs/cifar100/kdsvd.yaml, which
    trains resnet32x4 to resnet8x4; there the matrix is channels x rows by columns of the map).

    Differs: a right singular vector has one entry per channel, so sizes do not matter. If channels differ, a 1x1
    convolution and BatchNorm adapt the student's map (there: an error). Maps need not be square. The sign of a singular
    vector is arbitrary: the teacher's is chosen such that the sum of the entries is 0 or more (there: the library's
    choice); after a ReLU all entries of its first vector are then 0 or more. Gradient terms of singular values that are
    equal or 0 are 0 (the authors' code also drops terms that are not finite, among 5 singular values); those of nearly
    equal or nearly zero ones are at most 1 / |F|, with |F| the norm of a map with a root mean square of 0.001. On GPUs
    the decomposition synchronises with the device. For RepDistiller's pairing of maps see fitnet.

    Args:
        pair: Shapes of both networks, with the same number of maps, 2 or more. Batches have 2 or more samples if a
            student's map has one position and other channels than the teacher's, because of BatchNorm.
        vectors: k, 1 or more, at most the smallest of all maps' channels and positions.

    Raises:
        ValueError: There are fewer than 2 maps, the numbers of maps differ, or k is larger than a map's channels or
            positions allow.
    """

    weight = 1.0
    needs = frozenset({"maps"})

    def __init__(self, pair: Pair, *, vectors: int = 1) -> None:
        super().__init__(pair)
        maps = paired_maps("KDSVD", pair, fewest=2)
        rank = min(min(t[0], *(m[1] * m[2] for m in (s, t))) for s, t in maps)
        if not 1 <= vectors <= rank:
            raise ValueError(
                f"vectors={vectors}: expected 1 to {rank}, the smallest number of channels or positions of {maps}."
            )
        self.vectors = vectors
        self.adapters = nn.ModuleList(ChannelAdapter(s[0], t[0]) for s, t in maps)

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Float[Tensor, ""]:
        """Return the loss, at least float32."""
        losses, before = [], None
        with torch.autocast(student.maps[0].device.type, enabled=False):
            for adapter, s, t in zip(self.adapters, student.maps, teacher.maps, strict=True):
                adapted = adapter(at_least_float32(s))
                rank = min(adapted.shape[1], adapted.shape[2] * adapted.shape[3])
                target, values = right_vectors(at_least_float32(t), self.vectors)
                target = target * torch.where(target.sum(1, keepdim=True) < 0, -1, 1)
                vectors, sizes = right_vectors(adapted, min(self.vectors + 3, rank))
                found = aligned(vectors, sizes, target)
                scale = nn.functional.normalize(values, dim=1)[:, None]
                now = found * scale, target * scale
                if before is not None:
                    one, two = (vector_relations(a, b) for a, b in zip(now, before, strict=True))
                    losses.append((one - two).square().sum() / len(s))
                before = now
        return torch.stack(losses).sum()
