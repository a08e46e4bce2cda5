"""Tar files as splits, read where they lie: an index of where each image starts, and no unpacking.

Three layouts: class folders in a tar (train.tar, val.tar), a tar for each class (train/n01440764.tar, or all of them in
one tar, as ImageNet is published), and webdataset shards, whose images have a label beside them (1.jpg with 1.cls,
1.json or 1.txt).
"""

import hashlib
import json
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from torch import Tensor

from mgd_timm.data.decode import ENDINGS, EVAL_SPLITS, DataError, cache_folder, decode, spaced_digest
from mgd_timm.storage.checkpoint import State
from mgd_timm.storage.lock import load_or_create

_LABELS = (".cls", ".json", ".txt")
_SPLITS = ("train", *EVAL_SPLITS)


@dataclass(frozen=True)
class Tars:
    """The tar files of a split, sorted by name, as yet not read."""

    paths: tuple[Path, ...]


@dataclass(frozen=True)
class _Index:
    """Where the images of a tar lie, in its order."""

    offsets: np.ndarray
    sizes: np.ndarray
    names: list[str]
    labels: list[str]
    """What lies beside an image (".cls" and its text, ...), or "" where nothing does."""


@dataclass(frozen=True)
class TarRows:
    """A split in tar files. A file is opened for every image, which a local disk does in microseconds.

    Args:
        paths: The tars.
        tar: Which of them holds each image, int [n].
        offsets, sizes: Where in it, in bytes, int64 [n].
        names: Names in the tars.
        split: Name of the split.
        labels: Class ids, int64 [n].
        class_names: Names of the classes.
    """

    paths: tuple[Path, ...]
    tar: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray
    names: list[str]
    split: str
    labels: np.ndarray
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.names)

    def name(self, row: int) -> str:
        """What an error calls an image."""
        return f"{self.split} image {row} ({self.paths[self.tar[row]]}: {self.names[row]})"

    def content(self, row: int) -> bytes:
        """An encoded image."""
        return _part(self.paths[self.tar[row]], int(self.offsets[row]), int(self.sizes[row]))

    def pixels(self, row: int, in_chans: int) -> np.ndarray:
        """A decoded image, uint8 [height, width, channels]."""
        return decode(self.content(row), in_chans, self.name(row))

    def digest(self) -> str:
        """sha256 of labels, sizes and encoded images, of which evenly spaced ones stand for more than a gigabyte."""
        total = hashlib.sha256(json.dumps([self.split, self.class_names]).encode())
        total.update(self.labels.tobytes())
        total.update(np.ascontiguousarray(self.sizes).tobytes())
        return spaced_digest(total, self.sizes, self.content)


def find_tars(folder: Path) -> dict[str, Tars]:
    """The splits of a folder of tars: by the folder that they lie in (train/), or a word of their names
    (imagenet-train-0001.tar).

    Without such a word a tar belongs to the training split.
    """
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.glob("*.tar")):
        found.setdefault(_split_of(path.stem) or "train", []).append(path)
    for inner in sorted(path for path in folder.iterdir() if path.is_dir()):
        split = _split_of(inner.name)
        if split is not None:
            found.setdefault(split, []).extend(sorted(inner.glob("*.tar")))
    return {split: Tars(tuple(paths)) for split, paths in found.items() if paths}


def _split_of(name: str) -> str | None:
    words = re.split(r"[^a-z]+", name.lower())
    return next((split for split in _SPLITS if split in words), None)


def read_tars(tars: Tars, split: str, classes: tuple[str, ...] | None, key: str | None) -> TarRows:
    """A split's rows: of class folders and class tars in the order of their names, of webdataset shards in their own.

    Args:
        tars: Of `find_tars`.
        split: Its name.
        classes: Class names to take where the labels are numbers, or names among these.
        key: Of a label in webdataset's json; "label" where it is None.

    Raises:
        DataError: A tar that cannot be read, an image without a label, or labels that are no classes.
    """
    indices = [_indexed(path) for path in tars.paths]
    tar = np.concatenate([np.full(len(index.names), i) for i, index in enumerate(indices)])
    offsets, sizes = (np.concatenate([getattr(index, part) for index in indices]) for part in ("offsets", "sizes"))
    names = [name for index in indices for name in index.names]
    beside = [label for index in indices for label in index.labels]
    if not names:
        raise DataError(f"{tars.paths[0]}: no image in it: expected class folders, or images with a label beside each.")
    if any(beside):
        words = [_label(text, name, tars.paths[i], key) for text, name, i in zip(beside, names, tar, strict=True)]
    else:
        words = [_folder(tars.paths[i], name) for name, i in zip(names, tar, strict=True)]
        order = sorted(range(len(names)), key=lambda i: (words[i], names[i]))
        tar, offsets, sizes = tar[order], offsets[order], sizes[order]
        names, words = [names[i] for i in order], [words[i] for i in order]
    labels, class_names = _classes(words, classes, numbers=any(beside))
    return TarRows(tars.paths, tar, offsets, sizes, names, split, labels, class_names)


