"""Pair the maps of two networks, and adapt their sizes and channels."""

from collections.abc import Iterable

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mgd_timm.criteria.base import SMALLEST_RMS, at_least_float32
from mgd_timm.features import Pair

MapShape = tuple[int, int, int]


def tapped_maps(method: str, pair: Pair) -> tuple[tuple[MapShape, ...], tuple[MapShape, ...]]:
    """Return (channels, height, width) of all maps of student and teacher, shallow to deep.

    Raises:
        ValueError: A network has no maps.
    """
    student, teacher = pair.student.maps, pair.teacher.maps
    if not student or not teacher:
        raise ValueError(
            f"{method} needs maps of both networks: the student has {len(student)} {student}, the teacher "
            f"{len(teacher)} {teacher}. Choose --maps stages or --maps last (in Python maps='last')."
        )
    return student, teacher


def paired_maps(method: str, pair: Pair, *, fewest: int = 1) -> list[tuple[MapShape, MapShape]]:
    """Return (channels, height, width) of student and teacher for each pair of maps.

    Args:
        method: Its name in messages.
        pair: Shapes of both networks.
        fewest: Smallest number of pairs.

    Raises:
        ValueError: A network has no maps, the numbers of maps differ, or there are fewer pairs.
    """
    student, teacher = tapped_maps(method, pair)
    if len(student) != len(teacher):
        raise ValueError(
            f"{method} pairs maps one to one: the student has {len(student)} {student}, the teacher {len(teacher)} "
            f"{teacher}. Choose maps that both have: --maps last or --maps {min(len(student), len(teacher))} (in "
            "Python maps='last')."
        )
    if len(student) < fewest:
        raise ValueError(
            f"{method} compares neighbouring maps: {len(student)} map of each network is chosen, expected {fewest} or "
            "more. Choose --maps stages or --maps 2 (in Python maps='stages')."
        )
    return list(zip(student, teacher, strict=True))


def check_positions(method: str, shapes: Iterable[tuple[MapShape, MapShape]]) -> None:
    """Check that maps have positions to normalise over.

    Raises:
        ValueError: A pair of maps has only one position at the smaller of both sizes.
    """
    for student, teacher in shapes:
        if max(map(min, student[1:], teacher[1:])) == 1:
            raise ValueError(
                f"{method} compares where maps are active: the student's {student} and the teacher's {teacher} have "
                "one position after pooling to the smaller size, where all maps are equal. Use larger images "
                "(--img-size) or other maps (--maps; in Python maps=)."
            )


def pool_larger(
    student: Float[Tensor, "b c h w"], teacher: Float[Tensor, "b c2 h2 w2"]
) -> tuple[Float[Tensor, "b c h3 w3"], Float[Tensor, "b c2 h3 w3"]]:
    """Average-pool both maps to the smaller height and the smaller width of the two."""
    size = (min(student.shape[2], teacher.shape[2]), min(student.shape[3], teacher.shape[3]))
    one, two = (m if m.shape[2:] == size else F.adaptive_avg_pool2d(m, size) for m in (student, teacher))
    return one, two


def damp_gradient(outputs: Float[Tensor, "..."], maps: Float[Tensor, "b c h w"]) -> Float[Tensor, "..."]:
    """Return the outputs unchanged, but scale their gradient down if the maps hardly vary.

    BatchNorm multiplies the gradient of a map without variance by 1 / sqrt(1e-5) = 316, several layers by a power of
    316. The gradient is multiplied by min(1, spread / 0.001), where the spread is the root mean square of the maps
    after their channels' means over batch and positions are subtracted.

    Args:
        outputs: Outputs of layers with BatchNorm.
        maps: Inputs of these layers.
    """
    values = at_least_float32(maps.detach())  # the square of 300 overflows float16
    spread = (values - values.mean((0, 2, 3), keepdim=True)).square().mean().sqrt()
    share = (spread / SMALLEST_RMS).clamp(max=1).to(outputs.dtype)
    return outputs.detach() + share * (outputs - outputs.detach())


class ChannelAdapter(nn.Sequential):
    """1x1 convolution and BatchNorm from the student's channels to the teacher's, empty if they are equal.

    The gradient is scaled down if the maps hardly vary (`damp_gradient`).
    """

    def __init__(self, student_channels: int, teacher_channels: int) -> None:
        super().__init__()
        if student_channels != teacher_channels:
            self.append(nn.Conv2d(student_channels, teacher_channels, 1, bias=False))
            self.append(nn.BatchNorm2d(teacher_channels))

    def forward(self, maps: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c2 h w"]:
        """Return the student's map with the teacher's channels."""
        return damp_gradient(super().forward(maps), maps) if len(self) else maps
