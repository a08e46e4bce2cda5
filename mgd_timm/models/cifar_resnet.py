"""CIFAR ResNets: 6n+2 layers, three stages (He et al., arXiv 1512.03385, section 4.2), as timm models.

Shortcuts are 1x1 convolutions with BatchNorm where the shape changes, as in RepDistiller, whose checkpoints have the same keys.
"""

from typing import Any, Literal

import torch
from timm.models import build_model_with_cfg, register_model
from timm.models._features import feature_take_indices
from timm.models._manipulate import checkpoint_seq
from timm.models._registry import generate_default_cfgs
from torch import Tensor, nn

__all__ = ["CifarResNet"]


class BasicBlock(nn.Module):
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

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        if self.downsample is not None:
            # A slice is the stride of a 1x1 convolution. oneDNN's backward of a strided one with few channels, channels-last and 56
            # pixels or more ends the process (segmentation fault, CPUs with AVX-512).
            shortcut = self.downsample(x[:, :, :: self.stride, :: self.stride])
        x = self.act1(self.bn1(self.conv1(x)))
        return self.act2(self.bn2(self.conv2(x)) + shortcut)


class CifarResNet(nn.Module):
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
        super().__init__()
        if depth < 8 or depth % 6 != 2:
            raise ValueError(f"depth={depth}: expected 6n + 2 with n of 1 or more (8, 14, 20, ...).")
        self.num_classes, self.in_chans, self.drop_rate = num_classes, in_chans, drop_rate
        self.num_features = self.head_hidden_size = widths[3]
        self.grad_checkpointing = False
        self.conv1 = nn.Conv2d(in_chans, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.act1 = nn.ReLU(inplace=True)
        blocks = (depth - 2) // 6
        self.layer1 = self._stage(widths[0], widths[1], blocks, stride=1)
        self.layer2 = self._stage(widths[1], widths[2], blocks, stride=2)
        self.layer3 = self._stage(widths[2], widths[3], blocks, stride=2)
        reductions = (("act1", 1), ("layer1", 1), ("layer2", 2), ("layer3", 4))
        self.feature_info = [
            {"num_chs": width, "reduction": reduction, "module": module}
            for width, (module, reduction) in zip(widths, reductions, strict=True)
        ]
        self.fc: nn.Module
        self.reset_classifier(num_classes, global_pool)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @staticmethod
    def _stage(in_chs: int, out_chs: int, blocks: int, stride: int) -> nn.Sequential:
        rest = [BasicBlock(out_chs, out_chs, 1) for _ in range(blocks - 1)]
        return nn.Sequential(BasicBlock(in_chs, out_chs, stride), *rest)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's layer groups, for layer-wise learning rates."""
        return {"stem": r"^conv1|bn1", "blocks": r"^layer(\d+)" if coarse else r"^layer(\d+)\.(\d+)"}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the stages' activations in backward; as in timm's networks, BatchNorm statistics then move twice a step."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The last linear layer."""
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A fresh classifier; 0 classes for none."""
        if global_pool is not None:
            if global_pool not in ("avg", "") or (not global_pool and num_classes):
                raise ValueError(f"global_pool={global_pool!r}: expected 'avg', or '' with num_classes=0.")
            self.global_pool = global_pool
        self.num_classes = num_classes
        like = self.conv1.weight
        self.fc = nn.Linear(self.num_features, num_classes, device=like.device, dtype=like.dtype) if num_classes else nn.Identity()
        self.fc.train(self.training)

    def _run_stage(self, stage: nn.Sequential, x: Tensor) -> Tensor:
        if self.grad_checkpointing and self.training:
            return checkpoint_seq(stage, x)
        return stage(x)

    def forward_features(self, x: Tensor) -> Tensor:
        """The last map [batch, channels, height, width]."""
        x = self.act1(self.bn1(self.conv1(x)))
        for stage in (self.layer1, self.layer2, self.layer3):
            x = self._run_stage(stage, x)
        return x

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,  # noqa: ARG002 - timm's contract
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """timm's contract: the last map and those of `indices`, the stem's first."""
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt={output_fmt!r}: only 'NCHW' maps exist here.")
        take, last = feature_take_indices(4, indices)
        x = self.act1(self.bn1(self.conv1(x)))
        maps = [x] if 0 in take else []
        for index, stage in enumerate((self.layer1, self.layer2, self.layer3), start=1):
            if stop_early and index > last:
                break
            x = self._run_stage(stage, x)
            if index in take:
                maps.append(x)
        return maps if intermediates_only else (x, maps)

    def prune_intermediate_layers(
        self,
        indices: int | list[int] = 1,
        prune_norm: bool = False,  # noqa: ARG002 - timm's contract
        prune_head: bool = True,
    ) -> list[int]:
        """timm's contract: drop what the maps of `indices` do not need."""
        take, last = feature_take_indices(4, indices)
        for index in range(last + 1, 4):
            setattr(self, f"layer{index}", nn.Sequential())
        if prune_head:
            self.reset_classifier(0, "")
        return take

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pooled embedding [batch, dim] with `pre_logits`, else logits [batch, classes]."""
        if self.global_pool:
            x = x.mean((2, 3))
        x = nn.functional.dropout(x, self.drop_rate, self.training)
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [batch, classes]."""
        return self.forward_head(self.forward_features(x))


def _cfg() -> dict[str, Any]:
    return {
        "num_classes": 100,
        "input_size": (3, 32, 32),
        "pool_size": (8, 8),
        "crop_pct": 1.0,
        "interpolation": "bicubic",
        "fixed_input_size": False,
        "mean": (0.5071, 0.4867, 0.4408),
        "std": (0.2675, 0.2565, 0.2761),
        "first_conv": "conv1",
        "classifier": "fc",
    }


_X4 = (32, 64, 128, 256)
_HALF = (8, 8, 16, 32)
_NAMES = (8, 14, 20, 32, 44, 56, 110)
_WIDE = ("cifar_resnet8x4", "cifar_resnet32x4")
_NARROW = ("cifar_resnet8x05", "cifar_resnet14x05", "cifar_resnet20x05")
default_cfgs = generate_default_cfgs({name: _cfg() for name in (*(f"cifar_resnet{d}" for d in _NAMES), *_WIDE, *_NARROW)})


def _create(variant: str, depth: int, widths: tuple[int, int, int, int] = (16, 16, 32, 64), **kwargs: Any) -> nn.Module:
    # timm's feature_cfg asks for out_indices within feature_info; all else is its default.
    pretrained = kwargs.pop("pretrained", False)
    return build_model_with_cfg(
        CifarResNet, variant, pretrained, feature_cfg={"out_indices": (0, 1, 2, 3)}, depth=depth, widths=widths, **kwargs
    )


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
