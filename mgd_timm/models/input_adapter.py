"""Adapt the student's images to the normalisation and size that a teacher expects."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from timm.models import get_model_input_config
from torch import Tensor, nn

from mgd_timm.models.pretrained_cfg import read_channel_values


class InputAdapter(nn.Module):
    """Re-normalise images for a teacher, and resize them if it needs another size.

    Args:
        mean, std: Normalisation of the images, one value per channel, of pixels in [0, 1].
        teacher_mean, teacher_std: Normalisation that the teacher was trained with.
        size: (height, width) in pixels for the teacher; None keeps the images' size.

    Raises:
        ValueError: Numbers of channels differ.
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self,
        mean: Sequence[float],
        std: Sequence[float],
        teacher_mean: Sequence[float],
        teacher_std: Sequence[float],
        size: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        stats = [torch.tensor(v, dtype=torch.float64) for v in (mean, std, teacher_mean, teacher_std)]
        if len({len(v) for v in stats}) != 1:
            raise ValueError(f"mean and std: expected one value per channel each, got {[v.tolist() for v in stats]}.")
        ours_mean, ours_std, its_mean, its_std = stats
        self.register_buffer("scale", (ours_std / its_std).float()[:, None, None], persistent=False)
        self.register_buffer("shift", ((ours_mean - its_mean) / its_std).float()[:, None, None], persistent=False)
        self.same = bool((ours_mean == its_mean).all() and (ours_std == its_std).all())
        self.size = size

    def values(self) -> list[object]:
        """Return scale and shift per channel, and the size, as JSON values for fingerprints."""
        return [self.scale.flatten().tolist(), self.shift.flatten().tolist(), self.size]

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h2 w2"]:
        """Return the images in the teacher's normalisation and size."""
        if not self.same:
            images = images * self.scale + self.shift
        if self.size is not None and tuple(images.shape[2:]) != self.size:
            images = F.interpolate(images, size=self.size, mode="bilinear", align_corners=False, antialias=True)
        return images


def build_input_adapter(
    teacher: nn.Module,
    mean: Sequence[float],
    std: Sequence[float],
    input_size: tuple[int, int, int],
    side: int | None = None,
) -> InputAdapter:
    """Build the adapter from the student's images to a teacher's normalisation and size.

    Args:
        teacher: A timm model; its pretrained_cfg gives mean, std and input size.
        mean, std: Normalisation of the student's images, per channel, of pixels in [0, 1].
        input_size: (channels, height, width) of the student's images.
        side: Height and width in pixels for a teacher whose input size is not fixed; None keeps the images' size.
    """
    config = getattr(teacher, "pretrained_cfg", {}) or {}
    its_mean, its_std = read_channel_values(config, "mean") or (), read_channel_values(config, "std") or ()
    if len(its_mean) != len(mean) or len(its_std) != len(std):
        its_mean, its_std = tuple(mean), tuple(std)
    inputs = get_model_input_config(teacher)
    fixed = tuple(inputs["input_size"][1:]) if inputs["fixed_input_size"] else None
    size = fixed or ((side, side) if side is not None else input_size[1:])
    return InputAdapter(mean, std, its_mean, its_std, (size[0], size[1]) if size != input_size[1:] else None)
