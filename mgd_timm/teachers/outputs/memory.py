"""Teacher outputs computed once: a few augmented views of every image, as a data set of embeddings and logits.

The granularity heads read nothing else of a frozen teacher, so they are fitted on these rows instead of on live images.
"""

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


class StoredOutputs:
    """A Source of rows: row `view * n + i` is what the teacher showed of image i in that view. Its batches hold no
    images.

    Args:
        embedding: [views * n, dim].
        logits: [views * n, classes].
        labels: [n] class ids or [n, classes] distributions.
        digest: Of the images.
    """

    def __init__(self, embedding: Tensor, logits: Tensor, labels: Tensor, digest: str) -> None:
        self.embedding, self.logits, self.digest = embedding, logits, digest
        views = len(embedding) // len(labels)
        self.labels = labels.repeat(views, *[1] * (labels.ndim - 1))
        self.ids = torch.arange(len(embedding))

    def batches(self, micro_batches: Sequence[Tensor], epoch: int, device: torch.device) -> Iterator[Batch]:  # noqa: ARG002
        """Labels and row numbers; `features` gives what belongs to them."""
        self._to(device)
        for rows in micro_batches:
            there = rows.to(device, non_blocking=True)
            labels = self.labels[there if self.labels.device == there.device else rows].to(device)
            yield Batch(torch.empty(len(rows), 0, 0, 0, device=device), labels, there)

    def _to(self, device: torch.device) -> None:
        """Onto a GPU that has room, so that no step of the heads' fitting waits for a transfer."""
        need = 4 * (self.embedding.numel() + self.logits.numel())
        if device.type == "cuda" and not self.logits.is_cuda and need < torch.cuda.mem_get_info(device)[0] // 4:
            self.embedding, self.logits, self.labels = (
                t.to(device) for t in (self.embedding, self.logits, self.labels)
            )

    def features(self, batch: Batch) -> Features:
        """The teacher's features of a batch of rows, on the batch's device."""
        rows, device = batch.sample_ids.to(self.logits.device), batch.labels.device
        return Features(self.logits[rows].to(device), self.embedding[rows].to(device))


@torch.no_grad()
def store_outputs(
    teach: Callable[[Batch], Features],
    source: Source,
    views: int,
    accelerator: Accelerator,
    batch_size: int,
    quiet: bool = False,
) -> StoredOutputs:
    """Show the teacher `views` views of every image, each process its share, and keep embeddings and logits in float32.

    Args:
        teach: The teacher.
        source: Images; view v is what it shows in epoch v.
        views: How many.
        accelerator: Device, processes and precision.
        batch_size: Images per process and step.
        quiet: No progress bar.

    Raises:
        ValueError: The outputs do not fit into memory.
    """
    mine = torch.arange(len(source.ids))[accelerator.process_index :: accelerator.num_processes]
    whole: tuple[Tensor, Tensor] | None = None
    hidden = quiet or not accelerator.is_main_process
    with (
        print_stacks_before_timeout(accelerator) as start_step,
        tqdm(total=views * len(mine), desc="teacher outputs", unit="img", disable=hidden, leave=False) as bar,
    ):
        for view in range(views):
            micro_batches = mine.split(batch_size) if len(mine) else ()
            batches = source.batches([source.ids[p] for p in micro_batches], view, accelerator.device)
            for positions in micro_batches:
                start_step()
                batch = next(batches)
                with accelerator.autocast():
                    shown = teach(batch)
                if whole is None:
                    widths = shown.embedding.shape[1], shown.logits.shape[1]
                    whole = _room(views * len(source.ids), widths, accelerator)
                for rows, values in zip(whole, (shown.embedding, shown.logits), strict=True):
                    rows[positions + view * len(source.ids)] = values.float().cpu()
                bar.update(len(positions))
        if accelerator.num_processes > 1:  # every row was filled by one process, and is 0 on the others
            found = [(whole[0].shape[1], whole[1].shape[1]) if whole is not None else None]
            broadcast_object_list(found)  # the first process has an image; the last ones have none where there are few
            assert found[0] is not None
            whole = whole or _room(views * len(source.ids), found[0], accelerator)
            whole = (_sum(whole[0], accelerator), _sum(whole[1], accelerator))
    assert whole is not None
    return StoredOutputs(whole[0], whole[1], source.labels, source.digest)


def read_outputs(store: TeacherStore, source: Source, views: int, accelerator: Accelerator) -> StoredOutputs:
    """As `store_outputs`, from the first views of a filled store.

    Raises:
        ValueError: The outputs do not fit into memory, or a shard is damaged.
    """
    count = len(source.ids)
    embedding, logits = _room(views * count, (store.layout.embed_dim, store.layout.num_classes), accelerator)
    for view in range(views):
        shown = store.features(source.ids, view, torch.device("cpu"))
        embedding[view * count : (view + 1) * count] = shown.embedding
        logits[view * count : (view + 1) * count] = shown.logits
    return StoredOutputs(embedding, logits, source.labels, source.digest)


def _room(count: int, widths: tuple[int, int], accelerator: Accelerator) -> tuple[Tensor, Tensor]:
    """Zeros for embeddings and logits of `count` rows; refused where they do not fit into memory.

    Raises:
        ValueError: They need more than half of the free memory.
    """
    need, free = 4 * count * sum(widths), psutil.virtual_memory().available // accelerator.num_processes
    if need > free // 2:
        raise ValueError(
            f"stored teacher outputs of {count:,} rows x ({widths[0]} + {widths[1]}) numbers need {need / 1e9:.1f} GB "
            f"in each process, more than half of the {free / 1e9:.1f} GB that are free: choose --heads-augmentations "
            "1, or --heads-protocol live."
        )
    return torch.zeros(count, widths[0]), torch.zeros(count, widths[1])


def _sum(rows: Tensor, accelerator: Accelerator) -> Tensor:
    """The sum over processes, in parts that fit on any device."""
    for part in rows.split(65536) if rows.numel() else ():
        part.copy_(accelerator.reduce(part.to(accelerator.device), "sum"))
    return rows
