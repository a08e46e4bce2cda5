"""Tar files, read without unpacking them: an index says where each image starts.

Three layouts: class folders in a tar (train.tar, val.tar), a tar for each class (train/n01440764.tar, or all of them in
one tar, as ImageNet is published), and webdataset shards, whose images have label files (1.jpg with 1.cls,
1.json or 1.txt).
"""

import json
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import torch

from mgd_timm.data.decode import DataError, LazyImage, decode, open_image
from mgd_timm.data.image_formats import readable_endings, why_not_read
from mgd_timm.data.readers.classes import Labels, is_number, labels_of_words, match_classes
from mgd_timm.data.readers.rows import begin_digest, digest_images, file_state
from mgd_timm.data.readers.scan import Ignored
from mgd_timm.data.readers.shards import check_shards
from mgd_timm.data.readers.splits import LocalSplit, role_of
from mgd_timm.recipe.data import Data
from mgd_timm.storage.cache import cache_entry
from mgd_timm.storage.checkpoint import State
from mgd_timm.storage.lock import load_or_create

_LABELS = (".cls", ".json", ".txt")


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


def read_files(
    split: LocalSplit,
    data: Data,
    ignored: Ignored,
    class_names: tuple[str, ...] | None,
    log: Callable[[str], None],
) -> TarRows:
    """Read the index of each tar. Images of class folders and class tars are sorted by name, of shards they are not.

    Args:
        split: The split; each tar in its folder (train/n01440764.tar) may be a class.
        data: Its `input_key` is the ending of the images (jpg) where webdataset's samples have several, and its
            `target_key` names the label in webdataset's json; "label" by default.
        ignored: Counts the other files in the tars.
        class_names: Class names of the training split; None for the training split itself.
        log: Logs one line.

    Raises:
        DataError: A tar that cannot be read, an image without a label, or labels that are not classes.
    """
    paths = tuple(split.root / file for file in split.files)
    check_shards(paths)
    indices = [_load_index(path, log) for path in paths]
    tars = [i for i, index in enumerate(indices) for _ in index.values["names"]]
    offsets, sizes = (
        torch.cat([index.tensors["index"][part] for index in indices]).numpy() for part in ("offsets", "sizes")
    )
    names = [name for index in indices for name in index.values["names"]]
    texts = [label for index in indices for label in index.values["labels"]]
    for path, index in zip(paths, indices, strict=True):
        for why, (first, count) in index.values["others"].items():
            ignored.add(f"{path.relative_to(split.root)}: {first}", why, count)
    rows = list(range(len(names)))
    if any(texts):
        rows = [i for i in rows if data.input_key is None or _key(names[i])[1] == f".{data.input_key.lstrip('.')}"]
        _check_keys([(tars[i], _key(names[i])[0], names[i]) for i in rows], paths)
        words = [_parse_label(texts[i], names[i], paths[tars[i]], data.target_key or "label") for i in rows]
    else:
        classes = _class_folders(names, tars, paths, split)
        rows.sort(key=lambda i: (classes[i], names[i]))
        words = [classes[i] for i in rows]
    if not rows:
        raise DataError(f"{paths[0]}: no image in it: expected class folders, or images with label files.")
    labels = labels_of_words(words)
    if any(texts) and all(map(is_number, words)):
        labels = _numbers(words, paths[0], data.first_label, training=class_names is None)
    values, known = match_classes(labels, class_names, split.name, log)
    return TarRows(
        paths=paths,
        tar=np.array([tars[i] for i in rows]),
        offsets=offsets[rows],
        sizes=sizes[rows],
        names=[names[i] for i in rows],
        split=split.name,
        labels=values,
        class_names=known,
    )


def _numbers(words: list[str], path: Path, first: int, *, training: bool) -> Labels:
    """Return labels that are class ids from `first`."""
    ids = np.array(words, dtype=np.int64)
    if ids.min() < first or (training and int(ids.max()) - first >= len(words)):
        raise DataError(
            f"{path}: labels {ids.min()} to {ids.max()} of {len(words)} images: expected consecutive class ids from "
            f"{first}."
        )
    names = tuple(str(i) for i in range(first, int(ids.max()) + 1)) if first else None
    return Labels(ids - first, names)


