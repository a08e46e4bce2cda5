"""Tar files, read without unpacking them: an index says where each image starts.

Three layouts: class folders in a tar (train.tar, val.tar), a tar for each class (train/n01440764.tar, or all of them in
one tar, as ImageNet is published), and webdataset shards, whose images have label files (1.jpg with 1.cls,
1.json or 1.txt).
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import xxhash

from mgd_timm.data.decode import DataError, LazyImage, decode, open_image
from mgd_timm.data.image_formats import NOT_AN_IMAGE
from mgd_timm.data.readers.classes import Labels, labels_of_numbers, labels_of_words, match_classes
from mgd_timm.data.readers.rows import begin_digest, digest_images, file_state
from mgd_timm.data.readers.scan import Ignored
from mgd_timm.data.readers.shards import check_shards
from mgd_timm.data.readers.splits import LocalSplit, role_of
from mgd_timm.data.readers.tar_index import LABELS, load_index, read_part, sample_key
from mgd_timm.recipe.data import Data
from mgd_timm.recipe.options import few
from mgd_timm.storage.checkpoint import State


@dataclass(frozen=True)
class TarRows:
    """`Rows` of tar files. A file is opened for every image, which a local disk does in microseconds.

    Args:
        paths: The tars.
        tar: Index of the tar that holds each image, int [n].
        offsets, sizes: Where the image is in its tar, in bytes, int64 [n].
        names: Names of the images in their tars.
        state: Hash of the tars' sizes, times and inodes.
        split: Name of the split.
        labels: Class ids, int64 [n].
        class_names: Names of the classes.
    """

    paths: tuple[Path, ...]
    tar: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray
    names: list[str]
    state: str
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
        return read_part(self.paths[self.tar[row]], int(self.offsets[row]), int(self.sizes[row]))

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
    indices = [load_index(path, log) for path in paths]
    tars = [i for i, index in enumerate(indices) for _ in index.values["names"]]
    offsets, sizes = (
        torch.cat([index.tensors["index"][part] for index in indices]).numpy() for part in ("offsets", "sizes")
    )
    names = [name for index in indices for name in index.values["names"]]
    texts = [label for index in indices for label in index.values["labels"]]
    _count_others(indices, split, ignored)
    rows = list(range(len(names)))
    if not rows:
        lost = f" ({ignored.line()})" if ignored.count else ""
        raise DataError(f"{paths[0]}: no image in it{lost}: expected class folders, or images with label files.")
    if _has_labels(texts, names, tars, paths, split, data):
        rows = _chosen_images(names, data.input_key, paths, ignored)
        _check_keys([(tars[i], sample_key(names[i])[0], names[i]) for i in rows], paths)
        words = [_parse_label(texts[i], names[i], paths[tars[i]], data.target_key or "label") for i in rows]
        labels = _labels(words, texts[rows[0]], paths[0], data.first_label, training=class_names is None)
    else:
        if data.input_key is not None or data.target_key is not None:
            raise DataError(f"{paths[0]}: it has no label files: leave --input-key and --target-key out.")
        _ignore_notes(texts, names, ignored, paths[0].relative_to(split.root))
        classes = _class_folders(names, tars, paths, split)
        rows.sort(key=lambda i: (classes[i], names[i]))
        labels = labels_of_words([classes[i] for i in rows])
        _check_lost(indices, paths, set(classes))
    values, known = match_classes(labels, class_names, split.name, log)
    return TarRows(
        paths=paths,
        tar=np.array([tars[i] for i in rows]),
        offsets=offsets[rows],
        sizes=sizes[rows],
        names=[names[i] for i in rows],
        state=xxhash.xxh3_128_hexdigest("".join(map(file_state, paths)).encode()),
        split=split.name,
        labels=values,
        class_names=known,
    )


def _count_others(indices: Sequence[State], split: LocalSplit, ignored: Ignored) -> None:
    """Count the files of tars that are neither images nor labels."""
    for file, index in zip(split.files, indices, strict=True):
        for why, (first, count) in index.values["others"].items():
            ignored.add(f"{file}: {first}", why, count)


def _has_labels(
    texts: list[str], names: list[str], tars: list[int], paths: Sequence[Path], split: LocalSplit, data: Data
) -> bool:
    """Return whether the files beside the images are their labels: a .cls file is, text and JSON beside class folders
    are notes, but for JSON with the label's key."""
    if not any(texts) or any(text.startswith(".cls") for text in texts):
        return any(texts)
    key = data.target_key or "label"
    if any(text.startswith(".json") and _json_label(text[6:], key) is not None for text in texts):
        return True
    try:
        return len(set(_class_folders(names, tars, paths, split))) < 2
    except DataError:  # they lie in no class folders
        return True


def _chosen_images(names: list[str], input_key: str | None, paths: Sequence[Path], ignored: Ignored) -> list[int]:
    """Return the images of the ending that --input-key gives, all without one."""
    if input_key is None:
        return list(range(len(names)))
    ending = f".{input_key.lstrip('.').lower()}"
    rows = [i for i, name in enumerate(names) if sample_key(name)[1] == ending]
    if not rows:
        known = sorted({sample_key(name)[1].lstrip(".") for name in names})
        raise DataError(f"{paths[0]}: no image ends with {ending}: expected --input-key to be one of {few(known)}.")
    others = [name for name in names if sample_key(name)[1] != ending]
    if others:
        ignored.add(
            f"{paths[0].name}: {others[0]}", "another image of a sample, not chosen by --input-key", len(others)
        )
    return rows


