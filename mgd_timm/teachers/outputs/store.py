"""A teacher's outputs on all passes of a run, written once and read by later students, host methods and seeds.

A store is a folder: `store.json` says whose outputs of which images it holds, and
`pass-00003-rows-000000000.safetensors` holds those of pass 3 from sample id 0 on. A pass is a function of (seed,
pass number, sample id), so a store grows by passes and what is there stays. Its rows are all images of the training
split, a validation cut's among them: another seed cuts off others.

A shard appears whole or not at all, so an interrupted write goes on with the shards that lack. Its header carries the
digest of the fingerprint in store.json and the sha256 of its numbers. One run writes at a time; to read takes no lock.
"""

import errno
import itertools
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
    corrupt_shard_error,
    format_bytes,
    index_text,
    read_index,
    tensors_sha256,
)


class TeacherStore:
    """The outputs of one teacher on passes over one data set, in a folder. The constructor writes nothing.

    Args:
        folder: Its folder, which all processes must see; it need not exist.
        made_of: What decides the outputs beside pass number and sample id, as JSON values.
        layout: What a row holds.
        num_samples: Rows of a pass; the row is the sample id.
        passes: Number of passes that are needed; there may be more.
        accelerator: Processes.

    Raises:
        StoreError: The folder holds a store of other outputs, or a corrupt file.
        OSError: The disk has no room for what is missing.
    """

    def __init__(
        self,
        folder: Path,
        made_of: dict[str, Any],
        layout: Layout,
        num_samples: int,
        passes: int,
        accelerator: Accelerator,
    ) -> None:
        self.folder, self.layout, self.num_samples, self.passes = folder, layout, num_samples, passes
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
        """Let the main process find what is there, and broadcast it."""
        self.fingerprint = broadcast_from_main(accelerator, self._fingerprint_on_disk)
        self.digest = digest(self.fingerprint)
        self.missing = broadcast_from_main(accelerator, self._find_missing)

    def _fingerprint_on_disk(self) -> dict[str, Any]:
        """Return the fingerprint in store.json, or this store's own where there is no such file.

        Both must be equal but for the rows of a shard.
        """
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
        """Return the missing (pass, shard) pairs. Raise OSError where the disk has no room for them."""
        missing = []
        for stored_pass in range(self.passes):
            for shard in range(self.shards):
                if self.path(stored_pass, shard).exists():
                    self._recorded(stored_pass, shard)
                else:
                    missing.append((stored_pass, shard))
        needed = sum(self.layout.size(self._count(shard)) for _, shard in missing)
        there = next(path for path in (self.folder.absolute(), *self.folder.absolute().parents) if path.is_dir())
        free = shutil.disk_usage(there).free
        if needed > free:
            raise OSError(
                errno.ENOSPC,
                f"the teacher store {self.folder} needs {format_bytes(needed)} more, and {format_bytes(free)} are "
                "free: choose fewer --teacher-augmentations, a --teacher-top-k, or a larger disk",
            )
        return missing

    @property
    def rows(self) -> int:
        """Number of rows of a shard."""
        return int(self.fingerprint["rows_per_shard"])

    @property
    def shards(self) -> int:
        """Number of shards of a pass."""
        return -(-self.num_samples // self.rows)

    def path(self, stored_pass: int, shard: int) -> Path:
        """Return the file of a shard."""
        return self.folder / f"pass-{stored_pass:05d}-rows-{shard * self.rows:09d}.safetensors"

    def _count(self, shard: int) -> int:
        return min(self.rows, self.num_samples - shard * self.rows)

    def _recorded(self, stored_pass: int, shard: int) -> str:
        """Return the sha256 in a shard's header. Raise StoreError where the file is cut off or of another store."""
        path = self.path(stored_pass, shard)
        try:
            found, metadata = read_header(path)
        except ValueError as error:
            raise corrupt_shard_error(path, str(error)) from error
        parts = self.layout.parts(self._count(shard))
        if found != {
            name: (DTYPES[dtype], shape, dtype.itemsize * math.prod(shape)) for name, (dtype, shape) in parts.items()
        }:
            raise corrupt_shard_error(path, "its header is not that of such a shard")
        owner, _, recorded = metadata.get(KEY, "").partition(" ")
        if owner != f"{self.digest}:{stored_pass}:{shard}":
            raise corrupt_shard_error(path, "its header names another store or another place in it")
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
        """Write the missing shards, each process its share, after logging the size.

        One run writes at a time: another one waits, and then writes what is still missing.

        Args:
            teach: The teacher.
            source: Images by sample id, also of those that are not among its `ids`; pass p has those of epoch p.
            accelerator: Device, processes and precision.
            batch_size: Images per process and step.
            quiet: No progress bar.

        Raises:
            StoreError: Outputs beyond fp16, a folder that not all processes see, or one that another run has filled
                with other outputs.
            OSError: The disk is full, or another fault while writing. No shard is partial, and a later call continues.
        """
        passes = f"{self.passes} pass{'es' if self.passes > 1 else ''}"
        rows = f"{passes} x {self.num_samples:,} images x {self.layout.describe()}"
        size = format_bytes(self.passes * self.layout.size(self.num_samples))
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
                accelerator.print(f"teacher store: another run has written shards; {self._left()}")
            run_on_main(accelerator, self._begin)
            self._write_missing(teach, source, accelerator, batch_size, quiet)
        self.missing = []

    def _left(self) -> str:
        return (
            f"{len(self.missing)} of {self.passes * self.shards} shards to write"
            if self.missing
            else "nothing to write"
        )

    def _progress(self) -> str:
        there = {path.name for path in self.folder.glob("pass-*")}
        wanted = itertools.product(range(self.passes), range(self.shards))
        written = sum(self.path(stored_pass, shard).name in there for stored_pass, shard in wanted)
        return f"{written} of {self.passes * self.shards} shards written"

    def _begin(self) -> None:
        if not (self.folder / INDEX).exists():
            write_text_atomically(
                self.folder / INDEX, index_text({"fingerprint": self.fingerprint, "written_by": versions()})
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
                for stored_pass, shard in mine:
                    self._write(stored_pass, shard, teach, source, accelerator, batch_size, bar, start_step)

        def check() -> None:
            for stored_pass, shard in self.missing:
                if not self.path(stored_pass, shard).exists():
                    raise StoreError(
                        f"{self.path(stored_pass, shard)} was written by another process, and process "
                        f"{accelerator.process_index} does not see it: --teacher-store needs a folder that all "
                        "machines share."
                    )

        _together(write, accelerator)
        _together(check, accelerator)

    @torch.no_grad()
    def _write(
        self,
        stored_pass: int,
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
        batches = source.batches(micro_batches, stored_pass, accelerator.device)
        for ids in micro_batches:
            start_step()
            batch = next(batches)
            with accelerator.autocast():  # as live teaching
                features = teach(batch)
            for name, part in self.layout.pack(features).items():
                room[name][ids - first] = part
            bar.update(len(ids))
        # One key: safetensors writes several in no particular order, and the same outputs are to give the same bytes.
        mark = {KEY: f"{self.digest}:{stored_pass}:{shard} {tensors_sha256(room)}"}
        write_atomically(self.path(stored_pass, shard), lambda draft: save_file(room, draft, metadata=mark))

    # -- reading
    # ----------------------------------------------------------------------------------------------------------------

    def features(self, ids: Int[Tensor, " b"], stored_pass: int, device: torch.device) -> Features:
        """Return the teacher's logits and embedding of images in a pass, in float32 on the device.

        Args:
            ids: Sample ids, on the CPU.
            stored_pass: Number of the pass, less than `passes`.
            device: Of the result.

        Raises:
            StoreError: A shard is corrupt; each one is verified when a process first reads it.
        """
        parts = self._gather(ids, stored_pass, pinned=device.type == "cuda")
        return self.layout.unpack({name: part.to(device, non_blocking=True) for name, part in parts.items()})

    def _gather(self, ids: Tensor, stored_pass: int, pinned: bool) -> dict[str, Tensor]:
        room = {
            name: torch.empty(shape, dtype=dtype, pin_memory=pinned)
            for name, (dtype, shape) in self.layout.parts(len(ids)).items()
        }
        shards = ids // self.rows
        touched = shards.unique().tolist() if self.shards > 1 else [0]
        for shard in touched:
            tensors = self._shard(stored_pass, shard)
            if len(touched) == 1:
                for name, tensor in tensors.items():
                    torch.index_select(tensor, 0, ids - shard * self.rows, out=room[name])
            else:
                where = (shards == shard).nonzero().flatten()
                rows = ids[where] - shard * self.rows
                for name, tensor in tensors.items():
                    room[name][where] = tensor[rows]
        return room

    def _shard(self, stored_pass: int, shard: int) -> dict[str, Tensor]:
        """Return a shard's tensors, mapped from its file and verified the first time."""
        key = stored_pass, shard
        if key not in self._open:
            for other in [other for other in self._open if other[0] != stored_pass]:
                del self._open[other]  # a run reads one pass at a time: few files stay mapped
            path, recorded = self.path(stored_pass, shard), self._recorded(stored_pass, shard)
            try:
                tensors = load_file(path)
            except (OSError, SafetensorError) as error:
                raise corrupt_shard_error(path, str(error)) from error
            if key not in self._verified and tensors_sha256(tensors) != recorded:
                raise corrupt_shard_error(path, "its numbers do not match their sha256")
            self._verified.add(key)
            self._open[key] = tensors
        return self._open[key]


def _together(action: Callable[[], None], accelerator: Accelerator) -> None:
    """Run an action on every process, and raise on all what any of them raises.

    One process may have a shard more to write than another, which may take longer than a collective's timeout.
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
