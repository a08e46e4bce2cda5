"""Every cifar_* network: the paper's sizes, maps, initialisation and outputs."""

import copy
import math

import pytest
import timm
import torch
import torch.nn.functional as F
from cifar_networks import TABLE, build, families, images, trained
from cifar_references import REFERENCES, Layers
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import mgd_timm.models  # noqa: F401 - registers cifar_*
from mgd_timm.features import FeatureTap


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
