"""CIFAR VGGs with BatchNorm: five blocks of 3x3 convolutions (Simonyan and Zisserman, arXiv 1409.1556), as timm models.

Differs: the paper's classifier of three layers is a single one on the average of the last map, as in RepDistiller,
whose checkpoints have the same keys.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mgd_timm.models.cifar.base import CifarNet, activate, register

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
        **options: num_classes, in_chans, global_pool and drop_rate, as for CifarNet.
    """

    classifier_name = "classifier"
    stages = tuple((f"pool{index}", f"block{index}", f"act{index}") for index in range(1, 5))
    map_modules = ("act0", "act1", "act2", "act3", "act4")

    def __init__(self, depths: tuple[int, int, int, int, int], **options: Any) -> None:
        super().__init__(**options)
        self.depths = depths
        before = self.in_chans
        for index, (width, depth) in enumerate(zip(_WIDTHS, depths, strict=True)):
            if index:
                self.add_module(f"pool{index}", PoolOf64() if index == 4 else nn.MaxPool2d(2, 2))
            layers: list[nn.Module] = []
            for _ in range(depth):
                layers += [nn.Conv2d(before, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
                before = width
            self.add_module(f"block{index}", nn.Sequential(*layers[:-1]))
            # Outside the block, so that its output before the ReLU can be a map.
            self.add_module(f"act{index}", layers[-1])
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


register(
    CifarVGG,
    {
        "cifar_vgg8": {"depths": (1, 1, 1, 1, 1)},
        "cifar_vgg11": {"depths": (1, 1, 2, 2, 2)},
        "cifar_vgg13": {"depths": (2, 2, 2, 2, 2)},
        "cifar_vgg16": {"depths": (2, 2, 3, 3, 3)},
        "cifar_vgg19": {"depths": (2, 2, 4, 4, 4)},
    },
    pool=4,
    first_conv="block0.0",
)
