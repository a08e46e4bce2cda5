"""Every cifar_* network: the paper's sizes, maps, initialisation and outputs, and timm's contract."""

import copy
import math
import subprocess
import sys

import pytest
import timm
import torch
import torch.nn.functional as F
from test_cifar_resnet import TABLE as RESNETS
from timm.models import group_parameters
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import mgd_timm.models  # noqa: F401 - registers cifar_*
from mgd_timm.export.timm_folder import export_model
from mgd_timm.features import FeatureTap
from mgd_timm.models.cifar.base import CifarNet
from mgd_timm.models.pretrained_cfg import describe_weights

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


def test_the_table_has_every_network():
    assert set(timm.list_models("cifar_*")) == set(TABLE)


@pytest.mark.parametrize("name", TABLE)
def test_sizes(name):
    parameters, macs, width, sizes = TABLE[name]
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=100)
        x = torch.empty(1, 3, 32, 32)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert model.num_features == model.head_hidden_size == width
    convs = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert not [
        conv for conv in convs if conv.kernel_size == (1, 1) and conv.stride != (1, 1)
    ]  # see BasicBlock.forward_preact
    with FlopCounterMode(display=False) as counter:
        final, maps = model.forward_intermediates(x)
        embedding = model.forward_head(final, pre_logits=True)
        model.get_classifier()(embedding)
    assert embedding.shape == (1, width)
    assert [tuple(m.shape[1:]) for m in maps] == [(c, s, s) for c, s in sizes]
    assert [(info["num_chs"], 32 // info["reduction"]) for info in model.feature_info] == list(sizes)
    if macs:
        assert counter.get_total_flops() / 2e9 == pytest.approx(macs, abs=6e-4 if macs > 0.01 else 6e-5)


# The networks in eval mode, from their weights alone, in the specification's words: maps, those before activation,
# embedding.


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


@pytest.mark.parametrize(
    ("name", "side"),
    [*((name, 32) for name in REFERENCES), ("cifar_vgg8", 64), ("cifar_wrn_16_2", 13), ("cifar_resnet50", 9)],
)
def test_forward_is_the_papers(name, side):
    model = trained(build(name))
    x = images(side).double()
    maps, before, embedding = REFERENCES[name](Layers(model.state_dict()), x)
    final, ours = model.forward_intermediates(x)
    torch.testing.assert_close(ours, maps)
    torch.testing.assert_close(model.forward_intermediates(x, preact=True, intermediates_only=True), before)
    torch.testing.assert_close(model.forward_head(final, pre_logits=True), embedding)
    torch.testing.assert_close(model(x), model.get_classifier()(embedding))


@families
@pytest.mark.parametrize("frugal", [False, True])
def test_showing_maps_before_their_activation_changes_nothing_else(name, frugal):
    """Neither values nor gradients nor BatchNorm's statistics; and no activation in place reaches what is shown."""
    results = []
    for preact in (False, True):
        model = build(name).double().train()
        model.set_grad_checkpointing(frugal)
        final, maps = model.forward_intermediates(images(16).double(), preact=preact)
        saved = [m.clone() for m in maps]
        model.forward_head(final).square().sum().backward()
        assert all(torch.equal(m, kept) for m, kept in zip(maps, saved, strict=True))
        results.append((final, maps, {k: p.grad for k, p in model.named_parameters()}, dict(model.named_buffers())))
    (final, maps, grads, buffers), (final2, before, grads2, buffers2) = results
    assert torch.equal(final, final2)
    torch.testing.assert_close(grads2, grads)
    if not (
        frugal and "wrn" in name
    ):  # recomputed blocks count a batch twice there, the BatchNorm that a map is shown behind does not
        torch.testing.assert_close(buffers2, buffers)
    if name == "cifar_mobilenetv2":
        assert all(torch.equal(m, b) for m, b in zip(maps, before, strict=True))
        return
    if name == "cifar_wrn_16_1":  # raw sums; what the next BatchNorm makes of them has no offset and unit variance
        assert torch.equal(before[0], maps[0])
        assert torch.equal(before[-1].relu(), final)
        for m, b in zip(maps[1:], before[1:], strict=True):
            column = (slice(None), None, None)
            expected = (m - m.mean((0, 2, 3))[column]) / (m.var((0, 2, 3), correction=0)[column] + 1e-5).sqrt()
            torch.testing.assert_close(b, expected)
        return
    if name == "cifar_shufflev2":  # not shuffled
        before = [before[0], *(torch.stack(b.chunk(2, 1), 2).flatten(1, 2) for b in before[1:])]
    for m, b in zip(maps, before, strict=True):
        assert (b < 0).any()
        assert torch.equal(b.relu(), m)


@families
def test_maps_before_their_activation_teach(name):
    """Their gradients reach the weights before them."""
    model = build(name).double().train()
    _, before = model.forward_intermediates(images(16).double(), preact=True)
    sum(b.square().mean() for b in before).backward()
    first = next(model.parameters())
    assert first.grad.abs().sum() > 0
    _, (one,) = model.forward_intermediates(images(16).double(), indices=[2], preact=True)
    assert torch.equal(one, before[2])


def test_a_pruned_wrn_cannot_show_what_follows():
    model = build("cifar_wrn_16_1")
    model.prune_intermediate_layers([1])
    with pytest.raises(ValueError, match="a pruned network lacks the BatchNorm"):
        model.forward_intermediates(images(), preact=True)


@pytest.mark.parametrize(
    "name", ["cifar_resnet14", "cifar_wrn_40_2", "cifar_vgg11", "cifar_mobilenetv2", "cifar_resnet50"]
)
def test_initialisation(name):
    model = build(name)
    for key, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            weight = module.weight.detach()
            std = math.sqrt(2 / (module.kernel_size[0] ** 2 * module.out_channels))
            assert weight.std().item() == pytest.approx(std, rel=4 / math.sqrt(weight.numel()) + 0.01), key
            if weight.numel() > 2000:
                assert (weight.abs() > 2 * std).float().mean().item() == pytest.approx(0.0455, abs=0.02), key  # normal
            assert (module.bias is not None) is ("vgg" in name)
            assert module.bias is None or not module.bias.any()
        elif isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all()
            assert not module.bias.any()
    for classes in (100, 1000):
        model.reset_classifier(classes)  # a later one is as the first
        linear = model.get_classifier()
        if model.classifier_name == "classifier":
            assert linear.weight.std().item() == pytest.approx(0.01, rel=0.02)
        else:
            bound = 1 / math.sqrt(model.num_features)
            assert 0.98 * bound < linear.weight.abs().max() <= bound
        assert linear.bias.any().item() is name.startswith("cifar_resnet")


@pytest.mark.parametrize("name", ["cifar_shufflev1", "cifar_shufflev2"])
def test_initialisation_is_the_frameworks(name):
    model = build(name)
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            bound = 1 / math.sqrt(module.weight[0].numel())
            assert module.weight.abs().max() <= bound
            assert module.weight.std().item() == pytest.approx(
                bound / math.sqrt(3), rel=4 / math.sqrt(module.weight.numel())
            )


@pytest.mark.parametrize("name", TABLE)
def test_every_network_trains_and_is_tapped(name):
    """One step at 32 and 64 pixels, channels last and bfloat16: a strided 1x1 convolution ended the process here."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10)
    twin = copy.deepcopy(model)
    twin.load_state_dict(model.state_dict())
    tap = FeatureTap(model, (0, len(model.feature_info) - 1))
    assert tap.classifier is model.get_classifier()
    with torch.no_grad():
        features = tap.eval()(images(16))
        torch.testing.assert_close(twin.eval()(images(16)), features.logits)
    assert [m.shape[1] for m in features.maps] == [TABLE[name][3][0][0], TABLE[name][3][-1][0]]
    assert features.embedding.shape == (2, TABLE[name][2])
    model.train().to(memory_format=torch.channels_last)
    for side in (32, 64):
        model.zero_grad()
        x = images(side).to(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(x), torch.tensor([1, 2]))
        loss.backward()
        assert loss.isfinite()
        for key, parameter in model.named_parameters():
            assert parameter.grad is not None, key
            assert parameter.grad.isfinite().all(), key


@families
@pytest.mark.parametrize(
    ("num_classes", "channels", "height", "width"), [(1, 1, 28, 28), (10, 3, 64, 32), (1000, 4, 33, 35)]
)
def test_any_classes_channels_and_sizes(name, num_classes, channels, height, width):
    model = build(name, num_classes=num_classes, in_chans=channels).eval()
    x = images(height, width, channels)
    final, maps = model.forward_intermediates(x)
    assert model.forward_head(final).shape == (2, num_classes)
    rounding = math.floor if "vgg" in name else math.ceil  # pooling rounds down, a strided convolution up
    for m, info in zip(maps, model.feature_info, strict=True):
        sides = [rounding(side / info["reduction"]) for side in (height, width)]
        assert tuple(m.shape[1:]) == (info["num_chs"], *sides)


@families
def test_the_smallest_image(name):
    side = SMALL[name][1]
    model = build(name, num_classes=3).eval()
    assert model(images(side)).shape == (2, 3)
    for height, width in ((side - 1, 32), (32, 2)):
        for call in (model, model.forward_features, model.forward_intermediates):
            with pytest.raises(
                ValueError, match=rf"{name} cannot take images of {height}x{width} pixels.*smallest side is {side} "
            ):
                call(images(height, width))


@families
def test_forward_intermediates(name):
    model = build(name).eval()
    count = len(model.feature_info)
    _, every = model.forward_intermediates(images())
    assert len(every) == count
    for indices in (None, 2, [0], [1, 3], [-1], [-2, -1]):
        picked = (
            {None: list(range(count)), 2: [count - 2, count - 1]}.get(indices)
            if not isinstance(indices, list)
            else indices
        )
        final, maps = model.forward_intermediates(images(), indices=indices)
        alone = model.forward_intermediates(images(), indices=indices, intermediates_only=True, stop_early=True)
        assert torch.equal(final, model.forward_features(images()))
        for one in (maps, alone):
            assert all(torch.equal(m, every[i]) for m, i in zip(one, picked, strict=True))
    with pytest.raises(ValueError, match="only 'NCHW'"):
        model.forward_intermediates(images(), output_fmt="NLC")
    with pytest.raises((ValueError, AssertionError)):
        model.forward_intermediates(images(), indices=[count])


@families
def test_stopping_early_leaves_the_rest_alone(name):
    model = build(name).train()
    for preact in (False, True):
        last, (one,) = model.forward_intermediates(images(), indices=[1], stop_early=True, preact=preact)
        assert last.shape == one.shape
    moved = {key.rpartition(".")[0] for key, value in model.state_dict().items() if key.endswith("tracked") and value}
    reached = {key for key, module in model.named_modules() if isinstance(module, nn.BatchNorm2d) and key in moved}
    assert reached
    stages = [stage for names in model.stages[1:] for stage in names]
    beyond = [key for key in reached if key.startswith(tuple(f"{stage}." for stage in stages))]
    assert beyond == (["block2.layer.0.bn1"] if "wrn" in name else [])  # WRN shows map 1 behind it


@families
def test_head_and_classifier(name):
    model = build(name).to(torch.bfloat16)
    x, first = images().bfloat16(), next(model.parameters()).clone()
    width = model.head_hidden_size
    model.eval()
    final = model.forward_features(x)
    embedding = model.forward_head(final, pre_logits=True)
    torch.testing.assert_close(embedding, final.mean((2, 3)))
    assert torch.equal(model.forward_head(final), model.get_classifier()(embedding))
    model.train()
    model.reset_classifier(5)
    assert model.num_classes == model.get_classifier().out_features == 5
    assert model.get_classifier().weight.dtype == torch.bfloat16
    assert model.get_classifier().training
    assert model(x).shape == (2, 5)
    assert torch.equal(next(model.parameters()), first)
    model.reset_classifier(0)
    assert isinstance(model.get_classifier(), nn.Identity)
    assert model(x).shape == (2, width)
    model.reset_classifier(0, "")
    assert model(x).shape == final.shape
    model.reset_classifier(3, "avg")
    assert model(x).shape == (2, 3)
    for classes, pool in ((5, ""), (5, "max"), (0, "catavg")):
        with pytest.raises(ValueError, match="expected 'avg', or ''"):
            model.reset_classifier(classes, pool)
    assert build(name, num_classes=0)(images()).shape == (2, width)


@families
def test_configuration_names_the_layers_that_are_there(name):
    model = build(name)
    config = model.pretrained_cfg
    assert (config["mean"], config["std"]) == ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761))
    assert (config["input_size"], config["num_classes"]) == ((3, 32, 32), 100)
    assert model.get_submodule(config["first_conv"]).in_channels == 3
    assert model.get_submodule(config["classifier"]) is model.get_classifier()
    assert tuple(model.forward_features(images())[0, 0].shape) == config["pool_size"]
    for info in model.feature_info:
        shapes = []
        handle = model.get_submodule(info["module"]).register_forward_hook(
            lambda module, x, out, found=shapes: found.append(out)
        )
        model(images())
        handle.remove()
        assert shapes[0].shape[1] == info["num_chs"]


@families
@pytest.mark.parametrize("coarse", [False, True])
def test_group_matcher_puts_every_parameter_in_a_layer(name, coarse):
    model = build(name)
    layers = group_parameters(model, model.group_matcher(coarse))
    assert sorted(key for keys in layers.values() for key in keys) == sorted(key for key, _ in model.named_parameters())
    ordered = [layers[index] for index in sorted(layers)]
    assert model.pretrained_cfg["first_conv"] + ".weight" in ordered[0]
    assert set(ordered[-1]) == {f"{model.classifier_name}.weight", f"{model.classifier_name}.bias"}
    places = {key: index for index, keys in enumerate(ordered) for key in keys}
    assert [places[key] for key in model.state_dict() if key in places] == sorted(
        places.values()
    )  # in the order of execution
    tail = [key for key in places if key.split(".")[0] in model.tail]
    assert {places[key] for key in tail} == ({len(ordered) - 2} if tail else set())
    assert len(ordered) >= (5 if coarse else 7)


@families
def test_gradient_checkpointing_changes_no_number(name):
    plain, frugal = build(name).double().train(), build(name).double().train()
    frugal.set_grad_checkpointing()
    hooked, calls = (
        next(m for m in frugal.get_submodule(frugal.stages[1][-1] if "vgg" not in name else "block2").modules()),
        [],
    )
    next(m for m in hooked.modules() if isinstance(m, nn.Conv2d)).register_forward_hook(lambda *_: calls.append(1))
    outputs = []
    for model in (plain, frugal):
        final, maps = model.forward_intermediates(images(16).double())
        logits = model.forward_head(final)
        (logits.square().sum() + sum(m.square().mean() for m in maps)).backward()
        outputs.append(logits)
    assert torch.equal(*outputs)
    for (key, p), q in zip(plain.named_parameters(), frugal.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, msg=key)
    assert len(calls) == 2  # once forward, once recomputed
    frugal.set_grad_checkpointing(False)
    frugal(images(16).double()).sum().backward()
    assert len(calls) == 3


@families
def test_dropout_before_the_classifier(name):
    model = build(name, drop_rate=0.5)
    final = torch.rand(32, model.num_features, 2, 2) + 0.1
    whole = model.eval().forward_head(final, pre_logits=True)
    dropped = model.train().forward_head(final, pre_logits=True)
    kept = dropped != 0
    assert 0.4 < kept.float().mean() < 0.6
    torch.testing.assert_close(dropped[kept], 2 * whole[kept])


@families
@pytest.mark.parametrize("last", [0, 1, -1])
def test_prune_intermediate_layers(name, last):
    model = build(name).eval()
    _, every = model.forward_intermediates(images())
    whole = sum(p.numel() for p in model.parameters())
    take = [last % len(every)]
    assert model.prune_intermediate_layers([last], prune_norm=True) == take
    (one,) = model.forward_intermediates(images(), indices=take, intermediates_only=True)
    assert torch.equal(one, every[last])
    assert sum(p.numel() for p in model.parameters()) < whole
    assert torch.equal(model(images()), every[last])  # neither tail nor pool nor classifier is left


@families
def test_pruning_may_keep_the_head(name):
    model = build(name).eval()
    logits = model(images())
    model.prune_intermediate_layers([-1], prune_head=False)
    assert torch.equal(model(images()), logits)


@families
@pytest.mark.parametrize("indices", [None, (1, 3), (0,), (-1,)])
@pytest.mark.parametrize("kind", ["list", "getter"])
def test_features_only(name, indices, kind):
    model = build(name).eval()
    _, every = model.forward_intermediates(images())
    kwargs = {} if indices is None else {"out_indices": indices}
    if kind == "getter":
        kwargs["feature_cls"] = kind
    features = build(name, features_only=True, **kwargs).eval()  # from the same seed
    picked = [index % len(every) for index in (range(len(every)) if indices is None else indices)]
    assert features.feature_info.channels() == [every[i].shape[1] for i in picked]
    assert features.feature_info.reduction() == [model.feature_info[i]["reduction"] for i in picked]
    assert all(torch.equal(m, every[i]) for m, i in zip(features(images()), picked, strict=True))


@families
def test_state_dict_has_the_names_of_public_checkpoints(name):
    first = {
        "cifar_resnet14": "conv1 bn1 layer1 layer2 layer3 fc",
        "cifar_wrn_16_1": "conv1 block1 block2 block3 bn1 fc",
        "cifar_vgg11": "block0 block1 block2 block3 block4 classifier",
        "cifar_mobilenetv2": "conv1 blocks conv2 classifier",
        "cifar_shufflev1": "conv1 bn1 layer1 layer2 layer3 fc",
        "cifar_shufflev2": "conv1 bn1 layer1 layer2 layer3 conv2 bn2 fc",
        "cifar_resnet50": "conv1 bn1 layer1 layer2 layer3 layer4 fc",
    }
    inner = {
        "cifar_resnet14": "layer2.0.downsample.1.running_mean",
        "cifar_wrn_16_1": "block2.layer.0.convShortcut.weight",
        "cifar_vgg11": "block2.4.running_var",
        "cifar_mobilenetv2": "blocks.6.0.conv.7.weight",
        "cifar_shufflev1": "layer1.0.bn3.bias",
        "cifar_shufflev2": "layer1.0.conv5.weight",
        "cifar_resnet50": "layer1.0.shortcut.1.weight",
    }
    state = build(name).state_dict()
    assert (
        list(dict.fromkeys(key.split(".")[0] for key in state)) == first[name].split()
    )  # in this order, which export keeps
    assert inner[name] in state


@families
def test_an_exported_network_loads_in_timm(name, tmp_path):
    torch.manual_seed(0)
    full = "cifar_resnet8" if name == "cifar_resnet14" else name
    model = timm.create_model(full, num_classes=4, in_chans=1)
    describe_weights(
        model,
        input_size=(1, 28, 28),
        mean=(0.3,),
        std=(0.4,),
        class_names=("a", "b", "c", "d"),
        license="mit",
        tag="imported",
    )
    folder = export_model(model, tmp_path / "out")
    loaded = timm.create_model(f"local-dir:{folder}", pretrained=True)
    for (key, value), (other, ours) in zip(loaded.state_dict().items(), model.state_dict().items(), strict=True):
        assert key == other
        assert torch.equal(value, ours), key


@pytest.mark.slow
def test_traced_networks_take_any_size():
    """In a process without checks of types, which a tracer's proxies do not pass."""
    program = """
import timm, torch
import mgd_timm.models
for name in NAMES:
    model = timm.create_model(name).eval()
    traced = torch.fx.symbolic_trace(model)
    for side in (16, 48):
        x = torch.randn(2, 3, side, side)
        torch.testing.assert_close(traced(x), model(x))
"""
    names = ["cifar_resnet8", "cifar_wrn_16_1", "cifar_vgg8"]
    done = subprocess.run(
        [sys.executable, "-c", program.replace("NAMES", repr(names))], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("depth", [4, 12, 18])
def test_a_depth_that_does_not_exist_is_refused(depth):
    from mgd_timm.models.cifar.cifar_wrn import CifarWRN

    with pytest.raises(ValueError, match=f"depth={depth}: expected 6n \\+ 4"):
        CifarWRN(depth, 1)
