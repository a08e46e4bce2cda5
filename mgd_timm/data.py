"""Images in: the embedded default, hub ids, parquet or arrow files, image folders; always yields Batch.

`datasets` reads them all. Small images of one size are decoded once into a memory-mapped uint8 store and augmented as a batch on the
device; others go through timm's transforms in worker processes.
"""

import contextlib
import hashlib
import io
import json
import os
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from mgd_timm.checkpoint import write_whole
from mgd_timm.features import Batch
from mgd_timm.recipe import Data, unknown
from mgd_timm.sampling import augment, mix, normalise

EMBEDDED = Path(__file__).parent / "embedded"
SMALL = 96  # pixels: up to here an image costs less to keep than to decode again
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
_EVAL_SPLITS = ("test", "validation", "valid", "val")


def cache_folder() -> Path:
    """Where stores and fitted heads are kept: $MGD_TIMM_CACHE, else mgd_timm in the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "mgd_timm"
    return Path(os.environ.get("MGD_TIMM_CACHE", default))


class DataError(ValueError):
    """Data that cannot be used: names what and where, and the way out."""


class Source(Protocol):
    """Images of one split, addressed by sample id."""

    ids: Tensor
    """Sample ids [n], each the row in the split it was cut from."""
    labels: Tensor
    """Labels of `ids`: [n] class ids, or [n, k] distributions."""
    digest: str
    """sha256 of what the images and labels are."""

    def batches(self, slots: Sequence[Tensor], epoch: int, device: torch.device) -> Iterator[Batch]:
        """One Batch for every tensor of sample ids."""
        ...


@dataclass(frozen=True)
class Images:
    """A data set, ready to train on."""

    train: Source
    val: Source | None
    test: Source | None
    num_samples: int
    class_names: tuple[str, ...]
    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @property
    def watched(self) -> Source | None:
        """What is evaluated each epoch: the validation cut where there is one, else the test split."""
        return self.val if self.val is not None else self.test


@dataclass(frozen=True)
class Defaults:
    """What a recipe leaves open and the models know: mean and std of weights, and a model's nominal input."""

    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    img_size: int = 224
    interpolation: str = "bicubic"
    crop_pct: float = 0.875


def decode(content: bytes | str | os.PathLike[str], in_chans: int, name: str) -> np.ndarray:
    """Pixels of an encoded image or an image file, uint8 [height, width, channels].

    Grey, palette, CMYK and transparent images are converted to what `in_chans` asks for.

    Raises:
        DataError: Truncated, not an image, too large to be one, or of more than 8 bits a channel (which would be clipped).
    """
    try:
        with Image.open(io.BytesIO(content) if isinstance(content, bytes) else content, formats=_FORMATS) as image:
            if image.mode.startswith(("I", "F")):
                raise DataError(
                    f"{name}: mode {image.mode!r} has more than 8 bits a channel and no known range: convert it to 8 bits first."
                )
            image.load()
            if image.mode == "P" and "transparency" in image.info:
                pixels = np.asarray(image.convert("RGBA").convert("RGB" if in_chans == 3 else "L"))
            else:
                pixels = np.asarray(image.convert("RGB" if in_chans == 3 else "L"))
    except DataError:
        raise
    except UnidentifiedImageError as error:
        raise DataError(f"{name}: not an image of a known format ({', '.join(_FORMATS)}): remove or replace it.") from error
    except Image.DecompressionBombError as error:
        raise DataError(f"{name}: {error}: remove or shrink it.") from error
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(f"{name}: truncated or damaged ({error}): remove or replace it.") from error
    return pixels.reshape(*pixels.shape[:2], in_chans)


