"""Teacher outputs computed once: a few augmented views of every image, as a data set of embeddings and logits.

The granularity heads read nothing else of a frozen teacher, so they are fitted on these rows instead of on live images.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from mgd_timm.data import Source
from mgd_timm.features import Batch, Features


class StoredOutputs:
    """A Source of rows: row `view * n + i` is what the teacher showed of image i in that view. Its batches hold no images.

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

    def batches(self, slots: Sequence[Tensor], epoch: int, device: torch.device) -> Iterator[Batch]:  # noqa: ARG002
        """Labels and row numbers; `features` gives what belongs to them."""
        for rows in slots:
            yield Batch(torch.empty(len(rows), 0, 0, 0, device=device), self.labels[rows].to(device), rows.to(device))

    def features(self, batch: Batch) -> Features:
        """The teacher's features of a batch of rows, on the batch's device."""
        rows, device = batch.sample_ids.to(self.logits.device), batch.labels.device
        return Features(self.logits[rows].to(device), self.embedding[rows].to(device))


@torch.no_grad()
def store_outputs(
    teach: Callable[[Batch], Features], source: Source, views: int, accelerator: Accelerator, batch_size: int, quiet: bool = False
) -> StoredOutputs:
    """Show the teacher `views` views of every image, each process its share, and keep embeddings and logits in float32.

    Args:
        teach: The teacher.
        source: Images; view v is what it shows in epoch v.
        views: How many.
        accelerator: Device, processes and precision.
        batch_size: Images per process and step.
        quiet: No progress bar.
    """
    mine = torch.arange(len(source.ids))[accelerator.process_index :: accelerator.num_processes]
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    hidden = quiet or not accelerator.is_main_process
    with tqdm(total=views * len(mine), desc="teacher outputs", unit="img", disable=hidden, leave=False) as bar:
        for view in range(views):
            slots = mine.split(batch_size)
            for positions, batch in zip(
                slots, source.batches([source.ids[p] for p in slots], view, accelerator.device), strict=True
            ):
                with accelerator.autocast():
                    shown = teach(batch)
                parts.append((positions + view * len(source.ids), shown.embedding.float().cpu(), shown.logits.float().cpu()))
                bar.update(len(positions))
    rows = torch.cat([part[0] for part in parts])
    full = []
    for index in (1, 2):
        values = torch.cat([part[index] for part in parts])
        whole = torch.zeros(views * len(source.ids), values.shape[1])
        whole[rows] = values
        if accelerator.num_processes > 1:  # every row was filled by one process
            whole = accelerator.reduce(whole.to(accelerator.device), "sum").cpu()
        full.append(whole)
    return StoredOutputs(full[0], full[1], source.labels, source.digest)
