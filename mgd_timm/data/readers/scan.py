"""Scan a local folder: one walk that finds its images, tables, tars and arrays, and says what else lies there."""

import os
from array import array
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from pathlib import Path

from tqdm import tqdm

from mgd_timm.data.image_formats import NOT_AN_IMAGE, is_image_format, why_not_read

FIRST_IGNORED = 20
"""Ignored files that are listed one by one; the others are counted."""

LEFT_BEHIND = "a folder that a program left behind"
RESOURCE_FILE = "a resource file of macOS"
HIDDEN_FILE = "a hidden file"
LOOP = "a link to a folder above it"
NOWHERE = "a link that leads nowhere"
LOCKED_FOLDER = "no permission to read the folder"
_NOT_DATA = frozenset(
    {
        *(".git", ".hg", ".svn", ".ipynb_checkpoints", "__pycache__"),
        *("__MACOSX", "@eaDir", ".thumbnails", "lost+found", "$RECYCLE.BIN"),
    }
)
"""Folders that programs leave behind. Some hold copies of images."""


@dataclass
class Ignored:
    """Files and folders that are not used: their number, the first ones, and the first and number for each reason."""

    count: int = 0
    first: list[tuple[str, str]] = field(default_factory=list)
    reasons: dict[str, tuple[str, int]] = field(default_factory=dict)

    def add(self, path: str, why: str, count: int = 1) -> None:
        """Count `count` more files or folders, of which `path` is the first."""
        self.count += count
        if len(self.first) < FIRST_IGNORED:
            self.first.append((path, why))
        example, before = self.reasons.get(why, (path, 0))
        self.reasons[why] = example, before + count

    def add_files(self, folder: "Folder") -> None:
        """Count the files of a folder that are neither images nor data."""
        for name, why in folder.others:
            self.add(folder.inner(name), why)

    def listed(self) -> list[dict[str, str]]:
        """Return paths and reasons of `FIRST_IGNORED` of them, one for each reason first; as JSON values."""
        rows = dict.fromkeys([(path, why) for why, (path, _) in self.reasons.items()] + self.first)
        return [{"path": path, "why": why} for path, why in list(rows)[:FIRST_IGNORED]]

    def line(self) -> str:
        """Return how many files are not used, in one line."""
        parts = [
            f"{count} {why} ({path})" if count > 1 else f"{path}: {why}" for why, (path, count) in self.reasons.items()
        ]
        more = f"; and {len(parts) - 4} more reasons" if len(parts) > 4 else ""
        return f"{self.count:,} left out: {'; '.join(parts[:4])}{more}"


