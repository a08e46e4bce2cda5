"""Find images that are in the training split and in the evaluation split."""

import hashlib
from pathlib import Path

import numpy as np

from mgd_timm.data.readers.rows import Rows


def find_duplicates(train: Rows, test: Rows) -> list[tuple[str, str]]:
    """Return the names of images of both splits with equal content, byte by byte: in training, and in evaluation.

    Only images whose number of bytes is found in both splits are read.
    """
    train_sizes, test_sizes = _sizes(train), _sizes(test)
    first: dict[bytes, int] = {}
    for row in np.flatnonzero(np.isin(train_sizes, test_sizes)).tolist():
        first.setdefault(_digest(train, row), row)
    rows = np.flatnonzero(np.isin(test_sizes, train_sizes)).tolist()
    return [(train.name(first[key]), test.name(row)) for row in rows if (key := _digest(test, row)) in first]


def _sizes(rows: Rows) -> np.ndarray:
    """Return the bytes of each image, int [n]; 0 where they are not known before it is read."""
    return np.asarray(getattr(rows, "sizes", np.zeros(len(rows), dtype=np.int64)))


def _digest(rows: Rows, row: int) -> bytes:
    content = rows.content(row) if hasattr(rows, "content") else rows.pixels(row, 3).tobytes()
    return hashlib.sha256(Path(content).read_bytes() if isinstance(content, str) else content).digest()
