"""What gives batches of images: small ones from memory, others decoded and transformed in reader processes."""

import contextlib
import copy
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import mgd_timm.data.loader  # noqa: F401  # readers are forked safely
from mgd_timm.data.decode import DataError
from mgd_timm.data.readers.tables import AnyRows
from mgd_timm.data.rng import mix, seeded
from mgd_timm.data.sampler import epoch_order
from mgd_timm.data.transforms import augment, erase, normalise
from mgd_timm.features import Batch, Defaults
from mgd_timm.recipe.recipe import Data

WAY_OUT = "Or leave it and its like out: --max-bad."


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


def per_channel(defaults: Defaults, in_chans: int) -> Defaults:
    """Mean and std of colour weights for grey images, or the other way round: their average, as timm sums the
    weights."""

    def fit(values: tuple[float, ...] | None) -> tuple[float, ...] | None:
        return values if values is None or len(values) == in_chans else (sum(values) / len(values),) * in_chans

    return replace(defaults, mean=fit(defaults.mean), std=fit(defaults.std))


def weights_statistics(data: Data, defaults: Defaults) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel: the recipe's, else the weights', else ImageNet's."""
    from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

    grey = data.in_chans == 1
    mean = data.mean or defaults.mean or (IMAGENET_DEFAULT_MEAN if not grey else (0.5,))
    std = data.std or defaults.std or (IMAGENET_DEFAULT_STD if not grey else (0.5,))
    return mean, std


