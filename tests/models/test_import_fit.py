"""Public checkpoints that do not fit: another architecture, number of classes, image size or type, or not finite."""

import pytest
import torch
from public_networks import NAME, network
from torch import nn

from mgd_timm.cli.import_checkpoint import import_checkpoint
from mgd_timm.models.load import load_model


@pytest.mark.parametrize(
    ("source", "target", "expected"),
    [
        ("cifar_resnet14", "cifar_resnet8", [r"unexpected \['layer1.1.conv1.weight'"]),
        ("cifar_resnet8", "cifar_resnet14", [r"missing \['layer1.1.conv1.weight'"]),
        (
            "cifar_resnet8",
            "cifar_resnet8x05",
            [r"of another shape \['conv1.weight \(16, 3, 3, 3\) instead of \(8, 3, 3, 3\)'"],
        ),
        ("cifar_vgg8", "cifar_resnet8", [r"missing \['conv1.weight'", r"unexpected \['block0.0.weight'"]),
        ("cifar_resnet8", "cifar_shufflev1", ["missing", "unexpected", "of another shape"]),
        ("cifar_wrn_16_1", "cifar_wrn_16_2", ["missing", "of another shape"]),
    ],
)
def test_another_architecture(tmp_path, source, target, expected):
    torch.save(network(source).state_dict(), tmp_path / "x.pt")
    with pytest.raises(ValueError, match=rf"x.pt does not fit {target}: .*name the architecture") as refused:
        import_checkpoint(tmp_path / "x.pt", target, tmp_path / "out")
    for text in expected:
        refused.match(text)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("architecture", "options", "expected"),
    [
        ("cifar_resnet8x5", {}, "unknown model 'cifar_resnet8x5': did you mean"),
        (NAME, {"num_classes": 100}, "num_classes=100: the classifier in .*x.pt has 10 outputs"),
        (NAME, {"class_names": ["a", "b"]}, "2 class names, but the classifier in .*x.pt has 10 outputs"),
        (NAME, {"mean": (0.5,)}, r"mean=\(0.5,\): expected one value for each of the 3 channels"),
        (NAME, {"std": (0.5, 0.5, 0)}, r"std=\(0.5, 0.5, 0.0\): expected finite values above 0"),
        (NAME, {"mean": (0.5, float("nan"), 0.5)}, "mean=.* expected finite values"),
        (NAME, {"mean": (125, 123, 114)}, r"expected 1 at most.*: --mean 0\.4902 0\.4824 0\.4471"),
        (NAME, {"in_chans": 1}, r"conv1.weight \(8, 3, 3, 3\) instead of \(8, 1, 3, 3\)"),
    ],
)
def test_values_that_do_not_fit(tmp_path, architecture, options, expected):
    torch.save(network().state_dict(), tmp_path / "x.pt")
    with pytest.raises(ValueError, match=expected):
        import_checkpoint(tmp_path / "x.pt", architecture, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_grey_weights_need_a_mean_of_their_own(tmp_path):
    torch.save(network(in_chans=1).state_dict(), tmp_path / "x.pt")
    with pytest.raises(
        ValueError, match=r"the architecture's own: expected one value for each of the 1 channels.*give --mean"
    ):
        import_checkpoint(tmp_path / "x.pt", NAME, tmp_path / "out")


def test_weights_without_a_classifier_or_of_another_type(tmp_path):
    state = network().state_dict()
    torch.save({name: value for name, value in state.items() if not name.startswith("fc.")}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"does not fit cifar_resnet8x05: missing \['fc.weight', 'fc.bias'\]"):
        import_checkpoint(tmp_path / "x.pt", NAME, tmp_path / "out")
    torch.save({**state, "conv1.weight": state["conv1.weight"].char()}, tmp_path / "y.pt")
    with pytest.raises(ValueError, match=r"of another type \['conv1.weight torch.int8 instead of torch.float32'\]"):
        import_checkpoint(tmp_path / "y.pt", NAME, tmp_path / "out")


def test_channels_are_one_or_more(tmp_path):
    torch.save(network().state_dict(), tmp_path / "x.pt")
    with pytest.raises(ValueError, match="in_chans=0: expected 1 or more"):
        import_checkpoint(tmp_path / "x.pt", "cifar_resnet8x05", tmp_path / "out", in_chans=0)


def test_weights_that_are_not_finite(tmp_path):
    for value in (float("nan"), float("inf")):
        model = network()
        with torch.no_grad():
            model.fc.bias[3] = value
        torch.save(model.state_dict(), tmp_path / "x.pt")
        with pytest.raises(
            ValueError, match=r"x.pt: 1 of \d+ weights hold values that are not finite, such as fc.bias"
        ):
            import_checkpoint(tmp_path / "x.pt", NAME, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("built", "wanted"), [(64, 64), (64, 96), (160, 96)])
def test_position_embeddings_of_another_image_size_are_resampled(tmp_path, built, wanted):
    model = network("test_vit", classes=5, img_size=built)
    nn.init.normal_(model.pos_embed)
    torch.save({"model": model.state_dict()}, tmp_path / "x.pt")
    if built != 160:
        with pytest.raises(ValueError, match=r"pos_embed \(1, 17, 64\) instead of .* give --img-size"):
            import_checkpoint(tmp_path / "x.pt", "test_vit", tmp_path / "no")
    folder = import_checkpoint(tmp_path / "x.pt", "test_vit", tmp_path / "out", img_size=wanted, num_classes=5)
    loaded = load_model(str(folder))
    assert tuple(loaded.pretrained_cfg["input_size"]) == (3, wanted, wanted)
    model.set_input_size(img_size=wanted)
    images = torch.randn(2, 3, wanted, wanted, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(images), model(images))


def test_an_image_size_of_any_network_is_written_and_other_weights_are_refused_at_it(tmp_path):
    torch.save(network("test_resnet", classes=5).state_dict(), tmp_path / "x.pt")
    folder = import_checkpoint(tmp_path / "x.pt", "test_resnet", tmp_path / "out", img_size=96)
    assert tuple(load_model(str(folder)).pretrained_cfg["input_size"]) == (3, 96, 96)
    with pytest.raises(ValueError, match=r"x\.pt does not fit test_vit for 96x96 images"):
        import_checkpoint(tmp_path / "x.pt", "test_vit", tmp_path / "no", img_size=96)


@pytest.mark.parametrize("name", ["timm/test_resnet.r160_in1k", "hf_hub:timm/test_resnet", "hf-hub:timm/test_resnet"])
def test_names_as_they_are_pasted(tmp_path, name):
    torch.save(network("test_resnet").state_dict(), tmp_path / "x.pt")
    assert load_model(str(import_checkpoint(tmp_path / "x.pt", name, tmp_path / "out"))).num_classes == 10
