"""Images in: the embedded default, hub ids, parquet or arrow files, image folders; always yields Batch.

Small images of one size are decoded once into a memory-mapped uint8 store and augmented as a batch on the device;
others go through timm's transforms in worker processes.
"""

import contextlib
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mgd_timm.data.corrupt_images import check_number, damaged
from mgd_timm.data.decode import EVAL_SPLITS, DataError, cache_folder, decode
from mgd_timm.data.image_cache import ImageStore, stored_images
from mgd_timm.data.readers.streams import StreamSource, open_streams, read_stream
from mgd_timm.data.readers.tables import AnyRows, check_classes, open_splits, read_split
from mgd_timm.data.rng import mix
from mgd_timm.data.sources import (
    WAY_OUT,
    FileSource,
    Source,
    StoreSource,
    epoch_ids,
    per_channel,
    picture,
    timm_transform,
    weights_statistics,
)
from mgd_timm.features import Defaults
from mgd_timm.recipe.data import EMBEDDED
from mgd_timm.recipe.recipe import Data

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
    "epoch_ids",
    "load_images",
]

SMALL = 96  # pixels: up to here an image costs less to keep than to decode again


@dataclass(frozen=True)
class Images:
    """A data set, ready to train on."""

    train: Source
    val: Source | None
    test: Source | None
    num_samples: int
    labels: Tensor | None
    """Labels of all `num_samples` rows of the training split, a validation cut among them, by sample id. Of a stream
    None."""
    class_names: tuple[str, ...]
    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    bad: tuple[str, ...] = ()
    """Names of the images that are left out as damaged, and why."""

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    def trained_labels(self) -> Tensor | None:
        """Class ids by sample id, the likeliest of a distribution; -1 for those held out of training. Of a stream
        None."""
        if self.labels is None:
            return None
        known = self.labels.argmax(1) if self.labels.ndim == 2 else self.labels
        return torch.full_like(known, -1).index_copy_(0, self.train.ids, known[self.train.ids])

    @property
    def watched(self) -> Source | None:
        """What is evaluated each epoch: the validation cut where there is one, else the test split."""
        return self.val if self.val is not None else self.test


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
    defaults = per_channel(defaults or Defaults(), data.in_chans)
    place = data.data_dir or (str(EMBEDDED / "fashion_mnist") if data.dataset == "embedded" else data.dataset)
    if data.streaming:
        return _stream(data, seed, defaults, open_streams(place, data.dataset_config), say)
    with main_first():
        splits = open_splits(place, data.dataset_config, local=data.data_dir is not None)
        train = read_split(data, splits, data.train_split, say)
        test_name = data.eval_split or next(
            (name for name in EVAL_SPLITS if name in splits and name != data.train_split), None
        )
        test = read_split(data, splits, test_name, lambda _: None, train.class_names) if test_name else None
    check_classes(train, test)
    kept, held = _cut_validation(train, data.val_split, seed)
    with main_first():
        parts = {rows.split: _examine(rows, data, say) for rows in (train, test) if rows is not None}
        bad = check_number([(part.rows, part.bad) for part in parts.values()], data.max_bad, say)
        found = _build(
            data, seed, defaults, parts[train.split], parts[test.split] if test is not None else None, (kept, held), say
        )
    return replace(found, bad=bad)


@dataclass(frozen=True)
class _Part:
    """A split that was looked through."""

    rows: AnyRows
    digest: str
    labels: Tensor
    bad: dict[int, str]

    def good(self, ids: Tensor) -> Tensor:
        """Those of the ids that can be decoded."""
        return ids[[int(i) not in self.bad for i in ids]] if self.bad else ids

    def pixels(self, row: int, in_chans: int) -> np.ndarray:
        """A decoded image; the error of a damaged one names both ways out."""
        try:
            return self.rows.pixels(row, in_chans)
        except DataError as error:
            raise DataError(f"{error} {WAY_OUT}") from error


def _examine(rows: AnyRows, data: Data, say: Callable[[str], None]) -> _Part:
    digest = rows.digest()
    bad = damaged(rows, digest, data.in_chans, data.workers, say) if data.max_bad else {}
    return _Part(rows, digest, torch.from_numpy(rows.labels), bad)


def _build(
    data: Data,
    seed: int,
    defaults: Defaults,
    train: _Part,
    test: _Part | None,
    cut: tuple[Tensor, Tensor],
    say: Callable[[str], None],
) -> Images:
    """Sources of the images; `cut` holds the rows to train and to validate on."""
    kept, held = (train.good(ids) for ids in cut)
    _check_left(train, kept)
    first = int(train.good(torch.arange(len(train.rows)))[0])
    own = train.pixels(first, data.in_chans).shape[:2]
    size = (data.img_size, data.img_size) if data.img_size else own
    if max(*own, *size) <= SMALL:
        _check_small(data)
        stored = {part.rows.split: _store(part, data, size, say) for part in (train, test) if part is not None}
        mean, std = _statistics(data, defaults, stored[train.rows.split], kept)
        stats = torch.tensor(mean)[:, None, None], torch.tensor(std)[:, None, None]

        def source(part: _Part, ids: Tensor, training: bool) -> Source:
            own_seed, kept = seed if training else None, stored[part.rows.split]
            return StoreSource(kept.images, part.labels, ids, part.digest, data, stats, own_seed, kept.check)
    else:
        side = data.img_size or defaults.img_size
        size = (side, side)
        mean, std = weights_statistics(data, defaults)
        data = replace(data, interpolation=data.interpolation or defaults.interpolation)

        def source(part: _Part, ids: Tensor, training: bool) -> Source:
            transform = timm_transform(data, defaults, (data.in_chans, side, side), mean, std, training)
            own_seed = seed if training else None
            return FileSource(part.rows, part.labels, ids, part.digest, data, transform, own_seed, frozenset(part.bad))

    return Images(
        train=source(train, kept, True),
        val=source(train, held, False) if len(held) else None,
        test=source(test, test.good(torch.arange(len(test.rows))), False) if test is not None else None,
        num_samples=len(train.rows),
        labels=train.labels,
        class_names=train.rows.class_names,
        input_size=(data.in_chans, *size),
        mean=tuple(mean),
        std=tuple(std),
    )


