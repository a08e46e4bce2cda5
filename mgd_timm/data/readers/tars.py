"""Tar files, read without unpacking them: an index says where each image starts.

Three layouts: class folders in a tar (train.tar, val.tar), a tar for each class (train/n01440764.tar, or all of them in
one tar, as ImageNet is published), and webdataset shards, whose images have label files (1.jpg with 1.cls,
1.json or 1.txt).
"""

import json
import re
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import torch

from mgd_timm.data.decode import IMAGE_SUFFIXES, DataError, LazyImage, decode, open_image
from mgd_timm.data.readers.rows import EVAL_SPLITS, ReadSplit, begin_digest, digest_images
from mgd_timm.data.readers.scan import TABLE_SUFFIXES, LocalFolder
from mgd_timm.recipe.data import Data
from mgd_timm.storage.cache import cache_entry
from mgd_timm.storage.checkpoint import State
from mgd_timm.storage.lock import load_or_create

_LABELS = (".cls", ".json", ".txt")
_SPLITS = ("train", *EVAL_SPLITS)


class _Member(NamedTuple):
    """A file in a tar: its name, and its offset and size in bytes."""

    name: str
    offset: int
    size: int


@dataclass(frozen=True)
class TarRows:
    """`Rows` of tar files. A file is opened for every image, which a local disk does in microseconds.

    Args:
        paths: The tars.
        tar: Index of the tar that holds each image, int [n].
        offsets, sizes: Where the image is in its tar, in bytes, int64 [n].
        names: Names of the images in their tars.
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
        """Return the name of an image in error messages: its split, row, tar and file."""
        return f"{self.split} image {row} ({self.paths[self.tar[row]]}: {self.names[row]})"

    def content(self, row: int) -> bytes:
        """Return an encoded image."""
        return _read_part(self.paths[self.tar[row]], int(self.offsets[row]), int(self.sizes[row]))

    def pixels(self, row: int, in_chans: int) -> np.ndarray:
        """Return a decoded image, uint8 [height, width, in_chans]."""
        return decode(self.content(row), in_chans, self.name(row))

    def image(self, row: int, in_chans: int) -> LazyImage:
        """Return an image that is not decoded yet."""
        return open_image(self.content(row), in_chans, self.name(row))

    def digest(self) -> str:
        """Return a sha256 of classes, labels, sizes and encoded images."""
        total = begin_digest(self)
        total.update(np.ascontiguousarray(self.sizes).tobytes())
        return digest_images(total, self.sizes, self.content)


def find_splits(folder: LocalFolder, data: Data) -> dict[str, ReadSplit]:
    """Return the splits of a folder with tars, unless it also holds the images or tables that were unpacked from them.

    The split is the folder of the tar (train/) or a word of its name (imagenet-train-0001.tar). A tar without such a
    word belongs to the training split.
    """
    if folder.holds(IMAGE_SUFFIXES | TABLE_SUFFIXES):
        return {}
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.path.glob("*.tar")):
        found.setdefault(_split_of(path.stem) or "train", []).append(path)
    for inner in sorted(path for path in folder.path.iterdir() if path.is_dir()):
        split = _split_of(inner.name)
        if split is not None:
            found.setdefault(split, []).extend(sorted(inner.glob("*.tar")))
    return {split: partial(_read, tuple(paths), split, data) for split, paths in found.items() if paths}


def _split_of(name: str) -> str | None:
    words = re.split(r"[^a-z]+", name.lower())
    return next((split for split in _SPLITS if split in words), None)


def _read(
    paths: tuple[Path, ...], split: str, data: Data, class_names: tuple[str, ...] | None, log: Callable[[str], None]
) -> TarRows:
    """Read the index of each tar. Images of class folders and class tars are sorted by name, of shards they are not.

    Args:
        paths: The tars.
        split: Name of the split.
        data: Its `target_key` names the label in webdataset's json; "label" by default.
        class_names: Class names of the training split; None for the training split itself.
        log: Logs one line.

    Raises:
        DataError: A tar that cannot be read, an image without a label, or labels that are not classes.
    """
    if data.input_key is not None:
        raise DataError("tar files have no image columns: leave --input-key out.")
    indices = [_load_index(path, log) for path in paths]
    tar = np.repeat(np.arange(len(paths)), [len(index.values["names"]) for index in indices])
    offsets, sizes = (
        torch.cat([index.tensors["index"][part] for index in indices]).numpy() for part in ("offsets", "sizes")
    )
    names = [name for index in indices for name in index.values["names"]]
    label_texts = [label for index in indices for label in index.values["labels"]]
    if not names:
        raise DataError(f"{paths[0]}: no image in it: expected class folders, or images with label files.")
    if any(label_texts):
        key = data.target_key or "label"
        words = [_parse_label(text, name, paths[i], key) for text, name, i in zip(label_texts, names, tar, strict=True)]
    else:
        words = [_class_folder(paths[i], name) for name, i in zip(names, tar, strict=True)]
        order = sorted(range(len(names)), key=lambda i: (words[i], names[i]))
        tar, offsets, sizes = tar[order], offsets[order], sizes[order]
        names, words = [names[i] for i in order], [words[i] for i in order]
    labels, names_of_classes = _to_class_ids(words, class_names, numbers=any(label_texts))
    return TarRows(paths, tar, offsets, sizes, names, split, labels, names_of_classes)


def _to_class_ids(
    words: list[str], classes: tuple[str, ...] | None, *, numbers: bool
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Return class ids and class names of labels in words. With `numbers`, words that are numbers are class ids."""
    if numbers and all(word.isdecimal() for word in words):
        labels = np.array([int(word) for word in words], dtype=np.int64)
        if classes is None and labels.max() >= len(words):  # else check_classes compares them with the names
            raise DataError(f"label {labels.max()} of only {len(words)} images: expected consecutive class ids from 0.")
        return labels, classes or tuple(str(i) for i in range(int(labels.max()) + 1))
    known = tuple(sorted(set(words)))
    names = classes if classes is not None and set(known) <= set(classes) else known
    ids = {name: i for i, name in enumerate(names)}
    return np.array([ids[word] for word in words], dtype=np.int64), names