@dataclass(frozen=True)
class _Rows:
    """A split as `datasets` gives it, its image column not decoded."""

    table: Any
    key: str
    split: str
    labels: np.ndarray
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.table)

    def image(self, row: int) -> tuple[bytes | str, str]:
        """Content or path of an image, and a name for errors."""
        cell = self.table[row][self.key]
        if isinstance(cell, bytes):
            return cell, f"{self.split} image {row}"
        name = f"{self.split} image {row}" + (f" ({cell['path']})" if cell.get("path") else "")
        content = cell.get("bytes") or cell.get("path")
        if content is None:
            raise DataError(f"{name}: the row holds neither bytes nor a path.")
        return content, name

    def digest(self) -> str:
        """sha256 of the encoded images and labels; of a file's path, size and time where only its path is known."""
        total = hashlib.sha256(json.dumps([self.split, self.class_names]).encode() + self.labels.tobytes())
        for row in range(len(self)):
            content, _ = self.image(row)
            if isinstance(content, str):
                stat = os.stat(content)
                content = f"{content}:{stat.st_size}:{stat.st_mtime_ns}".encode()
            total.update(hashlib.sha256(content).digest())
        return total.hexdigest()


class StoreSource:
    """Small images in a uint8 tensor [n, c, h, w], augmented as a batch on the device."""

    def __init__(
        self, images: Tensor, labels: Tensor, ids: Tensor, digest: str, data: Data, stats: tuple[Tensor, Tensor], seed: int | None
    ) -> None:
        self.images, self.all_labels, self.ids, self.digest = images, labels, ids, digest
        self.labels = labels[ids]
        self.data, self.stats, self.seed = data, stats, seed

    def batches(self, slots: Sequence[Tensor], epoch: int, device: torch.device) -> Iterator[Batch]:
        """Augmented batches where the source has a seed, else the images as they are."""
        mean, std = (s.to(device) for s in self.stats)
        for ids in slots:
            images = self.images[ids].to(device, non_blocking=True)
            labels, there = self.all_labels[ids].to(device), ids.to(device)
            if self.seed is not None:
                images = augment(images, there, self.seed, epoch, pad=self.data.pad, hflip=self.data.hflip)
            yield Batch(normalise(images, mean, std), labels, there)


class FileSource:
    """Large images, decoded and transformed in worker processes; each image's randomness is seeded by (seed, epoch, sample)."""

    def __init__(
        self,
        rows: _Rows,
        labels: Tensor,
        ids: Tensor,
        digest: str,
        data: Data,
        transform: Callable[[Any], Tensor],
        seed: int | None,
    ) -> None:
        self.rows, self.all_labels, self.ids, self.digest = rows, labels, ids, digest
        self.labels = labels[ids]
        self.data, self.transform, self.seed = data, transform, seed

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        epoch, row = key
        pixels = decode(*_swap(self.rows.image(row), self.data.in_chans))
        image = Image.fromarray(pixels.squeeze(2) if self.data.in_chans == 1 else pixels)
        with _seeded(None if self.seed is None else mix(self.seed, epoch, row)):
            return self.transform(image), row

    def batches(self, slots: Sequence[Tensor], epoch: int, device: torch.device) -> Iterator[Batch]:
        """Batches in the order of the slots, read ahead by the workers."""
        keys = [[(epoch, int(row)) for row in ids] for ids in slots]
        loader = torch.utils.data.DataLoader(
            self,  # type: ignore[arg-type]  # a map-style data set needs __getitem__ alone beside a batch sampler
            batch_sampler=keys,
            num_workers=self.data.workers,
            pin_memory=device.type == "cuda",
        )
        for images, rows in loader:
            labels = self.all_labels[rows].to(device, non_blocking=True)
            yield Batch(images.to(device, non_blocking=True), labels, rows.to(device, non_blocking=True))


def _swap(named: tuple[bytes | str, str], in_chans: int) -> tuple[bytes | str, int, str]:
    return named[0], in_chans, named[1]


@contextlib.contextmanager
def _seeded(seed: int | None) -> Iterator[None]:
    """timm's transforms draw from three global generators: seeded for one image, and left as they were found."""
    if seed is None:
        yield
        return
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        random.seed(seed)
        np.random.seed(seed & 0xFFFFFFFF)
        torch.random.default_generator.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


