"""Sources: batches of images by sample id. Small images come from memory, large ones from DataLoader workers."""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from PIL import Image
from torch import Tensor

from mgd_timm.data.corrupt_images import SKIP_HINT, CheckedRows
from mgd_timm.data.decode import LazyImage
from mgd_timm.data.loader import ReadAhead
from mgd_timm.data.rng import mix
from mgd_timm.data.sampler import epoch_order
from mgd_timm.data.transforms import ImageTransform, augment_small, normalise
from mgd_timm.features import Batch
from mgd_timm.recipe.data import Data


@runtime_checkable  # for the checks of shapes under pytest
class Source(Protocol):
    """Images of one split, addressed by sample id."""

    ids: Tensor
    """Sample ids [n]: rows of the split."""
    labels: Tensor
    """Labels of `ids`: [n] class ids, or [n, k] distributions."""
    digest: str
    """sha256 of images and labels."""

    def batches(self, micro_batches: Sequence[Tensor], epoch: int, device: torch.device) -> Iterator[Batch]:
        """Yield one Batch for each tensor of sample ids.

        An id plus r times `num_samples` (of `Images`) is the r-th further augmentation of the same image.
        """
        ...


def epoch_ids(source: Source, seed: int, epoch: int) -> Tensor:
    """Return the ids of an epoch, in order: the source's own `order`, or a permutation of its ids."""
    order = getattr(source, "order", None)
    return order(seed, epoch) if order is not None else source.ids[epoch_order(len(source.ids), seed, epoch)]


class SmallImageSource:
    """Small images, uint8 [n, c, h, w] in memory, augmented batch by batch on the device.

    Args:
        images: All images of the split.
        labels: Their labels, [n] or [n, k].
        ids: Sample ids of this source.
        digest: Digest of the split.
        data: Its options of augmentation.
        stats: Mean and standard deviation, [c, 1, 1], of pixels in [0, 1].
        seed: Seed of the augmentation; None returns the images as they are.
        check: Called with the rows [n] of images before they are read.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        ids: Tensor,
        digest: str,
        data: Data,
        stats: tuple[Tensor, Tensor],
        seed: int | None,
        check: Callable[[Tensor], None] = lambda _: None,
    ) -> None:
        self.images, self.all_labels, self.ids, self.digest, self.check = images, labels, ids, digest, check
        self.labels = labels[ids]
        self.data, self.stats, self.seed = data, stats, seed
        self._on_device: dict[torch.device, tuple[Tensor, Tensor]] = {}

    @property
    def augmentation(self) -> dict[str, Any]:
        """Options that an augmentation depends on besides images, mean, std and size; as JSON values."""
        return {"pad": self.data.pad, "hflip": self.data.hflip, **_erasing_options(self.data)}

    def with_seed(self, seed: int) -> "SmallImageSource":
        """Return the same images, augmented with another seed."""
        other = copy.copy(self)
        other.seed = seed
        return other

    def batches(self, micro_batches: Sequence[Tensor], epoch: int, device: torch.device) -> Iterator[Batch]:
        """Yield a Batch for each tensor of sample ids, augmented where the source has a seed."""
        mean, std = (s.to(device) for s in self.stats)
        images, labels = self._move(device)
        sizes = [len(ids) for ids in micro_batches]
        moved = torch.cat(list(micro_batches)).to(device).split(sizes) if sizes else ()  # one transfer per epoch
        for ids, keys in zip(micro_batches, moved, strict=True):
            rows = keys % len(self.images)
            if not images.is_cuda:
                self.check(ids % len(images))
            on_device = images.device == rows.device  # else they are too many for the GPU
            batch = images[rows] if on_device else _to_device(images[ids % len(images)], device)
            if self.seed is None:
                pixels = normalise(batch, mean, std)
            else:
                pixels = augment_small(batch, keys, self.seed, epoch, self.data, mean, std)
            yield Batch(pixels, labels[rows], rows)

    def _move(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return images and labels on the device, so that no step waits for a transfer. Images that would take more
        than a quarter of a GPU's free memory stay on the host."""
        if device.type != "cuda":
            return self.images, self.all_labels.to(device)
        if device not in self._on_device:
            fits = self.images.numel() < torch.cuda.mem_get_info(device)[0] // 4
            if fits:
                self.check(torch.arange(len(self.images)))
            self._on_device[device] = (self.images.to(device) if fits else self.images, self.all_labels.to(device))
        return self._on_device[device]


