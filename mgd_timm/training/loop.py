"""The only training loop.

Teacher training, head fitting and distillation are `fit` with another trainee. Accelerate computes (processes,
precision, averaging of gradients); order, randomness and the learning rate are functions of the recipe and the number
of updates done, so a run that was killed ends in the same weights.
"""

import signal
import time
from collections.abc import Callable
from dataclasses import dataclass

from accelerate import Accelerator
from accelerate.utils.memory import should_reduce_batch_size
from torch import nn
from tqdm import tqdm

from mgd_timm.data.sources import Source
from mgd_timm.distributed.collectives import any_process
from mgd_timm.distributed.hangs import print_stacks_before_timeout
from mgd_timm.recipe.optim import Optim
from mgd_timm.training.checkpointer import Checkpointer
from mgd_timm.training.evaluation import Metrics
from mgd_timm.training.find_batch_size import find_batch_size
from mgd_timm.training.options import FitOptions
from mgd_timm.training.report import Progress, Reporter, means_of
from mgd_timm.training.signals import Stopped, catch_signals
from mgd_timm.training.step import Teach, Updater
from mgd_timm.training.update_plan import UpdatePlan

Evaluate = Callable[[nn.Module | None], Metrics]


@dataclass(frozen=True)
class Fitted:
    """What `fit` returns.

    Args:
        last: Metrics of the last epoch; empty without evaluation.
        losses: Mean training losses of the last epoch, by name.
        best: Best "top1" in %, -1 without one.
        best_epoch: Epoch of the best, from 1; 0 without one.
        updates: Updates in all.
        seconds: Time spent in updates, also before a resume.
        averaged: The moving average of the trained module, if asked for.
    """

    last: Metrics
    losses: Metrics
    best: float
    best_epoch: int
    updates: int
    seconds: float
    averaged: nn.Module | None


def fit(
    trainee: nn.Module,
    source: Source,
    optim: Optim,
    accelerator: Accelerator,
    *,
    seed: int,
    batch_size: int,
    teach: Teach | None = None,
    evaluate: Evaluate | None = None,
    start_epoch: Callable[[int], None] | None = None,
    end_epoch: Callable[[int, nn.Module | None], None] | None = None,
    averaged: nn.Module | None = None,
    compile: bool = False,
    epochs_before: int = 0,
    options: FitOptions | None = None,
) -> Fitted:
    """Train a module whose forward(batch, teacher) returns its losses by name, and logits.

    Args:
        trainee: On the accelerator's device, trained in place. Parameters without requires_grad stay as they are.
        source: Training images (or stored teacher outputs).
        optim: Epochs, optimizer, schedule, clipping, global batch, averaging.
        accelerator: Device, processes and precision.
        seed: Of order and dropout.
        batch_size: The most samples of a micro-batch, 2 or more: an update takes as many micro-batches as hold its
            global batch. With `optim.find_batch_size`, where the search for what memory admits starts.
        teach: Returns the teacher's features of a batch, as `distiller.LiveTeachers` does; None passes no teacher.
        evaluate: Returns metrics after each epoch, given the averaged module or None; `best` follows their "top1".
        start_epoch, end_epoch: Called around each epoch with the number done; the second with the averaged module too.
        averaged: Part of the trainee to keep a moving average of, if `optim` asks for one.
        compile: Compile the trainee's forward and backward, and a live teacher (torch.compile; CUDA graphs on a GPU).
        epochs_before: Epochs that the objective has been trained for, which warm-ups of its terms count.
        options: Checkpoints and logs; by default nothing is kept.

    Raises:
        NonFiniteError: A loss or weight that is not finite.
        Stopped: SIGINT or SIGTERM; the state was saved first, if there is a folder.
        checkpoint.CheckpointError: The newest checkpoint is of another recipe.
        ValueError: A global batch of fewer than 2 samples for each process, an unknown optimizer or scheduler, or no
            memory for 2 samples.
        OSError: A checkpoint could not be written; older ones are whole.
    """
    options = options or FitOptions()
    global_batch = optim.global_batch_size or batch_size * accelerator.num_processes * (optim.grad_accum_steps or 1)

    def build_updater(size: int) -> Updater:
        plan = UpdatePlan(source, seed, options.stage, size, global_batch, accelerator)
        return Updater(
            trainee,
            optim,
            accelerator,
            plan,
            teach=teach,
            averaged=averaged,
            compile=compile,
            epochs_before=epochs_before,
        )

    if optim.find_batch_size:
        batch_size = find_batch_size(
            lambda size: build_updater(size).try_update(source), trainee, accelerator, batch_size, global_batch
        )
    loop = _Loop(build_updater(batch_size), source, evaluate, options, start_epoch, end_epoch)
    with catch_signals() as caught:
        try:
            return loop.run(caught)
        except RuntimeError as error:
            if should_reduce_batch_size(error):
                error.add_note(f"{options.stage}: {options.memory_hint}")
            raise