def load_images(
    data: Data,
    seed: int,
    defaults: Defaults | None = None,
    *,
    say: Callable[[str], None] = print,
    main_first: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
) -> Images:
    """Read a data set.

    Args:
        data: Which, and how shown.
        seed: Of augmentation and of the validation cut.
        defaults: What models know and the recipe leaves open.
        say: Takes one line for the user.
        main_first: Context in which the other processes wait for the main one, so that one process writes a store.

    Raises:
        DataError: No such data set, split or column; a class without images; images that cannot be used.
    """
    defaults = defaults or Defaults()
    with main_first():
        splits = _open(data)
    train = _rows(data, splits, data.train_split, say)
    test_name = _eval_split(data, splits)
    test = _rows(data, splits, test_name, lambda _: None) if test_name else None
    if test is not None and test.class_names != train.class_names:
        raise DataError(
            f"split {test.split!r} has the classes {_few(test.class_names)}, {train.split!r} has {_few(train.class_names)}: "
            "both need the same ones."
        )
    _check_classes(train)
    kept, held = _cut_validation(train, data.val_split, seed)
    with main_first():
        return _build(data, seed, defaults, train, test, kept, held, say)


def _build(
    data: Data,
    seed: int,
    defaults: Defaults,
    train: _Rows,
    test: _Rows | None,
    kept: Tensor,
    held: Tensor,
    say: Callable[[str], None],
) -> Images:
    first = decode(*_swap(train.image(0), data.in_chans))
    digests = {rows.split: rows.digest() for rows in (train, test) if rows is not None}
    stored = None
    if max(first.shape[:2]) <= SMALL:
        size = (data.img_size, data.img_size) if data.img_size else (first.shape[0], first.shape[1])
        stored = {
            rows.split: _store(rows, digests[rows.split], data.in_chans, size, resize=data.img_size is not None, say=say)
            for rows in (train, test)
            if rows is not None
        }
    labels = {rows.split: torch.from_numpy(rows.labels) for rows in (train, test) if rows is not None}
    side = data.img_size or defaults.img_size
    if stored is not None:
        mean, std = _statistics(data, defaults, stored[train.split][kept])
        stats = torch.tensor(mean)[:, None, None], torch.tensor(std)[:, None, None]
        height, width = stored[train.split].shape[2:]

        def source(rows: _Rows, ids: Tensor, training: bool) -> Source:
            images = stored[rows.split]
            return StoreSource(images, labels[rows.split], ids, digests[rows.split], data, stats, seed if training else None)
    else:
        from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

        grey = data.in_chans == 1
        mean = data.mean or defaults.mean or (IMAGENET_DEFAULT_MEAN if not grey else (0.5,))
        std = data.std or defaults.std or (IMAGENET_DEFAULT_STD if not grey else (0.5,))
        height = width = side

        def source(rows: _Rows, ids: Tensor, training: bool) -> Source:
            transform = _transform(data, defaults, (data.in_chans, side, side), mean, std, training)
            return FileSource(rows, labels[rows.split], ids, digests[rows.split], data, transform, seed if training else None)

    everything = torch.arange(len(test)) if test is not None else None
    return Images(
        train=source(train, kept, True),
        val=source(train, held, False) if len(held) else None,
        test=source(test, everything, False) if test is not None and everything is not None else None,
        num_samples=len(train),
        class_names=train.class_names,
        input_size=(data.in_chans, int(height), int(width)),
        mean=tuple(mean),
        std=tuple(std),
    )


