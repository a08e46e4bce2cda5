"""Streams: images that are read in order, from the hub by `datasets` or from local files, and are not stored.

An epoch's order is a function of (seed, epoch): the shards in a random order, and the next image drawn at random from a
buffer of those that were read last. The position in this order identifies an image, and its augmentation is a function
of (seed, epoch, position).

The cost: every process reads the full stream, but decodes only its own images; a resumed epoch reads its finished part
again, without decoding; an evaluation split is read once at the start, for its labels; each process holds the buffer in
memory. Without --streaming, data on a local disk are read faster.
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

from mgd_timm.data.decode import DataError, open_image
from mgd_timm.data.loader import ReadAhead
from mgd_timm.data.readers.columns import image_column, label_column
from mgd_timm.data.readers.rows import Rows, find_split
from mgd_timm.data.rng import mix
from mgd_timm.data.transforms import ImageTransform
from mgd_timm.features import Batch
from mgd_timm.recipe.data import Data

_HEAD = 8  # the first images of a stream, which its digest covers


@dataclass(frozen=True)
class Stream:
    """A split that is read from its beginning.

    Args:
        rows: An IterableDataset of `datasets`, images not decoded, or a `RowStream`.
        key, target: Its columns of images and labels.
        split: Name of the split.
        count: Images of an epoch; the rest of a longer stream is not read.
        class_names: Names of the classes.
        labels: Labels of all images, if they were read before.
    """

    rows: Any
    key: str
    target: str
    split: str
    count: int
    class_names: tuple[str, ...]
    labels: Tensor | None = None

    def label(self, value: Any, position: int) -> Any:
        """Return a label, checked: a class id, or a distribution as float32."""
        classes = len(self.class_names)
        if isinstance(value, int | np.integer):
            if 0 <= value < classes:
                return int(value)
            raise DataError(
                f"{self.split} image {position} of the stream has the label {value}: expected 0 to {classes - 1}; "
                "choose another column with --target-key."
            )
        found = torch.as_tensor(value, dtype=torch.float32) if isinstance(value, list | np.ndarray) else torch.empty(0)
        if found.shape != (classes,) or not bool((found >= 0).all()) or abs(float(found.sum()) - 1) > 1e-3:
            raise DataError(
                f"{self.split} image {position} of the stream has the label {str(value)[:60]!r}: expected a class id "
                f"or a distribution over {classes} classes; choose another column with --target-key."
            )
        return found

    def digest(self) -> str:
        """Return a sha256 of name, classes, number of images and the first images; later ones are not read for it."""
        total = hashlib.sha256(json.dumps([self.split, self.class_names, self.count, self.rows.num_shards]).encode())
        for row in islice(self.rows, _HEAD):
            total.update(
                hashlib.sha256(_content(row[self.key], self.split)).digest() + json.dumps(row[self.target]).encode()
            )
        return total.hexdigest()


class RowStream:
    """The rows of a local split, as an IterableDataset of one shard for each row.

    Args:
        rows: The split. It has encoded images.
        first, last: The part of the rows.
    """

    def __init__(self, rows: Any, first: int = 0, last: int | None = None) -> None:
        self.rows, self.first, self.last = rows, first, len(rows) if last is None else last

    @property
    def num_shards(self) -> int:
        """Number of rows."""
        return self.last - self.first

    def shard(self, num_shards: int, index: int) -> "RowStream":  # noqa: ARG002  # one shard for each row
        """Return one row, as a stream."""
        return RowStream(self.rows, self.first + index, self.first + index + 1)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for row in range(self.first, self.last):
            label = self.rows.labels[row]
            yield {"image": self.rows.content(row), "label": int(label) if label.ndim == 0 else label.tolist()}


def stream_rows(rows: Rows, data: Data, *, training: bool) -> Stream:
    """Return a split of a local folder as a stream.

    Args:
        rows: The split.
        data: Its `num_samples`.
        training: Whether it is the training split.

    Raises:
        DataError: Its images are arrays.
    """
    if not hasattr(rows, "content"):
        raise DataError(f"split {rows.split!r} is an npy file, which is read in place: leave --streaming out.")
    count = (data.num_samples if training else None) or len(rows)
    labels = None if training else torch.from_numpy(rows.labels)
    return Stream(RowStream(rows), "image", "label", rows.split, count, rows.class_names, labels)


def open_streams(source: str, config: str | None) -> dict[str, Any]:
    """Return the splits of a hub id, as IterableDatasets.

    Raises:
        DataError: There is no such data set, or its files cannot be read.
    """
    import datasets

    datasets.disable_progress_bars()
    try:
        return dict(datasets.load_dataset(source, config, streaming=True))
    except Exception as error:  # `datasets` raises a dozen kinds, from several libraries
        raise DataError(f"{source}: cannot be streamed: {type(error).__name__}: {error}") from error


def read_stream(
    data: Data, splits: dict[str, Any], split: str, log: Callable[[str], None], classes: tuple[str, ...] | None = None
) -> Stream:
    """Return a split as a stream. Its columns are found by their type where `data` does not name them.

    Args:
        data: The options of the data.
        splits: From `open_streams`.
        split: Name of the split.
        log: Logs one line.
        classes: Class names of the training split, for another split.

    Raises:
        DataError: There is no such split or column, or the number of images or classes is not known.
    """
    import datasets

    rows = source = find_split(splits, split)
    if rows.features is None:
        raise DataError(
            f"split {split!r} cannot be streamed, as the types of its columns are not known: leave --streaming out."
        )
    columns = rows.features.arrow_schema.empty_table()
    key = image_column(columns, data)
    if data.target_key is None and set(rows.features) == {key, "__key__", "__url__"}:
        raise DataError(
            f"the tars of the stream {split!r} have no label files, and a stream does not see their class folders: "
            "leave --streaming out (tars are read without unpacking), or give webdataset shards (1.jpg with 1.cls)."
        )
    target = label_column(columns, key, data, log)
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
            f"column {target!r} of the stream {split!r} does not name its classes: give their number with "
            "--num-classes."
        )
    if classes is not None and names != classes:
        raise DataError(f"split {split!r} has other classes than the training split: expected the same ones.")
    if classes is not None:
        return _with_labels(Stream(rows, key, target, split, 0, names))
    known = (source.info.splits or {}).get(split)
    count = data.num_samples or (known.num_examples if known is not None else None)
    if not count:
        raise DataError(f"the stream {split!r} does not state its number of images: give it with --num-samples.")
    return Stream(rows, key, target, split, count, names)


def _with_labels(stream: Stream) -> Stream:
    """Return a stream to evaluate on with its labels, for which it is read to its end once."""
    rows = stream.rows.select_columns([stream.target])
    labels = [torch.as_tensor(stream.label(row[stream.target], position)) for position, row in enumerate(rows)]
    if not labels:
        raise DataError(f"the stream {stream.split!r} has no images: choose another with --eval-split.")
    return replace(stream, count=len(labels), labels=torch.stack(labels))


def _content(cell: Any, name: str) -> bytes:
    found = (cell["bytes"] or cell["path"]) if isinstance(cell, dict) else cell
    if isinstance(found, str) and Path(found).is_file():
        return Path(found).read_bytes()
    if not isinstance(found, bytes):
        raise DataError(
            f"{name}: the stream holds the address of the image ({found}), not the image: choose a data set of parquet "
            "or tar files."
        )
    return found


def shuffled(rows: Any, seed: int, epoch: int, buffer: int) -> Iterator[Any]:
    """Yield the rows of an IterableDataset in the order of an epoch.

    Python's generator draws it, as its numbers are the same in every version. The order depends on the number of shards
    too, so the same data in other files are another stream.
    """
    draw = random.Random(mix(seed, epoch, 10))
    shards = list(range(rows.num_shards))
    draw.shuffle(shards)
    buffered: list[Any] = []
    for shard in shards:
        for row in rows.shard(num_shards=len(shards), index=shard):
            if len(buffered) < buffer:
                buffered.append(row)
                continue
            chosen = draw.randrange(buffer)
            yield buffered[chosen]
            buffered[chosen] = row
    draw.shuffle(buffered)
    yield from buffered


class StreamSource:
    """A Source of a stream. Its ids are positions in the order of an epoch, and batches take them in this order.

    The labels of a training stream are not known before it is read, so `labels` is empty.

    Args:
        stream: The images.
        data: Its `in_chans`, `workers` and `shuffle_buffer`.
        transform: Augments and normalises.
        seed: Seed of order and augmentation; None reads the stream in its own order.
    """

    def __init__(self, stream: Stream, data: Data, transform: ImageTransform, seed: int | None) -> None:
        self.stream, self.data, self.transform, self.seed = stream, data, transform, seed
        self._workers = ReadAhead(_StreamedImages(stream.split, data.in_chans, transform, seed), data.workers)
        self.ids = torch.arange(stream.count)
        self.labels = stream.labels if stream.labels is not None else torch.empty(0, dtype=torch.int64)
        self.digest = stream.digest()

    def order(self, seed: int, epoch: int) -> Tensor:  # noqa: ARG002
        """Return all positions in ascending order: the stream itself is shuffled."""
        return self.ids

    def batches(self, micro_batches: Sequence[Tensor], epoch: int, device: torch.device) -> Iterator[Batch]:
        """Yield a Batch for each tensor of positions, which ascend.

        Raises:
            DataError: The stream ends too early or breaks off, or an image or label cannot be used.
        """
        keys = _read_keys(self, micro_batches, epoch)
        normalise = self.transform.normaliser(self.seed, epoch, device)
        for batch in self._workers.batches(keys, device):
            pixels, labels, positions = (part.to(device, non_blocking=True) for part in batch)
            yield Batch(normalise(pixels, positions), labels, positions)


@dataclass(frozen=True)
class _StreamedImages:
    """Decode and transform, in a worker, what was read of an image."""

    split: str
    in_chans: int
    transform: ImageTransform
    seed: int | None

    def __getitem__(self, key: tuple[int, int, bytes, Any]) -> tuple[Tensor, Any, int]:
        epoch, position, content, label = key
        image = open_image(content, self.in_chans, f"{self.split} image {position} of the stream in epoch {epoch + 1}")
        return self.transform(image, None if self.seed is None else mix(self.seed, epoch, position)), label, position


def _read_keys(
    source: StreamSource, micro_batches: Sequence[Tensor], epoch: int
) -> Iterator[list[tuple[int, int, bytes, Any]]]:
    """Read what the workers get of each image of a micro-batch: epoch, position, encoded image and label."""
    stream = source.stream
    numbered = _read_numbered(source, epoch)
    for positions in micro_batches:
        keys = []
        for wanted in positions.tolist():
            position, row = next(pair for pair in numbered if pair[0] == wanted)
            content = _content(row[stream.key], f"{stream.split} image {position} of the stream")
            keys.append((epoch, position, content, stream.label(row[stream.target], position)))
        yield keys


def _read_numbered(source: StreamSource, epoch: int) -> Iterator[tuple[int, Any]]:
    """Yield position and row in the order of an epoch. Raise DataError when the stream breaks off or ends."""
    stream, rows = source.stream, source.stream.rows
    if source.seed is not None:
        rows = shuffled(rows, source.seed, epoch, source.data.shuffle_buffer)
    read = 0
    try:
        for row in rows:
            yield read, row
            read += 1
    except DataError:
        raise
    except Exception as error:  # from the network, and from every format's reader
        raise DataError(
            f"the stream {stream.split!r} broke off after {read} images of epoch {epoch + 1} "
            f"({type(error).__name__}: {error}): continue from the newest checkpoint with --resume."
        ) from error
    raise DataError(
        f"the stream {stream.split!r} ended after {read} images, expected {stream.count}: give its true number with "
        "--num-samples."
    )
