"""How far a fit is, and its losses: collected on the device, then checked, added up and shown."""

import math
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from mgd_timm.criteria.base import target_classes
from mgd_timm.features import Batch
from mgd_timm.training.evaluation import Metrics
from mgd_timm.training.options import FitOptions

WEIGHT = "sample_weight/"
"""Prefix of sums that are not of losses, but of the weights of samples."""


@dataclass
class Progress:
    """How far a fit is, and what it has found: beside tensors, all that a checkpoint holds.

    Args:
        epoch: From 0.
        update: Of the epoch, from 0.
        done: Updates in all.
        sums: Sums over the epoch's samples so far, by name; see `sums_of`.
        seconds: Spent in updates.
        last: Metrics of the last epoch.
        losses: Its losses.
        best: Best top-1 in %, -1 before the first.
        best_epoch: Its epoch, from 1; 0 before the first.
    """

    epoch: int = 0
    update: int = 0
    done: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    last: Metrics = field(default_factory=dict)
    losses: Metrics = field(default_factory=dict)
    best: float = -1.0
    best_epoch: int = 0


class NonFiniteError(RuntimeError):
    """A loss or weight is not finite; names the update. Checkpoints hold a state before it."""


def sums_of(
    terms: dict[str, Tensor], logits: Tensor, batch: Batch, weights: dict[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Return each term times the number of samples, "hits", the correct predictions, and "n", the number of samples;
    of weights of samples their sum and that of their squares, under WEIGHT + "mean" and "square".

    They stay on the device, so that no step waits for them.
    """
    with torch.no_grad():
        count = len(batch.labels)
        target = target_classes(batch.labels)
        hits = torch.zeros((), device=logits.device)
        if logits.shape[1]:  # a teacher without logits may be the trainee
            hits = (logits.argmax(1) == target).sum().float()
        sums = {name: term.detach().float() * count for name, term in terms.items()}
        for name, weight in (weights or {}).items():
            sums |= {
                f"{WEIGHT}mean{name}": weight.float().sum(),
                f"{WEIGHT}square{name}": weight.float().square().sum(),
            }
        return {**sums, "hits": hits, "n": torch.full_like(hits, count)}


def means_of(sums: dict[str, float]) -> tuple[Metrics, Metrics]:
    """Return the mean losses by name, and the mean and standard deviation of the weights of samples, as mean and std
    with the suffix of their name."""
    means = {name: value / sums["n"] for name, value in sums.items() if name not in ("hits", "n")}
    losses = {name: value for name, value in means.items() if not name.startswith(WEIGHT)}
    weights: Metrics = {}
    for name, value in means.items():
        if name.startswith(f"{WEIGHT}mean"):
            suffix = name.removeprefix(f"{WEIGHT}mean")
            variance = means[f"{WEIGHT}square{suffix}"] - value**2
            weights |= {f"mean{suffix}": value, f"std{suffix}": math.sqrt(max(variance, 0.0))}
    return losses, weights


class PendingSums:
    """Sums of updates that are still on the device; one tensor brings those of all updates and processes to the host.

    Args:
        accelerator: Processes.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.names: list[str] = []
        self.rows: list[Tensor] = []

    def __len__(self) -> int:
        return len(self.rows)

    def add(self, sums: dict[str, Tensor]) -> None:
        """Add the sums of an update."""
        self.names = list(sums)
        self.rows.append(torch.stack(list(sums.values())))

    def fetch(self, flag: bool) -> tuple[list[dict[str, float]], bool]:
        """Return the sums of each update over all processes, and whether the flag is set on any; nothing is pending
        then."""
        flags = torch.full_like(self.rows[0][:1], float(flag))
        packed = self.accelerator.reduce(torch.cat([flags, *self.rows]), "sum").cpu().double()
        rows = packed[1:].view(len(self.rows), -1).tolist()
        self.rows.clear()
        return [dict(zip(self.names, row, strict=True)) for row in rows], bool(packed[0] > 0)


class Reporter:
    """Checks losses, adds them up, and shows them in the progress bar and to trackers.

    Args:
        options: Of the fit.
        accelerator: Processes and trackers.
        bar: Counts samples.
    """

    def __init__(self, options: FitOptions, accelerator: Accelerator, bar: tqdm) -> None:
        self.options, self.accelerator, self.bar = options, accelerator, bar
        self.pending = PendingSums(accelerator)

    def report(self, progress: Progress, lr: float, stop: bool) -> bool:
        """Report the pending updates, of which there is at least one; `progress.sums` takes them up.

        Args:
            progress: After these updates.
            lr: Learning rate of the last one.
            stop: Whether this process is to stop.

        Returns:
            Whether any process is to stop.

        Raises:
            NonFiniteError: A loss that is not finite.
        """
        rows, stop = self.pending.fetch(stop)
        for number, row in enumerate(rows, start=progress.done - len(rows) + 1):
            for name, value in row.items():
                if not math.isfinite(value):
                    raise NonFiniteError(
                        f"{self.options.stage}: the term {name!r} is {value} at update {number} (epoch "
                        f"{progress.epoch + 1}, lr {lr:.3g}). {self.options.advice}"
                    )
                progress.sums[name] = progress.sums.get(name, 0.0) + value
        terms, weights = means_of(rows[-1])
        shown = terms if len(terms) <= 6 else {"loss": sum(terms.values())}
        self.bar.set_postfix(
            {"epoch": progress.epoch + 1, **{name: f"{value:.3f}" for name, value in shown.items()}}, refresh=False
        )
        self.bar.update(int(sum(row["n"] for row in rows)))
        self.track({**terms, **{f"{WEIGHT}{name}": value for name, value in weights.items()}, "lr": lr}, progress.done)
        return stop

    def track(self, values: Metrics, step: int) -> None:
        """Log values to the trackers after `step` updates of this fit, under the stage's name."""
        if self.options.track:
            named = {f"{self.options.stage}/{name}": value for name, value in values.items()}
            self.accelerator.log(named, step=self.options.updates_before + step)