class _Loop:
    """Epochs of updates, with their reports, evaluations and checkpoints."""

    def __init__(
        self,
        updater: Updater,
        source: Source,
        evaluate: Evaluate | None,
        options: FitOptions,
        start_epoch: Callable[[int], None] | None,
        end_epoch: Callable[[int, nn.Module | None], None] | None,
    ) -> None:
        self.updater, self.source, self.evaluate, self.options = updater, source, evaluate, options
        self.start_epoch, self.end_epoch = start_epoch, end_epoch
        self.accelerator, self.epochs = updater.accelerator, updater.optim.epochs
        self.averaged = updater.average.module if updater.average is not None else None
        self.checkpointer = Checkpointer(options, updater)
        self.progress = Progress()
        # Several processes learn at a report that one of them was told to stop.
        self.log_interval = options.log_interval if updater.plan.processes == 1 else min(options.log_interval, 10)

    def run(self, caught: list[int]) -> Fitted:
        """Train from the newest checkpoint, or the beginning, to the end.

        Args:
            caught: Signals that ask for a stop.
        """
        self.updater.check_average()
        state = self.checkpointer.load_newest()
        if state is not None and state.values["epoch"] < self.epochs:
            self.updater.rebuild_buckets(self.source)
        self.progress = now = self.checkpointer.restore(state)
        total, start = self.epochs * len(self.source.ids), now.epoch * len(self.source.ids) + int(now.sums.get("n", 0))
        hidden = self.options.quiet or not self.accelerator.is_main_process
        with (
            tqdm(
                total=total, initial=start, desc=self.options.stage, unit="img", disable=hidden, mininterval=1.0
            ) as bar,
            print_stacks_before_timeout(self.accelerator) as start_step,
        ):
            reporter = Reporter(self.options, self.accelerator, bar)
            while now.epoch < self.epochs:
                self._train_epoch(reporter, caught, start_step)
                self._end_epoch(reporter)
                if any_process(self.accelerator, bool(caught)):
                    self._stop(caught)
        self.accelerator.free_memory()
        self.updater.parallel.copy_to_caller()
        return Fitted(now.last, now.losses, now.best, now.best_epoch, now.done, now.seconds, self.averaged)

    def _train_epoch(self, reporter: Reporter, caught: list[int], start_step: Callable[[], None]) -> None:
        now, interval = self.progress, self.options.checkpoint_interval
        if self.start_epoch is not None:
            self.start_epoch(now.epoch)
        updates = self.updater.plan.updates(now.epoch)[now.update :]
        ids = [micro_batch.ids for update in updates for micro_batch in update]
        batches = self.source.batches(ids, now.epoch, self.accelerator.device)
        self.updater.trainee.train()
        clock = time.monotonic()
        for number, update in enumerate(updates, start=1):
            start_step()
            reporter.pending.add(self.updater.run(update, batches, now.done))
            now.update += 1
            now.done += 1
            last = number == len(updates)
            save = bool(interval) and now.done % interval == 0 and not last
            stop_alone = bool(caught) and self.updater.plan.processes == 1
            if last or save or stop_alone or len(reporter.pending) >= self.log_interval:
                stop = reporter.report(now, self.updater.lr, bool(caught))
                now.seconds += time.monotonic() - clock
                if (save or stop) and not last:
                    self.checkpointer.save(now)
                clock = time.monotonic()  # writing a checkpoint is no part of an update
                if stop and not last:
                    self._stop(caught)

    def _end_epoch(self, reporter: Reporter) -> None:
        """Evaluate, append to metrics.jsonl and save."""
        now = self.progress
        count = now.sums["n"]
        now.losses, weights = means_of(now.sums)
        train = {**now.losses, "top1": 100 * now.sums["hits"] / count}
        self.updater.broadcast_buffers()
        metrics: Metrics = {}
        if self.evaluate is not None or self.end_epoch is not None:
            with self.updater.parallel.full_parameters():
                metrics = self.evaluate(self.averaged) if self.evaluate is not None else {}
                if self.end_epoch is not None:
                    self.end_epoch(now.epoch + 1, self.averaged)
        now.last = metrics
        now.epoch, now.update, now.sums = now.epoch + 1, 0, {}
        if metrics.get("top1", -1.0) > now.best:
            now.best, now.best_epoch = metrics["top1"], now.epoch
        row = {
            "stage": self.options.stage,
            "epoch": self.options.epochs_before + now.epoch,
            "updates": self.options.updates_before + now.done,
            "lr": self.updater.lr,
            "train": train,
            **({"sample_weights": weights} if weights else {}),
            "eval": metrics,
            "best_top1": now.best if now.best_epoch else None,
            "seconds": round(now.seconds, 3),
            "images_per_second": round(now.epoch * count / max(now.seconds, 1e-9), 1),
        }
        self.checkpointer.append_metrics(row)
        reporter.track({f"eval/{name}": value for name, value in metrics.items()}, now.done)
        self.checkpointer.save(now)

    def _stop(self, caught: list[int]) -> None:
        number = caught[0] if caught else signal.SIGTERM
        saved = "its state is saved, --resume continues it"
        kept = saved if self.options.folder is not None else "without a folder nothing was saved"
        raise Stopped(number, f"stopped by {signal.Signals(number).name} after update {self.progress.done}: {kept}")
