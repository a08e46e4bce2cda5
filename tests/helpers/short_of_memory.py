"""A run whose process with a given rank has little memory: the system refuses what goes beyond it.

    python tests/short_of_memory.py RANK MEGABYTES FITS

It has MEGABYTES more than it had before, and a batch size of 64 (global: 64), which is to be halved until it is FITS.
"""

import resource
import sys

import psutil
import torch
from torch import nn

from mgd_timm.distributed.collectives import join, leave
from mgd_timm.features import Batch
from mgd_timm.recipe.optim import Optim
from mgd_timm.training.loop import fit
from mgd_timm.training.options import FitOptions


class Rows:
    digest, count = "rows", 66

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randn(self.count, 4, 1, 1, generator=generator)
        self.labels = torch.randint(0, 3, (self.count,), generator=generator)
        self.ids = torch.arange(self.count)

    def batches(self, micro_batches, epoch, device):
        for ids in micro_batches:
            yield Batch(self.images[ids], self.labels[ids], ids)


class Wide(nn.Module):
    """2 MB of each of its activations for an image; and running statistics and dropout, which a trial moves."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.norm, self.dropout, self.outer = nn.BatchNorm1d(4), nn.Dropout(0.1), nn.Linear(4, 3)

    def forward(self, batch, teacher=None):
        shown = self.dropout(self.norm(batch.images.flatten(1)))
        wide = (shown.repeat(1, 2**17).relu() * 2).tanh()
        logits = self.outer(wide.view(len(shown), -1, 4).mean(1))
        return {"task": nn.functional.cross_entropy(logits, batch.labels)}, logits


def train(accelerator, batch_size: int, find: bool) -> nn.Module:
    trainee = Wide()
    optim = Optim(epochs=1, lr=0.1, global_batch_size=64, find_batch_size=find)
    options = {"seed": 3, "batch_size": batch_size, "options": FitOptions(quiet=True)}
    fit(trainee, Rows(), optim, accelerator, **options)
    return trainee


def main() -> None:
    rank, megabytes, fits = (int(word) for word in sys.argv[1:])
    accelerator = join()
    expected = train(accelerator, fits, False)  # it was started with what fits; all threads are there now
    if accelerator.process_index == rank:
        limit = psutil.Process().memory_info().vms + (megabytes << 20)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    found = train(accelerator, 64, True)
    for name, tensor in found.state_dict().items():
        assert torch.equal(tensor, expected.state_dict()[name]), name
    print(f"process {accelerator.process_index}: the same bits")
    leave()


if __name__ == "__main__":
    main()
