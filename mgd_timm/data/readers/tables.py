"""Tables of images and labels: parquet, arrow, feather, csv and jsonl files, and data sets of the Hugging Face hub.

Images are read and decoded one by one, when they are used.
"""

import csv
import json
import os
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from mgd_timm.data.decode import DataError, LazyImage, decode, open_image
from mgd_timm.data.image_formats import is_image_format
from mgd_timm.data.readers.classes import match_classes
from mgd_timm.data.readers.columns import image_column, label_column, read_labels, value_type
from mgd_timm.data.readers.rows import begin_digest, digest_images, file_state
from mgd_timm.data.readers.scan import Ignored
from mgd_timm.data.readers.shards import check_shards
from mgd_timm.data.readers.splits import LocalSplit
from mgd_timm.recipe.data import Data
from mgd_timm.recipe.options import unknown
from mgd_timm.storage.atomic_write import write_atomically
from mgd_timm.storage.cache import cache_entry
from mgd_timm.storage.lock import Lock

TABLE_ENDINGS = (".parquet", ".arrow", ".feather", ".csv", ".jsonl")
_WHOLE = re.compile(r"-?(0|[1-9]\d{0,17})")
"""A whole number as a csv file holds it: 7, not 007, which is a name."""
_FLOAT = re.compile(r"-?(0|[1-9]\d{0,14})(\.0+)?")
_UNKNOWN = ("nan", "na", "n/a", "none", "null", "<na>")
"""Words for a value that is not known, where the others of a column are numbers."""


@dataclass(frozen=True)
class TableRows:
    """`Rows` of tables.

    Args:
        columns: Image column of each table: encoded images, paths, or structs of both.
        starts: First row of each table, int64 [tables].
        folders: Folders that relative paths of images are tried in, for each table.
        split: Name of the split.
        labels: Class ids, int64 [n], or distributions over classes, float32 [n, k].
        class_names: Names of the classes.
        image_column, label_column: Names of the columns.
        state: Hash of the files' sizes, times and inodes; "" for data of the hub.
    """

    columns: tuple[pa.ChunkedArray, ...]
    starts: np.ndarray
    folders: tuple[tuple[Path, ...], ...]
    split: str
    labels: np.ndarray
    class_names: tuple[str, ...]
    image_column: str
    label_column: str
    state: str

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def sizes(self) -> np.ndarray:
        """Bytes of each encoded image, 0 where only its path is known, int64 [n]."""
        return np.concatenate([_binary_lengths(column) for column in self.columns])

    def name(self, row: int) -> str:
        """Return the name of an image in error messages: its split and row, and its file where one is known."""
        return self._name(row, self._cell(row))

    def content(self, row: int) -> bytes | str:
        """Return an encoded image, or its path.

        Raises:
            DataError: The row has neither, or there is no such file.
        """
        return self._content(row, self._cell(row))

    def pixels(self, row: int, in_chans: int) -> np.ndarray:
        """Return a decoded image, uint8 [height, width, in_chans]."""
        cell = self._cell(row)  # read once: it copies the encoded image
        return decode(self._content(row, cell), in_chans, self._name(row, cell))

    def image(self, row: int, in_chans: int) -> LazyImage:
        """Return an image that is not decoded yet."""
        cell = self._cell(row)
        return open_image(self._content(row, cell), in_chans, self._name(row, cell))

    def digest(self) -> str:
        """Return a sha256 of classes, labels, sizes and encoded images.

        Where only the path of an image is known, its file name and folder count too. The rest of the path and times
        do not: data that are moved stay the same data.
        """
        total = begin_digest(self)
        sizes = self.sizes.copy()
        for row in np.flatnonzero(sizes == 0).tolist():
            path = Path(str(self.content(row)))
            sizes[row] = path.stat().st_size
            total.update(json.dumps(path.parts[-2:]).encode())
        total.update(sizes.tobytes())
        return digest_images(total, sizes, self.content)

    def _cell(self, row: int) -> Any:
        table = int(np.searchsorted(self.starts, row, side="right")) - 1
        return self.columns[table][row - int(self.starts[table])].as_py()

    def _name(self, row: int, cell: Any) -> str:
        path = cell.get("path") if isinstance(cell, dict) else cell if isinstance(cell, str) else None
        return f"{self.split} image {row}" + (f" ({path})" if path else "")

    def _content(self, row: int, cell: Any) -> bytes | str:
        found: bytes | str | None = (cell.get("bytes") or cell.get("path")) if isinstance(cell, dict) else cell
        if not found:
            raise DataError(f"{self._name(row, cell)}: the row has neither bytes nor a path: take it out.")
        if isinstance(found, bytes):
            return found
        table = int(np.searchsorted(self.starts, row, side="right")) - 1
        for folder in self.folders[table]:
            path = os.path.join(folder, found)
            if os.path.isfile(path):
                return path
        raise DataError(
            f"{self._name(row, cell)}: no such file in {' or '.join(map(str, self.folders[table]))}: put it back, "
            "write paths relative to the table and with /, or take its row out of the table."
        )


