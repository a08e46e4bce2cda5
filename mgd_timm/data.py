"""Images in: the embedded default, hub ids, parquet or arrow files, image folders; always yields Batch.

Small images of one size are decoded once into a memory-mapped uint8 store and augmented as a batch on the device; others go through
timm's transforms in worker processes.
"""

import contextlib
import copy
import hashlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mgd_timm.augmentation import erase
from mgd_timm.checkpoint import write_whole
from mgd_timm.features import Batch
from mgd_timm.reading import EVAL_SPLITS, AnyRows, DataError, check_classes, decode, open_splits, read_split
from mgd_timm.recipe import Data
from mgd_timm.sampling import augment, epoch_order, mix, normalise, seeded

__all__ = [
    "EMBEDDED",
    "DataError",
    "Defaults",
    "FileSource",
    "Images",
    "Source",
    "StoreSource",
    "cache_folder",
    "decode",
    "load_images",
]

EMBEDDED = Path(__file__).parent / "embedded"
SMALL = 96  # pixels: up to here an image costs less to keep than to decode again


def cache_folder() -> Path:
    """Where stores and fitted heads are kept: $MGD_TIMM_CACHE, else mgd_timm in the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "mgd_timm"
    return Path(os.environ.get("MGD_TIMM_CACHE") or default)


@runtime_checkable  # for the checks of shapes under pytest
class Source(Protocol):
    """Images of one split, addressed by sample id."""

    ids: Tensor
    """Sample ids [n], each the row in the split it was cut from."""
    labels: Tensor
    """Labels of `ids`: [n] class ids, or [n, k] distributions."""
    digest: str
    """sha256 of what the images and labels are."""

    def batches(self, slots: Sequence[Tensor], epoch: int, device: torch.device) -> Iterator[Batch]:
        """One Batch for every tensor of sample ids.

        An id of `num_samples` times r more (of `Images`) asks for the same image in its r-th further augmentation.
        """
        ...


def epoch_ids(source: Source, seed: int, epoch: int) -> Tensor:
    """What an epoch asks a source for, in order: the source's own (`order`), or a permutation of its ids."""
    order = getattr(source, "order", None)
    return order(seed, epoch) if order is not None else source.ids[epoch_order(len(source.ids), seed, epoch)]


@dataclass(frozen=True)
class Images:
    """A data set, ready to train on."""

    train: Source
    val: Source | None
    test: Source | None
    num_samples: int
    labels: Tensor
    """Labels of all `num_samples` rows of the training split, a validation cut among them: sample ids index them."""
    class_names: tuple[str, ...]
    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    def trained_labels(self) -> Tensor:
        """Class ids by sample id, the likeliest class of a distribution; -1 for those that are held out of training."""
        known = self.labels.argmax(1) if self.labels.ndim == 2 else self.labels
        return torch.full_like(known, -1).index_copy_(0, self.train.ids, known[self.train.ids])

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


