"""CIFAR wide ResNets: pre-activation blocks, 6n + 4 layers, width k (Zagoruyko and Komodakis, arXiv 1605.07146), as
timm models.

Differs: the paper has dropout within blocks and a width of 10; here there is none, and widths 1 and 2, as in
RepDistiller, whose checkpoints have the same keys.
"""

from typing import Any

from torch import Tensor, nn

from mgd_timm.models.cifar.base import CifarNet, activate, register

__all__ = ["CifarWRN"]


class PreActBlock(nn.Module):
    """BatchNorm, ReLU and a 3x3 convolution, twice, and a shortcut: the input, or a projection of its ReLU to a new
    width."""

    def __init__(self, in_chs: int, out_chs: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_chs)
        self.act1 = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(in_chs, out_chs, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_chs)
        self.act2 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(out_chs, out_chs, 3, padding=1, bias=False)
        self.convShortcut = nn.Conv2d(in_chs, out_chs, 1, bias=False) if in_chs != out_chs else None
        self.stride = stride

    def forward(self, x: Tensor, normed: Tensor | None = None) -> Tensor:
        """Compute the block; `normed` is bn1's output where it is known already, and is not modified."""
        out = self.act1(self.bn1(x) if normed is None else normed.clone())
        if self.convShortcut is not None:
            # A slice is the stride of a 1x1 convolution; see cifar_resnet.BasicBlock.
            x = self.convShortcut(out[:, :, :: self.stride, :: self.stride])
        return x + self.conv2(self.act2(self.bn2(self.conv1(out))))


class Group(nn.Module):
    """Blocks of one width, under the name that public checkpoints give them."""

    def __init__(self, in_chs: int, out_chs: int, blocks: int, stride: int) -> None:
        super().__init__()
        rest = [PreActBlock(out_chs, out_chs, 1) for _ in range(blocks - 1)]
        self.layer = nn.Sequential(PreActBlock(in_chs, out_chs, stride), *rest)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class CifarWRN(CifarNet):
    """Wide ResNet for small images: stride 1 in the stem, total stride 4.

    The maps are sums without an activation, the stem's a convolution alone. With `preact`, those of the groups are
    taken after the next BatchNorm (the next group's first, or the final one), where the next ReLU reads them; the
    stem's stays the same.

    Args:
        depth: 6n + 4 layers.
        width: k; the groups have 16k, 32k and 64k channels.
        **options: num_classes, in_chans, global_pool and drop_rate, as for CifarNet.
    """

    stages = (("block1",), ("block2",), ("block3",))
    map_modules = ("conv1", "block1", "block2", "block3")
    tail = ("bn1", "act1")

    def __init__(self, depth: int, width: int, **options: Any) -> None:
        super().__init__(**options)
        if depth < 10 or depth % 6 != 4:
            raise ValueError(f"depth={depth}: expected 6n + 4 with n of 1 or more (10, 16, 22, ...).")
        channels = (16, 16 * width, 32 * width, 64 * width)
        blocks = (depth - 4) // 6
        self.conv1 = nn.Conv2d(self.in_chans, channels[0], 3, padding=1, bias=False)
        self.block1 = Group(channels[0], channels[1], blocks, stride=1)
        self.block2 = Group(channels[1], channels[2], blocks, stride=2)
        self.block3 = Group(channels[2], channels[3], blocks, stride=2)
        self.bn1 = nn.BatchNorm2d(channels[3])
        self.act1 = nn.ReLU(inplace=True)
        self._complete(channels, (1, 1, 2, 4))
        self._init_convs()

    def _init_classifier(self, linear: nn.Linear) -> None:
        nn.init.zeros_(linear.bias)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        blocks = r"^block(\d+)" if coarse else r"^block(\d+)\.layer\.(\d+)"
        return {"stem": r"^conv1", "blocks": [(blocks, None), (r"^bn1", (99999,))]}

    def _stem(self, x: Tensor, preact: bool) -> tuple[Any, Tensor]:  # noqa: ARG002
        x = self.conv1(x)
        return x, x

    def _stage(self, index: int, x: Any, preact: bool) -> tuple[Any, Tensor]:
        groups: tuple[nn.Module, ...] = (self.block1, self.block2, self.block3)
        blocks: list[Any] = list(getattr(groups[index - 1], "layer", ()))  # a pruned group has none
        if not preact:
            x = self._run(blocks, x, module=groups[index - 1])
            return x, x
        if not all(isinstance(group, Group) for group in groups):
            raise ValueError(
                "preact=True: a pruned network lacks the BatchNorm after its last map: use one that is not pruned."
            )
        # The previous map with the output of this group's first BatchNorm, which must not count a batch twice.
        if isinstance(x, tuple):
            x = blocks.pop(0)(*x)
        x = self._run(blocks, x)
        following = self.bn1 if index == len(groups) else groups[index].get_submodule("layer.0.bn1")
        normed = following(x)
        return (x, normed), normed

    def _tail(self, x: Any) -> Tensor:
        if isinstance(x, tuple):
            return activate(self.act1, x[1], preact=True)[0]
        return self.act1(self.bn1(x))


register(
    CifarWRN,
    {f"cifar_wrn_{depth}_{width}": {"depth": depth, "width": width} for depth in (16, 40) for width in (1, 2)},
    pool=8,
)
