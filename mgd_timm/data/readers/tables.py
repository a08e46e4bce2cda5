"""What `datasets` reads (hub ids, parquet or arrow files, image folders), and npy files, as rows of images and checked
labels.

Nothing is decoded or copied into memory before it is asked for.
"""

import hashlib
import json
import os
import shlex
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mgd_timm.data.decode import ENDINGS, DataError, decode, spaced_digest
from mgd_timm.data.readers.tars import TarRows, Tars, find_tars, read_tars
from mgd_timm.recipe.options import few, unknown
from mgd_timm.recipe.recipe import Data

_HUB = ("embedded", "uoft-cs/cifar10", "uoft-cs/cifar100", "zalando-datasets/fashion_mnist")


@dataclass(frozen=True)
class Rows:
    """A split as `datasets` gives it, its image column not decoded."""

    table: Any
    key: str
    split: str
    labels: np.ndarray
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.table)

    def name(self, row: int) -> str:
        """What an error calls an image: split and row, and the file where one is known."""
        cell = self.table[row][self.key]
        path = cell.get("path") if isinstance(cell, dict) else None
        return f"{self.split} image {row}" + (f" ({path})" if path else "")

    def content(self, row: int) -> bytes | str:
        """An encoded image, or its path."""
        cell = self.table[row][self.key]
        found: bytes | str | None = (cell["bytes"] or cell["path"]) if isinstance(cell, dict) else cell
        if not found:
            raise DataError(f"{self.name(row)}: the row holds neither bytes nor a path: remove it.")
        return found

    def pixels(self, row: int, in_chans: int) -> np.ndarray:
        """A decoded image, uint8 [height, width, channels]."""
        return decode(self.content(row), in_chans, self.name(row))

    def digest(self) -> str:
        """sha256 of labels and encoded images, and of a file's name and class folder where only its path is known.

        Data that are moved stay the same data: neither the rest of the path nor a time counts.
        Of more than `HASHED` bytes, all sizes and evenly spaced images are hashed, so that a start takes no minutes.
        """
        import pyarrow as pa
        import pyarrow.compute as pc

        column = self.table.with_format("arrow")[:][self.key]
        encoded = pc.struct_field(column, "bytes") if pa.types.is_struct(column.type) else column
        sizes = np.array(pc.fill_null(pc.binary_length(encoded), 0), dtype=np.int64)
        total = hashlib.sha256(json.dumps([self.split, self.class_names]).encode())
        total.update(self.labels.tobytes())
        paths = (
            pc.struct_field(column, "path") if pa.types.is_struct(column.type) else None
        )  # at once: a row alone takes 15 us
        for row in np.flatnonzero(sizes == 0).tolist():
            path = Path(str(self.content(row) if paths is None else paths[row].as_py() or self.content(row)))
            try:
                sizes[row] = path.stat().st_size
            except OSError as error:
                raise DataError(f"{self.name(row)}: {error.strerror}: put the file back or remove its row.") from error
            total.update(json.dumps(path.parts[-2:]).encode())
        total.update(sizes.tobytes())
        return spaced_digest(total, sizes, self.content)


@dataclass(frozen=True)
class ArrayRows:
    """A split of a pair of npy files: images uint8 [n, height, width] or [n, height, width, channels], mapped, and
    their labels."""

    images: np.ndarray
    split: str
    labels: np.ndarray
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.images)

    def name(self, row: int) -> str:
        """What an error calls an image."""
        return f"{self.split} image {row}"

    def pixels(self, row: int, in_chans: int) -> np.ndarray:
        """An image, uint8 [height, width, channels]."""
        picture = Image.fromarray(np.squeeze(np.asarray(self.images[row])))
        pixels = np.asarray(picture.convert("RGB" if in_chans == 3 else "L"))
        return pixels.reshape(*pixels.shape[:2], in_chans)

    def digest(self) -> str:
        """sha256 of the labels and of all pixels."""
        total = hashlib.sha256(json.dumps([self.split, self.class_names, list(self.images.shape)]).encode())
        total.update(self.labels.tobytes())
        for start in range(0, len(self), 4096):
            total.update(np.ascontiguousarray(self.images[start : start + 4096]).tobytes())
        return total.hexdigest()


AnyRows = Rows | ArrayRows | TarRows


