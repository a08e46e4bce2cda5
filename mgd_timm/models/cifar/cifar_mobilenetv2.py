"""CIFAR MobileNetV2 of half width (Sandler et al., arXiv 1801.04381), as a timm model.

Differs: ReLU instead of ReLU6, one stride fewer than the paper (total stride 16) and 1280 channels before the
classifier at any width, as in RepDistiller, whose checkpoints have the same keys except the classifier's
(`classifier.0` there).
"""

from typing import Any

from torch import Tensor, nn

from mgd_timm.models.cifar.base import CifarNet, conv_bn, register

__all__ = ["CifarMobileNetV2"]

# The paper's table 2: channels at full width, blocks, stride of the first. The third stride is 1 here.
_GROUPS = ((16, 1, 1), (24, 2, 1), (32, 3, 2), (64, 4, 2), (96, 3, 1), (160, 3, 2), (320, 1, 1))


class InvertedResidual(nn.Module):
    """1x1 expansion, 3x3 depthwise and linear 1x1 projection; the input is added where the shape stays the same."""

    def __init__(self, in_chs: int, out_chs: int, stride: int, expansion: int) -> None:
        super().__init__()
        middle = in_chs * expansion
        self.conv = nn.Sequential(
            *conv_bn(in_chs, middle, 1),
            nn.ReLU(inplace=True),
            *conv_bn(middle, middle, 3, stride, groups=middle),
            nn.ReLU(inplace=True),
            *conv_bn(middle, out_chs, 1),
        )
        self.same = stride == 1 and in_chs == out_chs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.same else self.conv(x)


class CifarMobileNetV2(CifarNet):
    """MobileNetV2 for small images: stride 2 in the stem, total stride 16.

    The maps are those of the stem and of groups 2, 3, 5 and 7 (counted from 1), without an activation except for the
    stem's. `preact` is ignored: the groups have no last activation, and the stem's map stays the same too.

    Args:
        width: Factor of the paper's channels.
        expansion: Factor t of the channels inside a block; 1 in the first group.
        **options: num_classes, in_chans, global_pool and drop_rate, as for CifarNet.
    """

    classifier_name = "classifier"
    stages = (("blocks.0", "blocks.1"), ("blocks.2",), ("blocks.3", "blocks.4"), ("blocks.5", "blocks.6"))
    map_modules = ("conv1.2", "blocks.1", "blocks.2", "blocks.4", "blocks.6")
    tail = ("conv2",)
    feature_cfg = {"flatten_sequential": True}

    def __init__(self, width: float = 0.5, expansion: int = 6, **options: Any) -> None:
        super().__init__(**options)
        stem = channels = int(32 * width)
        self.conv1 = nn.Sequential(*conv_bn(self.in_chans, channels, 3, 2), nn.ReLU(inplace=True))
        groups: list[nn.Sequential] = []
        widths: list[int] = []
        for index, (full, count, stride) in enumerate(_GROUPS):
            group_width, factor = int(full * width), expansion if index else 1
            blocks = [InvertedResidual(channels, group_width, stride, factor)]
            blocks += [InvertedResidual(group_width, group_width, 1, factor) for _ in range(count - 1)]
            groups.append(nn.Sequential(*blocks))
            channels = group_width
            widths.append(channels)
        self.blocks = nn.Sequential(*groups)
        self.conv2 = nn.Sequential(*conv_bn(channels, 1280, 1), nn.ReLU(inplace=True))
        self._complete((stem, widths[1], widths[2], widths[4], widths[6]), (2, 2, 4, 8, 16), width=1280)
        self._init_convs()

    def _init_classifier(self, linear: nn.Linear) -> None:
        nn.init.normal_(linear.weight, std=0.01)
        nn.init.zeros_(linear.bias)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        blocks = r"^blocks\.(\d+)" if coarse else r"^blocks\.(\d+)\.(\d+)"
        return {"stem": r"^conv1", "blocks": [(blocks, None), (r"^conv2", (99999,))]}

    def _stem(self, x: Tensor, preact: bool) -> tuple[Any, Tensor]:  # noqa: ARG002
        x = self.conv1(x)
        return x, x

    def _stage(self, index: int, x: Any, preact: bool) -> tuple[Any, Tensor]:  # noqa: ARG002
        return super()._stage(index, x, preact=False)

    def _tail(self, x: Any) -> Tensor:
        return self.conv2(x)


register(CifarMobileNetV2, {"cifar_mobilenetv2": {}}, pool=2, first_conv="conv1.0")
