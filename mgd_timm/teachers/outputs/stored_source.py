"""A filled store of teacher outputs in place of the teacher: a Source whose batches carry what the teacher showed."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from mgd_timm.data.dataset import Images
from mgd_timm.data.sources import LargeImageSource, SmallImageSource, Source
from mgd_timm.distiller import Teacher
from mgd_timm.features import Batch, Features
from mgd_timm.granularity import GranularityHeads
from mgd_timm.teachers.outputs.layout import FORMAT, Layout
from mgd_timm.teachers.outputs.store import TeacherStore


class StoredBatch(Batch):
    """A Batch together with the logits and embedding that the teacher showed of its images."""

    teacher: Features

    @classmethod
    def of(cls, batch: Batch, teacher: Features) -> "StoredBatch":
        """The batch with what the teacher showed of it."""
        stored = cls(*batch)
        stored.teacher = teacher
        return stored


class StoredSource:
    """A Source that shows, in epoch e, pass e modulo the number of stored passes, with the teacher's outputs.

    Args:
        source: Images under the store's seed; pass p is what it shows in epoch p.
        store: The teacher's outputs on them.
    """

    def __init__(self, source: Source, store: TeacherStore) -> None:
        self.source, self.store = source, store
        self.ids, self.labels, self.digest = source.ids, source.labels, source.digest

    def batches(self, micro_batches: Sequence[Tensor], epoch: int, device: torch.device) -> Iterator[Batch]:
        """Batches of the epoch's pass, each with the teacher's logits and embedding of its images."""
        stored_pass = epoch % self.store.passes
        for ids, batch in zip(micro_batches, self.source.batches(micro_batches, stored_pass, device), strict=True):
            # By the ids that were asked for, which lie on the CPU: to fetch the batch's would wait for the device.
            yield StoredBatch.of(batch, self.store.features(ids, stored_pass, batch.labels.device))

    def fill(self, teacher: Teacher, accelerator: Accelerator, batch_size: int, *, quiet: bool = False) -> None:
        """Let the teacher write what the store lacks; see `TeacherStore.fill`."""
        self.store.fill(lambda batch: teacher(batch.images), self.source, accelerator, batch_size, quiet)


def stored_teacher(heads: GranularityHeads | None) -> Callable[[Batch], Features]:
    """The teacher of batches that carry its outputs, with the codes and views of its heads."""

    @torch.no_grad()
    def teach(batch: Batch) -> Features:
        assert isinstance(batch, StoredBatch), "a batch of another source than a StoredSource"
        if heads is None:
            return batch.teacher
        codes = heads.encode(batch.teacher.embedding)
        return batch.teacher._replace(codes=codes, views=heads.decode(codes))

    return teach


@dataclass(frozen=True)
class StoreOptions:
    """Where and what a store of teacher outputs holds.

    Args:
        folder: Where it lies.
        passes: Passes over the images, each under augmentations of its own.
        seed: Of the augmentations.
        top_k: Logits kept for an image; 0 keeps all.
    """

    folder: Path
    passes: int
    seed: int
    top_k: int


def open_store(options: StoreOptions, teacher: Teacher, images: Images, accelerator: Accelerator) -> StoredSource:
    """Open a store, as yet perhaps not filled, and the training images under its seed.

    Raises:
        StoreError: The folder holds a store of other outputs, or a corrupt file.
        OSError: The disk has no room for what lacks.
    """
    assert isinstance(images.train, SmallImageSource | LargeImageSource)
    made_of: dict[str, Any] = {
        "format": FORMAT,
        "teacher": teacher.digest,
        "architecture": teacher.tap.name,  # timm has several that compute other things from the same weights
        "teacher_input": json.loads(json.dumps(teacher.describe_input())),  # tuples as lists, as they are read back
        "images": images.train.digest,
        "mean": list(images.mean),
        "std": list(images.std),
        "input_size": list(images.input_size),
        "transform": images.train.augmentation,
        "seed": options.seed,
        "precision": str(accelerator.mixed_precision),
    }
    layout = Layout(teacher.tap.embed_dim, teacher.tap.num_classes, options.top_k)
    store = TeacherStore(options.folder, made_of, layout, images.num_samples, options.passes, accelerator)
    return StoredSource(images.train.with_seed(options.seed), store)
