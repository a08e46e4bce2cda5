"""Fake quantisation rounds as an int8 file does, at the same places, and leaves no trace."""

import copy
import re

import numpy as np
import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_weights

import mgd_timm.models  # noqa: F401  (registers cifar_*)
from mgd_timm.data.dataset import load_images
from mgd_timm.features import FeatureTap
from mgd_timm.models.fake_quantise import FakeQuantisation, TensorRounding, WeightRounding, find_places
from mgd_timm.models.load import load_model
from mgd_timm.recipe.data import Data


def rounded(values: np.ndarray, low: np.ndarray, high: np.ndarray, levels: int, offset: int) -> np.ndarray:
    """Integers of an affine grid back as numbers, in float64."""
    scale = (high - low) / levels
    zero = np.round(-low / scale) + offset
    return (np.clip(np.round(values / scale) + zero, offset, offset + levels) - zero) * scale


def rounded_weight(weight: np.ndarray) -> np.ndarray:
    largest = np.abs(weight.reshape(len(weight), -1)).max(1).reshape(-1, *[1] * (weight.ndim - 1))
    return rounded(weight, -largest, largest, 254, -127)


def nearly_all_equal(one: torch.Tensor, two: np.ndarray, share: float = 0.999) -> None:
    """Equal to float32's accuracy, but for numbers that lie within it between two integers: those differ by one."""
    difference, largest = np.abs(one.detach().double().numpy() - two), np.abs(two).max()
    assert (difference < 1e-5 * largest).mean() >= share
    assert difference.max() < 2 * largest / 127


@pytest.mark.parametrize("shape", [(7, 5, 3, 3), (9, 4)])
def test_weights_are_rounded_as_in_float64(shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0), requires_grad=True)
    rounding = WeightRounding()
    assert rounding(weight) is weight
    rounding.active = True
    nearly_all_equal(rounding(weight), rounded_weight(weight.detach().double().numpy()))
    rounding(weight).sum().backward()
    assert torch.equal(weight.grad, torch.ones(shape))  # symmetric, and no weight lies outside its channel's range


def test_tensors_are_rounded_as_in_float64_and_pass_gradients_within_their_range():
    generator = torch.Generator().manual_seed(0)
    rounding = TensorRounding()
    rounding.observing = True
    seen = [torch.randn(50, generator=generator) + 1 for _ in range(3)]
    for tensor in seen:
        assert rounding(tensor) is tensor
    rounding.observing, rounding.active = False, True
    tensor = (4 * torch.randn(500, generator=generator)).requires_grad_(True)
    low, high = torch.cat(seen).min().double().numpy(), torch.cat(seen).max().double().numpy()
    nearly_all_equal(rounding(tensor), rounded(tensor.detach().double().numpy(), low, high, 255, 0), 0.99)
    rounding(tensor).sum().backward()
    step = (high - low) / 255
    inside = (tensor.detach() > low + step) & (tensor.detach() < high - step)
    outside = (tensor.detach() < low - step) | (tensor.detach() > high + step)
    assert bool((tensor.grad[inside] == 1).all())
    assert not bool(tensor.grad[outside].any())
    positive = TensorRounding()
    positive.observing = True
    positive(torch.full((3,), 2.0))
    assert [float(positive.low), float(positive.high)] == [0, 2]  # 0 is exact: of padding, of ReLU


