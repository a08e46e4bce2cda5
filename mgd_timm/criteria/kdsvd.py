"""KDSVD: distillation of singular vectors (Lee, Kim and Song 2018)."""

from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mgd_timm.criteria.adapters import ChannelAdapter, paired_maps
from mgd_timm.criteria.base import Criterion, Need, at_least_float32, smallest_norm
from mgd_timm.features import Batch, Features, Pair


def bounded_inverse(values: Tensor, smallest: Tensor) -> Tensor:
    """1 / values, and from there to 0 along a line where |values| is below `smallest`."""
    return values / torch.maximum(values.abs(), smallest).square()


class _RightVectors(torch.autograd.Function):
    """The first right singular vectors, with a gradient that drops the terms of singular values that are equal or 0.

    PyTorch's own gradient is 0 / 0 as soon as any two singular values agree, and a map with two dead channels has two
    zeros.
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
        inverse = bounded_inverse(s, s.new_tensor(smallest))
        beyond = grad.mT - turned.mT @ vh  # what of it lies outside the span of all right vectors
        return u @ (s[:, :, None] * within @ vh + inverse[:, :, None] * beyond), None


@torch.compiler.disable  # the decomposition waits for the device, so it cannot stand in a CUDA graph
def right_vectors(maps: Float[Tensor, "b c h w"], count: int) -> tuple[Float[Tensor, "b c k"], Float[Tensor, "b k"]]:
    """The first right singular vectors of every sample's (positions x channels) matrix, and their singular values."""
    vectors, values = _RightVectors.apply(maps.flatten(2).mT, count)
    return vectors, values


def aligned(
    student: Float[Tensor, "b c m"], values: Float[Tensor, "b m"], teacher: Float[Tensor, "b c k"]
) -> Float[Tensor, "b c k"]:
    """For each vector of the teacher the student's of largest |cosine|, with the sign that makes the cosine positive.

    Vectors of singular values that are 0 but for rounding are an arbitrary basis of what the map lacks: none of them is
    chosen beside one that is not.
    """
    cosines = student.mT @ teacher
    real = values > 8 * torch.finfo(values.dtype).eps * values[:, :1]
    best: Int[Tensor, "b 1 k"] = torch.where(real[:, :, None], cosines.abs(), -1).argmax(1, keepdim=True)
    chosen = student.gather(2, best.expand(-1, student.shape[1], -1))
    return chosen * cosines.gather(1, best).sign()


def vector_relations(after: Float[Tensor, "b c k"], before: Float[Tensor, "b c2 k"]) -> Float[Tensor, "b c c2 k"]:
    """exp(-(a - b)^2 / 8) between all entries of two maps' vectors."""
    return torch.exp(-(after[:, :, None] - before[:, None]).square() / 8)


class KDSVD(Criterion):
    """Singular vectors: sum over neighbouring maps of sum((R_s - R_t)^2) / b, R = exp(-(v_i - v_(i-1))^2 / 8) for any
    two channels.

    v are the k first right singular vectors of a map as a matrix of positions by channels, scaled by the teacher's
    singular values of unit norm; the student's are the closest of its k + 3 first.

    Reference: Lee, Kim, Song, "Self-supervised Knowledge Distillation Using Singular Value Decomposition" (arXiv
    1807.06819), section 3, in RepDistiller's form of the authors' code.

    Weight: 1 (the MGD authors' default; no published script trains with it), with k = 1.

    Differs: a right singular vector has as many entries as the map has channels, and sizes do not matter: where
    channels differ the student's map passes a 1x1 convolution and BatchNorm (there: refused), and maps need not be
    square. A teacher's vector has no sign of its own: we choose a sum of 0 or more (there: what the library gives),
    which for maps after a ReLU is the vector of entries of one sign. Terms of the gradient between singular values that
    agree are dropped (the authors' code: likewise what is not finite, with 5 singular values in all). On GPUs the
    decomposition waits for the device. RepDistiller's pairing of maps: see fitnet.

    Args:
        pair: Shapes of both networks; the numbers of maps must agree and be at least 2. Batches of 2 or more where a
            student's map has one position and other channels: there is BatchNorm.
        vectors: k, 1 or more, at most the rank that all maps can have.

    Raises:
        ValueError: Fewer than 2 maps, a different number on each side, or a k that a map's channels or positions do not
            allow.
    """

    weight: ClassVar[float] = 1.0
    needs: ClassVar[frozenset[Need]] = frozenset({"maps"})

    def __init__(self, pair: Pair, *, vectors: int = 1) -> None:
        super().__init__(pair)
        maps = paired_maps("KDSVD", pair)
        if len(maps) < 2:
            raise ValueError(
                "KDSVD relates each map to the one before it: 1 is tapped, expected 2 or more, such as maps='3'."
            )
        rank = min(min(t[0], *(m[1] * m[2] for m in (s, t))) for s, t in maps)
        if not 1 <= vectors <= rank:
            raise ValueError(
                f"vectors={vectors}: expected 1 to {rank}, the least of the channels and positions of {maps}."
            )
        self.vectors = vectors
        self.adapters = nn.ModuleList(ChannelAdapter(s[0], t[0]) for s, t in maps)

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Float[Tensor, ""]:
        """Scalar, at least float32."""
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
