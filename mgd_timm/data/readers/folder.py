"""Images in class folders: train/cat/1.png."""

import os
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from mgd_timm.data.decode import DataError, LazyImage, decode, open_image
from mgd_timm.data.readers.classes import Labels, match_classes
from mgd_timm.data.readers.rows import begin_digest, digest_images
from mgd_timm.data.readers.scan import Folder, Ignored
from mgd_timm.data.readers.splits import LocalSplit
from mgd_timm.recipe.data import Data
from mgd_timm.recipe.options import few


@dataclass(frozen=True)
class FolderRows:
    """`Rows` of class folders, sorted by class and path. It takes about 50 bytes for an image.

    Args:
        root: The folder that all paths are relative to.
        folders: Paths of the folders with images.
        starts: First row of each folder, int64 [folders].
        text: File names, one after the other.
        ends: End of each file name in `text`, int64 [n].
        sizes: Bytes of each file, int64 [n].
        state: Hash of the files' sizes, times and inodes.
        split: Name of the split.
        labels: Class ids, int64 [n].
        class_names: Names of the classes.
    """

    root: Path
    folders: tuple[str, ...]
    starts: np.ndarray
    text: bytes
    ends: np.ndarray
    sizes: np.ndarray
    state: str
    split: str
    labels: np.ndarray
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.ends)

    def path(self, row: int) -> str:
        """Return the path of an image."""
        begin = int(self.ends[row - 1]) if row else 0
        folder = self.folders[int(np.searchsorted(self.starts, row, side="right")) - 1]
        return os.path.join(self.root, folder, os.fsdecode(self.text[begin : int(self.ends[row])]))

    def name(self, row: int) -> str:
        """Return the name of an image in error messages: its split, row and path."""
        return f"{self.split} image {row} ({self.path(row)})"

    def content(self, row: int) -> str:
        """Return the path of an image."""
        return self.path(row)

    def pixels(self, row: int, in_chans: int) -> np.ndarray:
        """Return a decoded image, uint8 [height, width, in_chans]."""
        return decode(self.path(row), in_chans, self.name(row))

    def image(self, row: int, in_chans: int) -> LazyImage:
        """Return an image that is not decoded yet."""
        path = self.path(row)
        return open_image(path, in_chans, f"{self.split} image {row} ({path})")

    def digest(self) -> str:
        """Return a sha256 of classes, labels, file names, sizes and images, wherever the folder lies."""
        total = begin_digest(self)
        total.update(self.text)
        total.update(self.sizes.tobytes())
        return digest_images(total, self.sizes, self.content)


def read_class_folders(
    split: LocalSplit,
    data: Data,
    ignored: Ignored,
    class_names: tuple[str, ...] | None,
    log: Callable[[str], None],
) -> FolderRows:
    """Return the images of a split's class folders. Folders below a class folder belong to its class.

    Raises:
        DataError: A class has no images, or two folders have one name.
    """
    if data.input_key is not None or data.target_key is not None:
        raise DataError("class folders have no columns: leave --input-key and --target-key out.")
    classes = {
        unicodedata.normalize("NFC", folder.name): folder
        for folder in _class_folders(split, ignored, training=class_names is None)
    }
    names = tuple(sorted(classes))
    found, counts = list[Folder](), list[int]()  # the folders with images, and the number of them for each class
    deep: Folder | None = None
    for name in names:
        counts.append(classes[name].num_images())
        for folder in classes[name].walk():
            ignored.add_files(folder)
            for hidden in (inner for inner in folder.folders if inner.name.startswith(".")):
                ignored.add(f"{hidden.path}/", "a hidden folder")
            for file in folder.data:
                ignored.add(folder.inner(file), "a table, tar or array in a class folder")
            if folder.own_images:
                deep = deep or (folder if folder is not classes[name] else None)
                found.append(folder)
    if deep is not None:
        log(
            f"split {split.name!r}: images in {deep.path} belong to the class of the folder above it. If that folder "
            "is not a class but a split or a level of its own, name the splits with --train-split and --eval-split, or "
            "give the folder above the classes with --data-dir."
        )
    labels = Labels(np.repeat(np.arange(len(names)), counts), names)
    values, names = match_classes(labels, class_names, split.name, log)
    stats = [np.frombuffer(folder.stats, dtype=np.int64).reshape(-1, 4) for folder in found]
    state = xxhash.xxh3_128()
    for part in stats:
        state.update(part.tobytes())
    return FolderRows(
        root=split.root,
        folders=tuple(folder.path for folder in found),
        starts=np.cumsum([0, *(folder.own_images for folder in found[:-1])]),
        text=b"".join(folder.text for folder in found),
        ends=np.cumsum(np.concatenate([folder.lengths for folder in found]), dtype=np.int64),
        sizes=np.concatenate([part[:, 0] for part in stats]),
        state=state.hexdigest(),
        split=split.name,
        labels=values,
        class_names=names,
    )


def _class_folders(split: LocalSplit, ignored: Ignored, *, training: bool) -> list[Folder]:
    """Return the class folders of a split that hold images.

    Raises:
        DataError: One of them holds none (in the training split, or as its images cannot be read), two have one name,
            or the only one holds further folders.
    """
    found: list[Folder] = []
    seen: dict[str, str] = {}
    for folder in split.classes:
        if not folder.num_images():
            if folder.name.startswith(".") and folder.lost_images() is None:
                ignored.add(f"{folder.path}/", "a hidden folder without images")
                continue
            lost = folder.lost_images()
            if lost is None and not training:
                ignored.add(f"{folder.path}/", "a class folder without images")
                continue
            reason = f" that can be read ({lost[0]}: {lost[1]})" if lost else ""
            raise DataError(
                f"{split.root / folder.path}: a class folder without images{reason}. Add images of the class or "
                f"move the folder out of {split.root / os.path.dirname(folder.path)}."
            )
        name = unicodedata.normalize("NFC", folder.name)
        if name in seen:
            raise DataError(
                f"{split.root}: {seen[name]!r} and {folder.path!r} are one class name in two Unicode forms: put their "
                "images into one folder."
            )
        seen[name] = folder.path
        found.append(folder)
    if len(found) == 1 and not found[0].own_images:
        inner = [folder.name for folder in found[0].folders]
        raise DataError(
            f"{split.root / found[0].path}: the only class folder, and its images lie in the folders {few(inner)} "
            f"below it. Give the folder above the class folders (--data-dir {split.root / found[0].path}), or move "
            "these folders one level up."
        )
    if not found:
        raise DataError(f"{split.root}: no images in the class folders of split {split.name!r}: add some.")
    return found
