"""Choose the readers of a local folder, or read a data set of the Hugging Face hub."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from mgd_timm.data.decode import DataError
from mgd_timm.data.readers import arrays, tables, tars
from mgd_timm.data.readers.folder import read_class_folders
from mgd_timm.data.readers.rows import ReadSplit, Rows
from mgd_timm.data.readers.scan import Folder, Ignored
from mgd_timm.data.readers.splits import EXPECTED, LocalFolder, LocalSplit, find_splits
from mgd_timm.recipe.data import Data
from mgd_timm.recipe.options import unknown

ReadFiles = Callable[[LocalSplit, Data, Ignored, tuple[str, ...] | None, Callable[[str], None]], Rows]
"""Reads a split of a local folder: the split, the options, what counts the files that are left out, the class names of
the training split (None for this split itself) and `log`."""

FORMATS: dict[str, ReadFiles] = {
    **dict.fromkeys(tables.TABLE_ENDINGS, tables.read_files),
    ".tar": tars.read_files,
    ".npy": arrays.read_files,
}
"""Reader of the files with each ending. Images in class folders need none."""

_KNOWN = ("embedded", "uoft-cs/cifar10", "uoft-cs/cifar100", "zalando-datasets/fashion_mnist")


@dataclass(frozen=True)
class Opened:
    """The splits of a data set, not read yet, and the files that are left out."""

    root: str
    splits: dict[str, ReadSplit]
    ignored: Ignored = field(default_factory=Ignored)
    loose: list[Folder] = field(default_factory=list)

    def count_loose(self, rows: Sequence[Rows]) -> None:
        """Count the images that lie in no class folder and that no table names.

        Args:
            rows: The splits that were read.
        """
        named = set[str]().union(*(tables.named_files(part) for part in rows if isinstance(part, tables.TableRows)))
        for folder in self.loose:
            for name in folder.names:
                path = folder.inner(name)
                if os.path.abspath(os.path.join(self.root, path)) not in named:
                    self.ignored.add(path, "an image in no class folder and in no table")


def is_local(source: str, data: Data) -> bool:
    """Return whether a source is a folder, not a hub id."""
    return data.data_dir is not None or Path(source).exists()


def scan_local_folder(source: str, data: Data) -> LocalFolder:
    """Scan a local folder for its splits.

    Args:
        source: The folder.
        data: The options of the data.

    Raises:
        DataError: There is no such folder, or its splits are not certain.
    """
    path = Path(source)
    if not path.is_dir():
        raise DataError(f"{source}: {'a file' if path.exists() else 'no such folder'}; {EXPECTED}")
    local = find_splits(path, FORMATS, [name for name in (data.train_split, data.eval_split) if name is not None])
    if not local.splits:
        left = f" ({local.ignored.line()})" if local.ignored.count else ""
        if local.inner is not None:
            raise DataError(f"{source}: its data lie deeper: give that folder (--data-dir {path / local.inner}).")
        what = "images, but none in a class folder" if local.loose[0].own_images else "no images"
        raise DataError(f"{source}: {what} and no tables, tars or arrays in it{left}; {EXPECTED}")
    return local


def open_splits(source: str, data: Data, local: LocalFolder | None) -> Opened:
    """Find the splits of a data set, without reading them.

    Args:
        source: A folder or a hub id.
        data: The options of the data.
        local: Of `scan_local_folder` for a folder; None for a hub id.

    Raises:
        DataError: There is no such data set, or its files cannot be used.
    """
    if local is None:
        if source.count("/") > 1 or source.startswith((".", "~", "/")):
            raise DataError(
                f"{source}: no such folder. Give a folder with --data-dir, or 'embedded' or a hub id with --dataset."
            )
        return Opened(source, _find_hub_splits(source, data))
    columns: dict[str, str] = {}
    read = {name: _reader(split, data, local, columns) for name, split in local.splits.items()}
    return Opened(source, read, local.ignored, local.loose)


def _reader(split: LocalSplit, data: Data, local: LocalFolder, columns: dict[str, str]) -> ReadSplit:
    """Return the reader of a split. A split that cannot be used is refused when it is read.

    Args:
        split: The split.
        data: The options of the data.
        local: What counts the files that are left out.
        columns: Holds the label column of the training split once this is read, which other splits share.
    """

    def read(class_names: tuple[str, ...] | None, log: Callable[[str], None]) -> Rows:
        reader, options = _choose(split, data, local), data
        if split.folder is not None:
            local.ignored.add_files(split.folder)
        if class_names is not None and reader is tables.read_files and "label" in columns:
            options = replace(data, target_key=columns["label"])
        rows = reader(split, options, local.ignored, class_names, log)
        if class_names is None and isinstance(rows, tables.TableRows):
            columns["label"] = rows.label_column
        return rows

    return read


def _choose(split: LocalSplit, data: Data, local: LocalFolder) -> ReadFiles:
    """Choose the one reader of a split, and remove from it the files that are left out."""
    classes = [folder for folder in split.classes if folder.num_images()]
    notes = [file for file in split.files if file.lower().endswith((".csv", ".jsonl"))]
    use_table = data.input_key is not None or data.target_key is not None
    if classes and notes and len(classes) > 1 and not use_table:
        split.files = [file for file in split.files if file not in notes]
        for file in notes:
            local.ignored.add(file, "a table beside class folders, which --target-key would use")
    formats = {Path(file).suffix.lower(): file for file in split.files}
    only_tables = bool(formats) and all(FORMATS[ending] is tables.read_files for ending in formats)
    if classes and only_tables and (use_table or (len(classes) == 1 and len(notes) == len(split.files))):
        # A table names the images: the user chose a column, or they lie in one folder.
        local.loose.extend(inner for folder in classes for inner in folder.walk())
        classes = []
    found = [*([classes[0].path + "/"] if classes else []), *formats.values()]
    if len(found) > 1:
        raise DataError(
            f"{split.root}: split {split.name!r} is there twice, in {found[0]} and in {found[1]}: move one of them out "
            "of the folder."
        )
    if formats:
        return FORMATS[next(iter(formats))]
    if split.classes:
        return read_class_folders
    raise DataError(f"{split.root}: its images lie in no class folder; {EXPECTED}")


def _find_hub_splits(hub_id: str, data: Data) -> dict[str, ReadSplit]:
    """Return the splits of a hub id. The data set is downloaded if it is not in the cache of `datasets`."""
    try:
        found = tables.load_tables(hub_id, data.dataset_config)
    except DataError as error:
        if hub_id in _KNOWN:
            raise
        raise DataError(f"{unknown('data set', hub_id, _KNOWN)} Reading it from the hub failed: {error}") from error
    return {split: partial(tables.read_hub_split, table, split, data) for split, table in found.items()}
