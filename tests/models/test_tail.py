"""Tails: what follows a map of a model computes what the model computes, or there is none."""

import pytest
import timm
import torch

import mgd_timm.models  # noqa: F401 - registers cifar_*
from mgd_timm.features import FeatureTap
from mgd_timm.models.tail import GenericTail, cut_tail

SIZE = (3, 32, 32)


def tap(name: str) -> FeatureTap:
    torch.manual_seed(0)
    sized = {"img_size": 32} if "vit" in name else {}
    tapped = FeatureTap(timm.create_model(name, num_classes=5, **sized), "stages", input_size=SIZE)
    for module in tapped.modules():  # as after training: BatchNorm is not the identity
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.uniform_(module.running_mean, -0.1, 0.1)
    return tapped.eval()


@pytest.mark.parametrize(
    ("name", "stages"), [("cifar_resnet8", 3), ("test_resnet", 4), ("test_convnext", 4), ("test_efficientnet", 4)]
)
def test_an_exact_tail_computes_the_models_own_logits(name, stages):
    """With stages in layer1 to layer4, `stages` and `blocks`; from the first map that a branch leaves from, and the
    last."""
    images = torch.randn(3, *SIZE)
    for position in (0, stages - 2):
        model = tap(name)
        assert len(model.indices) == stages
        with torch.no_grad():
            features = model(images)
        before = sum(weight.numel() for weight in model.parameters())
        tail = cut_tail(model, position)
        assert tail is not None
        assert 0 < sum(weight.numel() for weight in tail.parameters()) < before
        logits = tail(features.maps[position])
        torch.testing.assert_close(logits, features.logits, rtol=1e-4, atol=1e-5)
        gradients = torch.autograd.grad(logits.square().sum(), list(tail.parameters()), allow_unused=True)
        assert all(gradient is not None for gradient in gradients)


def test_a_model_with_position_embeddings_has_no_tail():
    assert cut_tail(tap("test_vit"), 0) is None


def test_a_generic_tail_has_the_later_maps_channels_and_sizes():
    tail = GenericTail(((4, 8, 8), (6, 4, 4), (7, 2, 2)), 5)
    assert [layer.out_channels for layer in tail if isinstance(layer, torch.nn.Conv2d)] == [4, 6, 6, 7]
    assert torch.nn.Sequential(*list(tail)[:7])(torch.randn(2, 4, 8, 8)).shape == (2, 6, 4, 4)
    assert tail(torch.randn(2, 4, 8, 8)).shape == (2, 5)
