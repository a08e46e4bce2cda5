"""Images in class folders: train/cat/1.png. `datasets` reads them; the checks here find what it would ignore."""

from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

from mgd_timm.data.decode import IMAGE_SUFFIXES, DataError
from mgd_timm.data.readers.rows import ReadSplit
from mgd_timm.data.readers.scan import LocalFolder
from mgd_timm.data.readers.tables import load_tables, read_table
from mgd_timm.recipe.data import Data


def find_splits(folder: LocalFolder, data: Data) -> dict[str, ReadSplit]:
    """Return the splits of a folder with images.

    Raises:
        DataError: A class folder without images, or images at different depths.
    """
    if not folder.holds(IMAGE_SUFFIXES):
        return {}
    _check_class_folders(folder)
    tables = load_tables(str(folder.path), data.dataset_config)
    _check_depths(tables)
    return {split: partial(read_table, table, split, data) for split, table in tables.items()}


def _check_class_folders(folder: LocalFolder) -> None:
    """Raise DataError for a folder without images: `datasets` ignores it, and its class would not exist."""
    with_images: set[Path] = set()
    for path, suffixes in folder.suffixes.items():
        if suffixes & IMAGE_SUFFIXES:
            with_images.update((path, *path.parents))
    for path in folder.suffixes:
        if path not in with_images:
            raise DataError(f"{path}: a class folder without images. Add images of the class or remove the folder.")


def _check_depths(tables: dict[str, Any]) -> None:
    """Raise DataError if images are at different depths: `datasets` then takes no folder for a class."""
    import datasets

    without_labels = [table for table in tables.values() if list(table.features) == ["image"]]
    if len(without_labels) < len(tables):
        return
    columns = [
        table.cast_column("image", datasets.Image(decode=False)).with_format("arrow")[:]["image"]
        for table in without_labels
    ]
    paths = [Path(cell["path"]) for column in columns for cell in column.to_pylist() if cell["path"]]
    depths = Counter(len(path.parts) for path in paths)
    if len(depths) > 1:
        usual = depths.most_common(1)[0][0]
        odd = next(path for path in paths if len(path.parts) != usual)
        other = next(path for path in paths if len(path.parts) == usual)
        raise DataError(
            f"{odd} and {other} are at different depths, so no folder is taken for a class: expected all images at "
            "one depth, in class folders (train/cat/1.png). Move or remove the first and others like it."
        )
