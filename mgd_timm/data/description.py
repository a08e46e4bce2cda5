"""What was understood of a data set: splits, classes, columns, and what is left out."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mgd_timm.data.corrupt_images import CheckedRows
from mgd_timm.data.decode import DataError, image_size
from mgd_timm.data.readers.arrays import ArrayRows
from mgd_timm.data.readers.open import open_splits
from mgd_timm.data.readers.rows import Rows, check_classes, default_eval_split, find_split
from mgd_timm.data.readers.scan import Ignored
from mgd_timm.data.readers.splits import LocalFolder
from mgd_timm.data.transforms import SMALL
from mgd_timm.recipe.data import Data
from mgd_timm.recipe.options import few

PROBED = 64
"""Images whose size is looked at before small images are decoded: those of most bytes."""


@dataclass(frozen=True)
class FoundRows:
    """The rows of a data set: to train on, to evaluate on if there is such a split, and what is left out."""

    train: Rows
    test: Rows | None
    ignored: Ignored

    def leave_out_corrupt(self, splits: Sequence[CheckedRows]) -> None:
        """Count the corrupt images that are skipped."""
        for split in splits:
            for row in split.corrupt:
                path, root = getattr(split.rows, "path", None), getattr(split.rows, "root", None)
                name = split.rows.name(row) if path is None else os.path.relpath(path(row), root)
                self.ignored.add(name, "a corrupt image, skipped with --max-bad")


def read_rows(location: str, data: Data, log: Callable[[str], None], local: LocalFolder | None) -> FoundRows:
    """Open a data set and read the rows of its splits, without the images.

    Args:
        location: A folder or a hub id.
        data: The options of the data.
        log: Logs one line.
        local: The scanned folder; None for a hub id.

    Raises:
        DataError: There is no such data set, split or column, or its classes cannot be used.
    """
    opened = open_splits(location, data, local)
    train = find_split(opened.splits, data.train_split)(None, log)
    check_classes(train, None)
    name = data.eval_split or default_eval_split(opened.splits, train.split)
    test = find_split(opened.splits, name)(train.class_names, log) if name is not None else None
    check_classes(train, test)
    for other in opened.splits:
        if other not in (train.split, test.split if test is not None else None):
            log(f"split {other!r} is not used: --eval-split {other} evaluates on it")
    opened.count_loose([rows for rows in (train, test) if rows is not None])
    return FoundRows(train, test, opened.ignored)


def may_be_small(rows: Rows, corrupt: Sequence[int] = ()) -> bool:
    """Return whether none of the `PROBED` images of most bytes has more than `SMALL` pixels a side.

    Args:
        rows: The split.
        corrupt: Rows to leave out.
    """
    if isinstance(rows, ArrayRows):
        return max(rows.images.shape[1:3]) <= SMALL
    order = np.argsort(-np.asarray(getattr(rows, "sizes", np.zeros(len(rows)))), kind="stable")[:PROBED]
    wanted = [row for row in order.tolist() if row not in corrupt]
    return int(read_sizes(rows, wanted)[0].max(initial=0)) <= SMALL


def read_sizes(rows: Rows, wanted: Sequence[int] | None = None) -> tuple[np.ndarray, dict[int, str]]:
    """Return the sizes of images from their headers, and the errors of those that cannot be read.

    Args:
        rows: The split.
        wanted: Rows to read; all by default.

    Returns:
        Height and width, int64 [n, 2], 0 where they cannot be read; and the error of each of these rows.
    """
    from tqdm import tqdm

    wanted = range(len(rows)) if wanted is None else wanted
    if isinstance(rows, ArrayRows):
        return np.tile(np.array(rows.images.shape[1:3]), (len(wanted), 1)), {}
    content, corrupt = getattr(rows, "content", None), dict[int, str]()
    sizes = np.zeros((len(wanted), 2), dtype=np.int64)
    for i, row in enumerate(tqdm(wanted, desc=f"sizes of {rows.split}", unit="img", leave=False, delay=2.0)):
        cell = None if content is None else content(row)
        try:
            sizes[i] = rows.pixels(row, 3).shape[:2] if cell is None else image_size(cell, rows.name(row))
        except DataError as error:
            corrupt[row] = str(error)
    return sizes, corrupt


def describe(
    found: FoundRows,
    in_memory: bool,
    held_out: np.ndarray | None = None,
    left: np.ndarray | None = None,
    tested: np.ndarray | None = None,
) -> dict[str, Any]:
    """Return what was understood of a data set, as JSON values.

    Args:
        found: Its rows.
        in_memory: Whether its images are kept in memory, or read from files when they are used.
        held_out: Training rows that are held out for validation; None without any.
        left: Training rows that are trained on; None for all.
        tested: Rows of the split to evaluate on that are not corrupt; None for all.
    """
    train, test = found.train, found.test
    evaluation = None if test is None else _part(test, tested)
    if held_out is not None and len(held_out):
        evaluation = _part(train, held_out)
    return {
        "train": _part(train, left),
        "eval": evaluation,
        "classes": list(train.class_names),
        "image_column": getattr(train, "image_column", None),
        "label_column": getattr(train, "label_column", None),
        "path": "memory" if in_memory else "files",
        "ignored_count": found.ignored.count,
        "ignored": found.ignored.listed(),
    }


def _part(rows: Rows, ids: np.ndarray | None) -> dict[str, Any]:
    """Return a split's name, number of images and images of each class (the most likely one of distributions)."""
    labels = rows.labels if rows.labels.ndim == 1 else rows.labels.argmax(1)
    labels = labels if ids is None else labels[ids]
    counts = np.bincount(labels, minlength=len(rows.class_names)).tolist()
    return {"split": rows.split, "images": len(labels), "per_class": dict(zip(rows.class_names, counts, strict=True))}


def log_description(described: dict[str, Any], ignored: Ignored, log: Callable[[str], None]) -> None:
    """Log what was understood of a data set in three lines: classes, evaluation, and what is left out."""
    classes, column = described["classes"], described["label_column"]
    train, evaluation = described["train"], described["eval"]
    of_column = f" from column {column!r}" if column is not None else ""
    log(f"{len(classes)} classes{of_column}: {few(classes)}; {train['images']:,} images of split {train['split']!r}")
    if evaluation is not None:
        held_out = " (held out)" if evaluation["split"] == train["split"] else ""
        lacking = [name for name, count in evaluation["per_class"].items() if not count]
        without = f", none of class {few(lacking)}" if lacking else ""
        log(f"evaluated on {evaluation['images']:,} images of split {evaluation['split']!r}{held_out}{without}")
    if ignored.count:
        log(ignored.line())
