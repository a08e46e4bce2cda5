"""What bridges two networks' maps: their pairing, their sizes and their channels, built from measured shapes."""

from collections.abc import Iterable

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mgd_timm.criteria.base import SMALLEST_RMS, at_least_float32
from mgd_timm.features import Pair

MapShape = tuple[int, int, int]


def paired_maps(method: str, pair: Pair) -> list[tuple[MapShape, MapShape]]:
    """(channels, height, width) of student and teacher, map by map.

    Raises:
        ValueError: No maps, or a different number on each side: none is left out silently.
    """
    student, teacher = pair.student.maps, pair.teacher.maps
    if not teacher or len(student) != len(teacher):
        both = min(len(student), len(teacher))
        hint = f"maps='last' or maps='{both}'" if both > 1 else "maps='last' or a number"
        raise ValueError(
            f"{method} pairs maps one to one: the student shows {len(student)} {student}, the teacher {len(teacher)} "
            f"{teacher}. "
            f"Choose maps that both have: {hint}."
        )
    return list(zip(student, teacher, strict=True))


def check_positions(method: str, shapes: Iterable[tuple[MapShape, MapShape]]) -> None:
    """For what is normalised over positions: ValueError where a pair of maps has but one left at the smaller of both
    sizes."""
    for student, teacher in shapes:
        if max(map(min, student[1:], teacher[1:])) == 1:
            raise ValueError(
                f"{method} compares where maps are active: the student's {student} and the teacher's {teacher} have "
                f"one position "
                "in common, where every map is alike. Give larger images (--img-size) or other maps (--maps; in Python "
                "maps=)."
            )


def pool_larger(
    student: Float[Tensor, "b c h w"], teacher: Float[Tensor, "b c2 h2 w2"]
) -> tuple[Float[Tensor, "b c h3 w3"], Float[Tensor, "b c2 h3 w3"]]:
    """Both maps at the smaller height and the smaller width of the two, by adaptive average pooling."""
    size = (min(student.shape[2], teacher.shape[2]), min(student.shape[3], teacher.shape[3]))
    one, two = (m if m.shape[2:] == size else F.adaptive_avg_pool2d(m, size) for m in (student, teacher))
    return one, two


def damp_gradient(outputs: Float[Tensor, "..."], maps: Float[Tensor, "b c h w"]) -> Float[Tensor, "..."]:
    """Outputs as they are, with a smaller gradient if the maps that they were computed from hardly vary.

    BatchNorm multiplies the gradient of a map without variance by 316 = 1 / sqrt(1e-5), and several in a row by a
    power of it. The gradient is multiplied by spread / 0.001 where this is below 1.

    Args:
        outputs: Computed from the maps by layers with BatchNorm.
        maps: Their spread is the root mean square of their difference from the channel's mean.
    """
    values = at_least_float32(maps.detach())  # the square of 300 overflows float16
    spread = (values - values.mean((0, 2, 3), keepdim=True)).square().mean().sqrt()
    share = (spread / SMALLEST_RMS).clamp(max=1).to(outputs.dtype)
    return outputs.detach() + share * (outputs - outputs.detach())


class ChannelAdapter(nn.Sequential):
    """1x1 convolution and BatchNorm from the student's channels to the teacher's; nothing at all where they agree."""

    def __init__(self, student_channels: int, teacher_channels: int) -> None:
        super().__init__()
        if student_channels != teacher_channels:
            self.append(nn.Conv2d(student_channels, teacher_channels, 1, bias=False))
            self.append(nn.BatchNorm2d(teacher_channels))

    def forward(self, maps: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c2 h w"]:
        """The student's map with the teacher's channels."""
        return damp_gradient(super().forward(maps), maps) if len(self) else maps