class LargeImageSource:
    """Large images, decoded and augmented in DataLoader workers, with random draws seeded by (seed, epoch, id).

    Workers send bytes, which the device normalises and erases boxes of.

    `ids` leaves out corrupt images. If all rows are read, each corrupt one is a black image.

    Args:
        rows: The split.
        ids: Sample ids of this source.
        data: Its `in_chans` and `workers`, and its options of augmentation.
        transform: Augments and normalises.
        seed: Seed of the augmentation; None does not augment.
    """

    def __init__(self, rows: CheckedRows, ids: Tensor, data: Data, transform: ImageTransform, seed: int | None) -> None:
        self.rows, self.ids, self.digest = rows, ids, rows.digest
        self.all_labels = rows.labels
        self.labels = self.all_labels[ids]
        self.data, self.transform, self.seed = data, transform, seed
        self._workers = ReadAhead(_LargeImages(rows, data.in_chans, transform, seed), data.workers)

    @property
    def augmentation(self) -> dict[str, Any]:
        """Options that an augmentation depends on besides images, mean, std and size; as JSON values."""
        names = ("scale", "ratio", "hflip", "aa", "color_jitter", "interpolation")
        values = {name: getattr(self.data, name) for name in names} | _erasing_options(self.data)
        if self.data.train_interpolation is not None:
            values["interpolation"] = self.data.train_interpolation
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    def with_seed(self, seed: int) -> "LargeImageSource":
        """Return the same images, augmented with another seed."""
        return LargeImageSource(self.rows, self.ids, self.data, self.transform, seed)

    def batches(self, micro_batches: Sequence[Tensor], epoch: int, device: torch.device) -> Iterator[Batch]:
        """Yield a Batch for each tensor of sample ids, read ahead by workers."""
        normalise = self.transform.normaliser(self.seed, epoch, device)
        count, sizes = len(self.all_labels), [len(ids) for ids in micro_batches]
        moved = torch.cat(list(micro_batches)).to(device).split(sizes) if sizes else ()  # one transfer per epoch
        keys = ([(epoch, number) for number in ids.tolist()] for ids in micro_batches)
        batches = self._workers.batches(keys, device, hint=SKIP_HINT)
        for ids, numbers, pixels in zip(micro_batches, moved, batches, strict=True):
            images = normalise(pixels.to(device, non_blocking=True), numbers)
            yield Batch(images, _to_device(self.all_labels[ids % count], device), numbers % count)


@dataclass(frozen=True)
class _LargeImages:
    """What the workers of a LargeImageSource read: uint8 [c, h, w] by (epoch, id)."""

    rows: CheckedRows
    in_chans: int
    transform: ImageTransform
    seed: int | None

    def __getitem__(self, key: tuple[int, int]) -> Tensor:
        epoch, number = key
        row = number % len(self.rows.rows)
        if row in self.rows.corrupt:
            image = LazyImage(Image.new("RGB" if self.in_chans == 3 else "L", (8, 8)), self.in_chans, "")
        else:
            image = self.rows.rows.image(row, self.in_chans)
        return self.transform(image, None if self.seed is None else mix(self.seed, epoch, number))


def _to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Move a tensor to a device, from pinned memory to a GPU, so that no step waits for the transfer."""
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


def _erasing_options(data: Data) -> dict[str, Any]:
    """Return the options of random erasing, or none without it, so that they do not count."""
    return {name: getattr(data, name) for name in ("reprob", "remode", "recount")} if data.reprob else {}