def _check_lost(indices: Sequence[State], paths: Sequence[Path], classes: set[str]) -> None:
    """Raise DataError if a folder has files that may be images and none that is."""
    for path, index in zip(paths, indices, strict=True):
        for name, why in index.values["lost"]:
            folders = set(name.split("/")[:-1])
            if folders and not folders & classes and path.stem not in classes:
                raise DataError(
                    f"{path}: {name.rpartition('/')[0]}: a class folder without images that can be read ({name}: "
                    f"{why}). Add images of the class, or write the tar again without it."
                )


def _ignore_notes(texts: list[str], names: list[str], ignored: Ignored, tar: Path) -> None:
    """Count the text and JSON files beside images in class folders, which are not their labels."""
    for kind in LABELS:
        notes = [name for name, text in zip(names, texts, strict=True) if text.startswith(f"{kind} ")]
        if notes:
            note = sample_key(notes[0])[0].lstrip("/") + kind
            ignored.add(f"{tar}: {note}", f"{NOT_AN_IMAGE} ({kind})", len(notes))


def _labels(words: list[str], text: str, path: Path, first: int, *, training: bool) -> Labels:
    """Return labels of label files, of which `text` is one: class ids where all are numbers, else class names."""
    if training and text.startswith(".txt") and len(set(words)) == len(words):
        raise DataError(
            f"{path}: the txt files hold {len(words)} texts for {len(words)} images, which are captions and not "
            "labels: expected .cls or .json files, or images in class folders."
        )
    if not all(re.fullmatch(r"-?(0|[1-9]\d{0,17})", word) for word in words):
        return labels_of_words(words)
    return labels_of_numbers(np.array(words, dtype=np.int64), str(path), first, training=training)


def _check_keys(images: Sequence[tuple[int, str, str]], paths: Sequence[Path]) -> None:
    """Raise DataError if a sample of webdataset has several images: its key is the name up to the first dot."""
    seen: dict[tuple[int, str], str] = {}
    for tar, key, name in images:
        other = seen.setdefault((tar, key), name)
        if other != name:
            raise DataError(
                f"{paths[tar]}: {other} and {name} have one key, {key}, which ends at the first dot: choose the images "
                f"of each sample by their ending with --input-key {sample_key(other)[1].lstrip('.')}, or rename the "
                "files."
            )


def _class_folders(names: Sequence[str], tars: Sequence[int], paths: Sequence[Path], split: LocalSplit) -> list[str]:
    """Return the class of each image: the first folder in its tar that not all images share, else its tar (of a folder
    of class tars), else the folder that all share.

    Raises:
        DataError: Images in no class folder, or a tar that holds several splits.
    """
    folders = [[part for part in name.split("/")[:-1] if part != "."] for name in names]
    depth = _shared(folders)
    of_tar = [len(folder) == depth and "/" in split.files[tar] for folder, tar in zip(folders, tars, strict=True)]
    several, alone = len(set(tars)) > 1, all(len(folder) == depth for folder in folders)
    found = []
    for name, folder, tar, tar_is_class in zip(names, folders, tars, of_tar, strict=True):
        if len(folder) > depth:
            found.append(folder[depth])
        elif tar_is_class and (several or not depth):
            found.append(paths[tar].stem)
        elif depth and alone:
            found.append(folder[-1])
        else:
            raise DataError(
                f"{paths[tar]}: {name} is in no class folder and has no label file (.cls, .json or .txt): expected "
                f"CLASS/{name}, or a tar for each class in a folder ({split.name}/CLASS.tar)."
            )
    if any(of_tar) and not all(of_tar):
        tar, other = tars[of_tar.index(True)], of_tar.index(False)
        if found[other] != paths[tars[other]].stem:
            raise DataError(
                f"{paths[tar]}: its images lie in no folder, but those of {paths[tars[other]]} in {found[other]}: it "
                "is not certain whether the tars or the folders are the classes: write all tars in the same way."
            )
    _check_tar_splits(found, folders, depth, paths)
    return found


def _check_tar_splits(classes: list[str], folders: list[list[str]], depth: int, paths: Sequence[Path]) -> None:
    """Raise DataError if what would be classes are splits: all of them by name, or with folders below them."""
    roles = {role: word for word in sorted(set(classes)) if (role := role_of(word)) is not None}
    below = any(role_of(word) and len(folder) > depth + 1 for word, folder in zip(classes, folders, strict=True))
    if len(roles) > 1 and (below or len(roles) == len(set(classes))):
        raise DataError(
            f"{paths[0]}: it holds the splits {' and '.join(roles.values())}: make a tar for each, named train.tar and "
            "test.tar, or unpack it."
        )


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
    if kind == ".json":
        found = _json_label(value, key)
        if found is None:
            raise DataError(f"{path}: the json file of {name} has no label under {key!r}: name it with --target-key.")
        return found
    if not value.strip():
        raise DataError(f"{path}: the {kind} file of {name} is empty: write its label.")
    return value


def _json_label(text: str, key: str) -> str | None:
    found = json.loads(text)
    found = found.get(key) if isinstance(found, dict) else found
    return str(found) if isinstance(found, int | str) and str(found).strip() else None
