"""Streams of `datasets`: images that come one after the other, from the hub or from files, and are not kept.

An epoch's order is a function of (seed, epoch): the shards in a random order, and the next image drawn at random from a
buffer of those that were read last. An image is known by its place in this order, and augmented by (seed, epoch,
place).

Order and resume are the same on any number of processes. Every process reads the whole stream, and decodes its own
images alone. A resumed epoch reads what it has done once more, without decoding it. A split to evaluate on is read once
at the start, for its labels. The buffer is held in memory, once a process. Data on a disk are better read without a
stream.
"""

import hashlib
import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mgd_timm.decoding import DataError, decode
from mgd_timm.features import Batch
from mgd_timm.options import unknown
from mgd_timm.reading import check_links, check_split, image_column, label_column
from mgd_timm.recipe import Data
from mgd_timm.sampling import mix, seeded
from mgd_timm.sources import picture, read_ahead

_HEAD = 8  # images that stand for a stream in its digest


@dataclass(frozen=True)
class Stream:
    """A split that is read from its beginning.

    Args:
        rows: An IterableDataset of `datasets`, images not decoded.
        key, target: Its columns of images and labels.
        split: Its name.
        count: Images of an epoch; a longer stream is cut off.
        class_names: Names of the classes.
        labels: Of all images, where they were read before.
    """

    rows: Any
    key: str
    target: str
    split: str
    count: int
    class_names: tuple[str, ...]
    labels: Tensor | None = None

    def label(self, value: Any, place: int) -> Any:
        """A checked label: a class id, or a distribution as float32."""
        classes = len(self.class_names)
        if isinstance(value, int | np.integer):
            if 0 <= value < classes:
                return int(value)
            raise DataError(
                f"{self.split} image {place} of the stream has the label {value}: expected 0 to {classes - 1}."
            )
        found = torch.as_tensor(value, dtype=torch.float32) if isinstance(value, list | np.ndarray) else torch.empty(0)
        if found.shape != (classes,) or not bool((found >= 0).all()) or abs(float(found.sum()) - 1) > 1e-3:
            raise DataError(
                f"{self.split} image {place} of the stream has the label {str(value)[:60]!r}: expected a class id or a "
                f"distribution over {classes} classes; choose another column with --target-key."
            )
        return found

    def digest(self) -> str:
        """sha256 of name, number, classes and the first images: what comes later in a stream is not looked at."""
        total = hashlib.sha256(json.dumps([self.split, self.class_names, self.count, self.rows.num_shards]).encode())
        for row in islice(self.rows, _HEAD):
            total.update(
                hashlib.sha256(_content(row[self.key], self.split)).digest() + json.dumps(row[self.target]).encode()
            )
        return total.hexdigest()


def open_streams(place: str, config: str | None) -> dict[str, Any]:
    """The splits of a hub id or a folder, as IterableDatasets.

    Raises:
        DataError: No such data set or folder, or files that cannot be read.
    """
    import datasets

    datasets.disable_progress_bars()
    check_links(Path(place))  # of a hub id there is no such folder
    try:
        return dict(datasets.load_dataset(place, config, streaming=True))
    except Exception as error:  # `datasets` raises a dozen kinds, of several libraries
        raise DataError(f"{place}: cannot be streamed: {type(error).__name__}: {error}") from error


def read_stream(
    data: Data, splits: dict[str, Any], split: str, say: Callable[[str], None], classes: tuple[str, ...] | None = None
) -> Stream:
    """A split as a stream, its columns found by their types where the recipe does not name them.

    Args:
        data: The recipe's part on images.
        splits: Of `open_streams`.
        split: Which of them.
        say: Takes one line for the user.
        classes: Class names of the training split, for another one.

    Raises:
        DataError: No such split or column; a number of images or classes that is not known.
    """
    import datasets

    check_split(split, splits)
    rows = splits[split]
    if rows.features is None:
        raise DataError(
            f"split {split!r}: the types of its columns are not known before it is read: it cannot be streamed."
        )
    for name in (data.input_key, data.target_key):
        if name is not None and name not in rows.features:
            raise DataError(str(unknown("column", name, rows.features)))
    key = data.input_key or image_column(rows)
    if data.target_key is None and set(rows.features) == {key, "__key__", "__url__"}:
        raise DataError(
            f"the tars of the stream {split!r} have no label beside each image, and their folders are not seen in a "
            f"stream: leave "
            "--streaming out, as tars are read where they lie, or give webdataset shards (1.jpg with 1.cls)."
        )
    target = data.target_key or label_column(rows, key, say)
    feature = rows.features[target]
    if isinstance(rows.features[key], datasets.Image):
        rows = rows.cast_column(key, datasets.Image(decode=False))
    rows = rows.select_columns([key, target])
    if isinstance(feature, datasets.ClassLabel):
        names = tuple(feature.names)
    else:
        names = classes or tuple(str(i) for i in range(data.num_classes or 0))
    if not names:
        raise DataError(
            f"column {target!r} of the stream {split!r} does not say how many classes there are: give --num-classes."
        )
    if classes is not None and names != classes:
        raise DataError(f"split {split!r} has other classes than the training split: both need the same ones.")
    if classes is not None:
        return _counted(Stream(rows, key, target, split, 0, names))
    said = (splits[split].info.splits or {}).get(split)
    count = data.num_samples or (said.num_examples if said is not None else None)
    if not count:
        raise DataError(f"the stream {split!r} does not say how many images it has: give --num-samples.")
    return Stream(rows, key, target, split, count, names)


