"""What a stage of training keeps in its folder: checkpoints of all that decides the weights, and metrics.jsonl."""

import contextlib
import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.optim import Optimizer

from mgd_timm.distributed.collectives import run_on_main
from mgd_timm.distributed.sharding import Replicated, load_full_tensors
from mgd_timm.recipe.options import differences
from mgd_timm.storage import checkpoint
from mgd_timm.storage.atomic_write import remove_partial_writes, write_text_atomically
from mgd_timm.training.evaluation import Metrics
from mgd_timm.training.optimizer_state import load_optimizer_state, optimizer_state


@dataclass(frozen=True)
class FitOptions:
    """What a run keeps and shows while it goes on.

    Args:
        folder: Folder for metrics.jsonl and checkpoints/; None keeps nothing.
        fingerprint: The recipe's values that decide the weights; a checkpoint of others is refused.
        stage: Name of the stage in metrics, and key of its randomness.
        resume: Continue from the newest whole checkpoint, where there is one.
        checkpoint_interval: Updates between checkpoints; 0 for the epochs' ends only.
        checkpoint_hist: Checkpoints kept.
        log_interval: Updates between checks and reports of the losses.
        quiet: No progress bar.
        track: Report to accelerate's trackers.
        advice: The way out that an error names where a loss or weight is not finite.
        memory_hint: As `advice`, where memory runs out.
    """

    folder: Path | None = None
    fingerprint: dict[str, Any] = field(default_factory=dict)
    stage: str = "distil"
    resume: bool = False
    checkpoint_interval: int = 0
    checkpoint_hist: int = 2
    log_interval: int = 50
    quiet: bool = False
    track: bool = True
    advice: str = "Lower --lr, clip gradients (--clip-grad 1) or warm up (--warmup-epochs)."
    memory_hint: str = "give --find-batch-size, or a smaller --batch-size beside the --global-batch-size."


