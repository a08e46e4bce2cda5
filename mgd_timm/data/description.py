"""What was understood of a data set: splits, classes, columns, and what is left out."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mgd_timm.data.decode import image_size
from mgd_timm.data.readers.arrays import ArrayRows
from mgd_timm.data.readers.open import open_splits
from mgd_timm.data.readers.rows import Rows, check_classes, default_eval_split, find_split
from mgd_timm.data.readers.scan import Ignored
from mgd_timm.data.readers.splits import LocalPlace
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


def read_rows(location: str, data: Data, log: Callable[[str], None], place: LocalPlace | None) -> FoundRows:
    """Open a data set and read the rows of its splits, without the images.

    Args:
        location: A folder or a hub id.
        data: The options of the data.
        log: Logs one line.
        place: The scanned folder; None for a hub id.

    Raises:
        DataError: There is no such data set, split or column, or its classes cannot be used.
    """
    opened = open_splits(location, data, place)
    train = find_split(opened.splits, data.train_split)(None, log)
    name = data.eval_split or default_eval_split(opened.splits, train.split)
    test = find_split(opened.splits, name)(train.class_names, log) if name is not None else None
    check_classes(train, test)
    opened.count_loose([rows for rows in (train, test) if rows is not None])
    return FoundRows(train, test, opened.ignored)


def find_large(rows: Rows, corrupt: Sequence[int] = (), *, every: bool) -> str | None:
    """Return the name of an image with more than `SMALL` pixels a side, or None where all that are looked at are small.

    Args:
        rows: The split. Images of most bytes are looked at first.
        corrupt: Rows to leave out.
        every: Look at every image, else at `PROBED` of them.
    """
    from tqdm import tqdm

    if isinstance(rows, ArrayRows):
        return rows.name(0) if max(rows.images.shape[1:3]) > SMALL else None
    order = np.argsort(-np.asarray(getattr(rows, "sizes", np.zeros(len(rows)))), kind="stable")
    order = order if every else order[:PROBED]
    known = set(corrupt)
    for row in tqdm(order.tolist(), desc=f"sizes of {rows.split}", unit="img", leave=False, delay=2.0):
        if row not in known and max(_size(rows, row)) > SMALL:
            return rows.name(row)
    return None


def _size(rows: Rows, row: int) -> tuple[int, int]:
    """Return height and width of an image. (0, 0) where it is corrupt."""
    content = getattr(rows, "content", None)
    if content is not None:
        return image_size(content(row))
    height, width = rows.pixels(row, 3).shape[:2]
    return height, width


def describe(
    found: FoundRows, in_memory: bool, held_out: np.ndarray | None = None, left: np.ndarray | None = None
) -> dict[str, Any]:
    """Return what was understood of a data set, as JSON values.

    Args:
        found: Its rows.
        in_memory: Whether its images are kept in memory, or read from files when they are used.
        held_out: Training rows that are held out for validation; None without any.
        left: Training rows that are trained on; None for all.
    """
    train, test = found.train, found.test
    evaluation = None if test is None else _part(test, None)
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
