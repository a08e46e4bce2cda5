"""CIFAR ShuffleNet with three groups (Zhang et al., arXiv 1707.01083), as a timm model.

Differs: a 1x1 stem instead of a strided 3x3 one and pooling, and a ReLU after the depthwise convolution, as in
RepDistiller, whose checkpoints have the same keys except the classifier's (`linear` there).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mgd_timm.models.cifar.base import Block, CifarNet, conv_bn, register, shuffle_channels

__all__ = ["CifarShuffleV1"]

_STEM = 24


class Unit(Block):
    """Grouped 1x1, shuffle, 3x3 depthwise, grouped 1x1; the input is added, or pooled and concatenated where the stride
    is 2."""

    last_act = "act3"

    def __init__(self, in_chs: int, out_chs: int, stride: int, groups: int) -> None:
        super().__init__()
        middle = out_chs // 4
        self.stride = stride
        self.groups = 1 if in_chs == _STEM else groups  # too few channels there to group
        self.conv1, self.bn1 = conv_bn(in_chs, middle, 1, groups=self.groups)
        self.act1 = nn.ReLU(inplace=True)
        self.conv2, self.bn2 = conv_bn(middle, middle, 3, stride, groups=middle)
        self.act2 = nn.ReLU(inplace=True)
        self.conv3, self.bn3 = conv_bn(middle, out_chs, 1, groups=groups)
        self.act3 = nn.ReLU(inplace=True)

    def forward_preact(self, x: Tensor) -> Tensor:
        out = shuffle_channels(self.act1(self.bn1(self.conv1(x))), self.groups)
        out = self.bn3(self.conv3(self.act2(self.bn2(self.conv2(out)))))
        return out + x if self.stride == 1 else torch.cat([out, F.avg_pool2d(x, 3, stride=2, padding=1)], 1)


class CifarShuffleV1(CifarNet):
    """ShuffleNet for small images: stride 1 in the stem, total stride 8.

    Args:
        widths: Channels of the three stages.
        depths: Units of the three stages.
        groups: Groups of the 1x1 convolutions.
        **options: num_classes, in_chans, global_pool and drop_rate, as for CifarNet.
    """

    def __init__(
        self,
        widths: tuple[int, int, int] = (240, 480, 960),
        depths: tuple[int, int, int] = (4, 8, 4),
        groups: int = 3,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.conv1, self.bn1 = conv_bn(self.in_chans, _STEM, 1)
        self.act1 = nn.ReLU(inplace=True)
        before = _STEM
        for index, (width, depth) in enumerate(zip(widths, depths, strict=True), start=1):
            rest = [Unit(width, width, 1, groups) for _ in range(depth - 1)]
            self.add_module(f"layer{index}", nn.Sequential(Unit(before, width - before, 2, groups), *rest))
            before = width
        self._complete((_STEM, *widths), (1, 2, 4, 8))


register(CifarShuffleV1, {"cifar_shufflev1": {}}, pool=4)
