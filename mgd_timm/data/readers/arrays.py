"""Pairs of npy files: SPLIT_x.npy with images and SPLIT_y.npy with class ids."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from mgd_timm.data.decode import DataError, LazyImage, to_pil
from mgd_timm.data.readers.rows import ReadSplit, begin_digest
from mgd_timm.data.readers.scan import LocalFolder
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


def find_splits(folder: LocalFolder, data: Data) -> dict[str, ReadSplit]:
    """Return the splits of a folder with pairs of npy files.

    Raises:
        DataError: A file without its partner, or arrays that are not images and labels.
    """
    splits: dict[str, ReadSplit] = {}
    for path in sorted(folder.path.glob("*_[xy].npy")):
        split, kind = path.stem[:-2], path.stem[-1]
        partner = path.with_name(f"{split}_{'y' if kind == 'x' else 'x'}.npy")
        if not partner.is_file():
            raise DataError(
                f"{path}: expected {partner.name} beside it: images in SPLIT_x.npy and their class ids in SPLIT_y.npy."
            )
        if kind == "x":  # the pair is read once
            splits[split] = partial(_read, _open_pair(folder.path, split), data)
    return splits


def _read(
    rows: ArrayRows,
    data: Data,
    class_names: tuple[str, ...] | None,
    log: Callable[[str], None],  # noqa: ARG001  # every reader takes it
) -> ArrayRows:
    if data.input_key is not None or data.target_key is not None:
        raise DataError("npy files have no columns: leave --input-key and --target-key out.")
    return replace(rows, class_names=class_names or rows.class_names)


def _open_pair(folder: Path, split: str) -> ArrayRows:
    images_path, labels_path = folder / f"{split}_x.npy", folder / f"{split}_y.npy"
    images, labels = _open_array(images_path), _open_array(labels_path)
    channels_first = images.ndim == 4 and images.shape[1] in (1, 3) and images.shape[3] not in (1, 3)
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or channels_first:
        raise DataError(
            f"{images_path}: {images.dtype} {list(images.shape)}, expected uint8 [n, height, width] or "
            "[n, height, width, channels]: convert it."
        )
    if labels.dtype.kind not in "iu" or labels.shape != (len(images),) or not len(labels) or labels.min() < 0:
        raise DataError(
            f"{labels_path}: {labels.dtype} {list(labels.shape)}, expected {len(images)} class ids from 0, one for "
            f"each image of {images_path.name}."
        )
    if int(labels.max()) >= len(labels):
        raise DataError(
            f"{labels_path}: label {labels.max()} of only {len(labels)} images: expected consecutive class ids from 0."
        )
    names = tuple(str(i) for i in range(int(labels.max()) + 1))
    return ArrayRows(images, split, np.asarray(labels).astype(np.int64), names)


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
