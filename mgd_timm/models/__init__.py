"""The paper's networks for 32x32 images, registered in timm as cifar_* by importing this package."""

from mgd_timm.models.cifar import (  # noqa: F401 - importing a module registers its networks
    cifar_mobilenetv2,
    cifar_resnet,
    cifar_resnet50,
    cifar_shufflev1,
    cifar_shufflev2,
    cifar_vgg,
    cifar_wrn,
)