def _open_arrays(folder: Path) -> dict[str, ArrayRows]:
    """The splits of a folder that holds SPLIT_x.npy (images) and SPLIT_y.npy (class ids); empty where it holds none.

    Raises:
        DataError: A file without its partner, or arrays that are no images and labels.
    """
    found: dict[str, ArrayRows] = {}
    for path in sorted(folder.glob("*_[xy].npy")):
        split, partner = (
            path.stem[:-2],
            path.with_name(path.stem[:-1] + ("y" if path.stem.endswith("x") else "x") + ".npy"),
        )
        if not partner.is_file():
            raise DataError(
                f"{path}: expected {partner.name} beside it, the images in SPLIT_x.npy and their class ids in "
                "SPLIT_y.npy."
            )
        images, labels = (_array(folder / f"{split}_{kind}.npy") for kind in "xy")
        if (
            images.dtype != np.uint8
            or images.ndim not in (3, 4)
            or (images.ndim == 4 and images.shape[3] not in (1, 3))
        ):
            raise DataError(
                f"{folder / f'{split}_x.npy'}: {images.dtype} {list(images.shape)}, expected uint8 [n, height, width] "
                "or [n, height, width, channels] with 1 or 3 channels: convert it."
            )
        if labels.dtype.kind not in "iu" or labels.shape != (len(images),) or not len(labels) or labels.min() < 0:
            raise DataError(
                f"{folder / f'{split}_y.npy'}: {labels.dtype} {list(labels.shape)}, expected {len(images)} class ids "
                "from 0, one for each image."
            )
        if int(labels.max()) >= len(labels):
            raise DataError(
                f"{folder / f'{split}_y.npy'}: the label {labels.max()} among {len(labels)} images: expected class "
                "ids from 0."
            )
        names = tuple(str(i) for i in range(int(labels.max()) + 1))
        found[split] = ArrayRows(images, split, np.asarray(labels).astype(np.int64), names)
    return found


def _array(path: Path) -> np.ndarray:
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
        if not isinstance(found, np.ndarray):
            raise ValueError("an archive of several arrays")
        return found
    except (OSError, ValueError, EOFError) as error:
        raise DataError(
            f"{path}: cannot be read as an npy file of numbers ({error}): write it anew with numpy.save."
        ) from error


def check_split(split: str, splits: Iterable[str]) -> None:
    """Raise DataError unless a split is there, with the others and the flags that name one."""
    if split not in splits:
        raise DataError(
            f"{unknown('split', split, splits)} --train-split and --eval-split name others; those of a folder are "
            "folders in it (train/CLASS/1.png, test/CLASS/2.png)."
        )


