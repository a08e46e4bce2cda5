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
_ANYWHERE = re.compile("|".join(sorted(_WORDS, key=len, reverse=True)), re.IGNORECASE)

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
        beside: Names of the top-level folders of the split, in which a table's images may lie.
    """

    name: str
    root: Path
    classes: list[Folder] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    folder: Folder | None = None
    beside: list[str] = field(default_factory=list)


@dataclass
class LocalFolder:
    """What a folder holds.

    Args:
        splits: Its splits, by name.
        ignored: What is left out.
        loose: The folders whose own images are in no class folder.
        inner: Path of a folder below it that holds tables, tars or arrays, where the folder itself holds no data.
    """

    splits: dict[str, LocalSplit]
    ignored: Ignored
    loose: list[Folder]
    inner: str | None = None


def role_of(split: str) -> str | None:
    """Return what a split is for by its name: train, test, validation, or None for another name."""
    return _WORDS.get(split.lower())


def split_of_file(name: str, named: Collection[str] = ()) -> str | None:
    """Return the split that a file's name begins with, in lower case, or None.

    Args:
        name: Name of the file, without its folder.
        named: Names that count as splits besides the usual words, in lower case.
    """
    for word in sorted(named, key=len, reverse=True):
        if re.match(rf"{re.escape(word)}(?=$|[._-])", name.lower()):
            return word
    found = _BEGINNING.match(name)
    return found[1].lower() if found else None


def find_splits(path: Path, data_endings: Collection[str], named: Collection[str]) -> LocalFolder:
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
    split_files = Folder("", others=[row for row in top.others if split_of_file(row[0], named) is not None])
    _check_reached(path, split_files, data_endings)
    splits = _split_folders(path, folders)
    _add_split_files(path, top, splits, named)
    if not splits:
        _check_flat(path, folders)
        _check_reached(path, top, data_endings)
        folders |= {name: scan.below(name) for name in others}
        inner = next((one.path for folder in folders.values() for one in folder.walk() if one.data), None)
        return LocalFolder(_training_split(path, top, folders, ignored), ignored, [top], inner)
    _check_mixed(path, splits, [scan.below(name) for name in others] if _all_mixed(splits) else [])
    for name in top.data:
        if split_of_file(name, named) is None:
            ignored.add(name, "its name does not begin with a split")
    for name in others:
        ignored.add(f"{name}/", "a folder beside the splits")
    for name, folder in folders.items():
        if folder.is_empty():
            ignored.add(f"{name}/", "an empty folder")
        elif name.lower() not in splits:
            ignored.add_files(folder)
    for split in splits.values():
        if split.folder is not None:
            _check_reached(path, split.folder, data_endings)
        split.beside = [name for name in folders if name.lower() == split.name or _same_role(name, split.name)]
    return LocalFolder(splits, ignored, [folder for folder in (top, *folders.values()) if folder.own_images])


def _same_role(name: str, other: str) -> bool:
    return role_of(name) is not None and role_of(name) == role_of(other)


def _check_reached(path: Path, folder: Folder, data_endings: Collection[str]) -> None:
    """Raise DataError if something in a folder that may be a class, a split or a part of one cannot be reached."""
    lost = folder.lost_folders(data_endings)
    if lost is not None:
        raise DataError(f"{path / lost[0]}: {lost[1]}: put back what it stands for, or move it out of the folder.")


def _all_mixed(splits: dict[str, LocalSplit]) -> bool:
    """Return whether every split is a folder that holds both images itself and class folders."""
    return all(split.folder is not None and split.folder.own_images and not split.files for split in splits.values())


def _check_mixed(path: Path, splits: dict[str, LocalSplit], others: list[Folder]) -> None:
    """Raise DataError if a folder that holds images and class folders may be a split, or a class like others."""
    neighbour = next((folder for folder in others if folder.own_images), None)
    if neighbour is not None:
        name = next(split.folder.path for split in splits.values() if split.folder is not None)
        raise DataError(
            f"{path}: {name} holds images itself and folders of images, and {neighbour.path} holds images too: it is "
            f"not certain whether {name} is a split or a class. Move {neighbour.path} out of the folder, or the images "
            f"of {name} into class folders."
        )


def _split_folders(path: Path, folders: dict[str, Folder]) -> dict[str, LocalSplit]:
    """Return the splits that are folders: those with class folders, tables, tars or arrays."""
    splits: dict[str, LocalSplit] = {}
    seen: dict[str, str] = {}
    for name, folder in folders.items():
        inside = any(inner.num_images() or (not folder.own_images and inner.lost_images()) for inner in folder.folders)
        if not (folder.data or inside):
            continue
        if name.lower() in splits:
            raise DataError(
                f"{path}: two folders of the split {name.lower()!r}, {seen[name.lower()]} and {name}: "
                "rename one of them, or move it out of the folder."
            )
        split = LocalSplit(name.lower(), path, files=[folder.inner(file) for file in folder.data])
        split.classes, split.folder = folder.folders, folder
        splits[split.name] = split
        seen[split.name] = name
    return splits


def _add_split_files(path: Path, top: Folder, splits: dict[str, LocalSplit], named: Collection[str]) -> None:
    for name in top.data:
        word = split_of_file(name, named)
        if word is not None:
            splits.setdefault(word, LocalSplit(word, path)).files.append(name)


def _check_flat(path: Path, folders: dict[str, Folder]) -> None:
    """Raise DataError if folders of several splits hold images themselves, so that the classes are not known."""
    flat = {role_of(name): name for name, folder in folders.items() if folder.own_images}
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
    roles = {_WORDS[found[0].lower()]: name for name in reversed(top.data) for found in _ANYWHERE.finditer(name)}
    misnamed = list(roles.values()) if len(roles) > 1 else [name for name in top.data if _INSIDE.search(name)]
    if misnamed:
        name = roles.get("train", misnamed[0])
        found = _ANYWHERE.search(name)
        beginning = re.match(r"[^._-]*", name[found.start() :]) if found else None
        word = name[: found.start() + beginning.end()] if found and beginning else name
        raise DataError(
            f"{path / name}: the split is not certain, as the name does not begin with it: expected train, val or "
            "test, followed by a dot, a dash or an underscore (train-0001.tar). Rename the files, or name the splits "
            f"(--train-split {word})."
        )
    return {"train": split} if split.classes or split.files else {}
