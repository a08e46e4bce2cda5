"""Tables of encoded images and labels, as `datasets` reads them: parquet and arrow files, image folders and the hub.

Images are read and decoded one by one, when they are used.
"""

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mgd_timm.data.decode import DataError, LazyImage, decode, open_image
from mgd_timm.data.readers.rows import ReadSplit, begin_digest, digest_images
from mgd_timm.data.readers.scan import TABLE_SUFFIXES, LocalFolder
from mgd_timm.recipe.data import Data
from mgd_timm.recipe.options import unknown


@dataclass(frozen=True)
class TableRows:
    """`Rows` of a table of `datasets`.

    Args:
        table: Its image column holds encoded images or their paths.
        key: Name of this column.
        split: Name of the split.
        labels: Class ids, int64 [n], or distributions over classes, float32 [n, k].
        class_names: Names of the classes.
    """

    table: Any
    key: str
    split: str
    labels: np.ndarray
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.table)

    def name(self, row: int) -> str:
        """Return the name of an image in error messages: its split and row, and its file where one is known."""
        return self._name(row, self.table[row][self.key])

    def content(self, row: int) -> bytes | str:
        """Return an encoded image, or its path."""
        return self._content(row, self.table[row][self.key])

    def pixels(self, row: int, in_chans: int) -> np.ndarray:
        """Return a decoded image, uint8 [height, width, in_chans]."""
        cell = self.table[row][self.key]  # read once: it copies the encoded image
        return decode(self._content(row, cell), in_chans, self._name(row, cell))

    def image(self, row: int, in_chans: int) -> LazyImage:
        """Return an image that is not decoded yet."""
        cell = self.table[row][self.key]
        return open_image(self._content(row, cell), in_chans, self._name(row, cell))

    def _name(self, row: int, cell: Any) -> str:
        path = cell.get("path") if isinstance(cell, dict) else None
        return f"{self.split} image {row}" + (f" ({path})" if path else "")

    def _content(self, row: int, cell: Any) -> bytes | str:
        found: bytes | str | None = (cell["bytes"] or cell["path"]) if isinstance(cell, dict) else cell
        if not found:
            raise DataError(f"{self._name(row, cell)}: the row has neither bytes nor a path: remove it.")
        return found

    def digest(self) -> str:
        """Return a sha256 of classes, labels, sizes and encoded images.

        Where only the path of an image is known, its file name and class folder count too. The rest of the path and
        times do not: data that are moved stay the same data.
        """
        import pyarrow as pa
        import pyarrow.compute as pc

        column = self.table.with_format("arrow")[:][self.key]
        has_paths = pa.types.is_struct(column.type)
        encoded = pc.struct_field(column, "bytes") if has_paths else column
        paths = pc.struct_field(column, "path") if has_paths else None  # the whole column: one row takes 15 us
        sizes = np.array(pc.fill_null(pc.binary_length(encoded), 0), dtype=np.int64)
        total = begin_digest(self)
        for row in np.flatnonzero(sizes == 0).tolist():
            path = Path(str((paths is not None and paths[row].as_py()) or self.content(row)))
            try:
                sizes[row] = path.stat().st_size
            except OSError as error:
                raise DataError(f"{self.name(row)}: {error.strerror}: put the file back or remove its row.") from error
            total.update(json.dumps(path.parts[-2:]).encode())
        total.update(sizes.tobytes())
        return digest_images(total, sizes, self.content)


def find_splits(folder: LocalFolder, data: Data) -> dict[str, ReadSplit]:
    """Return the splits of a folder with parquet or arrow files.

    Raises:
        DataError: A file cannot be read.
    """
    if not folder.holds(TABLE_SUFFIXES):
        return {}
    tables = load_tables(str(folder.path), data.dataset_config)
    return {split: partial(read_table, table, split, data) for split, table in tables.items()}


def load_tables(source: str, config: str | None) -> dict[str, Any]:
    """Return the splits of a folder or a hub id, as tables of `datasets`.

    Raises:
        DataError: It cannot be read.
    """
    import datasets

    datasets.disable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # from fsspec and the hub's client
            return dict(datasets.load_dataset(source, config))
    except Exception as error:  # `datasets` raises a dozen kinds, from several libraries
        if isinstance(error, datasets.exceptions.DatasetGenerationError) and error.__cause__ is not None:
            error = error.__cause__  # the outer error does not name the cause
        raise DataError(f"{source}: cannot be read: {type(error).__name__}: {error}") from error