def _classes(words: list[str], classes: tuple[str, ...] | None, *, numbers: bool) -> tuple[np.ndarray, tuple[str, ...]]:
    """Class ids and class names of labels in words: numbers stand for themselves, where they may."""
    if numbers and all(word.isdecimal() for word in words):
        labels = np.array([int(word) for word in words], dtype=np.int64)
        if classes is None and labels.max() >= len(words):  # else check_classes holds them against the names
            raise DataError(f"the label {labels.max()} among {len(words)} images: expected class ids from 0.")
        return labels, classes or tuple(str(i) for i in range(int(labels.max()) + 1))
    known = tuple(sorted(set(words)))
    names = classes if classes is not None and set(known) <= set(classes) else known
    place = {name: i for i, name in enumerate(names)}
    return np.array([place[word] for word in words], dtype=np.int64), names


def _folder(path: Path, name: str) -> str:
    """The class of an image: the folder that it lies in, else its tar."""
    folder = PurePosixPath(name).parent.name
    if folder:
        return folder
    if _split_of(path.stem) is not None:
        raise DataError(
            f"{path}: {name} lies in no class folder and has no label (.cls, .json or .txt) beside it: expected "
            f"CLASS/{name}, or a tar for each class."
        )
    return path.stem


def _label(text: str, name: str, path: Path, key: str | None) -> str:
    """A label beside an image, in words."""
    kind, _, value = text.partition(" ")
    if not kind:
        raise DataError(
            f"{path}: {name} has no label beside it, as others have: expected a .cls, .json or .txt of the same name."
        )
    if kind != ".json":
        return value
    found = json.loads(value)
    found = found.get(key or "label") if isinstance(found, dict) else found
    if not isinstance(found, int | str):
        raise DataError(
            f"{path}: the json beside {name} has no label under {key or 'label'!r}: name it with --target-key."
        )
    return str(found)


# -- the index
# --------------------------------------------------------------------------------------------------------------------


def _part(path: Path, offset: int, size: int) -> bytes:
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(size)


def _indexed(path: Path) -> _Index:
    """The index of a tar: from the cache by the tar's place, size and time, else made, which reads a header for every
    member."""
    stat = path.stat()
    key = hashlib.sha256(f"{path.resolve()}:{stat.st_size}:{stat.st_mtime_ns}:1".encode()).hexdigest()[:32]
    place = cache_folder() / "tars" / key

    def make() -> State:
        rows = _scan(path)
        made = {
            "offsets": torch.tensor([row[1] for row in rows], dtype=torch.int64),
            "sizes": torch.tensor([row[2] for row in rows], dtype=torch.int64),
            "names": _bytes([row[0] for row in rows]),
            "labels": _bytes([row[3] for row in rows]),
        }
        return State({"index": made}, {})

    found = load_or_create(place, f"index of {path}", make, print).tensors["index"]
    return _Index(found["offsets"].numpy(), found["sizes"].numpy(), _words(found["names"]), _words(found["labels"]))


def _bytes(words: list[str]) -> Tensor:
    text = "".join(f"{word}\n" for word in words).encode("utf-8", "surrogateescape")
    return torch.from_numpy(np.frombuffer(text, dtype=np.uint8).copy())


def _words(text: Tensor) -> list[str]:
    return text.numpy().tobytes().decode("utf-8", "surrogateescape").split("\n")[:-1]


def _scan(path: Path) -> list[tuple[str, int, int, str]]:
    """Name, offset, size and what lies beside it, for every image.

    Raises:
        DataError: Not a plain tar, or not a whole one.
    """
    members = list(_members(path))
    beside: dict[str, tuple[int, str]] = {}
    for name, offset, size in members:
        stem, ending = _key(name)
        if ending in _LABELS:
            text = _part(path, offset, size).decode(errors="replace")
            text = _one_line(text, name, path) if ending == ".json" else text.strip().partition("\n")[0]
            rank = _LABELS.index(ending)
            if stem not in beside or rank < beside[stem][0]:
                beside[stem] = rank, f"{ending} {text}"
    return [
        (name, offset, size, beside.get(stem, (0, ""))[1])
        for name, offset, size in members
        for stem, ending in [_key(name)]
        if ending in ENDINGS
    ]


def _one_line(text: str, name: str, path: Path) -> str:
    try:
        return json.dumps(json.loads(text))
    except ValueError as error:
        raise DataError(f"{path}: {name} is not JSON ({error}): write it anew.") from error


def _key(name: str) -> tuple[str, str]:
    """webdataset's key of a member, and its last ending."""
    place = PurePosixPath(name)
    return str(place.parent / place.name.partition(".")[0]), place.suffix.lower()


def _members(path: Path) -> Iterator[tuple[str, int, int]]:
    """Name, offset and size of every file; those of a tar in a tar under its name, as in a folder."""
    try:
        with tarfile.open(path, "r:") as outer:
            for member in outer:
                if not member.isreg() or PurePosixPath(member.name).name.startswith("."):
                    continue
                if not member.name.endswith(".tar"):
                    yield member.name, member.offset_data, member.size
                    continue
                content = outer.extractfile(member)
                assert content is not None
                with tarfile.open(fileobj=content, mode="r:") as inner:
                    for one in inner:
                        if one.isreg():
                            yield (
                                f"{PurePosixPath(member.name).stem}/{one.name}",
                                member.offset_data + one.offset_data,
                                one.size,
                            )
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(
            f"{path}: cannot be read as a tar ({error}): expected a whole one that is not compressed, as a compressed "
            "one cannot be read from the middle."
        ) from error
