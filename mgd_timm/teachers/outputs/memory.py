"""Teacher outputs computed once: a few augmentations of every image, as a data set of embeddings and logits.

The granularity heads read nothing else of a frozen teacher, so they are fitted on these rows instead of on live images;
with the embeddings of the images' rotations, so is the head of a criterion that `rotates`.
"""

import math
from collections.abc import Callable, Iterator, Sequence

import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor
from tqdm import tqdm

from mgd_timm.data.sources import Source
from mgd_timm.distributed.hangs import print_stacks_before_timeout
from mgd_timm.features import Batch, Features
from mgd_timm.teachers.outputs.store import TeacherStore
from mgd_timm.teachers.outputs.stored_source import StoredBatch


class StoredOutputs:
    """A Source of rows: row `stored_pass * n + i` is what the teacher showed of image i in that pass.

    Its batches hold no images.

    Args:
        embedding: [passes * n, dim].
        logits: [passes * n, classes].
        labels: [n] class ids or [n, classes] distributions.
        digest: Of the images.
        rotated: Embeddings of each image's rotations, [passes * n, 3, dim]; None for none.
    """

    def __init__(
        self, embedding: Tensor, logits: Tensor, labels: Tensor, digest: str, rotated: Tensor | None = None
    ) -> None:
        self.embedding, self.logits, self.rotated, self.digest = embedding, logits, rotated, digest
        passes = len(embedding) // len(labels)
        self.labels = labels.repeat(passes, *[1] * (labels.ndim - 1))
        self.ids = torch.arange(len(embedding))

    def batches(self, micro_batches: Sequence[Tensor], epoch: int, device: torch.device) -> Iterator[Batch]:  # noqa: ARG002
        """Yield labels and row numbers, with the teacher's outputs for `features`."""
        self._move(device)
        for rows in micro_batches:
            there = rows.to(device, non_blocking=True)
            # Outputs on the CPU are found by the rows as they were asked for: to fetch `there` would wait for a GPU.
            keys = there if self.labels.device == there.device else rows
            labels, logits, embedding = (
                _move_without_waiting(tensor[keys], device) for tensor in (self.labels, self.logits, self.embedding)
            )
            rotated = None
            if self.rotated is not None:
                turned = _move_without_waiting(self.rotated[keys], device).flatten(0, 1)
                rotated = Features(turned[:, :0], turned)
            batch = Batch(torch.empty(len(rows), 0, 0, 0, device=device), labels, there)
            yield StoredBatch.of(batch, Features(logits, embedding, rotated=rotated))

    def _move(self, device: torch.device) -> None:
        """Move outputs and labels to a GPU that has room, so that no step of the fit waits for a transfer."""
        if device.type != "cuda" or self.labels.is_cuda:
            return
        outputs = [self.embedding, self.logits, *([self.rotated] if self.rotated is not None else [])]
        if self.logits.is_cuda or _has_room(4 * sum(tensor.numel() for tensor in outputs), device):
            self.embedding, self.logits, self.labels = (
                tensor.to(device) for tensor in (self.embedding, self.logits, self.labels)
            )
            self.rotated = self.rotated.to(device) if self.rotated is not None else None

    def features(self, batch: Batch) -> Features:
        """Return the teacher's features of a batch of rows."""
        assert isinstance(batch, StoredBatch), "a batch of another source than StoredOutputs"
        return batch.teacher


