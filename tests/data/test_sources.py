"""Batches are the same for any number of workers and any batch size, and augmented by (seed, epoch, sample) alone."""

import io
import random
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from image_files import collect, encoded, folder, noise, parquet, pixels, read, stacked
from PIL import Image

from mgd_timm.data.rng import mix
from mgd_timm.data.sources import LargeImageSource
from mgd_timm.data.transforms import normalise, pad_crop_flip
from mgd_timm.features import Defaults


def test_small_images_of_a_folder_are_cached(small: Path) -> None:
    data = read(small)
    assert data.class_names == ("cat", "dog")
    assert data.input_size == (3, 12, 10)
    assert data.train.labels.tolist() == [0] * 4 + [1] * 4
    assert torch.equal(pixels(data.train), stacked([noise(i) for i in range(8)]))
    assert torch.equal(pixels(data.test), stacked([noise(i) for i in range(8, 12)]))


def test_large_images_go_through_timms_transforms(large: Path) -> None:
    from timm.data.transforms_factory import create_transform

    defaults = Defaults(mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4), img_size=48, interpolation="bilinear", crop_pct=0.9)
    data = read(
        large, seed=5, defaults=defaults, workers=0, scale=(0.2, 0.9), hflip=0.4, aa="rand-m9-mstd0.5", color_jitter=0.3
    )
    assert isinstance(data.train, LargeImageSource)
    assert (data.input_size, data.mean, data.std) == ((3, 48, 48), defaults.mean, defaults.std)
    common: dict[str, Any] = {"input_size": (3, 48, 48), "interpolation": "bilinear"}
    transform = create_transform(**common, mean=defaults.mean, std=defaults.std, crop_pct=0.9)
    pictures = [Image.fromarray(noise(i, 128, 128)) for i in (8, 9)] + [
        Image.fromarray(noise(i, 97, 150)) for i in (10, 11)
    ]
    assert torch.equal(collect(data.test).images, torch.stack([transform(picture) for picture in pictures]))
    assert collect(data.train, epoch=3).labels.tolist() == [0] * 4 + [1] * 4


@pytest.mark.parametrize(
    ("options", "most", "mean"),
    [
        ({"interpolation": "bilinear"}, 1, 0.1),
        ({"interpolation": "bicubic"}, 2, 0.1),
        ({"interpolation": "lanczos"}, 0, 0.0),  # Pillow's own
        ({"train_interpolation": "random", "interpolation": "bilinear"}, 2, 0.1),
        # A policy may turn a level into many.
        ({"interpolation": "bilinear", "aa": "rand-m9-mstd0.5"}, 255, 1.0),
        ({"interpolation": "bilinear", "color_jitter": 0.3}, 255, 1.0),
    ],
)
def test_training_draws_what_timm_draws(options: dict[str, Any], most: int, mean: float, large: Path) -> None:
    from timm.data.transforms_factory import create_transform

    defaults = Defaults(mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))
    train = read(large, seed=5, defaults=defaults, workers=0, img_size=48, scale=(0.2, 0.9), hflip=0.4, **options).train
    transform = create_transform(
        (3, 48, 48),
        is_training=True,
        mean=defaults.mean,
        std=defaults.std,
        scale=(0.2, 0.9),
        ratio=(3 / 4, 4 / 3),
        hflip=0.4,
        auto_augment=options.get("aa"),
        color_jitter=options.get("color_jitter"),
        interpolation=options.get("train_interpolation", options["interpolation"]),
    )
    images, std = collect(train, epoch=3).images, torch.tensor(defaults.std)[:, None, None]
    for row in range(8):
        picture = noise(row, 100 + 5 * row, 120) if row < 4 else noise(row, 110, 100 + 7 * row)
        seed = mix(5, 3, row)
        random.seed(seed)
        np.random.seed(seed & 0xFFFFFFFF)
        torch.manual_seed(seed)
        levels = (images[row] - transform(Image.fromarray(picture))).abs() * std * 255
        assert levels.max() < most + 0.01
        assert levels.mean() <= mean


