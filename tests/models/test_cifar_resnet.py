"""The 32x32 ResNets: the paper's sizes, and timm's contract."""

import math

import pytest
import timm
import torch
import torch.nn.functional as F
from cifar_networks import RESNETS, WIDE
from timm.models import group_parameters
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import mgd_timm.models  # noqa: F401 - registers cifar_*
from mgd_timm.models.cifar.cifar_resnet import BasicBlock, CifarResNet


def build(name: str = "cifar_resnet8", **kwargs) -> CifarResNet:
    torch.manual_seed(0)
    return timm.create_model(name, **kwargs)


def images(height: int = 32, width: int = 32, channels: int = 3, batch: int = 2) -> Tensor:
    return torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(1))


def test_the_table_has_every_network():
    assert set(timm.list_models(module="cifar_resnet")) == set(
        RESNETS
    )  # the bottlenecks of cifar_resnet50 are another module


@pytest.mark.parametrize("name", RESNETS)
def test_sizes(name):
    parameters, macs, widths = RESNETS[name]
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=100)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert [info["num_chs"] for info in model.feature_info] == list(widths)
    assert model.num_features == model.head_hidden_size == widths[-1]
    with FlopCounterMode(display=False) as counter:
        _, maps = model.forward_intermediates(torch.empty(1, 3, 32, 32, device="meta"))
        model(torch.empty(1, 3, 32, 32, device="meta"))
    assert [tuple(m.shape[1:]) for m in maps] == [(c, s, s) for c, s in zip(widths, (32, 32, 16, 8), strict=True)]
    if macs:
        assert counter.get_total_flops() / 2 / 2 / 1e9 == pytest.approx(macs, abs=6e-4)  # both passes, 2 flops each


