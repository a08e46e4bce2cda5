"""Which samples each update takes, and which of them are this process's."""

from dataclasses import dataclass

from accelerate import Accelerator
from torch import Tensor

from mgd_timm.data.rng import mix
from mgd_timm.data.sampler import cut_updates
from mgd_timm.data.sources import Source, epoch_ids
from mgd_timm.recipe.derived import micro_batch_size


@dataclass(frozen=True)
class MicroBatch:
    """This process's part of one step of an update. All processes take part in every step, if only for nothing.

    Args:
        ids: Sample ids; where the process's own micro-batch is empty, those of the step's first.
        count: Samples of its own, 0 where it is empty.
        total: Samples of the update.
        filled: Micro-batches of the step that hold samples, those of the first processes.
        seed: Of dropout and the like.
    """

    ids: Tensor
    count: int
    total: int
    filled: int
    seed: int


class UpdatePlan:
    """The updates of each epoch, a function of the arguments alone.

    Args:
        source: Training images.
        seed: Of order and dropout.
        stage: Name of the fit, so that each has its own dropout.
        batch_size: The most samples of a micro-batch.
        global_batch: Samples of an update.
        accelerator: Processes.
    """

    def __init__(
        self, source: Source, seed: int, stage: str, batch_size: int, global_batch: int, accelerator: Accelerator
    ) -> None:
        self.source, self.seed, self.stage_key = source, seed, mix(*stage.encode())
        self.batch_size, self.global_batch = batch_size, global_batch
        # The steps of an update follow from the global batch. An environment variable may override the accelerator's
        # accumulation steps; Updater scales the loss so that they cancel out.
        self.processes, self.rank = accelerator.num_processes, accelerator.process_index
        self.micro_batch_size = micro_batch_size(batch_size, self.processes, global_batch)
        self.updates_per_epoch = len(self._split(0))

    def _split(self, epoch: int) -> list[list[Tensor]]:
        order = epoch_ids(self.source, self.seed, epoch)
        return cut_updates(order, self.batch_size, self.processes, self.global_batch)

    def updates(self, epoch: int) -> list[list[MicroBatch]]:
        """Return an epoch's updates: of each, this process's micro-batch of every step."""
        return [self._own(ids, epoch, update) for update, ids in enumerate(self._split(epoch))]

    def _own(self, micro_batches: list[Tensor], epoch: int, update: int) -> list[MicroBatch]:
        total, own = sum(map(len, micro_batches)), []
        for first in range(0, len(micro_batches), self.processes):
            step = micro_batches[first : first + self.processes]
            ids = step[self.rank]
            # The same seed whatever ran before, and however micro-batches are dealt to processes.
            seed = mix(self.seed, self.stage_key, epoch, update, first + (self.rank if len(ids) else 0))
            filled = sum(len(part) > 0 for part in step)
            own.append(MicroBatch(ids if len(ids) else step[0], len(ids), total, filled, seed))
        return own