def test_rounding_weights_and_folding_batchnorm_commute():
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(6, 5, 3, 3, generator=generator)
    gain, mean, shift = (torch.randn(6, generator=generator) for _ in range(3))  # gains of both signs
    variance = torch.rand(6, generator=generator) + 0.1
    rounding = WeightRounding()
    rounding.active = True

    def fold(given: torch.Tensor) -> torch.Tensor:
        return fuse_conv_bn_weights(given, None, mean, variance, 1e-5, gain, shift)[0].detach()

    nearly_all_equal(rounding(fold(weight)), fold(rounding(weight)).double().numpy(), 0.99)


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_efficientnet"])
def test_layers_compute_with_rounded_numbers(name):
    """Each convolution and linear layer of a network gives what float64 gives of its rounded weight and input."""
    model = timm.create_model(name, num_classes=5).eval()
    tap = FeatureTap(model, "stages", input_size=(3, 64, 64) if name != "test_vit" else None).eval()
    images = torch.randn(4, *tap.input_size, generator=torch.Generator().manual_seed(0))
    weights = {key: value.detach().double().numpy() for key, value in model.named_parameters() if "weight" in key}
    FakeQuantisation(tap).calibrate(images.split(2))
    names = {module: key for key, module in model.named_modules()}
    seen = []

    def compare(module, inputs, output):
        weight = torch.from_numpy(rounded_weight(weights[f"{names[module]}.weight"]))
        taken = inputs[0].detach().double()
        assert len(taken.unique()) <= 256, names[module]
        bias = module.bias.double() if module.bias is not None else None
        expected = (
            F.linear(taken, weight, bias)
            if isinstance(module, nn.Linear)
            else F.conv2d(taken, weight, bias, module.stride, module.padding, module.dilation, module.groups)
        )
        expected = expected.numpy()
        if hasattr(module, "quantised_output"):  # where neither BatchNorm nor ReLU follows
            low, high = (getattr(module.quantised_output, end).double().numpy() for end in ("low", "high"))
            expected = rounded(expected, low, high, 255, 0)
        nearly_all_equal(output, expected, 0.99)
        seen.append(module)

    places = find_places(FeatureTap(timm.create_model(name, num_classes=5), input_size=tap.input_size))
    handles = [m.register_forward_hook(compare) for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    with torch.no_grad():
        tap(images)
    for handle in handles:
        handle.remove()
    assert len(seen) == len(places.weights) > 5


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_efficientnet", "cifar_resnet8x05"])
def test_nothing_is_left_of_it(name):
    model = timm.create_model(name, num_classes=5)
    tap = FeatureTap(model, "stages").eval()
    before = copy.deepcopy(model.state_dict())
    kinds, hooks = [type(m) for m in model.modules()], [len(m._forward_hooks) for m in model.modules()]
    images = torch.randn(2, *tap.input_size, generator=torch.Generator().manual_seed(0))
    expected = tap(images)
    rounding = FakeQuantisation(tap)
    assert torch.equal(tap(images).logits, expected.logits)  # inactive
    rounding.calibrate([images])
    changed = tap(images)
    assert not torch.equal(changed.logits, expected.logits)
    assert torch.allclose(changed.logits, expected.logits, atol=0.2 * float(expected.logits.detach().abs().max()))
    rounding.remove()
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert [type(m) for m in model.modules()] == kinds
    assert [len(m._forward_hooks) for m in model.modules()] == hooks
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert torch.equal(tap(images).logits, expected.logits)


def test_a_relu_leaves_one_range_behind_it_and_a_hard_swish_two():
    """As in the int8 file: what a convolution gives a hard-swish is rounded, and what it gives a ReLU is not."""
    model = timm.create_model("mobilenetv3_small_050", num_classes=5)
    places = find_places(FeatureTap(model, input_size=(3, 32, 32)))
    relu, hard_swish = model.blocks[0][0].bn1, model.blocks[2][0].bn1
    assert isinstance(relu.act, nn.ReLU)
    assert relu.drop not in places.outputs
    assert relu.act in places.outputs or model.blocks[0][0].conv_pw in places.inputs
    assert not isinstance(hard_swish.act, nn.ReLU)
    assert hard_swish.drop in places.outputs
    assert hard_swish.act in places.outputs


class Pixels(nn.Module):
    """A network with timm's methods and no weights to quantise."""

    num_classes, num_features = 0, 3
    pretrained_cfg = {"architecture": "pixels", "input_size": (3, 8, 8)}

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward_features(self, images):
        return self.scale * images

    def forward_intermediates(self, images, indices=None, **options):
        final = self.forward_features(images)
        return final, [final]


@pytest.mark.parametrize("norm", [nn.utils.parametrizations.spectral_norm, nn.utils.parametrizations.weight_norm])
def test_a_parametrized_student_is_refused(norm):
    model = timm.create_model("test_resnet", num_classes=10)
    norm(model.fc)
    with pytest.raises(ValueError, match=r"has parametrized weights .* or leave --qat out"):
        FakeQuantisation(FeatureTap(model, input_size=(3, 32, 32)))
    assert not [module for module in model.modules() if isinstance(module, TensorRounding)]


def test_a_network_without_layers_to_quantise_is_refused():
    tap = FeatureTap(Pixels(), input_size=(3, 8, 8))
    with pytest.raises(ValueError, match=re.escape("no convolution (Conv2d) and no linear layer to quantise")):
        FakeQuantisation(tap)


@pytest.mark.slow
def test_it_predicts_what_the_int8_file_predicts(tmp_path):
    """For nearly all images of a trained network: sums are rounded at other places, and kernels add in other orders."""
    pytest.importorskip("onnxruntime")
    from mgd_timm.export.int8 import quantize_onnx
    from mgd_timm.export.load_file import load_file
    from mgd_timm.export.write_files import export_program, write_onnx

    model = load_model("embedded").eval()
    images = load_images(Data(pad=0, hflip=0.0), 0, log=lambda _: None)
    train, test = images.train, images.test
    assert test is not None
    device = torch.device("cpu")
    calibration = [batch.images for batch in train.batches(train.ids[:256].split(128), 0, device)]
    shown = torch.cat([batch.images for batch in test.batches(test.ids[:500].split(250), 0, device)])
    write_onnx(export_program(model, images.input_size), tmp_path / "float.onnx", {})
    quantize_onnx(tmp_path / "float.onnx", tmp_path / "int8.onnx", calibration)
    expected = load_file(tmp_path / "int8.onnx")(shown).argmax(1)
    tap = FeatureTap(model, input_size=images.input_size).eval()
    FakeQuantisation(tap).calibrate(calibration)
    with torch.no_grad():
        found = tap(shown).logits.argmax(1)
    assert float((found == expected).double().mean()) > 0.98