@dataclass
class Progress:
    """How far a stage is, and what it has found: beside tensors all that it goes on from.

    Args:
        epoch: From 0.
        update: Of the epoch, from 0.
        done: Updates in all.
        sums: Sums over the epoch's samples so far, by name; "n" is their number.
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
    """A loss is not a number or infinite: names the update and the term. Checkpoints hold the state before it."""


class Checkpointer:
    """Saves a stage's state and finds it again.

    Args:
        options: What is kept, and where.
        accelerator: Processes, and fp16's loss scale.
        parallel: Of the trainee's parts.
        trainee: With the weights.
        optimizer: Bare, as accelerate does not wrap it.
        ema: The moving average, where there is one.
    """

    def __init__(
        self,
        options: FitOptions,
        accelerator: Accelerator,
        parallel: Replicated,
        trainee: nn.Module,
        optimizer: Optimizer,
        ema: ModelEmaV3 | None,
    ) -> None:
        self.options, self.accelerator, self.parallel = options, accelerator, parallel
        self.trainee, self.optimizer, self.ema = trainee, optimizer, ema

    def note(self, row: dict[str, Any]) -> None:
        """Append a row to metrics.jsonl."""
        if self.options.folder is not None:
            path, line = self.options.folder / "metrics.jsonl", json.dumps(row) + "\n"
            run_on_main(self.accelerator, lambda: _append(path, line))

    def save(self, progress: Progress) -> None:
        """Commit a checkpoint, whole or not at all; older ones than the recipe keeps go.

        Raises:
            NonFiniteError: A weight that is not finite, which is not saved.
            OSError: It could not be written; older ones are whole.
        """
        if self.options.folder is not None:
            folder = self.options.folder / "checkpoints"
            tensors: dict[str, dict[str, Tensor]] = {"trainee": self.trainee.state_dict()}
            tensors["optimizer"], optimizer = optimizer_state(self.optimizer, self.trainee)
            if self.ema is not None:
                tensors["ema"] = self.ema.module.state_dict()
            tensors = {group: self.parallel.gather_full(held) for group, held in tensors.items()}
            run_on_main(self.accelerator, lambda: self._save_here(folder, progress, tensors, optimizer))

    def _save_here(
        self, folder: Path, progress: Progress, tensors: dict[str, dict[str, Tensor]], optimizer: dict[str, Any]
    ) -> None:
        for name, tensor in tensors["trainee"].items():
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise NonFiniteError(
                    f"{self.options.stage}: {name} is not finite after update {progress.done} (epoch "
                    f"{progress.epoch + 1}), which is not saved. {self.options.advice}"
                )
        scaler = getattr(self.accelerator, "scaler", None)
        values = asdict(progress) | {"fingerprint": self.options.fingerprint, "optimizer": optimizer}
        values["scaler"] = scaler.state_dict() if scaler is not None else None
        checkpoint.save(folder, progress.done, checkpoint.State(tensors, values), keep=self.options.checkpoint_hist)

    def newest(self) -> checkpoint.State | None:
        """The newest whole checkpoint where the stage is to go on from one; None starts at the beginning.

        Raises:
            checkpoint.CheckpointError: It is of another recipe, or the processes find different ones.
        """
        folder, stage = self.options.folder, self.options.stage
        if folder is None or not self.options.resume:
            return None
        run_on_main(self.accelerator, lambda: remove_partial_writes(folder / "checkpoints"))
        state = checkpoint.load_newest(folder / "checkpoints", self.accelerator.print)
        self._check_same(state)
        if state is None:
            self.accelerator.print(f"{stage}: no checkpoint in {folder}, starting at the beginning")
        else:
            self._check_fingerprint(state)
        return state

    def go_on(self, state: checkpoint.State | None) -> Progress:
        """Load a state, and drop the rows of metrics from after it; None loads nothing."""
        folder, stage = self.options.folder, self.options.stage
        progress = Progress()
        if state is not None:
            progress = self._load(state)
            self.accelerator.print(f"{stage}: resumed after update {progress.done} (epoch {progress.epoch + 1})")
        if folder is not None:
            run_on_main(self.accelerator, lambda: remove_partial_writes(folder))  # of metrics.jsonl
            run_on_main(self.accelerator, lambda: _forget(folder / "metrics.jsonl", stage, progress.done))
        return progress

    def _check_same(self, state: checkpoint.State | None) -> None:
        """All processes go on from one update: with different weights each, gradients would be averaged all the
        same."""
        found = gather_object(["none" if state is None else f"update {state.values['done']}"])
        if len(set(found)) > 1:
            said = ", ".join(f"rank {rank} {name}" for rank, name in enumerate(found) if name != found[0])
            raise checkpoint.CheckpointError(
                f"rank 0 finds in {self.options.folder} the checkpoint of {found[0]}, and {said}: all machines have to "
                "see one --output folder."
            )

    def _check_fingerprint(self, state: checkpoint.State) -> None:
        changed = differences(state.values["fingerprint"], self.options.fingerprint)
        if changed:
            raise checkpoint.CheckpointError(
                f"the checkpoint in {self.options.folder} is of another recipe ({'; '.join(changed[:5])}): resume with "
                "the flags of the first start, or choose another --output."
            )

    def _load(self, state: checkpoint.State) -> Progress:
        load_full_tensors(self.trainee, state.tensors["trainee"])
        load_optimizer_state(self.optimizer, self.trainee, state.tensors["optimizer"], state.values["optimizer"])
        if self.ema is not None:
            load_full_tensors(self.ema.module, state.tensors["ema"])
        scaler = getattr(self.accelerator, "scaler", None)
        if scaler is not None and state.values["scaler"] is not None:
            scaler.load_state_dict(state.values["scaler"])
        return Progress(**{counter.name: state.values[counter.name] for counter in fields(Progress)})


def _append(path: Path, line: str) -> None:
    write_text_atomically(path, (path.read_text() if path.exists() else "") + line)


def _forget(path: Path, stage: str, updates: int) -> None:
    """Drop a stage's rows of metrics from after the update that the run goes on from."""
    if not path.exists():
        return
    rows = []
    for line in path.read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):  # half of a line, or a corrupt one
            rows.append(json.loads(line))
    kept = [row for row in rows if row["stage"] != stage or row["updates"] <= updates]
    text = "".join(json.dumps(row) + "\n" for row in kept)
    write_text_atomically(path, text)
