"""CIFAR ResNets: 6n+2 layers, three stages (He et al., arXiv 1512.03385, section 4.2), as timm models.

Shortcuts are 1x1 convolutions with BatchNorm where the shape changes, as in RepDistiller, whose checkpoints have the
same keys.
"""

from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from mgd_timm.models.cifar.base import Block, CifarNet, conv_bn, register

__all__ = ["CifarResNet"]


class BasicBlock(Block):
    """Two 3x3 convolutions with BatchNorm, and a shortcut."""

    def __init__(self, in_chs: int, out_chs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv_bn(in_chs, out_chs, 3, stride)
        self.act1 = nn.ReLU(inplace=True)
        self.conv2, self.bn2 = conv_bn(out_chs, out_chs, 3)
        self.downsample = nn.Sequential(*conv_bn(in_chs, out_chs, 1)) if stride != 1 or in_chs != out_chs else None
        self.stride = stride
        self.act2 = nn.ReLU(inplace=True)

    def forward_preact(self, x: Tensor) -> Tensor:
        shortcut = x
        if self.downsample is not None:
            # A slice is the stride of a 1x1 convolution. oneDNN's backward of a strided one with few channels,
            # channels-last and 56 pixels or more ends the process (segmentation fault, CPUs with AVX-512).
            shortcut = self.downsample(x[:, :, :: self.stride, :: self.stride])
        x = self.act1(self.bn1(self.conv1(x)))
        return self.bn2(self.conv2(x)) + shortcut


class CifarResNet(CifarNet):
    """ResNet for small images: stride 1 in the stem, total stride 4.

    Args:
        depth: 6n + 2 layers.
        widths: Channels of the stem and of the three stages.
        **options: num_classes, in_chans, global_pool and drop_rate, as for CifarNet.
    """

    def __init__(self, depth: int, widths: tuple[int, int, int, int] = (16, 16, 32, 64), **options: Any) -> None:
        super().__init__(**options)
        if depth < 8 or depth % 6 != 2:
            raise ValueError(f"depth={depth}: expected 6n + 2 with n of 1 or more (8, 14, 20, ...).")
        self.conv1, self.bn1 = conv_bn(self.in_chans, widths[0], 3)
        self.act1 = nn.ReLU(inplace=True)
        for index, (in_chs, out_chs) in enumerate(pairwise(widths), start=1):
            rest = [BasicBlock(out_chs, out_chs, 1) for _ in range((depth - 2) // 6 - 1)]
            first = BasicBlock(in_chs, out_chs, stride=1 if index == 1 else 2)
            self.add_module(f"layer{index}", nn.Sequential(first, *rest))
        self._complete(widths, (1, 1, 2, 4))
        self._init_convs()


_HALF = (8, 8, 16, 32)
_FOURFOLD = (32, 64, 128, 256)
register(
    CifarResNet,
    {
        **{f"cifar_resnet{depth}": {"depth": depth} for depth in (8, 14, 20, 32, 44, 56, 110)},
        **{f"cifar_resnet{depth}x05": {"depth": depth, "widths": _HALF} for depth in (8, 14, 20)},
        "cifar_resnet20x0375": {"depth": 20, "widths": (6, 6, 12, 24)},
        **{f"cifar_resnet{depth}x4": {"depth": depth, "widths": _FOURFOLD} for depth in (8, 32)},
    },
    pool=8,
)
