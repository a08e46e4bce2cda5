"""CIFAR ResNet-50: bottlenecks after a stem of stride 1 (He et al., arXiv 1512.03385), as a timm model.

Differs: the paper has a strided 7x7 stem and pooling; here a 3x3 one, as in RepDistiller, whose checkpoints have the
same keys except the classifier's (`linear` there).
"""

from typing import Any, Literal

from timm.models import register_model
from timm.models._registry import generate_default_cfgs
from torch import Tensor, nn

from mgd_timm.models.cifar.base import Block, CifarNet, conv_bn, create, default_cfg

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
        """The sum before the last ReLU."""
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
        num_classes: 0 for no classifier.
        in_chans: Channels of the image.
        global_pool: "avg", or "" for an unpooled head without a classifier.
        drop_rate: Dropout before the classifier, in [0, 1).
    """

    stages = (("layer1",), ("layer2",), ("layer3",), ("layer4",))
    map_modules = ("act1", "layer1", "layer2", "layer3", "layer4")

    def __init__(
        self,
        depths: tuple[int, int, int, int] = (3, 4, 6, 3),
        num_classes: int = 100,
        in_chans: int = 3,
        global_pool: Literal["avg", ""] = "avg",
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__(num_classes, in_chans, global_pool, drop_rate)
        self.conv1, self.bn1 = conv_bn(in_chans, 64, 3)
        self.act1 = nn.ReLU(inplace=True)
        channels = 64
        for index, depth in enumerate(depths, start=1):
            middle, stride = 32 * 2**index, 1 if index == 1 else 2
            rest = [Bottleneck(4 * middle, middle, 1) for _ in range(depth - 1)]
            self.add_module(f"layer{index}", nn.Sequential(Bottleneck(channels, middle, stride), *rest))
            channels = 4 * middle
        self._complete((64, 256, 512, 1024, 2048), (1, 1, 2, 4, 8))
        self._init_convs()


default_cfgs = generate_default_cfgs({"cifar_resnet50": default_cfg(4)})


@register_model
def cifar_resnet50(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-50, 256-512-1024-2048 channels."""
    return create(CifarResNet50, "cifar_resnet50", pretrained, **kwargs)
