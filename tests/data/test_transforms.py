"""Cropping, flipping, erasing and mixing: as PIL, timm and the papers define them, by (seed, epoch, sample) alone."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from image_files import read
from PIL import Image, ImageOps
from small import write_pictures

from mgd_timm.data.dataset import load_images
from mgd_timm.data.decode import DataError
from mgd_timm.data.rng import mix, uniform
from mgd_timm.data.transforms import erase, mix_batch, normalise, pad_crop_flip, to_distributions
from mgd_timm.recipe.data import Data
from mgd_timm.recipe.recipe import make_recipe

CPU = torch.device("cpu")


MEAN, STD = torch.tensor([0.5071, 0.4867, 0.4408])[:, None, None], torch.tensor([0.2675, 0.2565, 0.2761])[:, None, None]


def images(count: int, channels: int = 3, height: int = 9, width: int = 7) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randint(0, 256, (count, channels, height, width), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("pad", "hflip"), [(4, 0.5), (1, 1.0), (3, 0.0), (0, 0.5)])
def test_pad_crop_flip_is_pil_padding_cropping_and_mirroring(channels: int, pad: int, hflip: float) -> None:
    x, ids = images(64, channels), torch.arange(64) * 31 + 5
    height, width = x.shape[2:]
    got, draws = pad_crop_flip(x, ids, 7, 3, pad=pad, hflip=hflip), uniform(ids, 7, 3, 3).numpy()
    for image, (u, v, w), result in zip(x.numpy(), draws, got.numpy(), strict=True):
        top, left = int(u * (2 * pad + 1)), int(v * (2 * pad + 1))
        picture = Image.fromarray(image[0] if channels == 1 else image.transpose(1, 2, 0))
        picture = ImageOps.expand(picture, pad).crop((left, top, left + width, top + height))
        expected = np.asarray(ImageOps.mirror(picture) if w < hflip else picture).reshape(height, width, channels)
        np.testing.assert_array_equal(result, expected.transpose(2, 0, 1))


def test_pad_crop_flip_draws_every_offset_and_both_directions() -> None:
    marked = torch.zeros(3000, 1, 9, 9, dtype=torch.uint8)
    marked[:, :, 4, 4] = 1  # stays inside: moved by -2 to 2
    places = pad_crop_flip(marked, torch.arange(3000), 0, 0, pad=2, hflip=0.0).flatten(1).argmax(1)
    counts = torch.bincount(places, minlength=81)
    assert (counts > 0).sum() == 25
    assert counts[counts > 0].min() > 60  # 120 expected
    ramp = torch.arange(9, dtype=torch.uint8).expand(3000, 1, 9, 9)
    flipped = (pad_crop_flip(ramp, torch.arange(3000), 0, 0, pad=0, hflip=0.25)[:, 0, 0, 0] == 8).double().mean()
    assert abs(flipped - 0.25) < 0.03


def test_pad_crop_flip_without_pad_and_flip_is_the_identity() -> None:
    x = images(8)
    assert torch.equal(pad_crop_flip(x, torch.arange(8), 0, 0, pad=0, hflip=0.0), x)


def test_pad_crop_flip_does_not_depend_on_the_batch() -> None:
    x, ids = images(40), torch.arange(40)
    whole = pad_crop_flip(x, ids, 1, 2, pad=4, hflip=0.5)
    parts = [pad_crop_flip(x[part], part, 1, 2, pad=4, hflip=0.5) for part in ids.flip(0).split(7)]
    assert torch.equal(torch.cat(parts).flip(0), whole)
    assert not torch.equal(pad_crop_flip(x, ids, 1, 3, pad=4, hflip=0.5), whole)
    assert not torch.equal(pad_crop_flip(x, ids, 2, 2, pad=4, hflip=0.5), whole)


def test_normalise_agrees_with_float64() -> None:
    x = torch.arange(256, dtype=torch.uint8).expand(2, 3, 1, 256)
    expected = (x.double() / 255 - MEAN.double()) / STD.double()
    got = normalise(x, MEAN, STD)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), expected, atol=2e-6, rtol=1e-6)
    assert x.dtype == torch.uint8


def batch(count: int = 8, side: int = 16, classes: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(count)
    return torch.randn(count, 3, side, side + 4, generator=generator), torch.randint(
        0, classes, (count,), generator=generator
    )


def reference(images: torch.Tensor, labels: torch.Tensor, key: int, data: Data) -> tuple[np.ndarray, np.ndarray, str]:
    """mixup and cutmix by the papers' formulas in float64, from the same draws."""
    state = np.random.RandomState(key & 0xFFFFFFFF)
    x, y = images.double().numpy(), np.eye(5)[labels.numpy()]
    if state.rand() >= data.mixup_prob:
        return x, y, "none"
    kind = "cutmix" if data.cutmix and (not data.mixup or state.rand() < data.mixup_switch_prob) else "mixup"
    alpha = data.cutmix if kind == "cutmix" else data.mixup
    lam = state.beta(alpha, alpha)
    out = x.copy()
    if kind == "mixup":
        for i in range(len(x)):
            out[i] = lam * x[i] + (1 - lam) * x[len(x) - 1 - i]
    else:
        height, width = x.shape[2:]
        cut = [int(side * (1 - lam) ** 0.5) for side in (height, width)]
        middle = [state.randint(0, side) for side in (height, width)]
        changed = np.zeros((height, width), dtype=bool)
        for row in range(height):
            for column in range(width):
                inside = [
                    m - c // 2 <= place < m + (c + 1) // 2
                    for place, m, c in zip((row, column), middle, cut, strict=True)
                ]
                changed[row, column] = all(inside)
        for i in range(len(x)):
            out[i][:, changed] = x[len(x) - 1 - i][:, changed]
        lam = 1 - changed.mean()
    return out, lam * y + (1 - lam) * y[::-1], kind


