"""The paper's networks for 32x32 images, registered in timm as cifar_* by importing this package."""

from mgd_timm.models import cifar_resnet

__all__ = ["cifar_resnet"]
