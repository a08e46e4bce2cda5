"""What a fit keeps in its folder: checkpoints of all that decides the weights, and metrics.jsonl."""

import contextlib
import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from mgd_timm.distributed.collectives import run_on_main
from mgd_timm.distributed.sharding import load_full_tensors
from mgd_timm.recipe.options import differences
from mgd_timm.storage import checkpoint
from mgd_timm.storage.atomic_write import remove_partial_writes, write_text_atomically
from mgd_timm.training.optimizer_state import load_optimizer_state, optimizer_state
from mgd_timm.training.options import FitOptions
from mgd_timm.training.report import NonFiniteError, Progress
from mgd_timm.training.step import Updater


class Checkpointer:
    """Saves and restores the state of a fit.

    Args:
        options: What is kept, and where.
        updater: Has the trainee, the optimizer and the moving average.
    """

    def __init__(self, options: FitOptions, updater: Updater) -> None:
        self.options, self.updater, self.accelerator = options, updater, updater.accelerator
        self.scaler = getattr(updater.accelerator, "scaler", None)
        self.metrics_folder = options.metrics_folder or options.folder

    def append_metrics(self, row: dict[str, Any]) -> None:
        """Append a row to metrics.jsonl."""
        if self.metrics_folder is not None:
            path, line = self.metrics_folder / "metrics.jsonl", json.dumps(row) + "\n"
            run_on_main(self.accelerator, lambda: _append(path, line))

    def save(self, progress: Progress) -> None:
        """Save a checkpoint, whole or not at all, and remove the oldest.

        Raises:
            NonFiniteError: A weight is not finite; nothing is saved.
            OSError: It could not be written; older ones are whole.
        """
        if self.options.folder is not None:
            folder = self.options.folder / "checkpoints"
            tensors: dict[str, dict[str, Tensor]] = {"trainee": self.updater.trainee.state_dict()}
            optimizers = {}
            for group, optimizer in self.updater.optimizers.items():
                tensors[group], optimizers[group] = optimizer_state(optimizer, self.updater.trainee)
            if self.updater.average is not None:
                tensors["ema"] = self.updater.average.ema.module.state_dict()
            tensors = {group: self.updater.parallel.gather_full(named) for group, named in tensors.items()}
            run_on_main(self.accelerator, lambda: self._save_on_main(folder, progress, tensors, optimizers))

    def _save_on_main(
        self, folder: Path, progress: Progress, tensors: dict[str, dict[str, Tensor]], optimizers: dict[str, Any]
    ) -> None:
        for name, tensor in tensors["trainee"].items():
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise NonFiniteError(
                    f"{self.options.stage}: {name} is not finite after update {progress.done} (epoch "
                    f"{progress.epoch + 1}), which is not saved. {self.options.advice}"
                )
        values = asdict(progress) | {"fingerprint": self.options.fingerprint, **optimizers}
        values["scaler"] = self.scaler.state_dict() if self.scaler is not None else None
        checkpoint.save(folder, progress.done, checkpoint.State(tensors, values), keep=self.options.checkpoint_hist)

    def load_newest(self) -> checkpoint.State | None:
        """Return the newest whole checkpoint if the fit is to be resumed; None starts at the beginning.

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

    def restore(self, state: checkpoint.State | None) -> Progress:
        """Load a state, drop later rows of metrics.jsonl, and return the progress; None stands for the beginning."""
        folder, stage = self.metrics_folder, self.options.stage
        progress = Progress()
        if state is not None:
            progress = self._load(state)
            self.accelerator.print(f"{stage}: resumed after update {progress.done} (epoch {progress.epoch + 1})")
        if folder is not None:
            run_on_main(self.accelerator, lambda: remove_partial_writes(folder))  # of metrics.jsonl
            done = self.options.updates_before + progress.done
            run_on_main(self.accelerator, lambda: _drop_later_rows(folder / "metrics.jsonl", stage, done))
        return progress

    def _check_same(self, state: checkpoint.State | None) -> None:
        """Refuse different checkpoints on the processes: gradients would be averaged over different weights."""
        found = gather_object(["none" if state is None else f"update {state.values['done']}"])
        if len(set(found)) > 1:
            others = ", ".join(f"rank {rank} {name}" for rank, name in enumerate(found) if name != found[0])
            raise checkpoint.CheckpointError(
                f"rank 0 found in {self.options.folder} the checkpoint of {found[0]}, and {others}: expected the same "
                "on all. Give an --output folder that all machines share."
            )

    def _check_fingerprint(self, state: checkpoint.State) -> None:
        changed = differences(state.values["fingerprint"], self.options.fingerprint)
        if changed:
            raise checkpoint.CheckpointError(
                f"the checkpoint in {self.options.folder} is of another recipe ({'; '.join(changed[:5])}): resume with "
                "the flags of the first start, or choose another --output."
            )

    def _load(self, state: checkpoint.State) -> Progress:
        updater, tensors, values = self.updater, state.tensors, state.values
        load_full_tensors(updater.trainee, tensors["trainee"])
        for group, optimizer in updater.optimizers.items():
            load_optimizer_state(optimizer, updater.trainee, tensors[group], values[group])
        if updater.average is not None:
            load_full_tensors(updater.average.ema.module, tensors["ema"])
        if self.scaler is not None and values["scaler"] is not None:
            self.scaler.load_state_dict(values["scaler"])
        return Progress(**{counter.name: values[counter.name] for counter in fields(Progress)})


def _append(path: Path, line: str) -> None:
    write_text_atomically(path, (path.read_text() if path.exists() else "") + line)


def _drop_later_rows(path: Path, stage: str, updates: int) -> None:
    """Drop a stage's rows of metrics.jsonl from after the update that it is resumed at."""
    if not path.exists():
        return
    rows = []
    for line in path.read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):  # a partial or corrupt line
            rows.append(json.loads(line))
    kept = [row for row in rows if row["stage"] != stage or row["updates"] <= updates]
    text = "".join(json.dumps(row) + "\n" for row in kept)
    write_text_atomically(path, text)