def _check_keys(images: Sequence[tuple[int, str, str]], paths: Sequence[Path]) -> None:
    """Raise DataError if a sample of webdataset has several images: its key is the name up to the first dot."""
    seen: dict[tuple[int, str], str] = {}
    for tar, key, name in images:
        other = seen.setdefault((tar, key), name)
        if other != name:
            raise DataError(
                f"{paths[tar]}: {other} and {name} have one key, {key}, which ends at the first dot: choose the images "
                f"of each sample by their ending with --input-key {_key(other)[1].lstrip('.')}, or rename the files."
            )


def _class_folders(names: Sequence[str], tars: Sequence[int], paths: Sequence[Path], split: LocalSplit) -> list[str]:
    """Return the class of each image: the first folder in its tar that not all images of the tar share, else the
    folder that they share, else the tar.

    Raises:
        DataError: Images in no class folder, or a tar that holds several splits.
    """
    folders = [[part for part in name.split("/")[:-1] if part != "."] for name in names]
    shared = {tar: _shared([f for f, other in zip(folders, tars, strict=True) if other == tar]) for tar in set(tars)}
    flat = {tar for tar in shared if all(len(f) == shared[tar] for f, o in zip(folders, tars, strict=True) if o == tar)}
    found = []
    for name, folder, tar in zip(names, folders, tars, strict=True):
        depth = shared[tar]
        if len(folder) > depth:
            found.append(folder[depth])
        elif depth and tar in flat:
            found.append(folder[-1])
        elif not depth and "/" in split.files[tar]:
            found.append(paths[tar].stem)
        else:
            raise DataError(
                f"{paths[tar]}: {name} is in no class folder and has no label file (.cls, .json or .txt): expected "
                f"CLASS/{name}, or a tar for each class in a folder ({split.name}/CLASS.tar)."
            )
    roles = {role: word for word in sorted(set(found)) if (role := role_of(word)) is not None}
    if len(roles) > 1:
        raise DataError(
            f"{paths[0]}: it holds the splits {' and '.join(roles.values())}: make a tar for each, named train.tar and "
            "test.tar, or unpack it."
        )
    return found


def _shared(folders: Sequence[list[str]]) -> int:
    """Return the number of first parts that all paths share."""
    low, high = min(folders), max(folders)
    return next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), min(len(low), len(high)))


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
    """Load the index of a tar from the cache, by the tar's path, size, times and inode, or create it."""
    folder = cache_entry("tars", f"{file_state(path)}:3")
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
    images = [member for member in members if _ending(member.name) in readable_endings()]
    others: dict[str, tuple[str, int]] = {}
    for member in members:
        why = why_not_read(_ending(member.name))
        if why is not None and _ending(member.name) not in _LABELS:
            first, count = others.get(why, (member.name, 0))
            others[why] = first, count + 1
    tensors = {
        "offsets": torch.tensor([member.offset for member in images], dtype=torch.int64),
        "sizes": torch.tensor([member.size for member in images], dtype=torch.int64),
    }
    found = [labels.get(_key(member.name)[0], (0, ""))[1] for member in images]
    return State({"index": tensors}, {"names": [member.name for member in images], "labels": found, "others": others})


def _json_line(text: str, name: str, path: Path) -> str:
    try:
        return json.dumps(json.loads(text))
    except ValueError as error:
        raise DataError(f"{path}: {name} is not JSON ({error}): write it again.") from error


def _key(name: str) -> tuple[str, str]:
    """Return webdataset's key of a member, its name up to the first dot, and the rest of the name."""
    folder, _, file = name.rpartition("/")
    key, dot, rest = file.partition(".")
    return f"{folder}/{key}", f"{dot}{rest}".lower()


def _ending(name: str) -> str:
    return PurePosixPath(name).suffix.lower()


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
