"""Pairs of npy files: SPLIT_x.npy with images and SPLIT_y.npy with class ids."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mgd_timm.data.decode import DataError, LazyImage, to_pil
from mgd_timm.data.readers.classes import Labels, labels_of_numbers, labels_of_words, match_classes
from mgd_timm.data.readers.rows import begin_digest
from mgd_timm.data.readers.scan import Ignored
from mgd_timm.data.readers.splits import LocalSplit
from mgd_timm.recipe.data import Data


@dataclass(frozen=True)
class ArrayRows:
    """`Rows` of a pair of npy files.

    Args:
        images: uint8 [n, height, width] or [n, height, width, channels], mapped from the file.
        split: Name of the split.
        labels: Class ids, int64 [n].
        class_names: Names of the classes.
    """

    images: np.ndarray
    split: str
    labels: np.ndarray
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.images)

    def name(self, row: int) -> str:
        """Return the name of an image in error messages."""
        return f"{self.split} image {row}"

    def pixels(self, row: int, in_chans: int) -> np.ndarray:
        """Return an image, uint8 [height, width, in_chans]. Raise DataError for another number of channels."""
        image = np.asarray(self.images[row])
        image = image if image.ndim == 3 else image[..., None]
        channels = image.shape[2]
        if channels != in_chans and {channels, in_chans} != {1, 3}:
            raise DataError(
                f"{self.name(row)}: {channels} channels, expected {in_chans}: give --in-chans {channels}, or convert "
                "the array."
            )
        if channels != in_chans:
            image = np.asarray(to_pil(image).convert("RGB" if in_chans == 3 else "L"))
        return image.reshape(*image.shape[:2], in_chans)

    def image(self, row: int, in_chans: int) -> LazyImage:
        """Return an image of 3 channels or 1."""
        return LazyImage(to_pil(self.pixels(row, in_chans)), in_chans, self.name(row))

    def digest(self) -> str:
        """Return a sha256 of classes, labels and all pixels."""
        total = begin_digest(self, list(self.images.shape))
        for start in range(0, len(self), 4096):
            total.update(np.ascontiguousarray(self.images[start : start + 4096]).tobytes())
        return str(total.hexdigest())


def read_files(
    split: LocalSplit,
    data: Data,
    ignored: Ignored,
    class_names: tuple[str, ...] | None,
    log: Callable[[str], None],
) -> ArrayRows:
    """Return the images of a split's pair of npy files.

    Raises:
        DataError: A file without its partner, or arrays that are not images and labels.
    """
    if data.input_key is not None or data.target_key is not None:
        raise DataError("npy files have no columns: leave --input-key and --target-key out.")
    images, labels = (
        [file for file in split.files if re.search(rf"(^|[._-]){end}$", Path(file).stem.lower())] for end in "xy"
    )
    if len(images) != 1 or len(labels) != 1:
        raise DataError(
            f"{split.root / split.files[0]}: expected one pair of files for split {split.name!r}: images in "
            f"{split.name}_x.npy and their class ids in {split.name}_y.npy."
        )
    for file in set(split.files) - {images[0], labels[0]}:
        ignored.add(file, "an array that is neither SPLIT_x.npy nor SPLIT_y.npy")
    found = _open_images(split.root / images[0])
    values = _open_labels(split.root / labels[0], data.first_label, training=class_names is None)
    if len(found) != len(values.values):
        raise DataError(
            f"{split.root / labels[0]}: {len(values.values)} labels, expected {len(found)}, one for each image of "
            f"{images[0]}."
        )
    ids, names = match_classes(values, class_names, split.name, log)
    return ArrayRows(found, split.name, ids, names)


def _open_images(path: Path) -> np.ndarray:
    images = _open_array(path)
    channels_first = images.ndim == 4 and images.shape[1] in (1, 3) and images.shape[3] not in (1, 3)
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or channels_first:
        raise DataError(
            f"{path}: {images.dtype} {list(images.shape)}, expected uint8 [n, height, width] or "
            "[n, height, width, channels]: convert it."
        )
    return images


def _open_labels(path: Path, first: int, *, training: bool) -> Labels:
    """Return labels: class ids from `first`, or class names."""
    labels = _open_array(path)
    if labels.ndim != 1 or labels.dtype.kind not in "iubUS" or not len(labels):
        raise DataError(
            f"{path}: {labels.dtype} {list(labels.shape)}, expected class ids from {first} or class names, one for "
            "each image: write it again with numpy.save."
        )
    if labels.dtype.kind in "iu":
        return labels_of_numbers(np.asarray(labels), str(path), first, training=training)
    words = [
        word.decode(errors="surrogateescape") if isinstance(word, bytes) else str(word) for word in labels.tolist()
    ]
    empty = next((row for row, word in enumerate(words) if not word.strip()), None)
    if empty is not None:
        raise DataError(f"{path}: row {empty} has an empty label: write one.")
    return labels_of_words(words)


def _open_array(path: Path) -> np.ndarray:
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
        if not isinstance(found, np.ndarray):
            raise ValueError("an archive of several arrays")
        return found
    except (OSError, ValueError, EOFError) as error:
        raise DataError(
            f"{path}: cannot be read as an npy file of numbers ({error}): write it again with numpy.save."
        ) from error