def reference(state: dict[str, Tensor], x: Tensor, blocks: int) -> Tensor:
    """The network of He et al. in eval mode, from its weights alone."""

    def norm(key: str, x: Tensor) -> Tensor:
        mean, var, weight, bias = (state[f"{key}.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
        column = (slice(None), None, None)
        return (x - mean[column]) / (var[column] + 1e-5).sqrt() * weight[column] + bias[column]

    x = norm("bn1", F.conv2d(x, state["conv1.weight"], padding=1)).relu()
    for stage in (1, 2, 3):
        for block in range(blocks):
            key, stride = f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
            out = norm(f"{key}.bn1", F.conv2d(x, state[f"{key}.conv1.weight"], stride=stride, padding=1)).relu()
            out = norm(f"{key}.bn2", F.conv2d(out, state[f"{key}.conv2.weight"], padding=1))
            if f"{key}.downsample.0.weight" in state:
                x = norm(f"{key}.downsample.1", F.conv2d(x, state[f"{key}.downsample.0.weight"], stride=stride))
            x = (out + x).relu()
    return F.linear(x.mean((2, 3)), state["fc.weight"], state["fc.bias"])


@pytest.mark.parametrize(("name", "blocks"), [("cifar_resnet14", 2), ("cifar_resnet8x4", 1)])
def test_forward_is_the_papers(name, blocks):
    model = build(name).double().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for values in (module.running_mean, module.bias.data):
                nn.init.uniform_(values, -0.2, 0.2)
            for values in (module.running_var, module.weight.data):
                nn.init.uniform_(values, 0.5, 1.5)
    state = model.state_dict()
    assert ("layer1.0.downsample.0.weight" in state) is (
        name == "cifar_resnet8x4"
    )  # a projection where the width changes
    torch.testing.assert_close(model(images().double()), reference(state, images().double(), blocks))


def test_initialisation():
    model = build("cifar_resnet32x4")
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            weight = module.weight.detach()
            std = math.sqrt(2 / (module.kernel_size[0] ** 2 * module.out_channels))
            assert weight.std().item() == pytest.approx(std, rel=4 / math.sqrt(weight.numel()) + 0.01)
            assert abs(weight.mean().item()) < 4 * std / math.sqrt(weight.numel())
            assert (weight.abs() > 2 * std).float().mean().item() == pytest.approx(
                0.0455, abs=0.03
            )  # normal, not uniform
            assert module.bias is None
        elif isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all()
            assert (module.bias == 0).all()
    bound = 1 / math.sqrt(256)
    assert 0.99 * bound < model.fc.weight.abs().max() <= bound
    assert model.fc.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)


def test_default_classes_and_configuration():
    model = build()
    assert model.fc.out_features == model.num_classes == 100
    assert model.pretrained_cfg["input_size"] == (3, 32, 32)
    assert (model.default_cfg["first_conv"], model.default_cfg["classifier"]) == ("conv1", "fc")


@pytest.mark.parametrize(
    ("num_classes", "channels", "height", "width"), [(1, 1, 28, 28), (10, 3, 64, 32), (1000, 4, 33, 35), (7, 3, 8, 8)]
)
def test_any_classes_channels_and_sizes(num_classes, channels, height, width):
    model = build(num_classes=num_classes, in_chans=channels).eval()
    x = images(height, width, channels)
    assert model(x).shape == (2, num_classes)
    final, maps = model.forward_intermediates(x)
    assert maps[-1] is final
    for m, info in zip(maps, model.feature_info, strict=True):
        sides = [math.ceil(side / info["reduction"]) for side in (height, width)]
        assert tuple(m.shape[1:]) == (info["num_chs"], *sides)


@pytest.mark.parametrize("indices", [None, 2, [0], [1, 3], [-1], [-2, -1]])
def test_forward_intermediates(indices):
    model = build().eval()
    _, every = model.forward_intermediates(images())
    picked = {None: [0, 1, 2, 3], 2: [2, 3]}[indices] if not isinstance(indices, list) else [i % 4 for i in indices]
    final, maps = model.forward_intermediates(images(), indices=indices)
    alone = model.forward_intermediates(images(), indices=indices, intermediates_only=True, stop_early=True)
    assert torch.equal(final, model.forward_features(images()))
    for one in (maps, alone):
        assert len(one) == len(picked)
        assert all(torch.equal(m, every[i]) for m, i in zip(one, picked, strict=True))


def test_stopping_early_leaves_the_rest_alone():
    model = build().train()
    model.forward_intermediates(images(), indices=[1], stop_early=True, intermediates_only=True)
    assert model.layer1[0].bn1.num_batches_tracked == 1
    assert model.layer2[0].bn1.num_batches_tracked == 0


@pytest.mark.parametrize("index", [4, -5, [0, 4]])
def test_a_map_that_does_not_exist(index):
    with pytest.raises((ValueError, AssertionError)):
        build().forward_intermediates(images(), indices=index if isinstance(index, list) else [index])


def test_only_nchw_maps():
    with pytest.raises(ValueError, match="only 'NCHW'"):
        build().forward_intermediates(images(), output_fmt="NLC")


def test_forward_head():
    model = build().eval()
    final = model.forward_features(images())
    embedding = model.forward_head(final, pre_logits=True)
    torch.testing.assert_close(embedding, F.avg_pool2d(final, 8).flatten(1))
    assert torch.equal(model.forward_head(final), model.get_classifier()(embedding))
    assert torch.equal(model(images()), model.forward_head(final))


def test_reset_classifier():
    model = build().to(torch.bfloat16)
    before = model.conv1.weight.clone()
    model.reset_classifier(5)
    assert model.num_classes == model.fc.out_features == 5
    assert model.fc.weight.dtype == torch.bfloat16  # as timm's own models keep it
    assert model(images().bfloat16()).shape == (2, 5)
    assert torch.equal(model.conv1.weight, before)
    model.reset_classifier(0)
    assert isinstance(model.fc, nn.Identity)
    assert model(images().bfloat16()).shape == (2, 64)
    model.reset_classifier(0, "")
    assert model(images().bfloat16()).shape == (2, 64, 8, 8)
    model.reset_classifier(3, "avg")
    assert model(images().bfloat16()).shape == (2, 3)


@pytest.mark.parametrize(("num_classes", "pool"), [(5, ""), (5, "max"), (0, "catavg")])
def test_a_pool_that_does_not_exist_is_refused(num_classes, pool):
    with pytest.raises(ValueError, match="expected 'avg', or ''"):
        build().reset_classifier(num_classes, pool)


@pytest.mark.parametrize("depth", [2, 7, 18])
def test_a_depth_that_does_not_exist_is_refused(depth):
    with pytest.raises(ValueError, match=f"depth={depth}: expected 6n"):
        CifarResNet(depth)


@pytest.mark.parametrize(
    ("name", "coarse", "groups"), [("cifar_resnet14", False, 1 + 6 + 1), ("cifar_resnet14", True, 1 + 3 + 1)]
)
def test_group_matcher_puts_every_parameter_in_a_layer(name, coarse, groups):
    model = build(name)
    layers = group_parameters(model, model.group_matcher(coarse))
    assert len(layers) == groups
    assert sorted(key for keys in layers.values() for key in keys) == sorted(key for key, _ in model.named_parameters())
    ordered = [layers[index] for index in sorted(layers)]
    assert {key.split(".")[0] for key in ordered[0]} == {"conv1", "bn1"}
    assert set(ordered[-1]) == {"fc.weight", "fc.bias"}


def test_dropout_before_the_classifier():
    model = build(drop_rate=0.5)
    final = model.eval().forward_features(images(batch=32))
    whole = model.forward_head(final, pre_logits=True)
    assert (whole > 0).any(1).all()
    dropped = model.train().forward_head(final, pre_logits=True)
    kept = dropped != 0
    assert 0.4 < kept[whole > 0].float().mean() < 0.6
    torch.testing.assert_close(dropped[kept], 2 * whole[kept])
    assert torch.equal(
        build().train().forward_head(final, pre_logits=True), build().eval().forward_head(final, pre_logits=True)
    )


@pytest.mark.parametrize(("indices", "take"), [([0, 2], [0, 2]), (1, [3]), ([0], [0])])
def test_prune_intermediate_layers(indices, take):
    model = build("cifar_resnet14").eval()
    _, every = model.forward_intermediates(images())
    whole = sum(p.numel() for p in model.parameters())
    assert model.prune_intermediate_layers(indices) == take
    maps = model.forward_intermediates(images(), indices=take, intermediates_only=True)
    assert all(torch.equal(m, every[i]) for m, i in zip(maps, take, strict=True))
    assert sum(p.numel() for p in model.parameters()) < whole
    assert torch.equal(model(images()), every[take[-1]])  # neither pool nor classifier is left


def test_pruning_may_keep_the_head():
    model = build().eval()
    logits = model(images())
    model.prune_intermediate_layers([3], prune_head=False)
    assert torch.equal(model(images()), logits)


@pytest.mark.parametrize("indices", [None, (1, 3), (0,)])
def test_features_only(indices):
    model = build("cifar_resnet8x4").eval()
    _, every = model.forward_intermediates(images())
    kwargs = {} if indices is None else {"out_indices": indices}
    features = timm.create_model("cifar_resnet8x4", features_only=True, **kwargs).eval()
    features.load_state_dict(model.state_dict(), strict=False)
    picked = indices or (0, 1, 2, 3)
    assert features.feature_info.channels() == [WIDE[i] for i in picked]
    assert features.feature_info.reduction() == [(1, 1, 2, 4)[i] for i in picked]
    assert all(torch.equal(m, every[i]) for m, i in zip(features(images()), picked, strict=True))


def test_state_dict_has_the_names_of_repdistiller():
    names = set(build("cifar_resnet8").state_dict())
    assert {
        "conv1.weight",
        "bn1.running_var",
        "layer1.0.conv1.weight",
        "layer2.0.downsample.0.weight",
        "fc.bias",
    } <= names
    assert {name.split(".")[0] for name in names} == {"conv1", "bn1", "layer1", "layer2", "layer3", "fc"}


@pytest.mark.parametrize("side", [7, 8, 64])
def test_a_shortcut_is_a_strided_convolution(side):
    torch.manual_seed(0)
    block = BasicBlock(8, 16, 2).double().eval()
    assert {"downsample.0.weight", "downsample.1.weight", "downsample.1.running_var"} <= set(block.state_dict())
    conv, norm = block.downsample
    results = []
    for strided in (False, True):
        x = torch.randn(
            2, 8, side, side, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
        ).requires_grad_()
        shortcut = norm(F.conv2d(x, conv.weight, stride=2)) if strided else block.downsample(x[:, :, ::2, ::2])
        out = (block.bn2(block.conv2(block.act1(block.bn1(block.conv1(x))))) + shortcut).relu() if strided else block(x)
        results.append([out, *torch.autograd.grad(out.square().sum(), [x, conv.weight])])
    for ours, reference in zip(*results, strict=True):
        torch.testing.assert_close(ours, reference)


@pytest.mark.parametrize("side", [64, 96])
@pytest.mark.parametrize("name", ["cifar_resnet8x05", "cifar_resnet8"])
def test_channels_last_trains_on_larger_images(name, side):
    """A strided 1x1 convolution ended the process here, on some processors."""
    grads = []
    for form in (torch.contiguous_format, torch.channels_last):
        model = build(name, num_classes=5).train().to(memory_format=form)
        for module in [model, *(block for block in model.modules() if isinstance(block, BasicBlock))]:
            module.act1 = module.act2 = nn.Softplus()  # at the kink of a ReLU the last bit decides the gradient
        out = model(images(side, side, batch=4).contiguous(memory_format=form))
        out.square().sum().backward()
        grads.append([out, *(p.grad for p in model.parameters())])
    for one, two in zip(*grads, strict=True):
        torch.testing.assert_close(two, one, rtol=1e-3, atol=1e-3 * one.abs().max().item())
