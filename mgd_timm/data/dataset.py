"""`load_images`: load a data set, from files or the hub, as sources of training, validation and test images.

The steps: `readers` find splits and read rows, `corrupt_images` checks them, `image_cache` decodes small images once,
`sources` makes batches of them.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from mgd_timm.data.corrupt_images import CheckedRows, check_number_of_corrupt, check_rows
from mgd_timm.data.decode import DataError
from mgd_timm.data.description import FoundRows, describe, log_description, may_be_small, read_rows, read_sizes
from mgd_timm.data.duplicates import find_duplicates
from mgd_timm.data.image_cache import CachedImages, LargeImageError, load_or_decode, size_error
from mgd_timm.data.loader import allowed_workers
from mgd_timm.data.readers.open import is_local, scan_local_folder
from mgd_timm.data.readers.rows import Rows, default_eval_split
from mgd_timm.data.readers.splits import LocalFolder
from mgd_timm.data.readers.streams import Stream, StreamSource, open_streams, read_stream, stream_rows
from mgd_timm.data.rng import mix
from mgd_timm.data.sources import LargeImageSource, SmallImageSource, Source
from mgd_timm.data.transforms import SMALL, check_small_options, timm_transform
from mgd_timm.distributed.collectives import broadcast_from_main, local_main_first
from mgd_timm.features import Defaults
from mgd_timm.recipe.data import EMBEDDED, Data

Log = Callable[[str], None]


@dataclass(frozen=True)
class Images:
    """A data set as sources of batches."""

    train: Source
    val: Source | None
    test: Source | None
    num_samples: int
    """Rows of the training split, with the images held out for validation."""
    labels: Tensor | None
    """Labels of these rows, [n] class ids or [n, k] distributions. None for a stream."""
    class_names: tuple[str, ...]
    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    description: dict[str, Any]
    """What was understood of the data: the object that `mgd-timm data --json` prints."""
    corrupt: tuple[str, ...] = ()
    """Name and error of each corrupt image that is skipped."""

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    def trained_labels(self) -> Tensor | None:
        """Return class ids by sample id, int64 [n]: -1 for samples that are not trained on, the most likely class of a
        distribution. None for a stream."""
        if self.labels is None:
            return None
        known = self.labels.argmax(1) if self.labels.ndim == 2 else self.labels
        return torch.full_like(known, -1).index_copy_(0, self.train.ids, known[self.train.ids])

    @property
    def evaluation(self) -> Source | None:
        """Source to evaluate each epoch: the images held out for validation if there are any, else the test split."""
        return self.val if self.val is not None else self.test


def describe_data(data: Data, seed: int, *, log: Log = print) -> dict[str, Any]:
    """Return what was understood of a data set, without reading all images, as JSON values.

    Args:
        data: Its options.
        seed: Seed of the validation split.
        log: Logs one line.

    Returns:
        As `describe`, with "duplicates", the number of evaluation images that are also training images, and
        "duplicate_examples", names of the first ones.

    Raises:
        DataError: As `load_images`, but for images that are corrupt behind their header.
    """
    if data.streaming and not is_local(locate(data), data):
        raise DataError("a stream of the hub is not read before it is trained on: leave --streaming out.")
    found = read_rows(locate(data), data, log, scan_on_main(locate(data), data, None))
    ids = _hold_out(found.train, data.val_split, seed)
    splits, sizes = list[CheckedRows](), list[np.ndarray]()
    for rows in (found.train, found.test):
        if rows is not None:
            found_sizes, corrupt = read_sizes(rows)
            splits.append(CheckedRows(rows, "", corrupt))
            sizes.append(found_sizes)
    check_number_of_corrupt(splits, data.max_bad, log)
    found.leave_out_corrupt(splits)
    ids = _Ids(splits[0].readable(ids.train), splits[0].readable(ids.val))
    _check_classes_left(splits[0], ids.train)
    small = (data.img_size or 0) <= SMALL and max(int(part.max(initial=0)) for part in sizes) <= SMALL
    in_memory = small and not data.streaming
    if in_memory and data.img_size is None:
        _check_one_size(splits, sizes)
    kept = [split.readable(torch.arange(len(split.rows))).numpy() for split in splits]
    held_out, left, tested = ids.val.numpy(), ids.train.numpy(), kept[-1]
    described = describe(found, in_memory, held_out, left, tested)
    duplicates: list[tuple[str, str]] = []
    if len(held_out):
        duplicates = find_duplicates(found.train, left, found.train, held_out)
    elif found.test is not None:
        duplicates = find_duplicates(found.train, left, found.test, tested)
    return {**described, "duplicates": len(duplicates), "duplicate_examples": duplicates[:5]}


def load_images(
    data: Data,
    seed: int,
    defaults: Defaults | None = None,
    *,
    log: Log = print,
    accelerator: Accelerator | None = None,
) -> Images:
    """Load a data set.

    Args:
        data: Options of the data set and its augmentation.
        seed: Seed of augmentation and of the validation split.
        defaults: The models' size, mean, std, interpolation and crop, for what `data` leaves open.
        log: Logs one line.
        accelerator: Of the run. One process scans a local folder for all, and one on each machine writes the cache.

    Raises:
        DataError: There is no such data set, split or column, a class has no images, or images cannot be used.
    """
    data = replace(data, workers=allowed_workers(data.workers, log))
    defaults = _match_channels(defaults or Defaults(), data.in_chans)
    location = locate(data)
    local = scan_on_main(location, data, accelerator)
    if data.streaming:
        return _load_streams(data, seed, defaults, location, local, log)
    main_first = partial(local_main_first, accelerator) if accelerator is not None else contextlib.nullcontext
    with main_first():
        found = read_rows(location, data, log, local)
    ids = _hold_out(found.train, data.val_split, seed)
    with main_first():
        checked = [check_rows(rows, data, log) for rows in (found.train, found.test) if rows is not None]
        corrupt = check_number_of_corrupt(checked, data.max_bad, log)
        found.leave_out_corrupt(checked)
        ids = _Ids(checked[0].readable(ids.train), checked[0].readable(ids.val))
        _check_classes_left(checked[0], ids.train)
        images = _build(data, seed, defaults, checked, ids, found, log)
    log_description(images.description, found.ignored, log)
    return replace(images, corrupt=corrupt)


def scan_on_main(location: str, data: Data, accelerator: Accelerator | None) -> LocalFolder | None:
    """Scan a local folder on the main process, and return what it finds on all; None for a hub id."""
    if not is_local(location, data):
        return None
    scan = partial(scan_local_folder, location, data)
    return scan() if accelerator is None else broadcast_from_main(accelerator, scan)


def locate(data: Data) -> str:
    """Return the folder or the hub id of a data set."""
    return data.data_dir or (str(EMBEDDED / "fashion_mnist") if data.dataset == "embedded" else data.dataset)


@dataclass(frozen=True)
class _Ids:
    """Sample ids of the training split, to train and to validate on."""

    train: Tensor
    val: Tensor


def _hold_out(train: Rows, share: float, seed: int) -> _Ids:
    """Hold out a share of the images of every class for validation."""
    every = torch.arange(len(train))
    if not share:
        return _Ids(every, every[:0])
    classes = train.labels if train.labels.ndim == 1 else train.labels.argmax(1)
    held_out = torch.zeros(len(train), dtype=torch.bool)
    generator = torch.Generator().manual_seed(mix(seed, 2))
    for label in range(len(train.class_names)):
        ids = torch.from_numpy(np.flatnonzero(classes == label))
        held_out[ids[torch.randperm(len(ids), generator=generator)][: round(share * len(ids))]] = True
    if not held_out.any() or held_out.all():
        raise DataError(
            f"--val-split {share} of {len(train)} images leaves no image to train or to evaluate on: choose another "
            "share, 0 to 0.5."
        )
    return _Ids(every[~held_out], every[held_out])


def _check_classes_left(train: CheckedRows, ids: Tensor) -> None:
    """Raise DataError if all images of a class are corrupt."""
    if train.corrupt and train.labels.ndim == 1:
        counts = torch.bincount(train.labels[ids], minlength=len(train.rows.class_names))
        for label in (counts == 0).nonzero().flatten().tolist():
            raise DataError(
                f"split {train.rows.split!r}: no image of class {train.rows.class_names[label]!r} can be decoded: "
                "replace them, or move the class out of the data."
            )


def _check_one_size(splits: list[CheckedRows], sizes: list[np.ndarray]) -> None:
    """Raise DataError if images of several sizes are to be kept in memory."""
    first: tuple[int, int] | None = None
    for split, found in zip(splits, sizes, strict=True):
        for row in split.readable(torch.arange(len(found))).tolist():
            height, width = found[row].tolist()
            first = first or (height, width)
            if (height, width) != first:
                raise size_error(split.rows.name(row), (height, width), first)


@dataclass(frozen=True)
class _Format:
    """Size, mean and std of the images in a batch, and the function that builds a source."""

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    source: Callable[[CheckedRows, Tensor, bool], Source]
    """(split, sample ids, whether to augment) -> Source."""


def _build(
    data: Data, seed: int, defaults: Defaults, splits: list[CheckedRows], ids: _Ids, found: FoundRows, log: Log
) -> Images:
    train, test = splits[0], splits[1] if len(splits) > 1 else None
    in_memory = (data.img_size or 0) <= SMALL and all(
        may_be_small(split.rows, tuple(split.corrupt)) for split in splits
    )
    if in_memory:
        first = int(train.readable(torch.arange(len(train.rows)))[0])
        height, width = train.pixels(first, data.in_chans).shape[:2]
        size = (data.img_size, data.img_size) if data.img_size else (height, width)
        try:
            built = _build_small(data, seed, defaults, splits, size, ids.train, log)
        except LargeImageError:
            in_memory = False
    if not in_memory:
        built = _build_large(data, seed, defaults)
    tested = test.readable(torch.arange(len(test.rows))) if test is not None else ids.val
    return Images(
        train=built.source(train, ids.train, True),
        val=built.source(train, ids.val, False) if len(ids.val) else None,
        test=built.source(test, tested, False) if test is not None else None,
        num_samples=len(train.rows),
        labels=train.labels,
        class_names=train.rows.class_names,
        input_size=(data.in_chans, *built.size),
        mean=built.mean,
        std=built.std,
        description=describe(found, in_memory, ids.val.numpy(), ids.train.numpy(), tested.numpy()),
    )


def _build_small(
    data: Data,
    seed: int,
    defaults: Defaults,
    splits: list[CheckedRows],
    size: tuple[int, int],
    train_ids: Tensor,
    log: Log,
) -> _Format:
    """Decode small images once into the cache."""
    check_small_options(data)
    cached = {split.rows.split: load_or_decode(split, data, size, log) for split in splits}
    mean, std = data.mean or defaults.mean, data.std or defaults.std
    if mean is None or std is None:
        measured = _measure_mean_std(cached[splits[0].rows.split], train_ids)
        mean, std = mean or measured[0], std or measured[1]
    stats = torch.tensor(mean)[:, None, None], torch.tensor(std)[:, None, None]

    def source(split: CheckedRows, ids: Tensor, training: bool) -> Source:
        images = cached[split.rows.split]
        own_seed = seed if training else None
        return SmallImageSource(images.images, split.labels, ids, split.digest, data, stats, own_seed, images.check)

    return _Format(size, tuple(mean), tuple(std), source)


def _build_large(data: Data, seed: int, defaults: Defaults) -> _Format:
    if data.in_chans not in (1, 3):
        raise DataError(
            f"--in-chans {data.in_chans}: images of more than {SMALL} pixels are read with 1 or 3 channels: give "
            f"arrays of {SMALL} pixels or less."
        )
    side = data.img_size or defaults.img_size
    mean, std = _known_mean_std(data, defaults)
    data = replace(data, interpolation=data.interpolation or defaults.interpolation)

    def source(split: CheckedRows, ids: Tensor, training: bool) -> Source:
        transform = timm_transform(data, defaults, (data.in_chans, side, side), mean, std, training)
        return LargeImageSource(split, ids, data, transform, seed if training else None)

    return _Format((side, side), mean, std, source)


def _load_streams(
    data: Data, seed: int, defaults: Defaults, location: str, local: LocalFolder | None, log: Log
) -> Images:
    train: Stream
    test: Stream | None = None
    described: dict[str, Any] = {}
    if local is not None:
        found = read_rows(location, data, log, local)
        train = stream_rows(found.train, data, training=True)
        if found.test is not None:
            test = stream_rows(found.test, data, training=False)
        described = describe(found, in_memory=False)
        log_description(described, found.ignored, log)
    else:
        splits = open_streams(location, data.dataset_config)
        train = read_stream(data, splits, data.train_split, log)
        name = data.eval_split or default_eval_split(splits, data.train_split)
        if name is not None:
            test = read_stream(data, splits, name, lambda _: None, train.class_names)
    side = data.img_size or defaults.img_size
    mean, std = _known_mean_std(data, defaults)
    augment, plain = (
        timm_transform(data, defaults, (data.in_chans, side, side), mean, std, training) for training in (True, False)
    )
    return Images(
        train=StreamSource(train, data, augment, seed),
        val=None,
        test=StreamSource(test, data, plain, None) if test is not None else None,
        num_samples=train.count,
        labels=None,
        class_names=train.class_names,
        input_size=(data.in_chans, side, side),
        mean=mean,
        std=std,
        description=described,
    )


def _match_channels(defaults: Defaults, in_chans: int) -> Defaults:
    """Average mean and std over channels if `in_chans` is another number of them, as timm sums the weights."""

    def fit(values: tuple[float, ...] | None) -> tuple[float, ...] | None:
        return values if values is None or len(values) == in_chans else (sum(values) / len(values),) * in_chans

    return replace(defaults, mean=fit(defaults.mean), std=fit(defaults.std))


def _known_mean_std(data: Data, defaults: Defaults) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation per channel: the recipe's, else the weights', else ImageNet's."""
    from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

    grey = data.in_chans == 1
    mean = data.mean or defaults.mean or (IMAGENET_DEFAULT_MEAN if not grey else (0.5,))
    std = data.std or defaults.std or (IMAGENET_DEFAULT_STD if not grey else (0.5,))
    return mean, std


def _measure_mean_std(cached: CachedImages, ids: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation per channel of the images of `ids`, of pixels in [0, 1]."""
    levels = torch.arange(256, dtype=torch.float64) / 255
    counts = torch.zeros(cached.images.shape[1], 256, dtype=torch.float64)
    for rows in ids.split(8192):
        cached.check(rows)
        planes = cached.images[rows].unbind(1)
        counts += torch.stack([torch.bincount(plane.flatten(), minlength=256) for plane in planes])
    counts /= counts.sum(1, keepdim=True)
    mean = counts @ levels
    std = (counts @ levels.square() - mean.square()).clamp_min(1e-8).sqrt()
    return tuple(round(v, 4) for v in mean.tolist()), tuple(max(round(v, 4), 1e-4) for v in std.tolist())
