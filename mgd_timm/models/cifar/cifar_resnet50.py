"""CIFAR ResNet-50: bottlenecks after a stem of stride 1 (He et al., arXiv 1512.03385), as a timm model.

Differs: the paper has a strided 7x7 stem and pooling; here a 3x3 one, as in RepDistiller, whose checkpoints have the
same keys except the classifier's (`linear` there).
"""

from typing import Any

from torch import Tensor, nn

from mgd_timm.models.cifar.base import Block, CifarNet, conv_bn, register

__all__ = ["CifarResNet50"]


class Bottleneck(Block):
    """1x1, 3x3 and 1x1 convolutions with BatchNorm, four times as many channels at the end, and a shortcut."""

    last_act = "act3"

    def __init__(self, in_chs: int, middle: int, stride: int) -> None:
        super().__init__()
        out_chs = 4 * middle
        self.stride = stride
        self.conv1, self.bn1 = conv_bn(in_chs, middle, 1)
        self.act1 = nn.ReLU(inplace=True)
        self.conv2, self.bn2 = conv_bn(middle, middle, 3, stride)
        self.act2 = nn.ReLU(inplace=True)
        self.conv3, self.bn3 = conv_bn(middle, out_chs, 1)
        self.shortcut = nn.Sequential(*conv_bn(in_chs, out_chs, 1)) if stride != 1 or in_chs != out_chs else None
        self.act3 = nn.ReLU(inplace=True)

    def forward_preact(self, x: Tensor) -> Tensor:
        out = self.act2(self.bn2(self.conv2(self.act1(self.bn1(self.conv1(x))))))
        out = self.bn3(self.conv3(out))
        if self.shortcut is not None:
            # A slice is the stride of a 1x1 convolution; see cifar_resnet.BasicBlock.
            x = self.shortcut(x[:, :, :: self.stride, :: self.stride])
        return out + x


class CifarResNet50(CifarNet):
    """ResNet of bottlenecks for small images: stride 1 in the stem, total stride 8.

    Args:
        depths: Bottlenecks of the four stages.
        **options: num_classes, in_chans, global_pool and drop_rate, as for CifarNet.
    """

    stages = (("layer1",), ("layer2",), ("layer3",), ("layer4",))
    map_modules = ("act1", "layer1", "layer2", "layer3", "layer4")

    def __init__(self, depths: tuple[int, int, int, int] = (3, 4, 6, 3), **options: Any) -> None:
        super().__init__(**options)
        self.conv1, self.bn1 = conv_bn(self.in_chans, 64, 3)
        self.act1 = nn.ReLU(inplace=True)
        channels = 64
        for index, depth in enumerate(depths, start=1):
            middle, stride = 32 * 2**index, 1 if index == 1 else 2
            rest = [Bottleneck(4 * middle, middle, 1) for _ in range(depth - 1)]
            self.add_module(f"layer{index}", nn.Sequential(Bottleneck(channels, middle, stride), *rest))
            channels = 4 * middle
        self._complete((64, 256, 512, 1024, 2048), (1, 1, 2, 4, 8))
        self._init_convs()


register(CifarResNet50, {"cifar_resnet50": {}}, pool=4)
