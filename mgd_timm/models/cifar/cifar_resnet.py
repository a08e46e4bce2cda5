"""CIFAR ResNets: 6n+2 layers, three stages (He et al., arXiv 1512.03385, section 4.2), as timm models.

Shortcuts are 1x1 convolutions with BatchNorm where the shape changes, as in RepDistiller, whose checkpoints have the
same keys.
"""

from typing import Any, Literal

from timm.models import register_model
from timm.models._registry import generate_default_cfgs
from torch import Tensor, nn

from mgd_timm.models.cifar.base import Block, CifarNet, conv_bn, create, default_cfg

__all__ = ["CifarResNet"]


class BasicBlock(Block):
    """Two 3x3 convolutions with BatchNorm, and a shortcut."""

    def __init__(self, in_chs: int, out_chs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_chs, out_chs, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_chs)
        self.act1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(out_chs, out_chs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_chs)
        self.downsample: nn.Module | None = None
        if stride != 1 or in_chs != out_chs:
            self.downsample = nn.Sequential(nn.Conv2d(in_chs, out_chs, 1, bias=False), nn.BatchNorm2d(out_chs))
        self.stride = stride
        self.act2 = nn.ReLU(inplace=True)

    def forward_preact(self, x: Tensor) -> Tensor:
        """The sum before the last ReLU."""
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
        num_classes: 0 for no classifier.
        in_chans: Channels of the image.
        global_pool: "avg", or "" for an unpooled head without a classifier.
        drop_rate: Dropout before the classifier, in [0, 1).
    """

    def __init__(
        self,
        depth: int,
        widths: tuple[int, int, int, int] = (16, 16, 32, 64),
        num_classes: int = 100,
        in_chans: int = 3,
        global_pool: Literal["avg", ""] = "avg",
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__(num_classes, in_chans, global_pool, drop_rate)
        if depth < 8 or depth % 6 != 2:
            raise ValueError(f"depth={depth}: expected 6n + 2 with n of 1 or more (8, 14, 20, ...).")
        self.conv1, self.bn1 = conv_bn(in_chans, widths[0], 3)
        self.act1 = nn.ReLU(inplace=True)
        blocks = (depth - 2) // 6
        self.layer1 = self._blocks(widths[0], widths[1], blocks, stride=1)
        self.layer2 = self._blocks(widths[1], widths[2], blocks, stride=2)
        self.layer3 = self._blocks(widths[2], widths[3], blocks, stride=2)
        self._complete(widths, (1, 1, 2, 4))
        self._init_convs()

    @staticmethod
    def _blocks(in_chs: int, out_chs: int, blocks: int, stride: int) -> nn.Sequential:
        rest = [BasicBlock(out_chs, out_chs, 1) for _ in range(blocks - 1)]
        return nn.Sequential(BasicBlock(in_chs, out_chs, stride), *rest)


_X4 = (32, 64, 128, 256)
_HALF = (8, 8, 16, 32)
_THREE_EIGHTHS = (6, 6, 12, 24)
_NAMES = (8, 14, 20, 32, 44, 56, 110)
_WIDE = ("cifar_resnet8x4", "cifar_resnet32x4")
_NARROW = ("cifar_resnet8x05", "cifar_resnet14x05", "cifar_resnet20x05", "cifar_resnet20x0375")
default_cfgs = generate_default_cfgs(
    {name: default_cfg(8) for name in (*(f"cifar_resnet{d}" for d in _NAMES), *_WIDE, *_NARROW)}
)


def _create(
    variant: str,
    depth: int,
    widths: tuple[int, int, int, int] = (16, 16, 32, 64),
    pretrained: bool = False,
    **kwargs: Any,
) -> nn.Module:
    return create(CifarResNet, variant, pretrained, depth=depth, widths=widths, **kwargs)


@register_model
def cifar_resnet8(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-8, 16-16-32-64 channels."""
    return _create("cifar_resnet8", 8, pretrained=pretrained, **kwargs)


@register_model
def cifar_resnet8x05(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-8 of half width, 8-8-16-32 channels."""
    return _create("cifar_resnet8x05", 8, _HALF, pretrained=pretrained, **kwargs)


@register_model
def cifar_resnet8x4(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-8 of fourfold width, 32-64-128-256 channels."""
    return _create("cifar_resnet8x4", 8, _X4, pretrained=pretrained, **kwargs)


@register_model
def cifar_resnet14(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-14, 16-16-32-64 channels."""
    return _create("cifar_resnet14", 14, pretrained=pretrained, **kwargs)


@register_model
def cifar_resnet14x05(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-14 of half width, 8-8-16-32 channels."""
    return _create("cifar_resnet14x05", 14, _HALF, pretrained=pretrained, **kwargs)


@register_model
def cifar_resnet20(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-20, 16-16-32-64 channels."""
    return _create("cifar_resnet20", 20, pretrained=pretrained, **kwargs)


@register_model
def cifar_resnet20x05(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-20 of half width, 8-8-16-32 channels."""
    return _create("cifar_resnet20x05", 20, _HALF, pretrained=pretrained, **kwargs)


@register_model
def cifar_resnet20x0375(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-20 of three eighths of the width, 6-6-12-24 channels."""
    return _create("cifar_resnet20x0375", 20, _THREE_EIGHTHS, pretrained=pretrained, **kwargs)


@register_model
def cifar_resnet32(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-32, 16-16-32-64 channels."""
    return _create("cifar_resnet32", 32, pretrained=pretrained, **kwargs)


@register_model
def cifar_resnet32x4(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-32 of fourfold width, 32-64-128-256 channels."""
    return _create("cifar_resnet32x4", 32, _X4, pretrained=pretrained, **kwargs)


@register_model
def cifar_resnet44(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-44, 16-16-32-64 channels."""
    return _create("cifar_resnet44", 44, pretrained=pretrained, **kwargs)


@register_model
def cifar_resnet56(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-56, 16-16-32-64 channels."""
    return _create("cifar_resnet56", 56, pretrained=pretrained, **kwargs)


@register_model
def cifar_resnet110(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-110, 16-16-32-64 channels."""
    return _create("cifar_resnet110", 110, pretrained=pretrained, **kwargs)