def test_small_images_are_resized_on_request(small: Path) -> None:
    data = read(small, img_size=20)
    assert data.input_size == (3, 20, 20)
    expected = [np.asarray(Image.fromarray(noise(i)).resize((20, 20), Image.Resampling.BICUBIC)) for i in range(8)]
    assert torch.equal(pixels(data.train), stacked(expected))
    grown = read(small, img_size=128, workers=0)  # these would not be small
    assert isinstance(grown.train, LargeImageSource)
    assert collect(grown.test).images.shape == (4, 3, 128, 128)


def photo(seed: int, height: int, width: int) -> bytes:
    """A JPEG with structures of some 60 pixels."""
    rough = Image.fromarray(noise(seed, height // 60, width // 60))
    return encoded(rough.resize((width, height), Image.Resampling.BICUBIC), "JPEG", quality=90)


def test_large_photos_are_decoded_at_a_reduced_size_and_cropped_as_timm_does(tmp_path: Path) -> None:
    from timm.data.transforms_factory import create_transform

    contents = [photo(row, 900 + 37 * row, 1200 - 31 * row) for row in range(6)]
    place = folder(tmp_path, {"train/cat": contents[:3], "train/dog": contents[3:]}, ending="jpg")
    defaults = Defaults(mean=(0.5,) * 3, std=(0.25,) * 3, interpolation="bilinear")
    train = read(place, seed=5, defaults=defaults, workers=0, img_size=64).train
    transform = create_transform(
        64, is_training=True, mean=defaults.mean, std=defaults.std, color_jitter=None, interpolation="bilinear"
    )
    for row, image in enumerate(collect(train).images):
        seed = mix(5, 0, row)
        random.seed(seed)
        torch.manual_seed(seed)
        levels = (image - transform(Image.open(io.BytesIO(contents[row])))).abs() * 0.25 * 255
        assert 0 < levels.mean() < 1.5
        assert levels.mean() < (image[:, 1:] - image[:, :-1]).abs().mean() * 0.25 * 255 / 2  # not moved by half a pixel


def states() -> tuple[str, list[int]]:
    return str(np.random.get_state()), torch.get_rng_state().tolist()


@pytest.mark.parametrize("kind", ["small", "large"])
def test_augmentation_depends_on_seed_epoch_and_sample_alone(kind: str, request: pytest.FixtureRequest) -> None:
    place = request.getfixturevalue(kind)
    options: dict[str, Any] = {"img_size": 24, "reprob": 0.5} if kind == "large" else {"img_size": None}
    order = torch.tensor([5, 0, 7, 2, 1, 6, 3, 4])
    train = read(place, seed=1, workers=0, **options).train
    whole = collect(train, 8, epoch=2)
    for workers in (0, 1, 2):
        again = read(place, seed=1, workers=workers, **options).train
        torch.manual_seed(workers)
        random.seed(workers)
        np.random.seed(workers)
        before = states()  # of Python's generator nothing can be said: beartype draws from it
        batch = collect(again, 3, epoch=2, ids=order)
        assert torch.equal(batch.images, whole.images[order])
        assert torch.equal(batch.labels, whole.labels[order])
        assert torch.equal(batch.sample_ids, order)
        assert states() == before
    assert not torch.equal(collect(train, 8, epoch=3).images, whole.images)
    assert not torch.equal(collect(read(place, seed=2, workers=0, **options).train, 8, epoch=2).images, whole.images)


def test_small_images_are_augmented_as_the_reference(small: Path) -> None:
    data = read(small, seed=3, pad=2, hflip=0.3)
    stats = torch.tensor(data.mean)[:, None, None], torch.tensor(data.std)[:, None, None]
    moved = pad_crop_flip(pixels(data.train), torch.arange(8), 3, 1, pad=2, hflip=0.3)
    assert torch.equal(collect(data.train, 3, epoch=1).images, normalise(moved, *stats))


def test_large_images_are_neither_decoded_nor_read_ahead(tmp_path: Path) -> None:
    content = encoded(np.zeros((1500, 1500, 3), np.uint8), compress_level=1)  # 6.75 MB decoded
    parquet(tmp_path / "train.parquet", image=[content] * 200, label=[0, 1] * 100)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    data = read(tmp_path, img_size=32, workers=0)
    assert collect(data.train, ids=torch.arange(8)).images.shape == (8, 3, 32, 32)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB; 1.35 GB in all