@pytest.mark.parametrize("count", [8, 7])
def test_mixing_is_the_papers(count: int) -> None:
    images, labels = batch(count)
    before = images.clone()
    kinds = set()
    for key in range(40):
        data = Data(mixup=0.8, cutmix=1.0, mixup_prob=0.8)
        x, y, kind = reference(images, labels, mix(key), data)
        found, shares = mix_batch(images, to_distributions(labels, 5), mix(key), data)
        np.testing.assert_allclose(found.double().numpy(), x, atol=1e-6)
        np.testing.assert_allclose(shares.double().numpy(), y, atol=1e-6)
        kinds.add(kind)
    assert kinds == {"none", "mixup", "cutmix"}
    assert torch.equal(images, before)


def test_mixing_is_timms_and_smoothing_after_it_is_smoothing_before_it() -> None:
    from timm.data.mixup import Mixup

    images, labels = batch()
    logits = torch.randn(8, 5, generator=torch.Generator().manual_seed(0))
    for key in range(20):
        data = Data(mixup=0.8, cutmix=1.0)
        found, shares = mix_batch(images, to_distributions(labels, 5), key, data)
        np.random.seed(key)
        expected, targets = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, num_classes=5, label_smoothing=0.1)(
            images.clone(), labels
        )
        torch.testing.assert_close(found, expected)
        ours = torch.nn.functional.cross_entropy(logits, shares, label_smoothing=0.1)
        torch.testing.assert_close(ours, -(targets * logits.log_softmax(1)).sum(1).mean())


