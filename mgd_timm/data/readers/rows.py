"""`Rows`, the protocol that every reader implements: the images of a split and their labels; and its checks."""

import hashlib
import json
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from mgd_timm.data.decode import DataError, LazyImage
from mgd_timm.data.readers.splits import role_of
from mgd_timm.recipe.options import few, unknown

HASHED = 1 << 28
"""Bytes: of a larger split only a part of the images is hashed, so that a start does not take minutes."""
_THREADS = 8


@runtime_checkable  # for the checks of shapes under pytest
class Rows(Protocol):
    """The images of one split, addressed by row, and their checked labels.

    `pixels` and `image` are called in DataLoader workers, which are forked: open a file or a database there, not
    before.
    """

    @property
    def split(self) -> str:
        """Name of the split, for messages."""
        ...

    @property
    def labels(self) -> np.ndarray:
        """Class ids, int64 [n], or distributions over classes, float32 [n, k]."""
        ...

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, by class id."""
        ...

    def __len__(self) -> int: ...

    def name(self, row: int) -> str:
        """Return the name of an image in error messages: its split and row, and its file where there is one."""
        ...

    def pixels(self, row: int, in_chans: int) -> np.ndarray:
        """Return a decoded image, uint8 [height, width, in_chans].

        Raises:
            DataError: The image is corrupt.
        """
        ...

    def image(self, row: int, in_chans: int) -> LazyImage:
        """Return an image that is not decoded yet; `in_chans` is 3 or 1.

        Raises:
            DataError: It cannot be opened.
        """
        ...

    def digest(self) -> str:
        """Return a sha256 of class names, labels and images, which does not depend on where they are stored."""
        ...


ReadSplit = Callable[[tuple[str, ...] | None, Callable[[str], None]], Rows]
"""Reads a split that was found, from the class names of the training split (None for this split itself) and `log`."""


def begin_digest(rows: Rows, *more: Any) -> Any:
    """Return a sha256 of the split's name, classes, labels and `more` JSON values, to be updated with the images."""
    total = hashlib.sha256(json.dumps([rows.split, rows.class_names, *more]).encode())
    total.update(rows.labels.tobytes())
    return total


def digest_images(total: Any, sizes: np.ndarray, content: Callable[[int], bytes | str]) -> str:
    """Add encoded images to a sha256 and return its hex digest. Above `HASHED` bytes evenly spaced images are added.

    Args:
        total: The sha256.
        sizes: Bytes of each image, int [n].
        content: Returns an encoded image, or its path. Called by several threads.
    """

    def digests(rows: np.ndarray) -> bytes:
        return b"".join(hashlib.sha256(_read(content(row))).digest() for row in rows.tolist())

    rows = np.arange(0, len(sizes), 1 + int(sizes.sum()) // HASHED)
    with ThreadPoolExecutor(_THREADS) as threads:
        for part in threads.map(digests, np.array_split(rows, -(-len(rows) // 256))):
            total.update(part)
    return str(total.hexdigest())


def file_state(path: Path) -> str:
    """Return what identifies a file's content on this machine: path, size, times and inode."""
    status = path.stat()
    return f"{str(path.resolve())!a}:{status.st_size}:{status.st_mtime_ns}:{status.st_ctime_ns}:{status.st_ino}"


def _read(content: bytes | str) -> bytes:
    if isinstance(content, bytes):
        return content
    try:
        with open(content, "rb", buffering=0) as file:
            return file.read()
    except OSError as error:
        raise DataError(
            f"{content}: cannot be read ({error.strerror}): put the file back, or take its row out of the table."
        ) from error


def find_split(splits: Mapping[str, Any], split: str) -> Any:
    """Return a split by its name: in any case, or the only split for the same purpose (training for train).

    Raises:
        DataError: There is none, or several.
    """
    names = [name for name in splits if name.lower() == split.lower()]
    names = names or [name for name in splits if role_of(split) is not None and role_of(name) == role_of(split)]
    if split == "train":  # not chosen: it is the default
        names += [name for name in splits if name not in names and role_of(name) == "train"]
    if len(names) > 1:
        raise DataError(
            f"splits {' and '.join(names)} have one purpose: choose with --train-split and --eval-split, or move one "
            "of them out of the folder."
        )
    if not names:
        raise DataError(
            f"{unknown('split', split, splits)} Choose one with --train-split and --eval-split. The splits of an image "
            "folder are its top folders (train/CLASS/1.png, test/CLASS/2.png)."
        )
    return splits[names[0]]


def default_eval_split(splits: Collection[str], train_split: str) -> str | None:
    """Return the split to evaluate on: the one for tests, else for validation, None without both.

    Raises:
        DataError: There are several.
    """
    for role in ("test", "validation"):
        names = [name for name in splits if role_of(name) == role and name.lower() != train_split.lower()]
        if len(names) > 1:
            raise DataError(f"splits {' and '.join(names)} have one purpose: choose with --eval-split.")
        if names:
            return names[0]
    return None


def check_classes(train: Rows, test: Rows | None) -> None:
    """Check that there are two classes or more, that labels are among them, and that each has a training image.

    Raises:
        DataError: They do not, or a label is out of range.
    """
    names = train.class_names
    for rows in (train, test):
        top = int(rows.labels.max()) if rows is not None and rows.labels.ndim == 1 else 0
        if rows is not None and top >= len(names):
            raise DataError(
                f"split {rows.split!r} has the label {top}, but there are {len(names)} classes, {few(names)}: "
                f"expected 0 to {len(names) - 1}. Correct the labels or the class names."
            )
    if len(names) < 2:
        raise DataError(f"split {train.split!r} has only one class, {names[0]!r}: expected two or more.")
    if train.labels.ndim == 1:
        counts = np.bincount(train.labels, minlength=len(names))
        empty = [f"{names[i]!r} ({i})" for i in np.flatnonzero(counts == 0)]
        if empty:
            raise DataError(
                f"split {train.split!r} has no image of class {few(empty)}: add images, or remove the class from the "
                "class names."
            )