def _cells(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return an image column without a dictionary, whose bytes have offsets."""
    kind = value_type(column.type)
    if pa.types.is_binary_view(kind):
        return column.cast(pa.large_binary())
    return column if kind == column.type and not pa.types.is_string_view(kind) else column.cast(pa.large_string())


def _binary_lengths(column: pa.ChunkedArray) -> np.ndarray:
    """Return the number of bytes of each encoded image, 0 where only a path is known, int64 [n]."""
    import pyarrow.compute as pc

    kind = column.type
    if pa.types.is_struct(kind):
        if kind.get_field_index("bytes") < 0:
            return np.zeros(len(column), dtype=np.int64)
        column = pc.struct_field(column, "bytes")
    if pa.types.is_null(column.type) or pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        return np.zeros(len(column), dtype=np.int64)
    return np.array(pc.fill_null(pc.binary_length(column), 0), dtype=np.int64)


def read_files(
    split: LocalSplit,
    data: Data,
    ignored: Ignored,  # noqa: ARG001  # every reader takes it
    class_names: tuple[str, ...] | None,
    log: Callable[[str], None],
) -> TableRows:
    """Return the rows of a split's table files.

    Raises:
        DataError: A file cannot be read or a shard is missing, or as `read_tables`.
    """
    paths = [split.root / file for file in split.files]
    check_shards(paths)
    tables = [_open(path, log) for path in paths]
    beside = sorted({split.name, *split.beside}, key=lambda name: name != split.name)
    folders = tuple((path.parent, *(path.parent / name for name in beside)) for path in paths)
    state = xxhash.xxh3_128()
    for path in paths:
        state.update(file_state(path).encode())
    return read_tables(tables, split.name, data, class_names, log, folders=folders, state=state.hexdigest())


def named_files(rows: TableRows) -> set[str]:
    """Return the paths of the images that a table names, none where it holds the images."""
    if rows.sizes.all():
        return set()
    contents = (rows.content(row) for row in range(len(rows)))
    return {os.path.abspath(content) for content in contents if isinstance(content, str)}


def _open(path: Path, log: Callable[[str], None]) -> pa.Table:
    """Open a table file. Arrow files are mapped into memory, parquet files are first converted to one in the cache."""
    try:
        match path.suffix.lower():
            case ".parquet":
                return _map_arrow(_converted(path, log))
            case ".csv":
                return _read_csv(path)
            case ".jsonl":
                return _read_jsonl(path)
            case _:
                return _map_arrow(path)
    except (pa.ArrowException, ValueError, OSError, csv.Error) as error:
        if isinstance(error, DataError) or (isinstance(error, OSError) and error.errno and path.stat().st_size):
            raise  # of the cache's disk; pyarrow's own have no number
        kind = path.suffix.lower().removeprefix(".")
        reason = " ".join(str(error).split())[:200] if path.stat().st_size else "it is empty"
        raise DataError(f"{path}: cannot be read as a {kind} file ({reason}): write it again.") from error


def _map_arrow(path: Path) -> pa.Table:
    """Open a file of arrow's file or stream format."""
    source = pa.memory_map(str(path))
    try:
        return pa.ipc.open_file(source).read_all()
    except pa.ArrowInvalid:
        source.seek(0)
        return pa.ipc.open_stream(source).read_all()


def _converted(path: Path, log: Callable[[str], None]) -> Path:
    """Return an arrow file with a parquet file's rows, which is made once: rows of parquet cannot be read singly."""
    folder = cache_entry("tables", file_state(path))
    found = folder / "table.arrow"
    if found.exists():
        return found
    with Lock(folder, f"rows of {path} ({folder})", log):
        if not found.exists():
            write_atomically(found, partial(_convert, path))
    return found


def _convert(path: Path, draft: Path) -> None:
    from tqdm import tqdm

    with pq.ParquetFile(path) as source, pa.OSFile(str(draft), "wb") as sink:
        schema = source.schema_arrow
        bar = tqdm(total=source.metadata.num_rows, desc=f"reading {path.name}", unit=" rows", leave=False, delay=2.0)
        with pa.ipc.new_file(sink, schema) as writer, bar:
            for batch in source.iter_batches(256):
                writer.write_batch(batch)
                bar.update(len(batch))


def _read_csv(path: Path) -> pa.Table:
    """Read a csv file with a header, every column as words: 007 stays 007. A column of whole numbers becomes int64."""
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = list(csv.reader(file))
    if not rows:
        raise ValueError("it is empty")
    header, rows = rows[0], [row for row in rows[1:] if row]
    if len(header) == 1 and re.search(r"[;\t|]", header[0]):
        raise ValueError(f"its header is {header[0]!r}: expected columns separated by a comma")
    unnamed = next((name for name in header if is_image_format(os.path.splitext(name)[1].lower())), None)
    if unnamed is not None:
        raise ValueError(f"expected a header with the names of the columns, and {unnamed!r} is an image")
    twice = next((name for name in header if header.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"its header has {twice!r} twice")
    wrong = next((i for i, row in enumerate(rows) if len(row) != len(header)), None)
    if wrong is not None:
        count = len(rows[wrong])
        raise ValueError(f"row {wrong + 1} has {count} field{'s' * (count != 1)}, the header has {len(header)}")
    return pa.table({name: _csv_column([row[i] for row in rows]) for i, name in enumerate(header)})


def _csv_column(words: list[str]) -> pa.Array:
    """Return words as whole numbers where all are, with null for those that are not known."""
    known = [word for word in words if word.lower() not in _UNKNOWN]
    if not known or not all(map(_FLOAT.fullmatch, known)):
        return pa.array(words, pa.string())
    if not all(map(_WHOLE.fullmatch, known)) and len({"." in word for word in known}) > 1:
        return pa.array(words, pa.string())  # 1 and 1.0 would be one
    return pa.array([None if word.lower() in _UNKNOWN else int(word.partition(".")[0]) for word in words], pa.int64())


def _read_jsonl(path: Path) -> pa.Table:
    """Read a file with a JSON object in each line."""
    rows = []
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from error
            if not isinstance(row, dict):
                raise ValueError(f"line {number} is not an object with the columns as keys")
            rows.append(row)
    return pa.table({name: [row.get(name) for row in rows] for row in rows[:1] for name in row})


def load_tables(source: str, config: str | None) -> dict[str, Any]:
    """Return the splits of a hub id, as data sets of `datasets`.

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


def read_hub_split(
    found: Any, split: str, data: Data, class_names: tuple[str, ...] | None, log: Callable[[str], None]
) -> TableRows:
    """Return the rows of a split of `load_tables`. Raise DataError as `read_tables`."""
    return read_tables([found.data.table], split, data, class_names, log)


def read_tables(
    tables: Sequence[pa.Table],
    split: str,
    data: Data,
    class_names: tuple[str, ...] | None,
    log: Callable[[str], None],
    *,
    folders: tuple[tuple[Path, ...], ...] | None = None,
    state: str = "",
) -> TableRows:
    """Return the rows of tables. Their columns are found where `data` does not name them (`readers.columns`).

    Args:
        tables: The tables of a split; their classes are compared by name.
        split: Name of the split.
        data: The options of the data.
        class_names: Of the training split; None for the training split itself.
        log: Logs one line.
        folders: Folders that relative paths are tried in, for each table.
        state: Of `TableRows`.

    Raises:
        DataError: There is no such column, or its labels are not class ids or distributions.
    """
    tables = [table for table in tables if len(table)] or list(tables[:1])
    if not len(tables[0]):
        raise DataError(f"split {split!r} has no images: choose another with --train-split or --eval-split.")
    try:
        key = image_column(tables[0], data)
        target = label_column(tables[0], key, data, log if class_names is None else lambda _: None)
    except DataError as error:
        other = "" if class_names is None else " Or choose another split with --eval-split."
        raise DataError(f"split {split!r}: {error}{other}") from error
    for table in tables:
        for name in (key, target):
            if name not in table.column_names:
                missing = unknown("column", name, table.column_names)
                raise DataError(f"split {split!r}: a file without the column {name!r}: {missing}")
    labels = read_labels(tables, target, split, data.first_label, training=class_names is None)
    values, names = match_classes(labels, class_names, split, log)
    return TableRows(
        columns=tuple(_cells(table.column(key)) for table in tables),
        starts=np.cumsum([0, *(len(table) for table in tables[:-1])]),
        folders=folders or ((Path.cwd(),),) * len(tables),
        split=split,
        labels=values,
        class_names=names,
        image_column=key,
        label_column=target,
        state=state,
    )