def _class_folder(path: Path, name: str) -> str:
    """Return the class of an image: its folder, else its tar."""
    folder = PurePosixPath(name).parent.name
    if folder:
        return folder
    if _split_of(path.stem) is not None:
        raise DataError(
            f"{path}: {name} is in no class folder and has no label file (.cls, .json or .txt): expected CLASS/{name}, "
            "or a tar for each class."
        )
    return path.stem


def _parse_label(text: str, name: str, path: Path, key: str) -> str:
    """Return the label in an image's label file."""
    kind, _, value = text.partition(" ")
    if not kind:
        raise DataError(
            f"{path}: {name} has no label file, but other images have: expected a .cls, .json or .txt file of the same "
            "name."
        )
    if kind != ".json":
        return value
    found = json.loads(value)
    found = found.get(key) if isinstance(found, dict) else found
    if not isinstance(found, int | str):
        raise DataError(f"{path}: the json file of {name} has no label under {key!r}: name it with --target-key.")
    return str(found)


# -- the index


def _read_part(path: Path, offset: int, size: int) -> bytes:
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(size)


def _load_index(path: Path, log: Callable[[str], None]) -> State:
    """Load the index of a tar from the cache, by the tar's path, size and time, or create it."""
    stat = path.stat()
    folder = cache_entry("tars", f"{path.resolve()}:{stat.st_size}:{stat.st_mtime_ns}:2")
    return load_or_create(folder, f"index of {path}", lambda: _scan(path), log)


def _scan(path: Path) -> State:
    """Create the index of a tar: offsets, sizes and names of its images, and their labels.

    A label is the suffix and the text of the image's label file (".cls 3"), "" without one.

    Raises:
        DataError: The file is not a tar, or compressed or truncated.
    """
    members = list(_members(path))
    labels: dict[str, tuple[int, str]] = {}
    for member in members:
        stem, suffix = _key(member.name)
        if suffix in _LABELS:
            text = _read_part(path, member.offset, member.size).decode(errors="replace")
            text = _json_line(text, member.name, path) if suffix == ".json" else text.strip().partition("\n")[0]
            rank = _LABELS.index(suffix)
            if stem not in labels or rank < labels[stem][0]:
                labels[stem] = rank, f"{suffix} {text}"
    images = [member for member in members if _key(member.name)[1] in IMAGE_SUFFIXES]
    tensors = {
        "offsets": torch.tensor([member.offset for member in images], dtype=torch.int64),
        "sizes": torch.tensor([member.size for member in images], dtype=torch.int64),
    }
    found = [labels.get(_key(member.name)[0], (0, ""))[1] for member in images]
    return State({"index": tensors}, {"names": [member.name for member in images], "labels": found})


def _json_line(text: str, name: str, path: Path) -> str:
    try:
        return json.dumps(json.loads(text))
    except ValueError as error:
        raise DataError(f"{path}: {name} is not JSON ({error}): write it again.") from error


def _key(name: str) -> tuple[str, str]:
    """Return webdataset's key of a member, and its last suffix."""
    path = PurePosixPath(name)
    return str(path.parent / path.name.partition(".")[0]), path.suffix.lower()


def _members(path: Path) -> Iterator[_Member]:
    """Yield every file. The files of a tar in a tar get its name as their folder."""
    try:
        with tarfile.open(path, "r:") as outer:
            for member in outer:
                if not member.isreg() or PurePosixPath(member.name).name.startswith("."):
                    continue
                if not member.name.endswith(".tar"):
                    yield _Member(member.name, member.offset_data, member.size)
                    continue
                content = outer.extractfile(member)
                assert content is not None
                with tarfile.open(fileobj=content, mode="r:") as inner:
                    for one in inner:
                        if one.isreg():
                            name = f"{PurePosixPath(member.name).stem}/{one.name}"
                            yield _Member(name, member.offset_data + one.offset_data, one.size)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(
            f"{path}: cannot be read as a tar ({error}): expected a complete tar without compression, as a compressed "
            "one cannot be read from the middle."
        ) from error