class StoreSource:
    """Small images in a uint8 tensor [n, c, h, w], augmented as a batch on the device; `check` sees rows before they
    are read."""

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
        self._moved: dict[torch.device, tuple[Tensor, Tensor]] = {}

    @property
    def shown(self) -> dict[str, Any]:
        """What decides, beside images, mean, std and size, how (seed, epoch, sample id) shows an image; as JSON
        values."""
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
            if not images.is_cuda:
                self.check(ids % len(images))
            if images.device == there.device:
                shown = images[there]
            else:
                held = images[
                    ids % len(images)
                ]  # too many for the GPU: pinned, so that no step waits for them all the same
                shown = (held.pin_memory() if device.type == "cuda" else held).to(device, non_blocking=True)
            if self.seed is None:
                yield Batch(normalise(shown, mean, std), labels[there], there)
                continue
            shown = augment(shown, keys, self.seed, epoch, pad=self.data.pad, hflip=self.data.hflip)
            pictures = normalise(shown, mean, std)
            if self.data.reprob:
                pictures = erase(
                    pictures, keys, self.seed, epoch, self.data.reprob, self.data.remode, self.data.recount
                )
            yield Batch(pictures, labels[there], there)

    def _resident(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Images and labels on the device, so that no step waits for a transfer; images that would fill a GPU stay on
        the host."""
        if device.type != "cuda":
            return self.images, self.all_labels.to(device)
        if device not in self._moved:
            fits = self.images.numel() < torch.cuda.mem_get_info(device)[0] // 4
            if fits:
                self.check(torch.arange(len(self.images)))
            self._moved[device] = (self.images.to(device) if fits else self.images, self.all_labels.to(device))
        return self._moved[device]


class FileSource:
    """Large images, decoded and transformed in reader processes; each image's randomness is seeded by (seed, epoch,
    sample).

    Rows of `bad` cannot be decoded and are not among the ids; where all rows are asked for, a black image stands for
    each.
    """

    def __init__(
        self,
        rows: AnyRows,
        labels: Tensor,
        ids: Tensor,
        digest: str,
        data: Data,
        transform: Callable[[Any], Tensor],
        seed: int | None,
        bad: Set[int] = frozenset(),
    ) -> None:
        self.rows, self.all_labels, self.ids, self.digest, self.bad = rows, labels, ids, digest, bad
        self.labels = labels[ids]
        self.data, self.transform, self.seed = data, transform, seed

    @property
    def shown(self) -> dict[str, Any]:
        """What decides, beside images, mean, std and size, how (seed, epoch, sample id) shows an image; as JSON
        values."""
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
        row, chans = number % len(self.all_labels), self.data.in_chans
        image = picture(np.zeros((8, 8, chans), np.uint8) if row in self.bad else self.rows.pixels(row, chans))
        with seeded(None if self.seed is None else mix(self.seed, epoch, number)):
            return self.transform(image), row

    def batches(self, slots: Sequence[Tensor], epoch: int, device: torch.device) -> Iterator[Batch]:
        """Batches in the order of the slots, read ahead by the readers."""
        keys = [[(epoch, row) for row in ids.tolist()] for ids in slots]
        for images, rows in read_ahead(self, keys, self.data.workers, device, way_out=WAY_OUT):
            labels = self.all_labels[rows].to(device, non_blocking=True)
            yield Batch(images.to(device, non_blocking=True), labels, rows.to(device, non_blocking=True))


def _erasing(data: Data) -> dict[str, Any]:
    """Nothing where nothing is erased, as before there was erasing: so stores of teacher outputs stay valid."""
    return {name: getattr(data, name) for name in ("reprob", "remode", "recount")} if data.reprob else {}


def picture(pixels: np.ndarray) -> Image.Image:
    """An image of pixels [height, width, channels]."""
    return Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels)


def timm_transform(
    data: Data,
    defaults: Defaults,
    size: tuple[int, int, int],
    mean: Sequence[float],
    std: Sequence[float],
    training: bool,
) -> Callable[[Any], Tensor]:
    """timm's transform of a picture into a normalised tensor of the given size.

    Raises:
        DataError: An interpolation or a policy that timm does not know.
    """
    from timm.data.transforms import str_to_interp_mode
    from timm.data.transforms_factory import create_transform

    for name in ("interpolation", "train_interpolation"):
        value = getattr(data, name)
        if value is not None and not (name == "train_interpolation" and value == "random"):
            try:
                str_to_interp_mode(value)
            except KeyError as error:
                more = ", or random for either by chance" if name == "train_interpolation" else ""
                raise DataError(f"{name}={value!r}: expected bilinear or bicubic{more}.") from error

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
    try:
        return create_transform(**common, is_training=True, hflip=data.hflip, auto_augment=data.aa)
    except (AssertionError, ValueError, KeyError, NotImplementedError) as error:
        raise DataError(
            f"aa={data.aa!r}, color_jitter={data.color_jitter}: timm cannot make a transform of them ({error}): "
            "expected a policy such as rand-m9-mstd0.5-inc1, augmix-m3 or original, and a strength of 0 or more."
        ) from error


class _Reading:
    """What a reader process holds: `source[key]`, or the error that it raised, which would else come with a
    traceback."""

    def __init__(self, source: Any) -> None:
        self.source = source

    def __getitem__(self, key: Any) -> Any:
        try:
            return self.source[key]
        except DataError as error:
            return error


def _collated(items: list[Any]) -> Any:
    failed = next((item for item in items if isinstance(item, DataError)), None)
    return failed if failed is not None else torch.utils.data.default_collate(items)


def read_ahead(
    source: Any, keys: Iterable[list[Any]], workers: int, device: torch.device, *, way_out: str = ""
) -> Iterator[Any]:
    """`source[key]` of each key, collated list by list in their order, by reader processes ahead of their use.

    Args:
        source: Whose items are tensors and numbers.
        keys: Lists of keys, one a batch. They are drawn in this process, a few batches ahead.
        workers: Reader processes; 0 reads in this one.
        device: What the batches are for.
        way_out: What the error of an item goes on with.

    Raises:
        DataError: What an item raised.
        RuntimeError: A reader process was killed.
    """
    loader: Any = torch.utils.data.DataLoader(
        _Reading(source),  # type: ignore[arg-type]  # a map-style data set needs __getitem__ alone beside a batch sampler
        batch_sampler=keys,
        num_workers=workers,
        collate_fn=_collated,
        pin_memory=device.type == "cuda",
        worker_init_fn=_start_reader,
        generator=torch.Generator(),  # the loader draws a seed, by default from the generator that dropout uses
    )
    with _held_signals():
        read = iter(loader)
    for found in read:
        if isinstance(found, DataError):
            raise DataError(f"{found} {way_out}".rstrip())
        yield found


# macOS cannot wait for a signal and see its sender: there SIGTERM ends the readers.
_OUTLIVED = {signal.SIGINT, signal.SIGTERM} if hasattr(signal, "sigwaitinfo") else {signal.SIGINT}


@contextlib.contextmanager
def _held_signals() -> Iterator[None]:
    """A reader that starts here is not ended by a signal to the whole process group: the run saves its state, then ends
    it itself.

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
