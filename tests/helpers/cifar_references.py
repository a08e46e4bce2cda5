"""Independent forward passes of the cifar_* networks in eval mode, from their weights alone.

Each returns the maps, the maps before their activation, and the embedding.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


class Layers:
    """Operations by the names of their weights."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        self.state = state

    def conv(self, key: str, x: Tensor, stride: int = 1, groups: int = 1) -> Tensor:
        weight = self.state[f"{key}.weight"]
        return F.conv2d(x, weight, self.state.get(f"{key}.bias"), stride, weight.shape[-1] // 2, groups=groups)

    def norm(self, key: str, x: Tensor) -> Tensor:
        mean, var, weight, bias = (
            self.state[f"{key}.{part}"][:, None, None] for part in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (var + 1e-5).sqrt() * weight + bias

    def count(self, prefix: str) -> int:
        return len({key.removeprefix(prefix).split(".")[0] for key in self.state if key.startswith(prefix)})


def resnet50_of(at: Layers, x: Tensor) -> tuple[list[Tensor], list[Tensor], Tensor]:
    before = [at.norm("bn1", at.conv("conv1", x))]
    x = before[0].relu()
    for stage in range(1, 5):
        for block in range(at.count(f"layer{stage}.")):
            key, stride = f"layer{stage}.{block}.", 2 if stage > 1 and block == 0 else 1
            out = at.norm(f"{key}bn1", at.conv(f"{key}conv1", x)).relu()
            out = at.norm(f"{key}bn2", at.conv(f"{key}conv2", out, stride)).relu()
            out = at.norm(f"{key}bn3", at.conv(f"{key}conv3", out))
            if block == 0:
                x = at.norm(f"{key}shortcut.1", at.conv(f"{key}shortcut.0", x, stride))
            total = out + x
            x = total.relu()
        before.append(total)
    return [m.relu() for m in before], before, x.mean((2, 3))


def wrn_of(at: Layers, x: Tensor) -> tuple[list[Tensor], list[Tensor], Tensor]:
    x = at.conv("conv1", x)
    maps = [x]
    for group in range(1, 4):
        for block in range(at.count(f"block{group}.layer.")):
            key, stride = f"block{group}.layer.{block}.", 2 if group > 1 and block == 0 else 1
            inner = at.norm(f"{key}bn1", x).relu()
            out = at.norm(f"{key}bn2", at.conv(f"{key}conv1", inner, stride)).relu()
            if f"{key}convShortcut.weight" in at.state:
                x = at.conv(f"{key}convShortcut", inner, stride)
            x = x + at.conv(f"{key}conv2", out)
        maps.append(x)
    norms = ("block2.layer.0.bn1", "block3.layer.0.bn1", "bn1")
    before = [maps[0], *(at.norm(key, m) for key, m in zip(norms, maps[1:], strict=True))]
    return maps, before, before[-1].relu().mean((2, 3))


def vgg_of(at: Layers, x: Tensor) -> tuple[list[Tensor], list[Tensor], Tensor]:
    side, before = x.shape[-1], []
    for block in range(5):
        if block in (1, 2, 3) or (block == 4 and side == 64):
            x = F.max_pool2d(x, 2)
        for layer in range(at.count(f"block{block}.") // 2):
            key = f"block{block}.{3 * layer}"
            x = at.norm(f"block{block}.{3 * layer + 1}", at.conv(key, x))
            last, x = x, x.relu()
        before.append(last)
    return [m.relu() for m in before], before, x.mean((2, 3))


def mobilenetv2_of(at: Layers, x: Tensor) -> tuple[list[Tensor], list[Tensor], Tensor]:
    x = at.norm("conv1.1", at.conv("conv1.0", x, 2)).relu()
    maps = [x]
    for group, stride in enumerate((1, 1, 2, 2, 1, 2, 1)):
        for block in range(at.count(f"blocks.{group}.")):
            key, step = f"blocks.{group}.{block}.conv.", 1 if block else stride
            out = at.norm(f"{key}1", at.conv(f"{key}0", x)).relu()
            out = at.norm(f"{key}4", at.conv(f"{key}3", out, step, groups=out.shape[1])).relu()
            out = at.norm(f"{key}7", at.conv(f"{key}6", out))
            x = x + out if step == 1 and x.shape == out.shape else out
        if group in (1, 2, 4, 6):
            maps.append(x)
    return maps, maps, at.norm("conv2.1", at.conv("conv2.0", x)).relu().mean((2, 3))


def shufflev1_of(at: Layers, x: Tensor) -> tuple[list[Tensor], list[Tensor], Tensor]:
    before = [at.norm("bn1", at.conv("conv1", x))]
    x = before[0].relu()
    for stage in range(1, 4):
        for unit in range(at.count(f"layer{stage}.")):
            key, groups = f"layer{stage}.{unit}.", 1 if stage == 1 and unit == 0 else 3
            out = at.norm(f"{key}bn1", at.conv(f"{key}conv1", x, groups=groups)).relu()
            out = torch.stack(out.chunk(groups, 1), 2).flatten(1, 2)
            out = at.norm(f"{key}bn2", at.conv(f"{key}conv2", out, 1 if unit else 2, groups=out.shape[1])).relu()
            out = at.norm(f"{key}bn3", at.conv(f"{key}conv3", out, groups=3))
            total = out + x if unit else torch.cat([out, F.avg_pool2d(x, 3, 2, 1)], 1)
            x = total.relu()
        before.append(total)
    return [m.relu() for m in before], before, x.mean((2, 3))


def shufflev2_of(at: Layers, x: Tensor) -> tuple[list[Tensor], list[Tensor], Tensor]:
    def interleave(one: Tensor, two: Tensor) -> Tensor:
        return torch.stack([one, two], 2).flatten(1, 2)

    before = [at.norm("bn1", at.conv("conv1", x))]
    x = before[0].relu()
    maps = [x]
    for stage in range(1, 4):
        key = f"layer{stage}.0."
        left = at.norm(f"{key}bn1", at.conv(f"{key}conv1", x, 2, groups=x.shape[1]))
        left = at.norm(f"{key}bn2", at.conv(f"{key}conv2", left)).relu()
        right = at.norm(f"{key}bn3", at.conv(f"{key}conv3", x)).relu()
        right = at.norm(f"{key}bn4", at.conv(f"{key}conv4", right, 2, groups=right.shape[1]))
        x = interleave(left, at.norm(f"{key}bn5", at.conv(f"{key}conv5", right)).relu())
        for unit in range(1, at.count(f"layer{stage}.")):
            key = f"layer{stage}.{unit}."
            half = x.shape[1] // 2
            out = at.norm(f"{key}bn1", at.conv(f"{key}conv1", x[:, half:])).relu()
            out = at.norm(f"{key}bn2", at.conv(f"{key}conv2", out, groups=half))
            out = at.norm(f"{key}bn3", at.conv(f"{key}conv3", out))
            both = torch.cat([x[:, :half], out], 1)
            x = interleave(x[:, :half], out.relu())
        maps.append(x)
        before.append(both)
    return maps, before, at.norm("bn2", at.conv("conv2", x)).relu().mean((2, 3))


REFERENCES = {
    "cifar_resnet50": resnet50_of,
    "cifar_wrn_16_1": wrn_of,
    "cifar_wrn_16_2": wrn_of,
    "cifar_vgg8": vgg_of,
    "cifar_vgg11": vgg_of,
    "cifar_mobilenetv2": mobilenetv2_of,
    "cifar_shufflev1": shufflev1_of,
    "cifar_shufflev2": shufflev2_of,
}