def _open(data: Data) -> dict[str, Any]:
    """The data set's splits, through `datasets`."""
    import datasets

    datasets.disable_progress_bars()
    place = data.data_dir or (str(EMBEDDED / "fashion_mnist") if data.dataset == "embedded" else data.dataset)
    local = Path(place)
    if data.data_dir is not None or data.dataset == "embedded" or local.exists():
        if not local.is_dir() or not any(local.iterdir()):
            raise DataError(f"{place}: expected a folder of parquet or arrow files, or of images in class folders.")
        _check_folders(local)
    elif place.count("/") > 1 or place.startswith((".", "~", "/")):
        raise DataError(f"{place}: no such folder. Give --data-dir a folder, or --dataset 'embedded' or a hub id.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of fsspec and of the hub's client; errors are what matters here
            found = datasets.load_dataset(place, data.dataset_config)
    except Exception as error:  # `datasets` raises a dozen kinds, of several libraries
        if local.exists():
            raise DataError(f"{place}: its files cannot be read: {type(error).__name__}: {error}") from error
        near = unknown("data set", place, ("embedded", "uoft-cs/cifar10", "uoft-cs/cifar100", "zalando-datasets/fashion_mnist"))
        raise DataError(f"{near}. Reading it failed with {type(error).__name__}: {error}") from error
    return dict(found)


def _check_folders(place: Path) -> None:
    """`datasets` does not see a class folder without an image: the class would silently not exist."""
    if any(path.suffix in (".parquet", ".arrow") for path in place.rglob("*.*")):
        return
    endings = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"}
    for folder in sorted(path for path in place.rglob("*") if path.is_dir()):
        below = any(path.is_file() and path.suffix.lower() in endings for path in folder.rglob("*"))
        if not below:
            raise DataError(f"{folder}: a class folder without an image. Add images of the class or remove the folder.")


def _eval_split(data: Data, splits: dict[str, Any]) -> str | None:
    if data.eval_split is not None:
        return data.eval_split
    return next((name for name in _EVAL_SPLITS if name in splits and name != data.train_split), None)


def _rows(data: Data, splits: dict[str, Any], split: str, say: Callable[[str], None]) -> _Rows:
    import datasets

    if split not in splits:
        raise DataError(str(unknown("split", split, splits)))
    table = splits[split]
    key = data.input_key or _image_column(table)
    target = data.target_key or _label_column(table, key, say)
    for name in (key, target):
        if name not in table.column_names:
            raise DataError(str(unknown("column", name, table.column_names)))
    if isinstance(table.features[key], datasets.Image):
        table = table.cast_column(key, datasets.Image(decode=False))
    feature = table.features[target]
    labels = np.asarray(table.with_format("numpy")[:][target] if len(table) == 0 else table.with_format("numpy")[target][:])
    if not len(table):
        raise DataError(f"split {split!r} has no images.")
    if labels.ndim == 2:  # a distribution over classes
        labels = labels.astype(np.float32)
        names: tuple[str, ...] = tuple(str(i) for i in range(labels.shape[1]))
        if not np.isfinite(labels).all() or labels.min() < 0 or not np.allclose(labels.sum(1), 1, atol=1e-3):
            raise DataError(f"column {target!r}: soft labels need to be distributions, 0 or more and of sum 1.")
    else:
        if labels.dtype.kind not in "iu" or labels.min() < 0:
            raise DataError(f"column {target!r}: labels are {feature} from {labels.min()}; expected class ids from 0.")
        labels = labels.astype(np.int64)
        named = isinstance(feature, datasets.ClassLabel)
        names = tuple(feature.names) if named else tuple(str(i) for i in range(int(labels.max()) + 1))
    return _Rows(table.select_columns([key]), key, split, labels, names)


def _image_column(table: Any) -> str:
    import datasets

    def holds_image(feature: Any) -> bool:
        encoded = isinstance(feature, dict) and set(feature) >= {"bytes", "path"}
        return encoded or isinstance(feature, datasets.Image) or getattr(feature, "dtype", None) in ("binary", "large_binary")

    found = [name for name, feature in table.features.items() if holds_image(feature)]
    if len(found) != 1:
        raise DataError(f"{len(found)} image columns {found} among {table.column_names}: name one with --input-key.")
    return found[0]


def _label_column(table: Any, image: str, say: Callable[[str], None]) -> str:
    import datasets

    classes = {name: f.num_classes for name, f in table.features.items() if isinstance(f, datasets.ClassLabel)}
    if classes:
        finest = max(classes, key=lambda name: classes[name])
        if len(classes) > 1:
            say(f"label column: {finest} of {', '.join(f'{n} ({c} classes)' for n, c in classes.items())}; --target-key to change")
        return finest
    rest = {name: f for name, f in table.features.items() if name != image}
    found = [
        name
        for name, f in rest.items()
        if getattr(f, "dtype", "").startswith(("int", "uint")) or isinstance(f, datasets.List | datasets.LargeList)
    ]
    if len(found) != 1:
        raise DataError(f"{len(found)} label columns {found} among {table.column_names}: name one with --target-key.")
    return found[0]


def _check_classes(train: _Rows) -> None:
    if train.labels.ndim == 2:
        return
    top = int(train.labels.max())
    if top >= len(train.class_names):
        raise DataError(f"split {train.split!r} has the label {top}, but only {len(train.class_names)} classes are named.")
    counts = np.bincount(train.labels, minlength=len(train.class_names))
    empty = [f"{train.class_names[i]!r} ({i})" for i in np.flatnonzero(counts == 0)]
    if empty:
        raise DataError(
            f"split {train.split!r} has no image of class {_few(empty)}: add some, or remove the class from the label names."
        )
    if len(counts) < 2:
        raise DataError(f"split {train.split!r} has one class only, {train.class_names[0]!r}: there is nothing to tell apart.")


def _cut_validation(train: _Rows, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Sample ids to train on and to validate on, the same share of every class."""
    everything = torch.arange(len(train))
    if not share:
        return everything, everything[:0]
    classes = train.labels if train.labels.ndim == 1 else train.labels.argmax(1)
    held = torch.zeros(len(train), dtype=torch.bool)
    generator = torch.Generator().manual_seed(mix(seed, 2))
    for label in range(len(train.class_names)):
        ids = torch.from_numpy(np.flatnonzero(classes == label))
        held[ids[torch.randperm(len(ids), generator=generator)][: round(share * len(ids))]] = True
    if not held.any() or held.all():
        raise DataError(f"val_split={share} of {len(train)} images leaves a part empty: choose another share.")
    return everything[~held], everything[held]


def _store(
    rows: _Rows, digest: str, in_chans: int, size: tuple[int, int], *, resize: bool, say: Callable[[str], None]
) -> Tensor | None:
    """The split's images, uint8 [n, c, h, w], memory-mapped from a file in the cache that is written once."""
    from safetensors.torch import load_file, save_file
    from tqdm import tqdm

    key = hashlib.sha256(f"{digest}:{in_chans}:{size}:2".encode()).hexdigest()[:32]
    path = cache_folder() / "images" / f"{key}.safetensors"
    if not path.exists():
        pixels = torch.empty(len(rows), in_chans, *size, dtype=torch.uint8)
        quick = len(rows) < 20_000
        for row in tqdm(range(len(rows)), desc=f"decoding {rows.split}", unit="img", leave=False, disable=quick):
            content, name = rows.image(row)
            image = decode(content, in_chans, name)
            if image.shape[:2] != size:
                if not resize:
                    raise DataError(
                        f"{name} has {image.shape[0]}x{image.shape[1]} pixels, the first image {size[0]}x{size[1]}: give --img-size."
                    )
                small = Image.fromarray(image.squeeze(2) if in_chans == 1 else image)
                image = np.asarray(small.resize((size[1], size[0]), Image.Resampling.BICUBIC)).reshape(*size, in_chans)
            pixels[row] = torch.from_numpy(image.copy()).permute(2, 0, 1)
        write_whole(path, lambda draft: save_file({"images": pixels}, draft))
        say(f"stored {len(rows)} images of {rows.split!r}, {pixels.numel() / 1e6:.0f} MB")
    return load_file(path)["images"]


def _statistics(data: Data, defaults: Defaults, images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel: the recipe's, else the weights', else measured."""
    mean, std = data.mean or defaults.mean, data.std or defaults.std
    if mean is None or std is None:
        levels = torch.arange(256, dtype=torch.float64) / 255
        counts = torch.stack([torch.bincount(images[:, c].flatten(), minlength=256) for c in range(images.shape[1])]).double()
        counts /= counts.sum(1, keepdim=True)
        average = counts @ levels
        spread = (counts @ levels.square() - average.square()).clamp_min(1e-8).sqrt()
        mean = mean or tuple(round(v, 4) for v in average.tolist())
        std = std or tuple(max(round(v, 4), 1e-4) for v in spread.tolist())
    return mean, std


def _transform(
    data: Data, defaults: Defaults, size: tuple[int, int, int], mean: Sequence[float], std: Sequence[float], training: bool
) -> Callable[[Any], Tensor]:
    from timm.data import create_transform

    common = {
        "input_size": size,
        "mean": tuple(mean),
        "std": tuple(std),
        "interpolation": data.interpolation or defaults.interpolation,
    }
    if not training:
        return create_transform(**common, crop_pct=data.crop_pct or defaults.crop_pct)
    return create_transform(
        **common,
        is_training=True,
        scale=data.scale,
        ratio=data.ratio,
        hflip=data.hflip,
        color_jitter=data.color_jitter or None,
        auto_augment=data.aa,
    )


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