class StoreSource:
    """Small images in a uint8 tensor [n, c, h, w], augmented as a batch on the device."""

    def __init__(
        self, images: Tensor, labels: Tensor, ids: Tensor, digest: str, data: Data, stats: tuple[Tensor, Tensor], seed: int | None
    ) -> None:
        self.images, self.all_labels, self.ids, self.digest = images, labels, ids, digest
        self.labels = labels[ids]
        self.data, self.stats, self.seed = data, stats, seed
        self._moved: dict[torch.device, tuple[Tensor, Tensor]] = {}

    @property
    def shown(self) -> dict[str, Any]:
        """What decides, beside images, mean, std and size, how (seed, epoch, sample id) shows an image; as JSON values."""
        return {"pad": self.data.pad, "hflip": self.data.hflip, **_erasing(self.data)}

    def seeded(self, seed: int) -> "StoreSource":
        """The same images, augmented by another seed."""
        other = copy.copy(self)
        other.seed = seed
        return other

    def batches(self, slots: Sequence[Tensor], epoch: int, device: torch.device) -> Iterator[Batch]:
        """Augmented batches where the source has a seed, else the images as they are."""
        mean, std = (s.to(device) for s in self.stats)
        images, labels = self._resident(device)
        sizes = [len(ids) for ids in slots]
        moved = torch.cat(list(slots)).to(device).split(sizes) if sizes else ()  # one transfer an epoch
        for ids, keys in zip(slots, moved, strict=True):
            there = keys % len(self.images)
            if images.device == there.device:
                shown = images[there]
            else:
                held = images[ids % len(images)]  # too many for the GPU: pinned, so that no step waits for them all the same
                shown = (held.pin_memory() if device.type == "cuda" else held).to(device, non_blocking=True)
            if self.seed is None:
                yield Batch(normalise(shown, mean, std), labels[there], there)
                continue
            shown = augment(shown, keys, self.seed, epoch, pad=self.data.pad, hflip=self.data.hflip)
            pictures = normalise(shown, mean, std)
            if self.data.reprob:
                pictures = erase(pictures, keys, self.seed, epoch, self.data.reprob, self.data.remode, self.data.recount)
            yield Batch(pictures, labels[there], there)

    def _resident(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Images and labels on the device, so that no step waits for a transfer; images that would fill a GPU stay on the host."""
        if device.type != "cuda":
            return self.images, self.all_labels.to(device)
        if device not in self._moved:
            fits = self.images.numel() < torch.cuda.mem_get_info(device)[0] // 4
            self._moved[device] = (self.images.to(device) if fits else self.images, self.all_labels.to(device))
        return self._moved[device]


class FileSource:
    """Large images, decoded and transformed in worker processes; each image's randomness is seeded by (seed, epoch, sample)."""

    def __init__(
        self,
        rows: AnyRows,
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

    @property
    def shown(self) -> dict[str, Any]:
        """What decides, beside images, mean, std and size, how (seed, epoch, sample id) shows an image; as JSON values."""
        names = ("scale", "ratio", "hflip", "aa", "color_jitter", "interpolation")
        values = {name: getattr(self.data, name) for name in names} | _erasing(self.data)
        if self.data.train_interpolation is not None:
            values["interpolation"] = self.data.train_interpolation
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    def seeded(self, seed: int) -> "FileSource":
        """The same images, transformed by another seed."""
        other = copy.copy(self)
        other.seed = seed
        return other

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        epoch, number = key
        row = number % len(self.all_labels)
        image = _picture(self.rows.pixels(row, self.data.in_chans))
        with seeded(None if self.seed is None else mix(self.seed, epoch, number)):
            return self.transform(image), row

    def batches(self, slots: Sequence[Tensor], epoch: int, device: torch.device) -> Iterator[Batch]:
        """Batches in the order of the slots, read ahead by the workers."""
        keys = [[(epoch, row) for row in ids.tolist()] for ids in slots]
        loader: Any = torch.utils.data.DataLoader(
            self,  # type: ignore[arg-type]  # a map-style data set needs __getitem__ alone beside a batch sampler
            batch_sampler=keys,
            num_workers=self.data.workers,
            pin_memory=device.type == "cuda",
            worker_init_fn=_start_reader,
            generator=torch.Generator(),  # the loader draws a seed, by default from the generator that dropout uses
        )
        with _held_signals():
            read = iter(loader)
        for images, rows in read:
            labels = self.all_labels[rows].to(device, non_blocking=True)
            yield Batch(images.to(device, non_blocking=True), labels, rows.to(device, non_blocking=True))


def _erasing(data: Data) -> dict[str, Any]:
    """Nothing where nothing is erased, as before there was erasing: so stores of teacher outputs stay valid."""
    return {name: getattr(data, name) for name in ("reprob", "remode", "recount")} if data.reprob else {}


# macOS cannot wait for a signal and see its sender: there SIGTERM ends the readers.
_OUTLIVED = {signal.SIGINT, signal.SIGTERM} if hasattr(signal, "sigwaitinfo") else {signal.SIGINT}


@contextlib.contextmanager
def _held_signals() -> Iterator[None]:
    """A reader that starts here is not ended by a signal to the whole process group: the run saves its state, then ends it itself.

    Held from before the start, as libraries start threads of their own in a forked process.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _OUTLIVED)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_reader(_: int) -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, _OUTLIVED)  # where it was not forked
    parent = multiprocessing.parent_process()
    if signal.SIGTERM not in _OUTLIVED or parent is None:
        return

    def wait() -> None:
        # multiprocessing ends a reader that is still there at the parent's exit with a SIGTERM, and waits for it.
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent.pid:
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


def _picture(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels)


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
    defaults = _per_channel(defaults or Defaults(), data.in_chans)
    place = data.data_dir or (str(EMBEDDED / "fashion_mnist") if data.dataset == "embedded" else data.dataset)
    with main_first():
        splits = open_splits(place, data.dataset_config, local=data.data_dir is not None)
    train = read_split(data, splits, data.train_split, say)
    test_name = data.eval_split or next((name for name in EVAL_SPLITS if name in splits and name != data.train_split), None)
    test = read_split(data, splits, test_name, lambda _: None, train.class_names) if test_name else None
    check_classes(train, test)
    kept, held = _cut_validation(train, data.val_split, seed)
    with main_first():
        return _build(data, seed, defaults, train, test, kept, held, say)


def _build(
    data: Data,
    seed: int,
    defaults: Defaults,
    train: AnyRows,
    test: AnyRows | None,
    kept: Tensor,
    held: Tensor,
    say: Callable[[str], None],
) -> Images:
    digests = {rows.split: rows.digest() for rows in (train, test) if rows is not None}
    labels = {rows.split: torch.from_numpy(rows.labels) for rows in (train, test) if rows is not None}
    own = train.pixels(0, data.in_chans).shape[:2]
    size = (data.img_size, data.img_size) if data.img_size else own
    if max(*own, *size) <= SMALL:
        _check_small(data)
        stored = {
            rows.split: _store(rows, digests[rows.split], data.in_chans, size, resize=data.img_size is not None, say=say)
            for rows in (train, test)
            if rows is not None
        }
        mean, std = _statistics(data, defaults, stored[train.split], kept)
        stats = torch.tensor(mean)[:, None, None], torch.tensor(std)[:, None, None]

        def source(rows: AnyRows, ids: Tensor, training: bool) -> Source:
            images = stored[rows.split]
            return StoreSource(images, labels[rows.split], ids, digests[rows.split], data, stats, seed if training else None)
    else:
        from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

        grey = data.in_chans == 1
        mean = data.mean or defaults.mean or (IMAGENET_DEFAULT_MEAN if not grey else (0.5,))
        std = data.std or defaults.std or (IMAGENET_DEFAULT_STD if not grey else (0.5,))
        side = data.img_size or defaults.img_size
        size = (side, side)
        data = replace(data, interpolation=data.interpolation or defaults.interpolation)

        def source(rows: AnyRows, ids: Tensor, training: bool) -> Source:
            transform = _transform(data, defaults, (data.in_chans, side, side), mean, std, training)
            return FileSource(rows, labels[rows.split], ids, digests[rows.split], data, transform, seed if training else None)

    everything = torch.arange(len(test)) if test is not None else None
    return Images(
        train=source(train, kept, True),
        val=source(train, held, False) if len(held) else None,
        test=source(test, everything, False) if test is not None and everything is not None else None,
        num_samples=len(train),
        labels=labels[train.split],
        class_names=train.class_names,
        input_size=(data.in_chans, *size),
        mean=tuple(mean),
        std=tuple(std),
    )


def _check_small(data: Data) -> None:
    """Refuse what only timm's transforms of large images do."""
    for name in ("aa", "color_jitter", "train_interpolation"):
        if getattr(data, name):
            raise DataError(
                f"{name}={getattr(data, name)}: images of {SMALL} pixels or less are augmented as a batch, by pad, hflip, reprob, "
                f"mixup and cutmix alone. Leave {name} out, or give --img-size {SMALL + 1} or more."
            )


def _cut_validation(train: AnyRows, share: float, seed: int) -> tuple[Tensor, Tensor]:
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


def _store(rows: AnyRows, digest: str, in_chans: int, size: tuple[int, int], *, resize: bool, say: Callable[[str], None]) -> Tensor:
    """The split's images, uint8 [n, c, h, w], memory-mapped from a file in the cache that is written once."""
    from safetensors.torch import load_file, save_file
    from tqdm import tqdm

    key = hashlib.sha256(f"{digest}:{in_chans}:{size}:2".encode()).hexdigest()[:32]
    path = cache_folder() / "images" / f"{key}.safetensors"
    if not path.exists():
        pixels = torch.empty(len(rows), in_chans, *size, dtype=torch.uint8)
        quick = len(rows) < 20_000
        for row in tqdm(range(len(rows)), desc=f"decoding {rows.split}", unit="img", leave=False, disable=quick):
            image = rows.pixels(row, in_chans)
            if image.shape[:2] != size:
                if not resize:
                    raise DataError(
                        f"{rows.name(row)} has {image.shape[0]}x{image.shape[1]} pixels, the first image {size[0]}x{size[1]}: "
                        "give --img-size to resize all to one size."
                    )
                resized = _picture(image).resize((size[1], size[0]), Image.Resampling.BICUBIC)
                image = np.asarray(resized).reshape(*size, in_chans)
            pixels[row] = torch.from_numpy(image.copy()).permute(2, 0, 1)
        write_whole(path, lambda draft: save_file({"images": pixels}, draft))
        say(f"stored {len(rows)} images of {rows.split!r}, {pixels.numel() / 1e6:.0f} MB")
    return load_file(path)["images"]


def _per_channel(defaults: Defaults, in_chans: int) -> Defaults:
    """Mean and std of colour weights for grey images, or the other way round: their average, as timm sums the weights."""

    def fit(values: tuple[float, ...] | None) -> tuple[float, ...] | None:
        return values if values is None or len(values) == in_chans else (sum(values) / len(values),) * in_chans

    return replace(defaults, mean=fit(defaults.mean), std=fit(defaults.std))


def _statistics(data: Data, defaults: Defaults, images: Tensor, ids: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel: the recipe's, else the weights', else measured on the images of `ids`."""
    mean, std = data.mean or defaults.mean, data.std or defaults.std
    if mean is None or std is None:
        levels = torch.arange(256, dtype=torch.float64) / 255
        counts = torch.zeros(images.shape[1], 256, dtype=torch.float64)
        for part in ids.split(8192):
            counts += torch.stack([torch.bincount(plane.flatten(), minlength=256) for plane in images[part].unbind(1)])
        counts /= counts.sum(1, keepdim=True)
        average = counts @ levels
        spread = (counts @ levels.square() - average.square()).clamp_min(1e-8).sqrt()
        mean = mean or tuple(round(v, 4) for v in average.tolist())
        std = std or tuple(max(round(v, 4), 1e-4) for v in spread.tolist())
    return mean, std


def _transform(
    data: Data, defaults: Defaults, size: tuple[int, int, int], mean: Sequence[float], std: Sequence[float], training: bool
) -> Callable[[Any], Tensor]:
    from timm.data.transforms_factory import create_transform

    common: dict[str, Any] = {
        "input_size": size,
        "mean": tuple(mean),
        "std": tuple(std),
        "interpolation": data.interpolation or defaults.interpolation,
    }
    if not training:
        return create_transform(**common, crop_pct=data.crop_pct or defaults.crop_pct)
    common |= {"scale": data.scale, "ratio": data.ratio, "color_jitter": data.color_jitter or None}
    common |= {"re_prob": data.reprob, "re_mode": data.remode, "re_count": data.recount}
    if data.train_interpolation is not None:
        common["interpolation"] = data.train_interpolation
    return create_transform(**common, is_training=True, hflip=data.hflip, auto_augment=data.aa)
