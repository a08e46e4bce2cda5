"""Networks as public checkpoints hold them."""

import timm
import torch
from torch import Tensor, nn

from mgd_timm import models  # noqa: F401  # registers cifar_*

NAME = "cifar_resnet8x05"
CIFAR10 = {"mean": (0.4914, 0.4822, 0.4465), "std": (0.2023, 0.1994, 0.2010)}


def network(name: str = NAME, classes: int = 10, **kwargs) -> nn.Module:
    """Weights and statistics that no initialisation gives."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=classes, **kwargs)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 1.5)
            module.num_batches_tracked.fill_(7)
    return model.eval()


def same(state: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return list(state) == list(expected) and all(torch.equal(value, expected[name]) for name, value in state.items())
