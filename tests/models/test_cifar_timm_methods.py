"""timm's methods and conventions on every family of the cifar_* networks."""

import math
import subprocess
import sys

import pytest
import timm
import torch
from cifar_networks import SMALL, build, families, images
from timm.models import group_parameters
from torch import nn

import mgd_timm.models  # noqa: F401 - registers cifar_*
from mgd_timm.export.timm_folder import export_model
from mgd_timm.models.pretrained_cfg import describe_weights


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
