"""The teacher's outputs of a whole run, written once: every later student, host method and seed reads them from mapped
files.

A store is a folder: `store.json` says whose outputs of which images it holds, and
`view-00003-rows-000000000.safetensors` holds those of view 3 from sample id 0 on. A view is a function of (view seed,
view number, sample id), so a store grows by views and what is there stays. Its rows are all images of the training
split, a validation cut's among them: another seed cuts off others.

A shard appears whole or not at all, so an interrupted write goes on with the shards that lack. Its header carries the
digest of the fingerprint in store.json and the sha256 of its numbers. One run writes at a time; to read takes no lock.
"""

import errno
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from jaxtyping import Int
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from mgd_timm.data.sources import Source
from mgd_timm.distributed.collectives import broadcast_from_main, lock_on_main, run_on_main, wait_by_polling
from mgd_timm.distributed.hangs import print_stacks_before_timeout
from mgd_timm.features import Batch, Features
from mgd_timm.recipe.options import differences, digest
from mgd_timm.storage.atomic_write import write_atomically, write_text_atomically
from mgd_timm.storage.lock import Lock
from mgd_timm.storage.safetensors_header import read_header
from mgd_timm.storage.versions import versions
from mgd_timm.teachers.outputs.layout import (
    DTYPES,
    INDEX,
    KEY,
    SHARD_BYTES,
    SHARD_ROWS,
    Layout,
    StoreError,
    damaged_shard,
    in_bytes,
    listed,
    payload,
    read_index,
)