def open_splits(place: str, config: str | None, *, local: bool) -> dict[str, Any]:
    """The splits of a folder, or of a hub id where `local` is false and no such folder exists; npy files come before
    others.

    Raises:
        DataError: No such folder or data set, a class folder without images, or files that cannot be read.
    """
    import datasets

    datasets.disable_progress_bars()
    folder = Path(place)
    local = local or folder.exists()
    if local:
        check_links(folder)
        arrays = _open_arrays(folder)
        if arrays:
            return dict(arrays)
        tars = find_tars(folder) if folder.is_dir() and not _holds_files(folder) else {}
        if tars:
            return dict(tars)
        _check_folder(folder)
    elif place.count("/") > 1 or place.startswith((".", "~", "/")):
        raise DataError(f"{place}: no such folder. Give --data-dir a folder, or --dataset 'embedded' or a hub id.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of fsspec and of the hub's client; errors are what matters here
            found = dict(datasets.load_dataset(place, config))
    except Exception as error:  # `datasets` raises a dozen kinds, of several libraries
        if isinstance(error, datasets.exceptions.DatasetGenerationError) and error.__cause__ is not None:
            error = error.__cause__  # it says only that there was one
        reason = f"{type(error).__name__}: {error}"
        if local or place in _HUB:
            raise DataError(f"{place}: cannot be read: {reason}") from error
        raise DataError(f"{unknown('data set', place, _HUB)} Reading it from the hub failed with {reason}") from error
    if local:
        _check_depths(found)
    return found


def check_links(folder: Path) -> None:
    """`datasets` does not follow a link to a folder: a class that is one would silently not exist.

    Raises:
        DataError: A link to a folder that holds images or tables.
    """
    for found, names, _ in os.walk(folder):
        names[:] = sorted(name for name in names if not name.startswith((".", "__")))  # `datasets` skips these too
        for link in (Path(found, name) for name in names if Path(found, name).is_symlink()):
            if _holds_files(link):
                raise DataError(
                    f"{link}: a link to a folder, which is not followed, so that its images would be left out. Put a "
                    f"real folder in its place, with links to the images (cp -rs {shlex.quote(str(link.resolve()))} "
                    "...), or the images."
                )


def _check_depths(splits: dict[str, Any]) -> None:
    """`datasets` sees no class in any folder where one image lies deeper than another.

    Raises:
        DataError: Images of a folder at different depths, without any label.
    """
    import datasets

    tables = [table for table in splits.values() if list(table.features) == ["image"]]
    if len(tables) < len(splits):
        return
    cells = [
        table.cast_column("image", datasets.Image(decode=False)).with_format("arrow")[:]["image"] for table in tables
    ]
    paths = [Path(cell["path"]) for column in cells for cell in column.to_pylist() if cell["path"]]
    depths = Counter(len(path.parts) for path in paths)
    if len(depths) > 1:
        usual = depths.most_common(1)[0][0]
        odd, even = (next(path for path in paths if (len(path.parts) == usual) is same) for same in (False, True))
        raise DataError(
            f"{odd}: not as deep in folders as {even}, so that no folder is taken for a class; expected all images at "
            "one depth, in class folders (train/cat/1.png). Move or remove it and its like."
        )


def _holds_files(folder: Path) -> bool:
    """Whether there are images or tables in it: tars beside them are what they were unpacked from."""
    endings = {*ENDINGS, ".parquet", ".arrow"}
    return any(Path(name).suffix.lower() in endings for _, _, files in os.walk(folder) for name in files)


def _check_folder(place: Path) -> None:
    """`datasets` does not see a class folder without an image: the class would silently not exist."""
    expected = (
        "expected a folder of parquet, arrow or npy files, or of images in class folders (train/cat/1.png), tar files "
        "of these too."
    )
    if not place.is_dir():
        raise DataError(f"{place}: {'a file' if place.exists() else 'no such folder'}; {expected}")
    folders: list[Path] = []
    full: set[Path] = set()
    for found, folder_names, files in os.walk(place):
        folder_names[:] = sorted(
            name for name in folder_names if not name.startswith((".", "__"))
        )  # `datasets` skips these too
        endings = {Path(name).suffix.lower() for name in files}
        if endings & {".parquet", ".arrow"}:
            return
        folders.append(Path(found))
        if endings & ENDINGS:
            full.update((Path(found), *Path(found).parents))
    for folder in folders[1:]:
        if full and folder not in full:
            raise DataError(f"{folder}: a class folder without an image. Add images of the class or remove the folder.")
    if not full:
        raise DataError(f"{place}: neither images nor parquet, arrow or npy files in it; {expected}")


def read_split(
    data: Data, splits: dict[str, Any], split: str, say: Callable[[str], None], classes: tuple[str, ...] | None = None
) -> AnyRows:
    """A split's rows, its columns found by their type where the recipe does not name them.

    Args:
        data: The recipe's part on images.
        splits: Of `open_splits`.
        split: Which of them.
        say: Takes one line for the user.
        classes: Class names to take where the label column has none.

    Raises:
        DataError: No such split or column; labels that are no class ids or distributions.
    """
    import datasets

    check_split(split, splits)
    table = splits[split]
    if isinstance(table, ArrayRows):
        if data.input_key is not None or data.target_key is not None:
            raise DataError("npy files have no columns: leave --input-key and --target-key out.")
        return replace(table, class_names=classes or table.class_names)
    if isinstance(table, Tars):
        if data.input_key is not None:
            raise DataError("tar files have no image columns: leave --input-key out.")
        return read_tars(table, split, classes, data.target_key)
    for name in (data.input_key, data.target_key):
        if name is not None and name not in table.column_names:
            raise DataError(str(unknown("column", name, table.column_names)))
    if not len(table):
        raise DataError(f"split {split!r} has no images: choose another with --train-split or --eval-split.")
    key = data.input_key or image_column(table)
    if not _holds_images(table.features[key]):
        raise DataError(
            f"column {key!r} holds {table.features[key]}: expected encoded images; choose another with --input-key."
        )
    target = data.target_key or label_column(table, key, say)
    if isinstance(table.features[key], datasets.Image):
        table = table.cast_column(key, datasets.Image(decode=False))
    labels, names = _labels(table, target, split, classes)
    return Rows(table.select_columns([key]), key, split, labels, names)


def _holds_images(feature: Any) -> bool:
    import datasets

    encoded = isinstance(feature, dict) and set(feature) >= {"bytes", "path"}
    return (
        encoded or isinstance(feature, datasets.Image) or getattr(feature, "dtype", None) in ("binary", "large_binary")
    )


def image_column(table: Any) -> str:
    """The one column that holds images."""
    found = [name for name, feature in table.features.items() if _holds_images(feature)]
    if len(found) != 1:
        several = f"{len(found)} image columns, {', '.join(found)}," if found else "no image column"
        raise DataError(f"{several} among {', '.join(table.column_names)}: expected one; name it with --input-key.")
    return found[0]


def label_column(table: Any, image: str, say: Callable[[str], None]) -> str:
    """The one column of labels, of several with class names the one of most classes."""
    import datasets

    classes = {name: f.num_classes for name, f in table.features.items() if isinstance(f, datasets.ClassLabel)}
    if classes:
        finest = max(classes, key=lambda name: classes[name])
        if len(classes) > 1:
            say(
                f"label column: {finest} of {', '.join(f'{n} ({c} classes)' for n, c in classes.items())}; "
                "--target-key to change"
            )
        return finest
    found = [
        name
        for name, f in table.features.items()
        if name != image
        and (
            isinstance(f, datasets.List | datasets.LargeList)
            or str(getattr(f, "dtype", "")).startswith(("int", "uint"))
        )
    ]
    if len(found) != 1:
        several = f"{len(found)} label columns, {', '.join(found)}," if found else "no label column"
        raise DataError(
            f"{several} among {', '.join(table.column_names)}: expected one of class ids or distributions; name it "
            "with --target-key, or put images into one folder per class, of two classes or more."
        )
    return found[0]


def _labels(table: Any, target: str, split: str, classes: tuple[str, ...] | None) -> tuple[np.ndarray, tuple[str, ...]]:
    """Class ids int64 [n] or distributions float32 [n, k], and the classes' names."""
    import datasets

    feature, where = table.features[target], f"column {target!r} of split {split!r}"
    labels = np.asarray(table.select_columns([target]).with_format("numpy")[:][target])
    if labels.ndim == 2 and labels.dtype.kind in "iuf":
        labels = labels.astype(np.float32)
        if not np.isfinite(labels).all() or labels.min() < 0 or not np.allclose(labels.sum(1), 1, atol=1e-3):
            raise DataError(f"{where}: soft labels need to be distributions, each value 0 or more and of sum 1.")
        count = labels.shape[1]
        return labels, classes if classes and len(classes) == count else tuple(str(i) for i in range(count))
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise DataError(
            f"{where} holds {feature} (read as {labels.dtype}): expected class ids from 0, none missing, or "
            "distributions of equal length; choose another with --target-key."
        )
    if labels.min() < 0:
        raise DataError(
            f"{where}: row {int(labels.argmin())} has the label {labels.min()}, expected class ids from 0. A split "
            "with hidden labels cannot be used: choose another with --train-split or --eval-split."
        )
    labels = labels.astype(np.int64)
    if isinstance(feature, datasets.ClassLabel):
        return labels, tuple(feature.names)
    return labels, classes or tuple(str(i) for i in range(int(labels.max()) + 1))


def check_classes(train: AnyRows, test: AnyRows | None) -> None:
    """Refuse labels outside the named classes, a class without a training image, a single class, and other classes to
    test on.

    Raises:
        DataError: Any of these.
    """
    names = train.class_names
    if test is not None and test.class_names != names:
        raise DataError(
            f"split {test.split!r} has the classes {few(test.class_names)}, {train.split!r} has {few(names)}: both "
            "need the same ones."
        )
    for rows in (train, test):
        top = int(rows.labels.max()) if rows is not None and rows.labels.ndim == 1 else 0
        if rows is not None and top >= len(names):
            raise DataError(
                f"split {rows.split!r} has the label {top}, but there are {len(names)} classes, {few(names)}: "
                f"expected 0 to {len(names) - 1}. Correct the labels or the class names."
            )
    if len(names) < 2:
        raise DataError(f"split {train.split!r} has one class only, {names[0]!r}: there is nothing to tell apart.")
    if train.labels.ndim == 1:
        counts = np.bincount(train.labels, minlength=len(names))
        empty = [f"{names[i]!r} ({i})" for i in np.flatnonzero(counts == 0)]
        if empty:
            raise DataError(
                f"split {train.split!r} has no image of class {few(empty)}: add some, or remove the class from the "
                "label names."
            )