class StoredPasses:
    """A Source of the same rows, of which epoch e shows those of pass e modulo the number of passes.

    A batch then holds no image twice.

    Args:
        outputs: Of all passes.
        count: Images of a pass.
    """

    def __init__(self, outputs: StoredOutputs, count: int) -> None:
        self.outputs, self.count, self.digest = outputs, count, outputs.digest
        self.ids, self.labels = torch.arange(count), outputs.labels[:count]

    def batches(self, micro_batches: Sequence[Tensor], epoch: int, device: torch.device) -> Iterator[Batch]:
        """Yield the batches of the epoch's pass."""
        first = epoch % (len(self.outputs.ids) // self.count) * self.count
        return self.outputs.batches([rows + first for rows in micro_batches], epoch, device)


def _move_without_waiting(tensor: Tensor, device: torch.device) -> Tensor:
    pinned = tensor.pin_memory() if device.type == "cuda" and not tensor.is_cuda else tensor
    return pinned.to(device, non_blocking=True)


def _has_room(size: int, device: torch.device) -> bool:
    """Return whether a number of bytes is less than a quarter of a GPU's free memory."""
    return device.type == "cuda" and size < torch.cuda.mem_get_info(device)[0] // 4


@torch.no_grad()
def store_outputs(
    teach: Callable[[Batch], Features],
    source: Source,
    passes: int,
    accelerator: Accelerator,
    batch_size: int,
    quiet: bool = False,
) -> StoredOutputs:
    """Show the teacher `passes` augmentations of every image, each process its share, and keep float32 outputs.

    They stay on a GPU that has room for them; else the host waits for each batch's.

    Args:
        teach: The teacher.
        source: Images; pass p is what it shows in epoch p.
        passes: How many.
        accelerator: Device, processes and precision.
        batch_size: Images per process and step.
        quiet: No progress bar.

    Raises:
        ValueError: The outputs do not fit into memory.
    """
    mine = torch.arange(len(source.ids))[accelerator.process_index :: accelerator.num_processes]
    whole: list[Tensor] | None = None
    hidden = quiet or not accelerator.is_main_process
    with (
        print_stacks_before_timeout(accelerator) as start_step,
        tqdm(total=passes * len(mine), desc="teacher outputs", unit="img", disable=hidden, leave=False) as bar,
    ):
        for stored_pass in range(passes):
            micro_batches = mine.split(batch_size) if len(mine) else ()
            batches = source.batches([source.ids[p] for p in micro_batches], stored_pass, accelerator.device)
            for positions in micro_batches:
                start_step()
                batch = next(batches)
                with accelerator.autocast():
                    features = teach(batch)
                found = [features.embedding, features.logits]
                if features.rotated is not None:
                    found.append(features.rotated.embedding.unflatten(0, (len(features.logits), -1)))
                if whole is None:
                    shapes = [tuple(rows.shape[1:]) for rows in found]
                    whole = _zeros(passes * len(source.ids), shapes, accelerator, accelerator.device)
                start = stored_pass * len(source.ids)
                # A slice, not the positions: a GPU would wait for their transfer.
                rows = slice(start + int(positions[0]), start + int(positions[-1]) + 1, accelerator.num_processes)
                for kept, shown in zip(whole, found, strict=True):
                    kept[rows] = shown.float()
                bar.update(len(positions))
        if accelerator.num_processes > 1:  # every row was filled by one process, and is 0 on the others
            known = [[tuple(rows.shape[1:]) for rows in whole] if whole is not None else None]
            broadcast_object_list(known)  # the first process has an image; the last ones have none where there are few
            assert known[0] is not None
            whole = whole or _zeros(passes * len(source.ids), known[0], accelerator, accelerator.device)
            whole = [_sum(rows, accelerator) for rows in whole]
    assert whole is not None
    return StoredOutputs(whole[0], whole[1], source.labels, source.digest, *whole[2:])


class OutputsOnce:
    """A teacher's outputs on the training images, which are stored when they are first asked for.

    What is fitted on them before a run then shares one pass over the teacher.

    Args:
        passes: Augmentations of each image.
        store: Stores the outputs, as `store_outputs` does.
    """

    def __init__(self, passes: int, store: Callable[[], StoredOutputs]) -> None:
        self.passes, self._store = passes, store
        self._stored: StoredOutputs | None = None

    def __call__(self) -> StoredOutputs:
        """Return the outputs."""
        if self._stored is None:
            self._stored = self._store()
        return self._stored


def read_outputs(store: TeacherStore, source: Source, passes: int, accelerator: Accelerator) -> StoredOutputs:
    """Read the first passes of a filled store, with the result of `store_outputs`.

    Raises:
        ValueError: The outputs do not fit into memory, or a shard is corrupt.
    """
    count = len(source.ids)
    shapes, cpu = [(store.layout.embed_dim,), (store.layout.num_classes,)], torch.device("cpu")
    embedding, logits = _zeros(passes * count, shapes, accelerator, cpu)
    for stored_pass in range(passes):
        features = store.features(source.ids, stored_pass, cpu)
        embedding[stored_pass * count : (stored_pass + 1) * count] = features.embedding
        logits[stored_pass * count : (stored_pass + 1) * count] = features.logits
    return StoredOutputs(embedding, logits, source.labels, source.digest)


def _zeros(
    count: int, shapes: Sequence[tuple[int, ...]], accelerator: Accelerator, device: torch.device
) -> list[Tensor]:
    """Return zeros for outputs of rows of these shapes, on the device if it is a GPU with room, else on the CPU.

    Raise ValueError where they need over half of the CPU's free memory.
    """
    widths = [math.prod(shape) for shape in shapes]
    need, free = 4 * count * sum(widths), psutil.virtual_memory().available // accelerator.num_processes
    if not _has_room(need, device):
        device = torch.device("cpu")
        if need > free // 2:
            raise ValueError(
                f"stored teacher outputs of {count:,} rows x ({' + '.join(map(str, widths))}) numbers need "
                f"{need / 1e9:.1f} GB in each process, more than half of the {free / 1e9:.1f} GB that are free: choose "
                "--heads-augmentations 1, or --heads-protocol live."
            )
    return [torch.zeros(count, *shape, device=device) for shape in shapes]


def _sum(rows: Tensor, accelerator: Accelerator) -> Tensor:
    """Return the sum over processes, computed in parts that fit on any device."""
    for part in rows.split(65536) if rows.numel() else ():
        part.copy_(accelerator.reduce(part.to(accelerator.device), "sum"))
    return rows