def _stream(data: Data, seed: int, defaults: Defaults, splits: dict[str, Any], say: Callable[[str], None]) -> Images:
    """Sources of streams."""
    train = read_stream(data, splits, data.train_split, say)
    name = data.eval_split or next((name for name in EVAL_SPLITS if name in splits and name != data.train_split), None)
    test = read_stream(data, splits, name, lambda _: None, train.class_names) if name is not None else None
    side = data.img_size or defaults.img_size
    mean, std = weights_statistics(data, defaults)
    data = replace(data, interpolation=data.interpolation or defaults.interpolation)
    transforms = [
        timm_transform(data, defaults, (data.in_chans, side, side), mean, std, training) for training in (True, False)
    ]
    return Images(
        train=StreamSource(train, data, transforms[0], seed),
        val=None,
        test=StreamSource(test, data, transforms[1], None) if test is not None else None,
        num_samples=train.count,
        labels=None,
        class_names=train.class_names,
        input_size=(data.in_chans, side, side),
        mean=mean,
        std=std,
    )


def _check_left(train: _Part, kept: Tensor) -> None:
    """Refuse a class all of whose images are damaged."""
    if train.bad and train.labels.ndim == 1:
        counts = torch.bincount(train.labels[kept], minlength=len(train.rows.class_names))
        for label in (counts == 0).nonzero().flatten().tolist():
            raise DataError(
                f"split {train.rows.split!r}: no image of class {train.rows.class_names[label]!r} can be decoded: "
                "replace some."
            )


def _check_small(data: Data) -> None:
    """Refuse what only timm's transforms of large images do."""
    for name in ("aa", "color_jitter", "train_interpolation"):
        if getattr(data, name):
            raise DataError(
                f"{name}={getattr(data, name)}: images of {SMALL} pixels or less are augmented as a batch, by pad, "
                f"hflip, reprob, mixup and cutmix alone. Leave {name} out, or give --img-size {SMALL + 1} or more."
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


def _store(part: _Part, data: Data, size: tuple[int, int], say: Callable[[str], None]) -> ImageStore:
    """The split's images from the cache; damaged ones are black."""
    from tqdm import tqdm

    rows, in_chans = part.rows, data.in_chans
    made_of = f"{part.digest}:{in_chans}:{size}:3" + (f":{sorted(part.bad)}" if part.bad else "")
    key = hashlib.sha256(made_of.encode()).hexdigest()[:32]

    def decode_all() -> Tensor:
        pixels = torch.zeros(len(rows), in_chans, *size, dtype=torch.uint8)
        quick = len(rows) < 20_000
        for row in tqdm(range(len(rows)), desc=f"decoding {rows.split}", unit="img", leave=False, disable=quick):
            if row in part.bad:
                continue
            image = part.pixels(row, in_chans)
            if image.shape[:2] != size:
                if data.img_size is None:
                    raise DataError(
                        f"{rows.name(row)} has {image.shape[0]}x{image.shape[1]} pixels, the first image "
                        f"{size[0]}x{size[1]}: give --img-size to resize all to one size."
                    )
                resized = picture(image).resize((size[1], size[0]), Image.Resampling.BICUBIC)
                image = np.asarray(resized).reshape(*size, in_chans)
            pixels[row] = torch.from_numpy(image.copy()).permute(2, 0, 1)
        return pixels

    return stored_images(cache_folder() / "images" / key, (len(rows), in_chans, *size), decode_all, rows.split, say)


def _statistics(
    data: Data, defaults: Defaults, stored: ImageStore, ids: Tensor
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel: the recipe's, else the weights', else measured on the images of
    `ids`."""
    mean, std = data.mean or defaults.mean, data.std or defaults.std
    if mean is None or std is None:
        levels = torch.arange(256, dtype=torch.float64) / 255
        counts = torch.zeros(stored.images.shape[1], 256, dtype=torch.float64)
        for part in ids.split(8192):
            stored.check(part)
            counts += torch.stack(
                [torch.bincount(plane.flatten(), minlength=256) for plane in stored.images[part].unbind(1)]
            )
        counts /= counts.sum(1, keepdim=True)
        average = counts @ levels
        spread = (counts @ levels.square() - average.square()).clamp_min(1e-8).sqrt()
        mean = mean or tuple(round(v, 4) for v in average.tolist())
        std = std or tuple(max(round(v, 4), 1e-4) for v in spread.tolist())
    return mean, std