@pytest.mark.parametrize("mode", ["const", "rand", "pixel"])
def test_erasing_has_the_distribution_of_timms(mode: str) -> None:
    from timm.data.random_erasing import RandomErasing

    count, keys = 1500, torch.arange(1500)
    blank = torch.full((count, 3, 24, 28), 7.0)
    random.seed(0)
    torch.manual_seed(0)
    theirs = RandomErasing(0.4, mode=mode, max_count=2, device="cpu")(blank.clone())
    ours = erase(blank, keys, 1, 2, 0.4, mode, 2)
    numbers = []
    for found in (ours, theirs):
        gone = (found != 7).any(1).flatten(1)
        erased = gone.any(1)
        areas = gone.double().mean(1)[erased]
        values = found.permute(1, 0, 2, 3)[:, (found != 7).any(1)]
        numbers.append(
            [erased.double().mean(), areas.mean(), areas.std(), values.mean(), values.std(), gone[:, 0].double().mean()]
        )
    np.testing.assert_allclose(numbers[0], numbers[1], atol=0.05)
    assert torch.equal((ours != 7).all(1), (ours != 7).any(1))  # a box goes through all channels


def test_erasing_depends_on_seed_epoch_and_sample_alone() -> None:
    images = torch.full((40, 3, 16, 16), 7.0)
    keys = torch.arange(40)
    whole = erase(images, keys, 1, 2, 0.5, "pixel", 3)
    some = torch.tensor([30, 2, 17])
    torch.manual_seed(5)
    torch.testing.assert_close(erase(images[:3], keys[some], 1, 2, 0.5, "pixel", 3), whole[some])
    for other in ((2, 2), (1, 3)):
        assert not torch.equal(erase(images, keys, *other, 0.5, "pixel", 3), whole)
    assert torch.equal(erase(images, keys, 1, 2, 0.0, "pixel", 1), images)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("pictures"), 24, 112)


@pytest.fixture(scope="module")
def thumbnails(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("thumbnails"), 24, 20)


@pytest.mark.parametrize("mode", ["const", "pixel"])
def test_large_images_are_erased_as_timm_does(mode: str, pictures: Path) -> None:
    erased = Data(data_dir=str(pictures), workers=0, img_size=32, reprob=1.0, remode=mode, recount=1, hflip=0.0)  # type: ignore[arg-type]
    found = load_images(erased, 3, log=lambda _: None).train
    plain = load_images(Data(data_dir=str(pictures), workers=0, img_size=32, hflip=0.0), 3, log=lambda _: None).train
    one, two = (next(iter(source.batches([torch.arange(24)], 0, CPU))).images for source in (found, plain))
    gone = (one != two).any(1).flatten(1).double().mean(1)
    assert 0.02 < gone.mean() < 0.34
    assert (gone < 0.36).all()


def test_small_images_refuse_what_only_large_ones_have(thumbnails: Path) -> None:
    with pytest.raises(ValueError, match="--aa rand-m9: images of 96 pixels or less"):
        load_images(Data(data_dir=str(thumbnails), aa="rand-m9"), 0, log=lambda _: None)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"reprob": 1.5}, "reprob=1.5: expected 0 to 1"),
        ({"mixup": -1.0}, "mixup=-1.0: expected 0 or more"),
        ({"aug_repeats": -1}, "aug_repeats=-1"),
        ({"streaming": True, "val_split": 0.1}, "val_split=0.1: it needs random access to the images"),
        ({"num_samples": 10}, "num_samples=10: it is for streamed images only"),
    ],
)
def test_values_out_of_range_are_refused(options: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Data(**options)  # type: ignore[arg-type]


def test_an_unknown_way_to_erase_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown remode 'noise': known: const, pixel, rand"):
        make_recipe(remode="noise")


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        (
            "aa",
            "rand-x9",
            r"--aa rand-x9 .* \(Unknown RandAugment config section\): expected a policy such as rand-m9",
        ),
        ("interpolation", "random", r"--interpolation random: expected bilinear or bicubic\."),
        ("train_interpolation", "bicubik", r"--train-interpolation bicubik: expected bilinear, bicubic or random"),
    ],
)
def test_what_timm_makes_no_transform_of_is_refused(name: str, value: object, said: str, large: Path) -> None:
    with pytest.raises(DataError, match=said):
        read(large, img_size=32, **{name: value})
