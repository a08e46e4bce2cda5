"""Sizes of which a network leaves pixels unread are refused with those that fit; what reads them all is let through."""

import re

import pytest
import timm
import torch
from torch import nn

import mgd_timm
from mgd_timm.models.build import build_model
from mgd_timm.models.unread_pixels import check_reads_all_pixels, find_unread


@pytest.mark.parametrize(
    ("name", "size", "unread"),
    [
        ("vit_tiny_patch16_224", (28, 28), (12, 12)),
        ("vit_tiny_patch16_224", (24, 32), (8, 0)),
        ("vit_tiny_patch16_224", (32, 33), (0, 1)),
        ("pit_ti_224", (28, 28), (4, 4)),  # overlapping patches
        ("test_convnext", (33, 34), (1, 2)),
        ("test_convnext", (36, 36), (0, 0)),
        ("test_resnet", (29, 30), (0, 0)),
        ("regnetx_002", (28, 28), (0, 0)),  # its last BatchNorms begin at 0, and no gradient passes them
        ("cifar_resnet8x05", (28, 31), (0, 0)),
    ],
)
def test_unread_pixels_do_not_change_the_output_and_the_others_do(name, size, unread):
    model = build_model(name, (3, *size), 10)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert find_unread(model, (3, *size)) == unread
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model.training
    model.double().eval()
    generator = torch.Generator().manual_seed(0)
    for weight in model.parameters():  # as after training: none is 0
        weight.data += 0.01 * torch.randn(weight.shape, generator=generator, dtype=torch.float64)
    images = torch.randn(1, 3, *size, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        expected = model.forward_features(images)
        for axis, pixels in zip((2, 3), unread, strict=True):
            length = images.shape[axis]
            last = images.clone()
            last.narrow(axis, length - pixels, pixels).add_(3)
            assert torch.equal(model.forward_features(last), expected)
            last.narrow(axis, length - pixels - 1, 1).add_(3)
            assert not torch.equal(model.forward_features(last), expected)


@pytest.mark.parametrize(
    ("name", "size", "sizes"),
    [
        ("vit_tiny_patch16_224", (28, 28), [16, 32]),
        ("vit_tiny_patch16_224", (24, 40), [16, 32, 48]),
        ("vit_tiny_patch16_224", (33, 33), [32, 48]),
        ("test_vit", (28, 28), [16, 32]),  # takes no such image
        ("swin_s3_tiny_224", (30, 30), [28, 32]),
        ("test_convnext", (30, 30), [32]),  # 28 is too small for it
        ("test_convnext", (33, 33), [32, 36]),
        ("pit_ti_224", (28, 28), [24, 32]),
    ],
)
def test_sizes_that_fit_are_named(name, size, sizes):
    with pytest.raises(ValueError, match=rf"the student {name} .* {size[0]}x{size[1]} pixels") as caught:
        check_reads_all_pixels(build_model(name, (3, *size), 10), "student", (3, *size), "--img-size")
    assert [int(side) for side in re.findall(r"--img-size (\d+)", str(caught.value))] == sizes
    for side in sizes:
        check_reads_all_pixels(build_model(name, (3, side, side), 10), "student", (3, side, side), "--img-size")


def strided(kernel: int, stride: int, *, layers: int = 1) -> nn.Module:
    """A network of convolutions without padding."""
    model = nn.Sequential(*(nn.Conv2d(3 if i == 0 else 4, 4, kernel, stride) for i in range(layers)))
    model.forward_features = model.forward  # type: ignore[assignment]
    return model


def test_convolutions_without_padding_may_leave_out_a_little():
    """Three of 3x3 with stride 2 leave out up to 7 pixels, of which 1/16 of a side, or one, is accepted."""
    accepted = {}
    for side in range(24, 200, 5):
        try:
            check_reads_all_pixels(strided(3, 2, layers=3), "student", (3, side, side), "--img-size")
            accepted[side] = True
        except ValueError:
            accepted[side] = False
    assert accepted == {side: (side - 15) % 8 <= max(1, side // 16) for side in accepted}


def test_a_size_at_which_weights_were_published_is_accepted():
    """As vit_so400m_patch14_siglip_384: 27 patches of 14 are 378 pixels."""
    model = timm.create_model("vit_tiny_patch16_224", img_size=40, num_classes=4)
    for config in ({"hf_hub_id": "timm/some"}, {"input_size": (3, 40, 40), "hf_hub_id": None, "url": ""}):
        model.pretrained_cfg = {**timm.create_model("vit_tiny_patch16_224").pretrained_cfg, **config}
        with pytest.raises(ValueError, match=r"the teacher .* reads only the upper left 32x32 of 40x40 pixels"):
            check_reads_all_pixels(model, "teacher", (3, 40, 40), "--teacher-img-size")
    model.pretrained_cfg = {**model.pretrained_cfg, "hf_hub_id": "timm/some"}
    check_reads_all_pixels(model, "teacher", (3, 40, 40), "--teacher-img-size")


def test_a_model_without_values_is_not_probed():
    with torch.device("meta"):
        model = timm.create_model("vit_tiny_patch16_224", img_size=28)
    check_reads_all_pixels(model, "student", (3, 28, 28), "--img-size")


@pytest.mark.slow
def test_runs_and_evaluations_refuse_sizes_before_a_folder_is_made(small_data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = str(small_data)
    fixed = timm.create_model("vit_tiny_patch16_224", img_size=28, num_classes=10)
    flexible = timm.create_model("test_convnext", num_classes=10)
    for call, said in (
        (lambda: mgd_timm.train("vit_tiny_patch16_224", data), "the student vit_tiny.* --img-size 16 or --img-size 32"),
        (lambda: mgd_timm.train(fixed, data), "the student vit_tiny.* --img-size 16 or --img-size 32"),
        (
            lambda: mgd_timm.distill(peer="vit_tiny_patch16_224", student="cifar_resnet8x05", data=data),
            "the peer vit_tiny.* --img-size 16 or --img-size 32",
        ),
        (
            lambda: mgd_timm.distill(fixed, data=data, method="none"),
            "the teacher .* --teacher-resize positions --teacher-img-size 16 or --teacher-resize positions "
            "--teacher-img-size 32",
        ),
        (
            lambda: mgd_timm.distill(flexible, data=data, method="none", teacher_img_size=33),
            "the teacher test_convnext .* --teacher-img-size 32 or --teacher-img-size 36",
        ),
        (lambda: mgd_timm.evaluate(flexible, data, img_size=33), "the model .* --img-size 32 or --img-size 36"),
    ):
        with pytest.raises(ValueError, match=said):
            call()
    assert not list(tmp_path.iterdir())
    assert mgd_timm.evaluate(fixed, data)["n"] == 100  # it is what it is: other images would not make it another model
