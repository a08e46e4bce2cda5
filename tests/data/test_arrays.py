"""npy files as a data set: pixels as they are, the same digest wherever they lie, and clear words for what is wrong."""

from pathlib import Path

import numpy as np
import pytest
import torch

import mgd_timm
from mgd_timm.data.dataset import load_images
from mgd_timm.data.decode import DataError
from mgd_timm.recipe.data import Data


def write(folder: Path, channels: int = 3) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    shape = (40, 12, 12) if channels == 0 else (40, 12, 12, channels)
    images = generator.integers(0, 256, shape, dtype=np.uint8)
    labels = np.arange(40) % 4
    for split in ("train", "test"):
        np.save(folder / f"{split}_x.npy", images)
        np.save(folder / f"{split}_y.npy", labels)
    return images, labels


def test_pixels_and_labels_are_those_of_the_files(tmp_path: Path) -> None:
    images, labels = write(tmp_path)
    found = load_images(Data(data_dir=str(tmp_path), mean=(0.0,) * 3, std=(1.0,) * 3), 0)
    assert (found.num_classes, found.num_samples, found.input_size) == (4, 40, (3, 12, 12))
    assert found.test is not None
    batch = next(iter(found.test.batches([torch.arange(40)], 0, torch.device("cpu"))))
    assert torch.equal((batch.images * 255).round().byte(), torch.from_numpy(images).permute(0, 3, 1, 2))
    assert batch.labels.tolist() == labels.tolist()


@pytest.mark.parametrize("channels", [0, 1, 3])
def test_grey_and_colour_are_converted(tmp_path: Path, channels: int) -> None:
    write(tmp_path, channels)
    for wanted in (1, 3):
        found = load_images(Data(data_dir=str(tmp_path), in_chans=wanted), 0)
        batch = next(iter(found.train.batches([torch.arange(4)], 0, torch.device("cpu"))))
        assert batch.images.shape == (4, wanted, 12, 12)


def test_five_channels_are_read_resized_and_trained_on(tmp_path: Path) -> None:
    images, _ = write(tmp_path, 5)
    found = load_images(Data(data_dir=str(tmp_path), in_chans=5, mean=(0.0,) * 5, std=(1.0,) * 5), 0)
    assert found.test is not None
    batch = next(iter(found.test.batches([torch.arange(40)], 0, torch.device("cpu"))))
    assert torch.equal((batch.images * 255).round().byte(), torch.from_numpy(images).permute(0, 3, 1, 2))
    with pytest.raises(DataError, match="5 channels, expected 3: give --in-chans 5"):
        load_images(Data(data_dir=str(tmp_path)), 0)
    student = mgd_timm.train(
        "cifar_resnet8x05", str(tmp_path), in_chans=5, img_size=16, epochs=1, output=tmp_path / "run"
    )
    assert student(torch.zeros(2, 5, 16, 16)).shape == (2, 4)
    assert len(student.pretrained_cfg["mean"]) == 5


def test_image_files_have_one_or_three_channels() -> None:
    with pytest.raises(DataError, match="read in colour or in grey, and --in-chans is 4: give 3 or 1, or npy arrays"):
        load_images(Data(in_chans=4), 0)


def test_the_digest_follows_the_content_not_the_place(tmp_path: Path) -> None:
    images, _ = write(tmp_path / "a")
    write(tmp_path / "b")
    one, two = (load_images(Data(data_dir=str(tmp_path / name)), 0).train.digest for name in "ab")
    assert one == two
    images[3, 2, 1, 0] ^= 1
    np.save(tmp_path / "b" / "train_x.npy", images)
    assert load_images(Data(data_dir=str(tmp_path / "b")), 0).train.digest != one


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda f: (f / "train_y.npy").unlink(), "expected one pair of files for split 'train': images in train_x.npy"),
        (
            lambda f: np.save(f / "train_x.npy", np.zeros((40, 3, 12, 12), np.uint8)),
            r"expected uint8 \[n, height, width\]",
        ),
        (lambda f: np.save(f / "train_x.npy", np.zeros((40, 12, 12, 3), np.float32)), "float32"),
        (
            lambda f: np.save(f / "train_y.npy", np.zeros(39, np.int64)),
            "39 labels, expected 40, one for each image of train_x.npy",
        ),
        (lambda f: np.save(f / "train_y.npy", np.full(40, -1)), "class ids from 0"),
        (
            lambda f: np.save(f / "train_y.npy", np.array([{}] * 40, dtype=object), allow_pickle=True),
            "cannot be read as an npy",
        ),
        (lambda f: (f / "train_x.npy").write_bytes((f / "train_x.npy").read_bytes()[:500]), "cannot be read as an npy"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, spoil, said: str) -> None:  # type: ignore[no-untyped-def]
    write(tmp_path)
    spoil(tmp_path)
    with pytest.raises(DataError, match=said):
        load_images(Data(data_dir=str(tmp_path)), 0)
