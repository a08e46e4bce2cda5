"""Pairs of npy files."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from image_files import read
from places import arrays, found, put, refused

IMAGES = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)


@pytest.mark.parametrize("split", ["train", "TRAIN", "training", ""])
def test_pairs_of_arrays(tmp_path: Path, split: str) -> None:
    arrays(tmp_path, split, [0, 1, 1, 0], IMAGES)
    if not split:
        (tmp_path / "_x.npy").rename(tmp_path / "x.npy")
        (tmp_path / "_y.npy").rename(tmp_path / "y.npy")
    assert found(tmp_path).train == {"0": 2, "1": 2}


def test_arrays_in_split_folders(tmp_path: Path) -> None:
    for split in ("train", "test"):
        arrays(tmp_path / split, split, [0, 1, 1, 0], IMAGES)
        (tmp_path / split / f"{split}_x.npy").rename(tmp_path / split / "x.npy")
    seen = found(tmp_path)
    assert (seen.train, seen.eval, seen.all["duplicates"]) == ({"0": 2, "1": 2}, {"0": 2, "1": 2}, 4)


@pytest.mark.parametrize(
    ("labels", "train"),
    [
        (["cat", "dog", "cat", "emu"], {"cat": 2, "dog": 1, "emu": 1}),
        ([True, False, True, True], {"False": 1, "True": 3}),
        (np.array([0, 1, 1, 2], np.uint8), {"0": 1, "1": 2, "2": 1}),
        (np.array([b"cat", b"dog", b"cat", b"cat"]), {"cat": 3, "dog": 1}),
    ],
)
def test_labels_of_arrays(tmp_path: Path, labels: Any, train: dict[str, int]) -> None:
    arrays(tmp_path, "train", labels, IMAGES)
    assert found(tmp_path).train == train


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ([0, 1, 0], ["3 labels", "4"]),
        ([1, 2, 1, 2], ["--first-label 1"]),
        ([0, 1, -1, 0], ["-1", "train_y.npy"]),
        ([0, 1, 900, 0], ["900"]),
        ([0, 2, 0, 2], ["'1'"]),
        (["cat", "", "dog", "cat"], ["empty", "train_y.npy"]),
        ([[0], [1], [0], [1]], ["train_y.npy", "[4, 1]"]),
        (np.eye(4)[[0, 1, 0, 1]], ["train_y.npy"]),
        ([0.5, 1.0, 0.0, 1.0], ["train_y.npy", "float64"]),
        (np.array(["a", 1, None, 2], dtype=object), ["train_y.npy"]),
    ],
)
def test_labels_of_arrays_that_are_refused(tmp_path: Path, labels: Any, words: list[str]) -> None:
    arrays(tmp_path, "train", labels, IMAGES)
    refused(tmp_path, *words)


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (IMAGES / 255, ["float64", "uint8"]),
        (IMAGES.astype(np.uint16), ["uint16"]),
        (IMAGES.astype(np.int64), ["int64"]),
        (IMAGES.transpose(0, 3, 1, 2), ["[4, 3, 8, 8]", "channels"]),
        (IMAGES.reshape(4, -1), ["[4, 192]"]),
        (IMAGES[:0], ["train"]),
        (IMAGES[..., :2], ["2 channels", "--in-chans 2"]),
    ],
)
def test_arrays_that_are_no_images_are_refused(tmp_path: Path, images: np.ndarray, words: list[str]) -> None:
    arrays(tmp_path, "train", [0, 1, 1, 0][: max(len(images), 2)], images)
    refused(tmp_path, *words, ask=read if images.shape[-1] == 2 else found)


def test_files_that_are_no_pair_are_refused(tmp_path: Path) -> None:
    arrays(tmp_path, "train", [0, 1, 1, 0], IMAGES)
    (tmp_path / "train_y.npy").rename(tmp_path / "train_labels.npy")
    refused(tmp_path, "train_x.npy", "train_y.npy")
    (tmp_path / "train_labels.npy").rename(tmp_path / "train_y.npy")
    np.save(tmp_path / "train_max.npy", IMAGES)
    np.save(tmp_path / "train_index.npy", np.arange(4))
    seen = found(tmp_path)
    assert (seen.train, seen.count) == ({"0": 2, "1": 2}, 2)
    for content in (b"", b"junk", (tmp_path / "train_x.npy").read_bytes()[:300]):
        put(tmp_path / "train_x.npy", content)
        refused(tmp_path, "train_x.npy")


def test_an_evaluation_pair_of_few_images(tmp_path: Path) -> None:
    arrays(tmp_path, "train", list(range(6)) * 2)
    arrays(tmp_path, "test", [5, 5])
    assert found(tmp_path).eval == {"5": 2}
    arrays(tmp_path, "test", [6, 5])
    refused(tmp_path, "test", "'6'")


def test_channels_of_arrays(tmp_path: Path) -> None:
    five = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 5), dtype=np.uint8)
    for split in ("train", "test"):
        arrays(tmp_path, split, [0, 1, 1, 0], five)
    assert found(tmp_path, in_chans=5).all["duplicates"] == 4
    arrays(tmp_path / "grey", "train", [0, 1, 1, 0], five[..., 0])
    assert found(tmp_path / "grey").all["path"] == "memory"
    arrays(tmp_path / "large", "train", [0, 1], np.zeros((2, 97, 8, 3), np.uint8))
    assert found(tmp_path / "large").all["path"] == "files"


def test_arrays_have_no_columns(tmp_path: Path) -> None:
    arrays(tmp_path, "train", [0, 1, 1, 0], IMAGES)
    refused(tmp_path, "--target-key", target_key="label")
