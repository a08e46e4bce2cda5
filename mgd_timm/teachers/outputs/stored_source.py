"""A filled store of teacher outputs in place of the teacher: its views as a Source, and what answers for the teacher on
them."""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from mgd_timm.data.dataset import FileSource, Images, Source, StoreSource
from mgd_timm.distiller import Teacher
from mgd_timm.features import Batch, Features
from mgd_timm.granularity import GranularityHeads
from mgd_timm.recipe.recipe import Recipe
from mgd_timm.teachers.outputs.layout import FORMAT, Layout
from mgd_timm.teachers.outputs.store import TeacherStore


class StoredViews:
    """A Source that shows, in epoch e, view e modulo their number, and the teacher that answers from the store.

    Args:
        source: Images under the store's view seed; view v is what it shows in epoch v.
        store: The teacher's outputs on them.
    """

    def __init__(self, source: Source, store: TeacherStore) -> None:
        self.source, self.store = source, store
        self.ids, self.labels, self.digest = source.ids, source.labels, source.digest
        self._last: tuple[Tensor, Tensor, int] | None = None

    def batches(self, slots: Sequence[Tensor], epoch: int, device: torch.device) -> Iterator[Batch]:
        """Batches of the epoch's view."""
        view = epoch % self.store.views
        for ids, batch in zip(slots, self.source.batches(slots, view, device), strict=True):
            self._last = batch.sample_ids, ids, view
            yield batch

    def fill(self, teacher: Teacher, accelerator: Accelerator, batch_size: int, *, quiet: bool = False) -> None:
        """Let the teacher write what the store lacks; see `TeacherStore.fill`."""
        self.store.fill(lambda batch: teacher(batch.images), self.source, accelerator, batch_size, quiet)

    def teacher(self, heads: GranularityHeads | None) -> Callable[[Batch], Features]:
        """The teacher of the batch that was read last, with the codes and views of its heads."""

        @torch.no_grad()
        def teach(batch: Batch) -> Features:
            # The ids that were asked for lie on the CPU: to fetch the batch's from the device would wait for all that
            # it has to do.
            assert self._last is not None, "no batch was read"
            there, ids, view = self._last
            assert batch.sample_ids is there, "another batch than the one that was read last"
            shown = self.store.features(ids, view, there.device)
            if heads is None:
                return shown
            codes = heads.encode(shown.embedding)
            return shown._replace(codes=codes, views=heads.decode(codes))

        return teach


def open_store(recipe: Recipe, teacher: Teacher, images: Images, accelerator: Accelerator) -> StoredViews:
    """The store that a resolved recipe names, as yet perhaps not filled, and the training images under its view seed.

    Raises:
        StoreError: The folder holds a store of other outputs, or a damaged file.
        OSError: The disk has no room for what lacks.
    """
    assert recipe.teacher_store is not None
    assert recipe.teacher_views is not None
    assert recipe.teacher_view_seed is not None
    assert isinstance(images.train, StoreSource | FileSource)
    view = teacher.describe_input()
    made_of = {
        "format": FORMAT,
        "teacher": teacher.digest,
        "architecture": teacher.tap.name,  # timm has several that compute other things from the same weights
        "teacher_view": json.loads(json.dumps(view)),  # tuples as lists, as they are read back
        "images": images.train.digest,
        "mean": list(images.mean),
        "std": list(images.std),
        "input_size": list(images.input_size),
        "transform": images.train.shown,
        "view_seed": recipe.teacher_view_seed,
        "precision": str(accelerator.mixed_precision),
    }
    layout = Layout(teacher.tap.embed_dim, teacher.tap.num_classes, recipe.teacher_top_k or 0)
    folder = Path(recipe.teacher_store)
    store = TeacherStore(folder, made_of, layout, images.num_samples, recipe.teacher_views, accelerator)
    return StoredViews(images.train.seeded(recipe.teacher_view_seed), store)
