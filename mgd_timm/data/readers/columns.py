"""Find the image and the label column of a table, and read the labels."""

import json
import os
import re
from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mgd_timm.data.decode import DataError
from mgd_timm.data.image_formats import is_image_format
from mgd_timm.data.readers.classes import Labels, labels_of_numbers, labels_of_words
from mgd_timm.recipe.data import Data
from mgd_timm.recipe.options import few, unknown

LABEL_NAMES = ("label", "labels", "target", "class", "fine_label")
"""Names of label columns, in this order."""

_NOT_LABELS = re.compile(
    r"(^|_)(id|ids|idx|index|uid|uuid|guid|key|row|fold|kfold|split|subset|bbox|bboxes|box|boxes|x|y|w|h|x1|x2|y1|y2|xmin|"
    r"xmax|ymin|ymax|width|height|size|area|time|timestamp|date|datetime|year|month|day|hour|path|file|filename|"
    r"file_name|url|md5|sha1|sha256|hash|license|source|count|num|number|no|nr|order|serial|seed|page|frame|patient|"
    r"subject|user|train|training|test|testing|val|valid|validation|eval|dev|usage|lat|lon|latitude|longitude|left|right|"
    r"top|bottom|cx|cy)s?($|_)|^unnamed|^__",
)
"""Names of columns that are not guessed to be labels."""
_DATE = re.compile(r"\d{4}[-/.:]\d{1,2}[-/.:]\d{1,2}([T ].*)?")


def image_column(table: pa.Table, data: Data) -> str:
    """Return the name of the image column: --input-key, else `image`, else the only column that holds images.

    Raises:
        DataError: There is none, or several.
    """
    if data.input_key is not None:
        _check_column(table.schema, data.input_key)
        if not holds_images(table, data.input_key):
            raise DataError(
                f"column {data.input_key!r} holds {_kind_in_words(table, data.input_key)}: expected encoded images or "
                "their paths; choose another with --input-key."
            )
        return data.input_key
    found = [name for name in table.column_names if holds_images(table, name)]
    if "image" in found:
        return "image"
    if found and "image" in table.column_names:
        kind = _kind_in_words(table, "image")
        raise DataError(
            f"column 'image' holds {kind}, neither encoded images nor their paths, and {few(found)} does: choose it "
            "with --input-key."
        )
    if len(found) != 1:
        several = f"{len(found)} image columns, {few(found)}," if found else "no image column"
        named = f" Column 'image' holds {_kind_in_words(table, 'image')}." if "image" in table.column_names else ""
        raise DataError(f"{several} among {few(table.column_names)}: expected one; name it with --input-key.{named}")
    return found[0]


def _kind_in_words(table: pa.Table, name: str) -> str:
    """Return what a column without images holds. Words may be names of images without their endings."""
    kind = table.schema.field(name).type
    if not _is_text(value_type(kind)) or not len(table):
        return str(kind)
    first = str(table.column(name)[0].as_py())[:60]
    return (
        f"words such as {first!r}, which do not end as image files do (.jpg, .png): write file names with their endings"
    )


def holds_images(table: pa.Table, name: str) -> bool:
    """Return whether a column holds encoded images, or paths of images."""
    kind = value_type(table.schema.field(name).type)
    if pa.types.is_struct(kind):
        fields = {kind.field(i).name for i in range(kind.num_fields)}
        return bool(fields) and fields <= {"bytes", "path"}
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind):
        return True
    if not _is_text(kind):
        return False
    first = next((path for cell in table.column(name)[:100] if (path := cell.as_py())), "")
    return is_image_format(os.path.splitext(first)[1].lower())