def read_table(
    table: Any, split: str, data: Data, class_names: tuple[str, ...] | None, log: Callable[[str], None]
) -> TableRows:
    """Return the rows of a table. Its columns are found by their type where `data` does not name them.

    Args:
        table: The table of `datasets`.
        split: Name of the split.
        data: The options of the data.
        class_names: Of the training split, for a label column without names. None for the training split itself.
        log: Logs one line.

    Raises:
        DataError: There is no such column, or its labels are not class ids or distributions.
    """
    import datasets

    if not len(table):
        raise DataError(f"split {split!r} has no images: choose another with --train-split or --eval-split.")
    key = image_column(table, data)
    if not _holds_images(table.features[key]):
        raise DataError(
            f"column {key!r} holds {table.features[key]}: expected encoded images; choose another with --input-key."
        )
    target = label_column(table, key, data, log if class_names is None else lambda _: None)
    if isinstance(table.features[key], datasets.Image):
        table = table.cast_column(key, datasets.Image(decode=False))
    labels, names = _read_labels(table, target, split, class_names)
    return TableRows(table.select_columns([key]), key, split, labels, names)


def _check_column(table: Any, name: str) -> None:
    if name not in table.features:
        raise DataError(str(unknown("column", name, table.features)))


def _holds_images(feature: Any) -> bool:
    import datasets

    encoded = isinstance(feature, dict) and set(feature) >= {"bytes", "path"}
    binary = getattr(feature, "dtype", None) in ("binary", "large_binary")
    return encoded or binary or isinstance(feature, datasets.Image)


def image_column(table: Any, data: Data) -> str:
    """Return the name of the image column: --input-key, else the one column that holds images.

    Raises:
        DataError: There is none, or several.
    """
    if data.input_key is not None:
        _check_column(table, data.input_key)
        return data.input_key
    found = [name for name, feature in table.features.items() if _holds_images(feature)]
    if len(found) != 1:
        several = f"{len(found)} image columns, {', '.join(found)}," if found else "no image column"
        raise DataError(f"{several} among {', '.join(table.column_names)}: expected one; name it with --input-key.")
    return found[0]


def label_column(table: Any, image: str, data: Data, log: Callable[[str], None]) -> str:
    """Return the name of the label column: --target-key, else the one with most classes of those with class names.

    Raises:
        DataError: There is none, or several without class names.
    """
    import datasets

    if data.target_key is not None:
        _check_column(table, data.target_key)
        return data.target_key
    classes = {name: f.num_classes for name, f in table.features.items() if isinstance(f, datasets.ClassLabel)}
    if classes:
        finest = max(classes, key=lambda name: classes[name])
        if len(classes) > 1:
            listed = ", ".join(f"{name} ({count} classes)" for name, count in classes.items())
            log(f"label column: {finest} of {listed}; choose another with --target-key")
        return finest

    def holds_labels(feature: Any) -> bool:
        is_integer = str(getattr(feature, "dtype", "")).startswith(("int", "uint"))
        return is_integer or isinstance(feature, datasets.List | datasets.LargeList)

    found = [name for name, feature in table.features.items() if name != image and holds_labels(feature)]
    if len(found) != 1:
        several = f"{len(found)} label columns, {', '.join(found)}," if found else "no label column"
        raise DataError(
            f"{several} among {', '.join(table.column_names)}: expected one of class ids or distributions; name it "
            "with --target-key, or put the images into one folder per class, with two classes or more."
        )
    return found[0]


def _read_labels(
    table: Any, target: str, split: str, classes: tuple[str, ...] | None
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Return class ids, int64 [n], or distributions, float32 [n, k]; and the class names."""
    import datasets

    feature, where = table.features[target], f"column {target!r} of split {split!r}"
    labels = np.asarray(table.select_columns([target]).with_format("numpy")[:][target])
    if labels.ndim == 2 and labels.dtype.kind in "iuf":
        labels = labels.astype(np.float32)
        if not np.isfinite(labels).all() or labels.min() < 0 or not np.allclose(labels.sum(1), 1, atol=1e-3):
            raise DataError(f"{where}: expected distributions: each value 0 or more, with the sum 1.")
        count = labels.shape[1]
        return labels, classes if classes and len(classes) == count else tuple(str(i) for i in range(count))
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise DataError(
            f"{where} holds {feature} (read as {labels.dtype}): expected class ids from 0, none missing, or "
            "distributions of equal length; choose another with --target-key."
        )
    if labels.min() < 0:
        raise DataError(
            f"{where}: row {int(labels.argmin())} has the label {labels.min()}, expected class ids from 0. A split "
            "with hidden labels cannot be used: choose another with --train-split or --eval-split."
        )
    labels = labels.astype(np.int64)
    if isinstance(feature, datasets.ClassLabel):
        return labels, tuple(feature.names)
    return labels, classes or tuple(str(i) for i in range(int(labels.max()) + 1))
