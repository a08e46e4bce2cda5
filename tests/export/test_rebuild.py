"""What timm could not load from an export is refused before a run, or merged where that is exact."""

import pytest
import timm
import torch
from timm.layers import convert_sync_batchnorm
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

import mgd_timm
from mgd_timm import models  # noqa: F401  # registers cifar_*
from mgd_timm.export.rebuild import check_rebuild

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def network(name: str = "cifar_resnet8x05", **options) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=10, **options)


class Doubled(nn.Module):
    """Has no weights, so that no state dict tells of it."""

    def forward(self, x):
        return 2 * x


def change(name: str):
    def apply(model):
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, Doubled())

    return apply


def change_eps(model):
    model.bn1.eps = 1e-3


def new_head(model):
    model.fc = nn.Sequential(nn.Linear(model.num_features, 16), nn.ReLU(), nn.Linear(16, 10))


@pytest.mark.parametrize(
    ("options", "edit", "said"),
    [
        ({}, new_head, r"only the model has fc\.0\.weight, fc\.0\.bias, fc\.2\.weight; only timm's has fc\.weight"),
        ({}, change_eps, r"eps of bn1 is 0\.001, and timm\.create_model builds it with 1e-05"),
        ({"name": "test_resnet"}, change("layer1.0.act2"), r"its logits are others .*layer1\.0\.act2 is a Doubled"),
        ({}, lambda model: prune.l1_unstructured(model.conv1, "weight", 0.5), r"weights of conv1 .*prune\.remove"),
        ({}, lambda model: weight_norm(model.fc), r"weights of fc .*\(WeightNorm\).*parametrizations\.weight_norm"),
        ({}, lambda model: spectral_norm(model.fc), r"weights of fc .*parametrizations\.spectral_norm"),
        ({}, lambda model: model.half(), r"of another dtype conv1\.weight \(torch\.float16, not torch\.float32\)"),
        ({}, lambda model: setattr(model, "fc", nn.Linear(model.num_features, 7)), r"of another shape fc\.weight"),
        (
            {"name": "test_resnet", "act_layer": nn.LeakyReLU},
            lambda model: None,
            r"'act_layer'.* such as act_layer='gelu'",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_what_timm_would_build_otherwise_is_refused(tmp_path, options, edit, said):
    model = network(**options)
    edit(model)
    with pytest.raises(ValueError, match=f"model: .* could not be loaded from its export: .*{said}"):
        mgd_timm.export_model(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_run_refuses_it_before_its_folder_is_made(small_data, tmp_path):
    model = network()
    new_head(model)
    with pytest.raises(ValueError, match=r"student: cifar_resnet8x05 could not be loaded from its export"):
        mgd_timm.train(model, str(small_data), output=tmp_path / "run")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("test_resnet", {"act_layer": "gelu"}),
        ("test_resnet", {"drop_path_rate": 0.1}),
        ("test_vit3", {"img_size": 32}),
        ("test_convnext", {"in_chans": 1}),
        ("test_resnet", {"global_pool": "max"}),
    ],
)
def test_what_timm_builds_is_not_refused(name, options):
    before = torch.get_rng_state()
    model = network(name, **options)
    drawn = torch.get_rng_state()
    check_rebuild(model, "model")
    assert torch.equal(torch.get_rng_state(), drawn)
    assert not torch.equal(before, drawn)
    check_rebuild(convert_sync_batchnorm(model).to(memory_format=torch.channels_last), "model")
    model.reset_classifier(7)
    check_rebuild(model, "model")


def exported_logits(model: nn.Module, folder) -> torch.Tensor:
    loaded = timm.create_model(f"local-dir:{mgd_timm.export_model(model, folder)}", pretrained=True).eval()
    with torch.no_grad():
        return loaded(IMAGES)


@pytest.mark.parametrize("parametrize", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_parametrizations_are_merged_exactly(tmp_path, parametrize):
    model = network()
    for module in (model.layer1[0].conv1, model.fc):
        parametrize(module)
    names = list(model.state_dict())
    with torch.no_grad():
        expected = model.eval()(IMAGES)
    assert torch.equal(exported_logits(model, tmp_path / "out"), expected)
    assert list(model.state_dict()) == names  # the caller's keeps them


def test_wrapped_modules_are_exported_as_the_model_in_them(tmp_path):
    model = network()
    with torch.no_grad():
        expected = model.eval()(IMAGES)
    wrapped = torch.compile(nn.DataParallel(torch.compile(model)))
    assert torch.equal(exported_logits(wrapped, tmp_path / "out"), expected)


@pytest.mark.slow
def test_compiled_and_parametrized_students_are_trained_and_exported_merged(small_data, tmp_path):
    model = network()
    parametrizations.weight_norm(model.layer1[0].conv1)
    student = mgd_timm.train(torch.compile(model), str(small_data), output=tmp_path / "run", epochs=1)
    assert student is model  # trained in place
    loaded = timm.create_model(f"local-dir:{tmp_path / 'run' / 'export'}", pretrained=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(IMAGES), student.to(memory_format=torch.contiguous_format)(IMAGES))


@pytest.mark.slow
def test_adapters_of_peft_train_alone_and_are_exported_merged(small_data, tmp_path):
    import peft  # it imports Transformers, which takes seconds

    model = network("test_vit3", img_size=32)
    options = {"target_modules": ["qkv"], "modules_to_save": ["head"], "init_lora_weights": False}
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, **options))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    student = mgd_timm.train(adapted, str(small_data), output=tmp_path / "run", epochs=1, img_size=32)
    changed = {name for name, value in student.state_dict().items() if not torch.equal(value, before[name])}
    assert changed
    assert all("lora_" in name or name.startswith("head.modules_to_save") for name in changed)
    loaded = timm.create_model(f"local-dir:{tmp_path / 'run' / 'export'}", pretrained=True).eval()
    with torch.no_grad():
        expected = adapted.eval()(IMAGES)
        torch.testing.assert_close(loaded(IMAGES), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(adapted.merge_and_unload()(IMAGES), expected, rtol=1e-4, atol=1e-5)