def label_column(table: pa.Table, image: str, data: Data, log: Callable[[str], None]) -> str:
    """Return the name of the label column: --target-key, else one of `LABEL_NAMES`, else the only one it can be.

    It can be a column with class names, of repeated words, or of class ids or distributions; never an index, an id, a
    time, a box or a fold.

    Args:
        table: Without rows, only the types of columns are looked at.
        image: Name of the image column.
        data: The options of the data.
        log: Logs one line.

    Raises:
        DataError: It is not certain.
    """
    names = [name for name in table.column_names if name != image]
    if data.target_key is not None:
        _check_column(table.schema, data.target_key)
        return data.target_key
    for label in LABEL_NAMES:
        for name in sorted(names, key=lambda name: name != label):
            if name.lower() == label:
                return name
    classes = {name: len(known) for name in names if (known := class_names_of(table.schema, name)) is not None}
    if classes:
        finest = max(classes, key=lambda name: classes[name])
        if len(classes) > 1:
            listed = ", ".join(f"{name} ({count} classes)" for name, count in classes.items())
            log(f"label column: {finest} of {listed}; choose another with --target-key")
        return finest
    found = [
        name for name in names if not _NOT_LABELS.search(_in_snake_case(name)) and _may_be_labels(table.column(name))
    ]
    if len(found) != 1:
        several = f"{len(found)} columns that may be labels, {few(found)}," if found else "no label column"
        raise DataError(
            f"{several} among {few(table.column_names)}: expected one of class names, class ids or distributions; name "
            "it with --target-key, or put the images into one folder per class, with two classes or more."
        )
    log(f"label column: {found[0]}, the only one that it can be; choose another with --target-key")
    return found[0]


def class_names_of(schema: pa.Schema, name: str) -> tuple[str, ...] | None:
    """Return the class names that `datasets` wrote for a column, None without any."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        feature = features[name]
    except (KeyError, TypeError, ValueError):
        return None
    names = feature.get("names") if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" else None
    return tuple(map(str, names)) if names else None


def _check_column(schema: pa.Schema, name: str) -> None:
    if name not in schema.names:
        raise DataError(str(unknown("column", name, schema.names)))


def _in_snake_case(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|[\s.-]+", "_", name).lower()


def _may_be_labels(column: pa.ChunkedArray) -> bool:
    """Return whether a column may hold labels, by its type and values."""
    kind = value_type(column.type)
    if _is_list(kind) and pa.types.is_floating(kind.value_type):
        return not len(column) or _distributions(column[:100]) is not None
    if not (pa.types.is_integer(kind) or pa.types.is_boolean(kind) or _is_text(kind)):
        return False
    if not len(column):
        return True
    distinct = pc.count_distinct(_plain(column)).as_py()
    if distinct == len(column) or distinct < 2:
        return False
    if pa.types.is_integer(kind) and not pa.types.is_dictionary(column.type):
        low, high = pc.min_max(column).as_py().values()
        return low in (0, 1) and high - low + 1 == distinct
    return not (_is_text(kind) and all(_DATE.fullmatch(cell.as_py() or "") for cell in column[:100]))


def value_type(kind: pa.DataType) -> pa.DataType:
    """Return a type, that of the values where it is a dictionary's (a categorical's)."""
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _plain(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return a column without a dictionary, whose text has offsets."""
    kind = value_type(column.type)
    return column.cast(pa.large_string() if _is_text(kind) else kind)


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def read_labels(tables: Sequence[pa.Table], target: str, split: str, first_label: int, training: bool) -> Labels:
    """Return the labels of a split's tables. Tables that number their classes differently are matched by name.

    Args:
        tables: The tables of the split.
        target: Name of the label column.
        split: Name of the split.
        first_label: Number of the first class, where the labels are numbers without names.
        training: Whether it is the training split, which has all classes.

    Raises:
        DataError: The labels are not class names, class ids or distributions, or the tables do not agree.
    """
    where = f"column {target!r} of split {split!r}"
    parts = [_read_part(table.column(target), class_names_of(table.schema, target), where) for table in tables]
    known = {part.names for part in parts}
    if len({part.values.shape[1:] for part in parts}) > 1 or (None in known and len(known) > 1):
        raise DataError(
            f"{where}: its files hold different kinds of labels: expected class ids, names or distributions."
        )
    if len(known) == 1:
        labels = Labels(np.concatenate([part.values for part in parts]), parts[0].names)
        if labels.values.ndim == 2 or labels.names is not None:
            return labels
        return labels_of_numbers(labels.values, where, first_label, training=training)
    merged = list(dict.fromkeys(name for part in parts for name in part.names or ()))
    if all(list(names or ()) == sorted(names or ()) for names in known):
        merged.sort()
    ids = {name: i for i, name in enumerate(merged)}
    values = [np.array([ids[name] for name in part.names or ()])[part.values] for part in parts]
    return Labels(np.concatenate(values), tuple(merged))


