"""Sources: batches of images by sample id. Small images come from memory, large ones from DataLoader workers."""

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from mgd_timm.data.corrupt_images import SKIP_HINT, CheckedRows
from mgd_timm.data.decode import to_pil
from mgd_timm.data.loader import read_ahead
from mgd_timm.data.rng import mix, seeded
from mgd_timm.data.sampler import epoch_order
from mgd_timm.data.transforms import augment_small, normalise
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
            if images.device == rows.device:
                batch = images[rows]
            else:  # too many for the GPU: pinned, so that no step waits for the transfer
                batch = images[ids % len(images)]
                batch = (batch.pin_memory() if device.type == "cuda" else batch).to(device, non_blocking=True)
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
    """Large images, decoded and transformed in DataLoader workers, with random draws seeded by (seed, epoch, id).

    `ids` leaves out corrupt images. If all rows are read, each corrupt one is a black image.

    Args:
        rows: The split.
        ids: Sample ids of this source.
        data: Its `in_chans` and `workers`, and its options of augmentation.
        transform: A PIL image to a normalised tensor [c, h, w].
        seed: Seed of the transform's draws; None does not seed them.
    """

    def __init__(
        self, rows: CheckedRows, ids: Tensor, data: Data, transform: Callable[[Any], Tensor], seed: int | None
    ) -> None:
        self.rows, self.ids, self.digest = rows, ids, rows.digest
        self.all_labels = rows.labels
        self.labels = self.all_labels[ids]
        self.data, self.transform, self.seed = data, transform, seed

    @property
    def augmentation(self) -> dict[str, Any]:
        """Options that an augmentation depends on besides images, mean, std and size; as JSON values."""
        names = ("scale", "ratio", "hflip", "aa", "color_jitter", "interpolation")
        values = {name: getattr(self.data, name) for name in names} | _erasing_options(self.data)
        if self.data.train_interpolation is not None:
            values["interpolation"] = self.data.train_interpolation
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    def with_seed(self, seed: int) -> "LargeImageSource":
        """Return the same images, transformed with another seed."""
        other = copy.copy(self)
        other.seed = seed
        return other

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        epoch, number = key
        row, channels = number % len(self.all_labels), self.data.in_chans
        if row in self.rows.corrupt:
            pixels = np.zeros((8, 8, channels), np.uint8)
        else:
            pixels = self.rows.rows.pixels(row, channels)
        with seeded(None if self.seed is None else mix(self.seed, epoch, number)):
            return self.transform(to_pil(pixels)), row

    def batches(self, micro_batches: Sequence[Tensor], epoch: int, device: torch.device) -> Iterator[Batch]:
        """Yield a Batch for each tensor of sample ids, read ahead by workers."""
        keys = ([(epoch, row) for row in ids.tolist()] for ids in micro_batches)
        for images, rows in read_ahead(self, keys, self.data.workers, device, hint=SKIP_HINT):
            labels = self.all_labels[rows].to(device, non_blocking=True)
            yield Batch(images.to(device, non_blocking=True), labels, rows.to(device, non_blocking=True))


def _erasing_options(data: Data) -> dict[str, Any]:
    """Return the options of random erasing, or none without it, so that they do not count."""
    return {name: getattr(data, name) for name in ("reprob", "remode", "recount")} if data.reprob else {}