class TeacherStore:
    """The outputs of one teacher on the views of one data set, in a folder. Making one reads what is there and writes
    nothing.

    Args:
        folder: Where it lies; all processes must see the same one. It need not exist.
        made_of: All that decides the outputs beside view number and sample id, as JSON values.
        layout: What a row holds.
        num_samples: Rows of a view; the row is the sample id.
        views: How many views are wanted; there may be more.
        accelerator: Processes.

    Raises:
        StoreError: The folder holds a store of other outputs, or a damaged file.
        OSError: The disk has no room for what lacks.
    """

    def __init__(
        self,
        folder: Path,
        made_of: dict[str, Any],
        layout: Layout,
        num_samples: int,
        views: int,
        accelerator: Accelerator,
    ) -> None:
        self.folder, self.layout, self.num_samples, self.views = folder, layout, num_samples, views
        self.missing, self.digest = list[tuple[int, int]](), ""
        self.fingerprint = {
            **made_of,
            "num_samples": num_samples,
            "embed_dim": layout.embed_dim,
            "num_classes": layout.num_classes,
            "top_k": layout.top_k,
            "dtype": "float16",
            "rows_per_shard": max(1, min(SHARD_ROWS, SHARD_BYTES // layout.size(1))),
        }
        self._verified: set[tuple[int, int]] = set()
        self._open: dict[tuple[int, int], dict[str, Tensor]] = {}
        self._survey(accelerator)

    # -- what is there
    # ----------------------------------------------------------------------------------------------------------

    def _survey(self, accelerator: Accelerator) -> None:
        """Let the main process look at what is there, and all take what it found."""
        self.fingerprint = broadcast_from_main(accelerator, self._fingerprint_on_disk)
        self.digest = digest(self.fingerprint)
        self.missing = broadcast_from_main(accelerator, self._find_missing)

    def _fingerprint_on_disk(self) -> dict[str, Any]:
        """The fingerprint in store.json, which must be this one's but for the rows of a shard; this one's where it
        lacks."""
        if self.folder.exists() and not self.folder.is_dir():
            raise StoreError(f"{self.folder} is a file: --teacher-store takes a folder.")
        index = self.folder / INDEX
        if not index.exists():
            return self.fingerprint
        found = read_index(index)
        changed = differences(found, {**self.fingerprint, "rows_per_shard": found.get("rows_per_shard")})
        if changed:
            raise StoreError(
                f"{self.folder} is a store of other teacher outputs ({'; '.join(changed[:5])}): choose another "
                "--teacher-store for these, or the teacher, the images and their transform, and the precision that it "
                "was written with."
            )
        return found

    def _find_missing(self) -> list[tuple[int, int]]:
        """The (view, shard) pairs that lack, for which the disk must have room."""
        missing = []
        for view in range(self.views):
            for shard in range(self.shards):
                if self.path(view, shard).exists():
                    self._recorded(view, shard)
                else:
                    missing.append((view, shard))
        needed = sum(self.layout.size(self._count(shard)) for _, shard in missing)
        there = next(path for path in (self.folder.absolute(), *self.folder.absolute().parents) if path.is_dir())
        free = shutil.disk_usage(there).free
        if needed > free:
            raise OSError(
                errno.ENOSPC,
                f"the teacher store {self.folder} needs {in_bytes(needed)} more, and {in_bytes(free)} are free: "
                "choose fewer --teacher-augmentations, a --teacher-top-k, or a larger disk",
            )
        return missing

    @property
    def rows(self) -> int:
        """Rows of a shard."""
        return int(self.fingerprint["rows_per_shard"])

    @property
    def shards(self) -> int:
        """Shards of a view."""
        return -(-self.num_samples // self.rows)

    def path(self, view: int, shard: int) -> Path:
        """The file of a shard."""
        return self.folder / f"view-{view:05d}-rows-{shard * self.rows:09d}.safetensors"

    def _count(self, shard: int) -> int:
        return min(self.rows, self.num_samples - shard * self.rows)

    def _recorded(self, view: int, shard: int) -> str:
        """The sha256 that a shard's header gives for its numbers, after a check of the header and the file's length.

        Raises:
            StoreError: The file is not whole, or of another store.
        """
        path = self.path(view, shard)
        try:
            found, metadata = read_header(path)
        except ValueError as error:
            raise damaged_shard(path, str(error)) from error
        parts = self.layout.parts(self._count(shard))
        if found != {
            name: (DTYPES[dtype], shape, dtype.itemsize * math.prod(shape)) for name, (dtype, shape) in parts.items()
        }:
            raise damaged_shard(path, "its header is not that of such a shard")
        owner, _, recorded = metadata.get(KEY, "").partition(" ")
        if owner != f"{self.digest}:{view}:{shard}":
            raise damaged_shard(path, "its header names another store or another place in it")
        return recorded

    # -- writing
    # ----------------------------------------------------------------------------------------------------------------

    def fill(
        self,
        teach: Callable[[Batch], Features],
        source: Source,
        accelerator: Accelerator,
        batch_size: int,
        quiet: bool = False,
    ) -> None:
        """Write the shards that lack, each process its share; says the size first. Where nothing lacks, nothing is
        written.

        One run writes at a time: another waits for it, and goes on with what then lacks.

        Args:
            teach: The teacher.
            source: Images by sample id, also of those that are not among its `ids`; view v is what it shows in epoch v.
            accelerator: Device, processes and precision.
            batch_size: Images per process and step.
            quiet: No progress bar.

        Raises:
            StoreError: Outputs beyond fp16; a folder that not all processes see; what another run has written is of
                other outputs.
            OSError: The disk is full, or another fault while writing. What is there is whole, and a later call goes on.
        """
        rows = f"{self.views} view{'s' if self.views > 1 else ''} x {self.num_samples:,} images x {self.layout.words()}"
        size = in_bytes(self.views * self.layout.size(self.num_samples))
        accelerator.print(f"teacher store: {rows} = {size} in {self.folder}; {self._left()}")
        if not self.missing and broadcast_from_main(accelerator, lambda: (self.folder / INDEX).exists()):
            return
        lock = Lock(
            self.folder, f"teacher store {self.folder}", accelerator.print, progress=self._progress, quiet=quiet
        )
        with lock_on_main(lock, accelerator):
            before = len(self.missing)
            self._survey(accelerator)
            if len(self.missing) != before:
                accelerator.print(f"teacher store: another run has written to it; {self._left()}")
            run_on_main(accelerator, self._begin)
            self._write_missing(teach, source, accelerator, batch_size, quiet)
        self.missing = []

    def _left(self) -> str:
        return (
            f"{len(self.missing)} of {self.views * self.shards} shards to write" if self.missing else "nothing to write"
        )

    def _progress(self) -> str:
        """How far another run is."""
        there = {path.name for path in self.folder.glob("view-*")}
        wanted = [self.path(view, shard).name in there for view in range(self.views) for shard in range(self.shards)]
        return f"{sum(wanted)} of {len(wanted)} shards are there"

    def _begin(self) -> None:
        """Write store.json where it lacks."""
        if not (self.folder / INDEX).exists():
            write_text_atomically(
                self.folder / INDEX, listed({"fingerprint": self.fingerprint, "written_by": versions()})
            )

    def _write_missing(
        self, teach: Callable[[Batch], Features], source: Source, accelerator: Accelerator, batch_size: int, quiet: bool
    ) -> None:
        mine = self.missing[accelerator.process_index :: accelerator.num_processes]
        hidden = quiet or not accelerator.is_main_process
        total = sum(self._count(shard) for _, shard in mine)

        def write() -> None:
            with (
                tqdm(total=total, desc="teacher store", unit="img", disable=hidden) as bar,
                print_stacks_before_timeout(accelerator) as start_step,
            ):
                for view, shard in mine:
                    self._write(view, shard, teach, source, accelerator, batch_size, bar, start_step)

        def check() -> None:
            for view, shard in self.missing:
                if not self.path(view, shard).exists():
                    raise StoreError(
                        f"{self.path(view, shard)} was written by another process and is not seen by process "
                        f"{accelerator.process_index}: --teacher-store needs a folder that all machines share."
                    )

        _together(write, accelerator)
        _together(check, accelerator)

    @torch.no_grad()
    def _write(
        self,
        view: int,
        shard: int,
        teach: Callable[[Batch], Features],
        source: Source,
        accelerator: Accelerator,
        batch_size: int,
        bar: tqdm,
        start_step: Callable[[], None],
    ) -> None:
        first, rows = shard * self.rows, self._count(shard)
        micro_batches = torch.arange(first, first + rows).split(batch_size)
        room = {name: torch.empty(shape, dtype=dtype) for name, (dtype, shape) in self.layout.parts(rows).items()}
        batches = source.batches(micro_batches, view, accelerator.device)
        for positions in micro_batches:
            start_step()
            batch = next(batches)
            with accelerator.autocast():  # as live teaching
                shown = teach(batch)
            for name, part in self.layout.pack(shown).items():
                room[name][positions - first] = part
            bar.update(len(positions))
        # One key: safetensors writes several in no particular order, and the same outputs are to give the same bytes.
        mark = {KEY: f"{self.digest}:{view}:{shard} {payload(room)}"}
        write_atomically(self.path(view, shard), lambda draft: save_file(room, draft, metadata=mark))

    # -- reading
    # ----------------------------------------------------------------------------------------------------------------

    def features(self, ids: Int[Tensor, " b"], view: int, device: torch.device) -> Features:
        """What the teacher showed of images in a view: logits and embedding in float32, on the device.

        Args:
            ids: Sample ids, on the CPU.
            view: Number of the view, less than `views`.
            device: Where to.

        Raises:
            StoreError: A shard is damaged; each is verified when a run first touches it.
        """
        parts = self._gather(ids, view, pinned=device.type == "cuda")
        return self.layout.unpack({name: part.to(device, non_blocking=True) for name, part in parts.items()})

    def _gather(self, ids: Tensor, view: int, pinned: bool) -> dict[str, Tensor]:
        room = {
            name: torch.empty(shape, dtype=dtype, pin_memory=pinned)
            for name, (dtype, shape) in self.layout.parts(len(ids)).items()
        }
        shards = ids // self.rows
        touched = shards.unique().tolist() if self.shards > 1 else [0]
        for shard in touched:
            tensors = self._shard(view, shard)
            if len(touched) == 1:
                for name, tensor in tensors.items():
                    torch.index_select(tensor, 0, ids - shard * self.rows, out=room[name])
            else:
                where = (shards == shard).nonzero().flatten()
                rows = ids[where] - shard * self.rows
                for name, tensor in tensors.items():
                    room[name][where] = tensor[rows]
        return room

    def _shard(self, view: int, shard: int) -> dict[str, Tensor]:
        """A shard's tensors, mapped from its file; verified the first time."""
        key = view, shard
        if key not in self._open:
            for other in [other for other in self._open if other[0] != view]:
                del self._open[other]  # a run reads one view at a time: few files stay mapped
            path, recorded = self.path(view, shard), self._recorded(view, shard)
            try:
                tensors = load_file(path)
            except (OSError, SafetensorError) as error:
                raise damaged_shard(path, str(error)) from error
            if key not in self._verified and payload(tensors) != recorded:
                raise damaged_shard(path, "its numbers do not match their sha256")
            self._verified.add(key)
            self._open[key] = tensors
        return self._open[key]


def _together(action: Callable[[], None], accelerator: Accelerator) -> None:
    """Carry something out on every process; what any of them raises is raised on all, once all are through.

    One may have a shard more to write than another, which takes longer than a collective may.
    """
    failure: Exception | None = None
    try:
        action()
    except Exception as error:  # raised again below
        failure = error
    if accelerator.num_processes > 1:
        wait_by_polling(True, accelerator.num_processes)
    failures = [found for found in gather_object([failure]) if found is not None]
    if failure is not None or failures:
        raise failure if failure is not None else failures[0]