def _read_part(column: pa.ChunkedArray, names: tuple[str, ...] | None, where: str) -> Labels:
    """Return the labels of one table, not yet checked."""
    is_category = pa.types.is_dictionary(column.type) and not _is_text(value_type(column.type))
    column = _plain(column)
    kind = column.type
    known = pc.is_finite(column).fill_null(False) if pa.types.is_floating(kind) else column.is_valid()
    if not pc.all(known, min_count=0).as_py():
        row = pc.index(known, False).as_py()
        raise DataError(
            f"{where}: row {row} has no label: take the row out, or choose another column with --target-key."
        )
    if pa.types.is_boolean(kind) or is_category:
        return labels_of_words([str(value) for value in column.to_pylist()])
    if _is_text(kind):
        words = column.to_pylist()
        empty = next((row for row, word in enumerate(words) if not word.strip()), None)
        if empty is not None:
            raise DataError(f"{where}: row {empty} has an empty label: write one, or take the row out.")
        labels = labels_of_words(words)
        stripped = {name.strip(): name for name in labels.names or ()}
        alike = next((name for name in labels.names or () if stripped[name.strip()] != name), None)
        if alike is not None:
            raise DataError(
                f"{where}: the classes {alike!r} and {stripped[alike.strip()]!r} differ in spaces only: write them "
                "alike."
            )
        return labels
    if pa.types.is_integer(kind) or pa.types.is_floating(kind):
        numbers = np.asarray(column)
        broken = np.flatnonzero(numbers != np.floor(numbers))
        if len(broken):
            raise DataError(
                f"{where}: row {broken[0]} has the label {numbers[broken[0]]}: expected class ids; choose another "
                "column with --target-key."
            )
        ids = numbers.astype(np.int64)  # floats are whole numbers that once had gaps
        if names is not None and int(ids.max()) >= len(names):
            raise DataError(f"{where}: label {ids.max()}, but it names {len(names)} classes, {few(names)}.")
        return _named(ids, names, where) if names is not None else Labels(ids, None)
    if _is_list(kind):
        found = _distributions(column)
        if found is not None:
            return Labels(found, None)
        lengths = sorted({len(row) for row in column.to_pylist()})
        raise DataError(
            f"{where}: lists of {', '.join(map(str, lengths[:3]))} values: expected distributions over classes: equal "
            "lengths, each value 0 or more, with the sum 1. Several labels for an image are not supported: choose "
            "another column with --target-key."
        )
    raise DataError(
        f"{where} holds {kind}: expected class names, class ids from 0 or distributions; choose another with "
        "--target-key."
    )


def _named(ids: np.ndarray, names: tuple[str, ...], where: str) -> Labels:
    """Return the ids of classes whose names the file holds. Raise DataError where they are hidden."""
    if int(ids.min()) < 0:
        raise DataError(
            f"{where}: row {int(ids.argmin())} has the label {ids.min()}, expected class ids from 0. A split with "
            "hidden labels cannot be used: choose another with --train-split or --eval-split."
        )
    return Labels(ids, names)


def _distributions(column: pa.ChunkedArray) -> np.ndarray | None:
    """Return distributions over classes, float32 [n, k], or None if a column holds other lists."""
    rows = column.to_pylist()
    if None in rows or len({len(row) for row in rows}) != 1:
        return None
    if not all(isinstance(value, int | float) for row in rows for value in row):
        return None
    labels = np.array(rows, dtype=np.float32)
    valid = np.isfinite(labels).all() and labels.min() >= 0 and np.allclose(labels.sum(1), 1, atol=1e-3)
    return labels if labels.size and valid else None
