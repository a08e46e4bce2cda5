"""Find the splits of a local folder, by the rules of docs/your-data.md."""

import re
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

from mgd_timm.data.decode import DataError
from mgd_timm.data.readers.scan import Folder, Ignored, Scan
from mgd_timm.recipe.options import few

ROLES = {
    "train": ("train", "training"),
    "test": ("test", "testing", "eval"),
    "validation": ("validation", "valid", "val", "dev"),
}
"""Words that name a split, by what it is for."""

_WORDS = {word: role for role, words in ROLES.items() for word in words}
_BEGINNING = re.compile(rf"({'|'.join(sorted(_WORDS, key=len, reverse=True))})(?=$|[._-])", re.IGNORECASE)
_INSIDE = re.compile(rf"(?:^|[^a-z])({'|'.join(_WORDS)})(?:[^a-z]|$)|^({'|'.join(_WORDS)})", re.IGNORECASE)

EXPECTED = (
    "expected a folder with images in class folders (train/cat/1.png, test/cat/2.png), or with tar, parquet, arrow, "
    "feather, csv, jsonl or npy files whose names begin with train, val or test."
)


@dataclass
class LocalSplit:
    """What a folder holds of one split.

    Args:
        name: Word that names it, in lower case.
        root: The folder that all paths are relative to.
        classes: Its class folders.
        files: Its tables, tars or arrays.
        folder: The split's own folder, where there is one.
    """

    name: str
    root: Path
    classes: list[Folder] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    folder: Folder | None = None


@dataclass
class LocalPlace:
    """The splits of a folder, what is left out, and the folders whose own images are in no class folder."""

    splits: dict[str, LocalSplit]
    ignored: Ignored
    loose: list[Folder]


def role_of(split: str) -> str | None:
    """Return what a split is for by its name: train, test, validation, or None for another name."""
    return _WORDS.get(split.lower())


def split_of_file(name: str, named: Collection[str] = ()) -> str | None:
    """Return the split that a file's name begins with, in lower case, or None.

    Args:
        name: Name of the file, without its folder.
        named: Names that count as splits besides the usual words, where they are the name up to its first dot.
    """
    if name.partition(".")[0].lower() in named:
        return name.partition(".")[0].lower()
    found = _BEGINNING.match(name)
    return found[1].lower() if found else None


def find_splits(path: Path, data_endings: Collection[str], named: Collection[str]) -> LocalPlace:
    """Scan a folder and find its splits.

    Args:
        path: The folder.
        data_endings: Endings of tables, tars and arrays.
        named: Names of splits that the user gave.

    Raises:
        DataError: The folder cannot be read, or its splits are not certain.
    """
    scan, ignored = Scan(path, data_endings), Ignored()
    try:
        top, names = scan.top()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}): give a folder that you may read.") from error
    ignored.add_files(top)
    named = {name.lower() for name in named}
    folders = {name: scan.below(name) for name in names if name.lower() in {*_WORDS, *named}}
    others = [name for name in names if name not in folders]
    splits = _split_folders(path, folders)
    _add_split_files(path, top, splits, named)
    if splits and all(split.folder is not None and split.folder.names for split in splits.values()):
        # Each holds images itself: they are classes like their neighbours, if those hold images too.
        folders |= {name: scan.below(name) for name in others}
        splits = {} if any(folders[name].names for name in others) else splits
    if not splits:
        _check_flat(path, folders)
        folders |= {name: scan.below(name) for name in others if name not in folders}
        return LocalPlace(_training_split(path, top, folders, ignored), ignored, [top])
    for name in top.data:
        if split_of_file(name, named) is None:
            ignored.add(name, "its name does not begin with a split")
    loose = [folder for name, folder in {"": top, **folders}.items() if folder.names and name not in others]
    for name in names:
        if name in others or not (name.lower() in splits or folders[name].names):
            ignored.add(f"{name}/", "a folder beside the splits")
    return LocalPlace(splits, ignored, loose)


def _split_folders(path: Path, folders: dict[str, Folder]) -> dict[str, LocalSplit]:
    """Return the splits that are folders: those with class folders, tables, tars or arrays."""
    splits: dict[str, LocalSplit] = {}
    for name, folder in folders.items():
        if not (folder.data or any(inner.num_images() for inner in folder.folders)):
            continue
        if name.lower() in splits:
            raise DataError(f"{path}: two folders of the split {name.lower()!r}: rename or remove one of them.")
        split = LocalSplit(name.lower(), path, files=[folder.inner(file) for file in folder.data])
        split.classes, split.folder = folder.folders, folder
        splits[split.name] = split
    return splits


def _add_split_files(path: Path, top: Folder, splits: dict[str, LocalSplit], named: Collection[str]) -> None:
    for name in top.data:
        word = split_of_file(name, named)
        if word is not None:
            splits.setdefault(word, LocalSplit(word, path)).files.append(name)


def _check_flat(path: Path, folders: dict[str, Folder]) -> None:
    """Raise DataError if folders of several splits hold images themselves, so that the classes are not known."""
    flat = {role_of(name): name for name, folder in folders.items() if folder.names}
    if len(flat) > 1:
        raise DataError(
            f"{path}: {few(list(flat.values()))} hold images themselves: expected class folders in them "
            "(train/cat/1.png), or a table that names image and label (train.csv)."
        )


def _training_split(path: Path, top: Folder, folders: dict[str, Folder], ignored: Ignored) -> dict[str, LocalSplit]:
    """Return the one split of a folder without splits: everything is training data."""
    split = LocalSplit("train", path, files=top.data)
    for name, folder in folders.items():
        if folder.num_images() or folder.lost_images() or folder.is_empty():
            split.classes.append(folder)
        else:
            ignored.add(f"{name}/", "a folder without images")
    split.classes.sort(key=lambda folder: folder.path)
    misnamed = [name for name in top.data if _INSIDE.search(name)]
    if misnamed:
        raise DataError(
            f"{path / misnamed[0]}: the split is not certain, as the name does not begin with it: expected train, val "
            "or test, followed by a dot, a dash or an underscore (train-0001.tar). Rename the files, or name the "
            f"splits (--train-split {misnamed[0].partition('.')[0]})."
        )
    return {"train": split} if split.classes or split.files else {}
