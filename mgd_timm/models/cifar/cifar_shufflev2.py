"""CIFAR ShuffleNet V2 (Ma et al., arXiv 1807.11164), as a timm model.

Differs: a 1x1 stem instead of a strided 3x3 one and pooling, and the channels are shuffled at a unit's end, as in
RepDistiller, whose checkpoints have the same keys except the classifier's (`linear` there).
"""

from typing import Any

import torch
from torch import Tensor, nn

from mgd_timm.models.cifar.base import CifarNet, conv_bn, register, shuffle_channels

__all__ = ["CifarShuffleV2"]

_STEM = 24


class DownUnit(nn.Module):
    """Two branches of stride 2, concatenated and shuffled."""

    def __init__(self, in_chs: int, out_chs: int) -> None:
        super().__init__()
        half = out_chs // 2
        self.conv1, self.bn1 = conv_bn(in_chs, in_chs, 3, 2, groups=in_chs)
        self.conv2, self.bn2 = conv_bn(in_chs, half, 1)
        self.conv3, self.bn3 = conv_bn(in_chs, half, 1)
        self.conv4, self.bn4 = conv_bn(half, half, 3, 2, groups=half)
        self.conv5, self.bn5 = conv_bn(half, half, 1)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        left = self.act(self.bn2(self.conv2(self.bn1(self.conv1(x)))))
        right = self.bn4(self.conv4(self.act(self.bn3(self.conv3(x)))))
        right = self.act(self.bn5(self.conv5(right)))
        return shuffle_channels(torch.cat([left, right], 1), 2)


class Unit(nn.Module):
    """One half of the channels passes, the other goes through three convolutions; concatenated and shuffled."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.conv1, self.bn1 = conv_bn(half, half, 1)
        self.conv2, self.bn2 = conv_bn(half, half, 3, groups=half)
        self.conv3, self.bn3 = conv_bn(half, half, 1)
        self.act = nn.ReLU(inplace=True)

    def _halves(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The half that passes, and the other before its last ReLU."""
        passing, x = x.chunk(2, 1)
        x = self.bn2(self.conv2(self.act(self.bn1(self.conv1(x)))))
        return passing, self.bn3(self.conv3(x))

    def forward(self, x: Tensor) -> Tensor:
        passing, x = self._halves(x)
        return shuffle_channels(torch.cat([passing, self.act(x)], 1), 2)

    def forward_with_preact(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The output, and the halves before the last ReLU, which are not shuffled."""
        passing, x = self._halves(x)
        before = torch.cat([passing, x], 1)
        return shuffle_channels(torch.cat([passing, self.act(x)], 1), 2), before


class CifarShuffleV2(CifarNet):
    """ShuffleNet V2 for small images: stride 1 in the stem, total stride 8.

    With `preact`, a stage's map is the last unit's halves before its last ReLU and before the shuffle: the order of its
    channels is another than without (channel 2i of the map is channel i here, channel 2i + 1 is channel i of the second
    half).

    Args:
        widths: Channels of the three stages.
        depths: Units of the three stages, the one of stride 2 included.
        width: Channels before the classifier.
        **options: num_classes, in_chans, global_pool and drop_rate, as for CifarNet.
    """

    tail = ("conv2", "bn2", "act2")

    def __init__(
        self,
        widths: tuple[int, int, int] = (116, 232, 464),
        depths: tuple[int, int, int] = (4, 8, 4),
        width: int = 1024,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.conv1, self.bn1 = conv_bn(self.in_chans, _STEM, 1)
        self.act1 = nn.ReLU(inplace=True)
        before = _STEM
        for index, (channels, depth) in enumerate(zip(widths, depths, strict=True), start=1):
            rest = [Unit(channels) for _ in range(depth - 1)]
            self.add_module(f"layer{index}", nn.Sequential(DownUnit(before, channels), *rest))
            before = channels
        self.conv2, self.bn2 = conv_bn(before, width, 1)
        self.act2 = nn.ReLU(inplace=True)
        self._complete((_STEM, *widths), (1, 2, 4, 8), width=width)

    def _tail(self, x: Any) -> Tensor:
        return self.act2(self.bn2(self.conv2(x)))


register(CifarShuffleV2, {"cifar_shufflev2": {}}, pool=4)
