"""BatchNorm folded into convolutions: the same features, the tap untouched, and no fold where it would change them."""

import pytest
import timm
import torch
from torch import nn

import mgd_timm.models  # noqa: F401
from mgd_timm.features import FeatureTap
from mgd_timm.models.fold_batchnorm import fold_batchnorm


def network(name: str) -> nn.Module:
    """An untrained network's BatchNorm is nearly the fingerprint: here with statistics of a trained one."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 2)
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_(0, 0.2)
    return model


def norms(module: nn.Module) -> int:
    return sum(isinstance(m, nn.BatchNorm2d) for m in module.modules())


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["cifar_resnet20", "resnet18", "tf_efficientnet_lite0", "densenet121", "resnetv2_50", "repvgg_a0"]
)
def test_the_features_of_any_batch_are_the_same_in_float64(name: str) -> None:
    size = 32 if name.startswith("cifar") else 64
    tap = FeatureTap(network(name), [0, -1], input_size=(3, size, size)).double().eval()
    before = {key: value.clone() for key, value in tap.state_dict().items()}
    twin = fold_batchnorm(tap)
    assert twin is not None
    assert norms(twin) < norms(tap)
    images = torch.randn(3, 3, size, size, dtype=torch.float64)
    with torch.no_grad():
        one, other = tap(images), twin(images)
    torch.testing.assert_close(one.logits, other.logits, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(one.embedding, other.embedding, rtol=1e-9, atol=1e-9)
    for a, b in zip(one.maps, other.maps, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    assert all(torch.equal(value, before[key]) for key, value in tap.state_dict().items())


def test_every_norm_behind_a_convolution_is_folded() -> None:
    assert norms(fold_batchnorm(FeatureTap(network("cifar_resnet20"), input_size=(3, 32, 32))) or nn.Identity()) == 0


@pytest.mark.parametrize("name", ["convnext_atto", "vit_tiny_patch16_224"])
def test_a_network_without_such_norms_is_left_alone(name: str) -> None:
    assert fold_batchnorm(FeatureTap(timm.create_model(name, num_classes=3))) is None


def test_a_residual_of_raw_convolutions_keeps_its_norm_and_the_others_are_folded() -> None:
    """In a WRN of width 1 the stem's output is the first residual as well."""
    tap = FeatureTap(network("cifar_wrn_16_1"), input_size=(3, 32, 32)).eval()
    twin = fold_batchnorm(tap)
    assert twin is not None
    assert 0 < norms(twin) < norms(tap)


def test_a_convolution_that_is_read_elsewhere_too_is_not_folded() -> None:
    class Leaky(nn.Module):
        """The convolution's raw output is added after its BatchNorm."""

        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16)
            self.bn.running_mean.fill_(0.5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raw = self.conv(x)
            return self.bn(raw) + raw

    model = network("cifar_resnet8")
    model.layer1 = nn.Sequential(Leaky())
    twin = fold_batchnorm(FeatureTap(model, input_size=(3, 32, 32)))
    assert twin is not None
    assert norms(twin.model.layer1) == norms(twin) == 1
