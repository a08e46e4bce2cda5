"""Choose the reader of a local folder, or read a data set of the Hugging Face hub."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from mgd_timm.data.decode import DataError
from mgd_timm.data.readers import arrays, folder, tables, tars
from mgd_timm.data.readers.rows import ReadSplit
from mgd_timm.data.readers.scan import LocalFolder, scan_folder
from mgd_timm.recipe.data import Data
from mgd_timm.recipe.options import unknown

FORMATS: tuple[Callable[[LocalFolder, Data], dict[str, ReadSplit]], ...] = (
    arrays.find_splits,
    tars.find_splits,
    tables.find_splits,
    folder.find_splits,
)
"""Formats of local folders. Each returns the splits that it finds, by name; the first that finds any is used."""

_KNOWN = ("embedded", "uoft-cs/cifar10", "uoft-cs/cifar100", "zalando-datasets/fashion_mnist")


def open_splits(source: str, data: Data) -> dict[str, ReadSplit]:
    """Find the splits of a data set, without reading them.

    Args:
        source: A folder, or a hub id if `data` names no folder and there is none of this name.
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
        return _find_hub_splits(source, data)
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


def _find_hub_splits(hub_id: str, data: Data) -> dict[str, ReadSplit]:
    """Return the splits of a hub id. The data set is downloaded if it is not in the cache of `datasets`."""
    try:
        found = tables.load_tables(hub_id, data.dataset_config)
    except DataError as error:
        if hub_id in _KNOWN:
            raise
        raise DataError(f"{unknown('data set', hub_id, _KNOWN)} Reading it from the hub failed: {error}") from error
    return {split: partial(tables.read_table, table, split, data) for split, table in found.items()}