@dataclass
class Folder:
    """A folder that was scanned, and the folders below it.

    Args:
        path: Relative to the folder where the scan began, "" for that one.
        text: Names of its images as the file system has them, sorted, one after the other.
        lengths: Bytes of each of these names.
        stats: For each image size, modification time, change time (ns) and inode.
        data: Names of its tables, tars and arrays, sorted.
        others: Name and reason of each file that is none of these.
        folders: The folders directly below it, sorted by name.
    """

    path: str
    text: bytes = b""
    lengths: "array[int]" = field(default_factory=lambda: array("H"))
    stats: "array[int]" = field(default_factory=lambda: array("q"))
    data: list[str] = field(default_factory=list)
    others: list[tuple[str, str]] = field(default_factory=list)
    folders: list["Folder"] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Name of the folder itself."""
        return os.path.basename(self.path)

    @property
    def own_images(self) -> int:
        """Number of images in this folder, without those below it."""
        return len(self.lengths)

    @property
    def names(self) -> list[str]:
        """Names of its images, sorted."""
        ends = [0, *accumulate(self.lengths)]
        return [os.fsdecode(self.text[begin:end]) for begin, end in pairwise(ends)]

    def walk(self) -> Iterator["Folder"]:
        """Yield this folder and all folders below it, but hidden ones."""
        yield self
        for folder in self.folders:
            if not folder.name.startswith("."):
                yield from folder.walk()

    def num_images(self) -> int:
        """Return the number of images in this folder and below it."""
        return sum(folder.own_images for folder in self.walk())

    def lost_images(self) -> tuple[str, str] | None:
        """Return path and reason of the first file or folder here or below that may be an image and cannot be used."""
        for folder in self.walk():
            for name, why in folder.others:
                if not why.startswith((NOT_AN_IMAGE, LEFT_BEHIND, RESOURCE_FILE, HIDDEN_FILE, LOOP)):
                    return folder.inner(name), why
        return None

    def lost_folders(self, data_endings: Collection[str]) -> tuple[str, str] | None:
        """Return path and reason of the first thing in this folder that may be a folder, table, tar or array and cannot
        be used: a link that leads nowhere, or a folder without permission."""
        for name, why in self.others:
            ending = os.path.splitext(name)[1].lower()
            if why == LOCKED_FOLDER or (why == NOWHERE and (not ending or ending in data_endings)):
                return self.inner(name), why
        return None

    def is_empty(self) -> bool:
        """Return whether there is no file in this folder or below it."""
        return not any(folder.own_images or folder.data or folder.others for folder in self.walk())

    def inner(self, name: str) -> str:
        """Return the path of a file in this folder, relative to where the scan began."""
        return f"{self.path}/{name}" if self.path else name


class Scan:
    """Scans folders below a root, each once; links are followed.

    Args:
        root: The folder that all paths are relative to.
        data_endings: Endings of tables, tars and arrays, in lower case.
    """

    def __init__(self, root: Path, data_endings: Collection[str]) -> None:
        self.root, self.data_endings = os.fspath(root), frozenset(data_endings)

    def top(self) -> tuple[Folder, list[str]]:
        """Return the root with its own files, and the names of the folders in it, sorted.

        Raises:
            OSError: It cannot be read.
        """
        return self._list("")

    def below(self, name: str) -> Folder:
        """Return a folder of the root with all folders below it."""
        with tqdm(desc=f"scanning {os.path.join(self.root, name)}", unit=" files", leave=False, delay=2.0) as bar:
            return self._scan(name, bar)

    def _scan(self, relative: str, bar: tqdm, followed: tuple[str, ...] = ()) -> Folder:
        """Scan a folder and all folders below it. `followed` are the targets of the links that lead to it."""
        path = os.path.join(self.root, relative)
        if os.path.islink(path):
            followed = (*followed, os.path.realpath(path))
        folder, names = self._list(relative, followed)
        bar.update(folder.own_images + len(folder.others))
        folder.folders = [self._scan(folder.inner(name), bar, followed) for name in names]
        return folder

    def _list(self, relative: str, followed: tuple[str, ...] = ()) -> tuple[Folder, list[str]]:
        """Return a folder with its own files, and the names of the folders in it that are to be scanned."""
        folder = Folder(relative)
        images: list[tuple[str, int, int, int, int]] = []
        below: list[str] = []
        with os.scandir(os.path.join(self.root, relative)) as entries:
            for entry in entries:
                name = entry.name
                if _is_folder(entry):
                    why = _why_not_scanned(entry, followed)
                    if why is None:
                        below.append(name)
                        continue
                else:
                    ending = os.path.splitext(name)[1].lower()
                    if ending in self.data_endings and _is_file(entry):
                        folder.data.append(name)
                        continue
                    why = _why_not_used(entry, ending)
                    if why is None:
                        stat = entry.stat()
                        images.append((name, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino))
                        continue
                folder.others.append((name, why))
        images.sort()
        encoded = [os.fsencode(row[0]) for row in images]
        folder.text = b"".join(encoded)
        folder.lengths.extend(map(len, encoded))
        for row in images:
            folder.stats.extend(row[1:])
        folder.data.sort()
        folder.others.sort()
        return folder, sorted(below)


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError:  # links in a ring
        return False


def _is_file(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_file()
    except OSError:
        return False


def _why_not_used(entry: "os.DirEntry[str]", ending: str) -> str | None:
    """Return why a file is not read as an image, or None if it is."""
    if entry.name.startswith("._"):
        return RESOURCE_FILE
    if entry.is_symlink() and not os.path.exists(entry.path):
        return NOWHERE
    if entry.name.startswith(".") and not ending:
        return HIDDEN_FILE
    why = why_not_read(ending)
    if why is not None and not is_image_format(ending):
        return why
    if not _is_file(entry):
        return "not a file"
    return why if why is not None or os.access(entry.path, os.R_OK) else "no permission to read it"


def _why_not_scanned(entry: "os.DirEntry[str]", followed: tuple[str, ...]) -> str | None:
    """Return why a folder is not scanned, or None if it is. `followed` are the targets of the links that lead to it."""
    if is_left_behind(entry.name):
        return LEFT_BEHIND
    if not os.access(entry.path, os.R_OK | os.X_OK):
        return LOCKED_FOLDER
    if not entry.is_symlink():
        return None
    target, folder = (os.path.realpath(path) for path in (entry.path, os.path.dirname(entry.path)))
    return LOOP if target in followed or os.path.commonpath([target, folder]) == target else None


def is_left_behind(name: str) -> bool:
    """Return whether programs leave folders of this name behind."""
    return name in _NOT_DATA or name.startswith(".Trash")
