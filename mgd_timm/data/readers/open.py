"""Choose the reader of a local folder, or of a hub id."""

from collections.abc import Callable
from pathlib import Path

from mgd_timm.data.decode import DataError
from mgd_timm.data.readers import arrays, folder, hub, tables, tars
from mgd_timm.data.readers.rows import ReadSplit
from mgd_timm.data.readers.scan import LocalFolder, scan_folder
from mgd_timm.recipe.data import Data

FORMATS: tuple[Callable[[LocalFolder, Data], dict[str, ReadSplit]], ...] = (
    arrays.find_splits,
    tars.find_splits,
    tables.find_splits,
    folder.find_splits,
)
"""Formats of local folders. Each returns the splits that it finds, by name; the first that finds any is used."""


def open_splits(source: str, data: Data) -> dict[str, ReadSplit]:
    """Find the splits of a data set. None is read yet.

    Args:
        source: A folder, or a hub id where `data` names no folder and there is none of this name.
        data: The options of the data.

    Raises:
        DataError: There is no such folder or data set, or its files cannot be used.
    """
    path = Path(source)
    if data.data_dir is None and not path.exists():
        if source.count("/") > 1 or source.startswith((".", "~", "/")):
            raise DataError(
                f"{source}: no such folder. Give a folder with --data-dir, or 'embedded' or a hub id with --dataset."
            )
        return hub.find_splits(source, data)
    expected = (
        "expected a folder with images in class folders (train/cat/1.png), with tar files of these, or with parquet, "
        "arrow or npy files."
    )
    if not path.is_dir():
        raise DataError(f"{source}: {'a file' if path.exists() else 'no such folder'}; {expected}")
    scanned = scan_folder(path)
    for find_splits in FORMATS:
        splits = find_splits(scanned, data)
        if splits:
            return splits
    raise DataError(f"{source}: no images and no tar, parquet, arrow or npy files in it; {expected}")
