"""Scan a local folder for the kinds of its files."""

import os
import shlex
from dataclasses import dataclass
from pathlib import Path

from mgd_timm.data.decode import IMAGE_SUFFIXES, DataError

TABLE_SUFFIXES = frozenset({".parquet", ".arrow"})


@dataclass(frozen=True)
class LocalFolder:
    """A folder that was scanned.

    Args:
        path: The folder.
        suffixes: Suffixes of the files directly in the folder and in each folder below it, in lower case.
    """

    path: Path
    suffixes: dict[Path, set[str]]

    def holds(self, suffixes: frozenset[str]) -> bool:
        """Return whether the folder holds a file with one of these suffixes, at any depth."""
        return any(suffixes & found for found in self.suffixes.values())


def scan_folder(path: Path) -> LocalFolder:
    """Scan a folder. Folders whose name starts with "." or "__" are skipped, as `datasets` skips them.

    Raises:
        DataError: A link to a folder that holds images or tables. `datasets` does not follow it, so a class would be
            missing without a warning.
    """
    suffixes = {}
    for found, folders, files in os.walk(path):
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__")))
        for link in (Path(found, name) for name in folders):
            if link.is_symlink() and _holds_data(link):
                raise DataError(
                    f"{link}: a link to a folder. It is not followed, so its images would be left out. Replace it by "
                    f"a folder of links to the images (cp -rs {shlex.quote(str(link.resolve()))} ...) or of the images."
                )
        suffixes[Path(found)] = {Path(name).suffix.lower() for name in files}
    return LocalFolder(path, suffixes)


def _holds_data(path: Path) -> bool:
    suffixes = IMAGE_SUFFIXES | TABLE_SUFFIXES
    return any(Path(name).suffix.lower() in suffixes for _, _, files in os.walk(path) for name in files)