def _counted(stream: Stream) -> Stream:
    """A stream to evaluate on, with its labels; it is read to its end once."""
    rows = stream.rows.select_columns([stream.target])
    labels = [torch.as_tensor(stream.label(row[stream.target], place)) for place, row in enumerate(rows)]
    if not labels:
        raise DataError(f"the stream {stream.split!r} has no images: choose another with --eval-split.")
    return replace(stream, count=len(labels), labels=torch.stack(labels))


def _content(cell: Any, name: str) -> bytes:
    """An encoded image."""
    found = (cell["bytes"] or cell["path"]) if isinstance(cell, dict) else cell
    if isinstance(found, str) and Path(found).is_file():
        return Path(found).read_bytes()
    if not isinstance(found, bytes):
        raise DataError(
            f"{name}: the stream gives no image but its address ({found}): choose a data set of parquet or tar files."
        )
    return found


def shuffled(rows: Any, seed: int, epoch: int, buffer: int) -> Iterator[Any]:
    """The rows of an IterableDataset in the order of an epoch.

    Python's generator draws it, whose numbers are the same in every version; as the number of shards decides it too,
    files that are cut in another way are another stream.
    """
    draw = random.Random(mix(seed, epoch, 10))
    shards = list(range(rows.num_shards))
    draw.shuffle(shards)
    held: list[Any] = []
    for shard in shards:
        for row in rows.shard(num_shards=len(shards), index=shard):
            if len(held) < buffer:
                held.append(row)
                continue
            place = draw.randrange(buffer)
            yield held[place]
            held[place] = row
    draw.shuffle(held)
    yield from held


class StreamSource:
    """A Source of a stream: its ids are places in the order of an epoch, and are asked for in this order.

    Labels of a training stream are known as it is read, and not before: there are none beside the ids.

    Args:
        stream: The images.
        data: How they are shown.
        transform: timm's.
        seed: Of order and augmentation; without one the stream is read as it is.
    """

    def __init__(self, stream: Stream, data: Data, transform: Callable[[Any], Tensor], seed: int | None) -> None:
        self.stream, self.data, self.transform, self.seed = stream, data, transform, seed
        self.ids = torch.arange(stream.count)
        self.labels = stream.labels if stream.labels is not None else torch.empty(0, dtype=torch.int64)
        self.digest = stream.digest()

    def order(self, seed: int, epoch: int) -> Tensor:  # noqa: ARG002
        """All places in their order, which is the order of the stream itself."""
        return self.ids

    def __getitem__(self, key: tuple[int, int, bytes, Any]) -> tuple[Tensor, Any, int]:
        epoch, place, content, label = key
        name = f"{self.stream.split} image {place} of the stream in epoch {epoch + 1}"
        image = picture(decode(content, self.data.in_chans, name))
        with seeded(None if self.seed is None else mix(self.seed, epoch, place)):
            return self.transform(image), label, place

    def batches(self, slots: Sequence[Tensor], epoch: int, device: torch.device) -> Iterator[Batch]:
        """Batches of ascending places.

        Raises:
            DataError: The stream ends before, breaks, or an image or label of it cannot be used.
        """
        for images, labels, places in read_ahead(self, _Keys(self, slots, epoch), self.data.workers, device):
            yield Batch(*(part.to(device, non_blocking=True) for part in (images, labels, places)))


class _Keys:
    """What the readers are given: of every slot its places, encoded images and labels, drawn from the stream in this
    process."""

    def __init__(self, source: StreamSource, slots: Sequence[Tensor], epoch: int) -> None:
        self.source, self.slots, self.epoch, self.read = source, slots, epoch, 0

    def __len__(self) -> int:
        return len(self.slots)

    def __iter__(self) -> Iterator[list[tuple[int, int, bytes, Any]]]:
        source, stream = self.source, self.source.stream
        rows = stream.rows
        if source.seed is not None:
            rows = shuffled(rows, source.seed, self.epoch, source.data.shuffle_buffer)
        numbered = enumerate(rows)
        for slot in self.slots:
            found = []
            for wanted in slot.tolist():
                place, row = self._next(numbered, wanted)
                name = f"{stream.split} image {place} of the stream"
                found.append(
                    (self.epoch, place, _content(row[stream.key], name), stream.label(row[stream.target], place))
                )
            yield found

    def _next(self, numbered: Iterator[tuple[int, Any]], wanted: int) -> tuple[int, Any]:
        stream = self.source.stream
        try:
            for place, row in numbered:
                self.read = place + 1
                if place == wanted:
                    return place, row
        except DataError:
            raise
        except Exception as error:  # of the network, and of every format's reader
            raise DataError(
                f"the stream {stream.split!r} broke off near image {wanted} of epoch {self.epoch + 1} "
                f"({type(error).__name__}: {error}): --resume continues from the newest checkpoint."
            ) from error
        raise DataError(
            f"the stream {stream.split!r} ended before image {wanted} of {stream.count} ({self.read} were read): give "
            f"its true "
            "number with --num-samples."
        )
