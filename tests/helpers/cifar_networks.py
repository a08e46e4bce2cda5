"""The cifar_* networks of the paper: their sizes, a small one of each family, and how tests build them."""

import pytest
import timm
import torch
from torch import Tensor, nn

import mgd_timm.models  # noqa: F401 - registers cifar_*
from mgd_timm.models.cifar.base import CifarNet

# The specification's table for 100 classes: parameters, billions of multiply-adds, channels of stem and stages.
NARROWEST, NARROW, PLAIN, WIDE = (6, 6, 12, 24), (8, 8, 16, 32), (16, 16, 32, 64), (32, 64, 128, 256)
RESNETS = {
    "cifar_resnet8": (83_892, None, PLAIN),
    "cifar_resnet14": (181_108, None, PLAIN),
    "cifar_resnet20": (278_324, 0.041, PLAIN),
    "cifar_resnet32": (472_756, 0.069, PLAIN),
    "cifar_resnet44": (667_188, None, PLAIN),
    "cifar_resnet56": (861_620, 0.126, PLAIN),
    "cifar_resnet110": (1_736_564, 0.253, PLAIN),
    "cifar_resnet8x4": (1_233_540, 0.177, WIDE),
    "cifar_resnet32x4": (7_433_860, 1.083, WIDE),
    "cifar_resnet8x05": (22_924, None, NARROW),
    "cifar_resnet14x05": (47_340, None, NARROW),
    "cifar_resnet20x05": (71_756, None, NARROW),
    "cifar_resnet20x0375": (41_194, None, NARROWEST),
}

# The specification's table for 100 classes: parameters, billions of multiply-adds, width of the embedding, channels and
# sides.
WRN = ((16, 32), (16, 32), (32, 16), (64, 8))
WRN2 = ((16, 32), (32, 32), (64, 16), (128, 8))
VGG = ((64, 32), (128, 16), (256, 8), (512, 4), (512, 4))
TABLE = {
    **{
        name: (count, macs, widths[-1], tuple(zip(widths, (32, 32, 16, 8), strict=True)))
        for name, (count, macs, widths) in RESNETS.items()
    },
    "cifar_wrn_16_1": (180_916, None, 64, WRN),
    "cifar_wrn_40_1": (569_780, 0.083, 64, WRN),
    "cifar_wrn_16_2": (703_284, 0.101, 128, WRN2),
    "cifar_wrn_40_2": (2_255_156, 0.328, 128, WRN2),
    "cifar_vgg8": (3_965_028, 0.096, 512, VGG),
    "cifar_vgg11": (9_277_284, None, 512, VGG),
    "cifar_vgg13": (9_462_180, 0.285, 512, VGG),
    "cifar_vgg16": (14_774_436, None, 512, VGG),
    "cifar_vgg19": (20_086_692, None, 512, VGG),
    "cifar_mobilenetv2": (812_836, 0.0065, 1280, ((16, 16), (12, 16), (16, 8), (48, 4), (160, 2))),
    "cifar_shufflev1": (949_258, 0.039, 960, ((24, 32), (240, 16), (480, 8), (960, 4))),
    "cifar_shufflev2": (1_355_528, 0.045, 1024, ((24, 32), (116, 16), (232, 8), (464, 4))),
    "cifar_resnet50": (23_705_252, 1.298, 2048, ((64, 32), (256, 32), (512, 16), (1024, 8), (2048, 4))),
}
# One small network of each family, and the side below which a stride would halve nothing.
SMALL = {
    "cifar_resnet14": ({}, 4),
    "cifar_wrn_16_1": ({}, 4),
    "cifar_vgg11": ({}, 8),
    "cifar_mobilenetv2": ({}, 16),
    "cifar_shufflev1": ({"depths": (2, 2, 1)}, 8),
    "cifar_shufflev2": ({"depths": (2, 3, 2)}, 8),
    "cifar_resnet50": ({"depths": (1, 1, 2, 1)}, 8),
}
families = pytest.mark.parametrize("name", SMALL)


def build(name: str, **kwargs) -> CifarNet:
    torch.manual_seed(0)
    return timm.create_model(name, **SMALL.get(name, ({},))[0], **kwargs)


def images(height: int = 32, width: int | None = None, channels: int = 3, batch: int = 2) -> Tensor:
    return torch.randn(batch, channels, height, width or height, generator=torch.Generator().manual_seed(1))


def trained(model: nn.Module) -> nn.Module:
    """Double precision, and BatchNorms as after training."""
    generator = torch.Generator().manual_seed(2)
    for module in model.double().modules():
        if isinstance(module, nn.BatchNorm2d):
            for values in (module.running_mean, module.bias.data):
                values.uniform_(-0.2, 0.2, generator=generator)
            for values in (module.running_var, module.weight.data):
                values.uniform_(0.5, 1.5, generator=generator)
    return model.eval()
