"""BatchNorm's running statistics on several processes: those of one process that sees all micro-batches in turn.

DDP by itself keeps the main process's, which has seen its own micro-batches only: a model would be evaluated and
exported with other statistics on every number of processes.
"""

import torch
from torch import Tensor, nn


class RunningStatistics:
    """The running statistics of a module's BatchNorm layers, kept equal on all processes.

    A micro-batch's forward makes r of r0: r = a r0 + b, with a = (1 - momentum)^calls. Micro-batches k = 0 .. n - 1 in
    turn make a^n r0 + sum_k a^(n - 1 - k) b_k, and each process knows its own b_k = r_k - a r0: one sum over processes,
    of two numbers per channel, where DDP would send as many from the main process.

    Args:
        module: What is trained. Layers without running statistics, or with cumulative ones (momentum None), are left
            alone.
    """

    def __init__(self, module: nn.Module) -> None:
        self.layers = {
            name: layer
            for name, layer in module.named_modules()
            if isinstance(layer, nn.modules.batchnorm._BatchNorm)
            and not isinstance(layer, nn.SyncBatchNorm)
            and layer.running_mean is not None
            and layer.num_batches_tracked is not None
            and layer.momentum is not None
        }

    def names(self) -> list[str]:
        """Return the names of the buffers in the module; nothing else needs to synchronise them."""
        return [
            f"{name}.{kind}" for name in self.layers for kind in ("running_mean", "running_var", "num_batches_tracked")
        ]

    def snapshot(self) -> list[Tensor]:
        """Return copies of the statistics of layers in train mode, before a step, for `merge`."""
        return [buffer.clone() for buffer in self._buffers()]

    @torch.no_grad()
    def merge(self, before: list[Tensor], filled: int, rank: int) -> None:
        """Make the statistics of one step, after its backward pass, those of its micro-batches in turn.

        Args:
            before: What `snapshot` returned before the step; the same on all processes.
            filled: Number of the step's micro-batches that hold samples, those of the first processes.
            rank: Of this process.
        """
        after = self._buffers()
        if not after:
            return
        floats = 2 * len(after) // 3  # means and variances; then numbers of batches
        sizes = [buffer.numel() for buffer in after[:floats]]
        calls = torch.stack(after[floats:]) - torch.stack(before[floats:])
        # Numbers, not tensors of them: a copy to the device would wait for the backward pass.
        kept = [1 - float(layer.momentum or 0) for layer in self._training()]
        powers = [share**number for share, number in zip(kept, calls.double().unbind(), strict=True)]
        a = torch.cat([power.expand(size) for power, size in zip(2 * powers, sizes, strict=True)])
        first, last = (torch.cat(buffers[:floats]).double() for buffers in (before, after))
        whole = (last - a * first) * a ** (filled - 1 - rank) if rank < filled else torch.zeros_like(first)
        torch.distributed.all_reduce(whole)
        whole += a**filled * first
        for buffer, values in zip(after[:floats], whole.split(sizes), strict=True):
            buffer.copy_(values)
        for buffer, start, number in zip(after[floats:], before[floats:], calls.unbind(), strict=True):
            buffer.copy_(start + filled * number)

    def _training(self) -> list[nn.modules.batchnorm._BatchNorm]:
        return [layer for layer in self.layers.values() if layer.training]

    def _buffers(self) -> list[Tensor]:
        """Return means, then variances, then numbers of batches."""
        layers = self._training()
        return [
            getattr(layer, kind) for kind in ("running_mean", "running_var", "num_batches_tracked") for layer in layers
        ]
