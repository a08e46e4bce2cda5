"""`Rows`, the protocol that every reader implements: the images of a split and their labels; and its checks."""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from mgd_timm.data.decode import DataError, LazyImage
from mgd_timm.recipe.options import few, unknown

EVAL_SPLITS = ("test", "validation", "valid", "val")
HASHED = 1 << 30
"""Bytes: of a larger split only a part of the images is hashed, so that a start does not take minutes."""


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
        content: Returns an encoded image, or its path.
    """
    for row in range(0, len(sizes), 1 + int(sizes.sum()) // HASHED):
        found = content(row)
        total.update(hashlib.sha256(found if isinstance(found, bytes) else Path(found).read_bytes()).digest())
    return str(total.hexdigest())


def find_split(splits: Mapping[str, Any], split: str) -> Any:
    """Return a split by its name.

    Raises:
        DataError: There is none.
    """
    if split not in splits:
        raise DataError(
            f"{unknown('split', split, splits)} Choose one with --train-split and --eval-split. The splits of an image "
            "folder are its top folders (train/CLASS/1.png, test/CLASS/2.png)."
        )
    return splits[split]


def check_classes(train: Rows, test: Rows | None) -> None:
    """Check that both splits have the same classes, two or more, and that each has a training image.

    Raises:
        DataError: They do not, or a label is out of range.
    """
    names = train.class_names
    if test is not None and test.class_names != names:
        raise DataError(
            f"split {test.split!r} has the classes {few(test.class_names)}, split {train.split!r} has {few(names)}: "
            "expected the same classes in both."
        )
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
