"""Find images that are in the training split and in the evaluation split."""

import hashlib
from pathlib import Path

import numpy as np

from mgd_timm.data.readers.arrays import ArrayRows
from mgd_timm.data.readers.rows import Rows


def find_duplicates(train: Rows, train_ids: np.ndarray, test: Rows, test_ids: np.ndarray) -> list[tuple[str, str]]:
    """Return the names of images of both splits with equal content, byte by byte: in training, and in evaluation.

    Only images whose number of bytes is found in both splits are read.

    Args:
        train: The split that is trained on.
        train_ids: Its rows that are trained on.
        test: The split that is evaluated on; the same where a part is held out.
        test_ids: Its rows that are evaluated on.
    """
    train_sizes, test_sizes = _sizes(train)[train_ids], _sizes(test)[test_ids]
    first: dict[bytes, int] = {}
    for row in train_ids[np.isin(train_sizes, test_sizes)].tolist():
        first.setdefault(_digest(train, row), row)
    rows = test_ids[np.isin(test_sizes, train_sizes)].tolist()
    return [(train.name(first[key]), test.name(row)) for row in rows if (key := _digest(test, row)) in first]


def _sizes(rows: Rows) -> np.ndarray:
    """Return the bytes of each image, int [n]; 0 where they are not known before it is read."""
    return np.asarray(getattr(rows, "sizes", np.zeros(len(rows), dtype=np.int64)))


def _digest(rows: Rows, row: int) -> bytes:
    if isinstance(rows, ArrayRows):
        return hashlib.sha256(np.ascontiguousarray(rows.images[row]).tobytes()).digest()
    content = rows.content(row) if hasattr(rows, "content") else rows.pixels(row, 3).tobytes()
    return hashlib.sha256(Path(content).read_bytes() if isinstance(content, str) else content).digest()
