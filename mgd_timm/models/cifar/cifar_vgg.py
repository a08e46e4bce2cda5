"""CIFAR VGGs with BatchNorm: five blocks of 3x3 convolutions (Simonyan and Zisserman, arXiv 1409.1556), as timm models.

Differs: the paper's classifier of three layers is a single one on the average of the last map, as in RepDistiller,
whose checkpoints have the same keys.
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.models import register_model
from timm.models._registry import generate_default_cfgs
from torch import Tensor, nn

from mgd_timm.models.cifar.base import CifarNet, activate, create, default_cfg

__all__ = ["CifarVGG"]

_WIDTHS = (64, 128, 256, 512, 512)


def _pool_of_64(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 2) if x.shape[-2:] == (8, 8) else x


torch.fx.wrap("_pool_of_64")  # kept as a call in traced graphs, so that they take any size


class PoolOf64(nn.Module):
    """Pooling that only images of 64x64 need: their map is 8x8 here."""

    def forward(self, x: Tensor) -> Tensor:
        return _pool_of_64(x)


class CifarVGG(CifarNet):
    """VGG for small images: 2x2 pooling after blocks 0, 1 and 2, and after block 3 where the image is 64x64 (64 to 71
    pixels).

    The maps are the five blocks' outputs after their last ReLU and before pooling.

    Args:
        depths: Convolutions of each of the five blocks.
        num_classes: 0 for no classifier.
        in_chans: Channels of the image.
        global_pool: "avg", or "" for an unpooled head without a classifier.
        drop_rate: Dropout before the classifier, in [0, 1).
    """

    classifier_name = "classifier"
    stages = tuple((f"pool{index}", f"block{index}", f"act{index}") for index in range(1, 5))
    map_modules = ("act0", "act1", "act2", "act3", "act4")

    def __init__(
        self,
        depths: tuple[int, int, int, int, int],
        num_classes: int = 100,
        in_chans: int = 3,
        global_pool: Literal["avg", ""] = "avg",
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__(num_classes, in_chans, global_pool, drop_rate)
        self.depths = depths
        for index, (width, depth) in enumerate(zip(_WIDTHS, depths, strict=True)):
            if index:
                self.add_module(f"pool{index}", PoolOf64() if index == 4 else nn.MaxPool2d(2, 2))
            layers: list[nn.Module] = []
            for _ in range(depth):
                layers += [nn.Conv2d(in_chans, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
                in_chans = width
            self.add_module(f"block{index}", nn.Sequential(*layers[:-1]))
            self.add_module(
                f"act{index}", layers[-1]
            )  # outside the block, so that its output before the ReLU can be a map
        self._complete(_WIDTHS, (1, 2, 4, 8, 8))
        self._init_convs()

    def _init_classifier(self, linear: nn.Linear) -> None:
        nn.init.normal_(linear.weight, std=0.01)
        nn.init.zeros_(linear.bias)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return timm's layer groups, for layer-wise learning rates: a convolution and its BatchNorm are one layer."""
        if coarse:
            return {"stem": r"^block0", "blocks": r"^block(\d+)"}
        layers = [(index, layer) for index, depth in enumerate(self.depths) for layer in range(depth) if index]
        names = [(rf"^block{index}\.(?:{3 * layer}|{3 * layer + 1})\.", (index, layer)) for index, layer in layers]
        return {"stem": r"^block0", "blocks": names}

    def _stem(self, x: Tensor, preact: bool) -> tuple[Any, Tensor]:
        return activate(self.get_submodule("act0"), self.get_submodule("block0")(x), preact)

    def _stage(self, index: int, x: Any, preact: bool) -> tuple[Any, Tensor]:
        pool, block, act = (self.get_submodule(name) for name in self.stages[index - 1])
        return activate(act, self._run([pool, block], x), preact)


default_cfgs = generate_default_cfgs(
    {
        f"cifar_vgg{depth}": default_cfg(4, first_conv="block0.0", classifier="classifier")
        for depth in (8, 11, 13, 16, 19)
    }
)


@register_model
def cifar_vgg8(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """VGG-8 with BatchNorm: one convolution a block, and the classifier as in all of these."""
    return create(CifarVGG, "cifar_vgg8", pretrained, depths=(1, 1, 1, 1, 1), **kwargs)


@register_model
def cifar_vgg11(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """VGG-11 with BatchNorm: 1-1-2-2-2 convolutions."""
    return create(CifarVGG, "cifar_vgg11", pretrained, depths=(1, 1, 2, 2, 2), **kwargs)


@register_model
def cifar_vgg13(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """VGG-13 with BatchNorm: 2-2-2-2-2 convolutions."""
    return create(CifarVGG, "cifar_vgg13", pretrained, depths=(2, 2, 2, 2, 2), **kwargs)


@register_model
def cifar_vgg16(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """VGG-16 with BatchNorm: 2-2-3-3-3 convolutions."""
    return create(CifarVGG, "cifar_vgg16", pretrained, depths=(2, 2, 3, 3, 3), **kwargs)


@register_model
def cifar_vgg19(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """VGG-19 with BatchNorm: 2-2-4-4-4 convolutions."""
    return create(CifarVGG, "cifar_vgg19", pretrained, depths=(2, 2, 4, 4, 4), **kwargs)
