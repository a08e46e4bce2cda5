"""The only training loop.

Teacher training, head fitting and distillation are `fit` with another trainee. Accelerate computes (processes,
precision, averaging of gradients); order, randomness and the learning rate are functions of the recipe and the number
of updates done, so a run that was killed goes on to the very same weights.
"""

import contextlib
import math
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils.memory import should_reduce_batch_size
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from tqdm import tqdm

from mgd_timm.criteria.base import Criterion, Objective, at_least_float32
from mgd_timm.data.rng import mix
from mgd_timm.data.sampler import cut_updates
from mgd_timm.data.sources import Source, epoch_ids
from mgd_timm.distiller import LiveTeachers, TeacherFeatures
from mgd_timm.distributed.batchnorm_statistics import RunningStatistics
from mgd_timm.distributed.collectives import any_process, broadcast_tensors
from mgd_timm.distributed.hangs import print_stacks_before_timeout
from mgd_timm.distributed.sharding import make_data_parallel
from mgd_timm.features import Batch
from mgd_timm.granularity import HeadFitting
from mgd_timm.recipe.derived import micro_batch_size
from mgd_timm.recipe.optim import Optim
from mgd_timm.training.checkpointer import Checkpointer, FitOptions, NonFiniteError, Progress
from mgd_timm.training.evaluation import Metrics
from mgd_timm.training.find_batch_size import find_batch_size
from mgd_timm.training.optimizer_state import build_optimizer, build_schedule
from mgd_timm.training.signals import Stopped, catch_signals
from mgd_timm.training.step import Wrapper, compile_mode, reads_logits

Teach = Callable[[Batch], TeacherFeatures]
Evaluate = Callable[[nn.Module | None], Metrics]


@dataclass(frozen=True)
class Fitted:
    """What `fit` leaves: metrics and losses of the last epoch, the best `top1` and its epoch (from 1), and the averaged
    module."""

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
    averaged: nn.Module | None = None,
    compile: bool = False,
    options: FitOptions | None = None,
) -> Fitted:
    """Train a module whose forward(batch, teacher) gives its losses by name, and logits.

    Args:
        trainee: On the accelerator's device; all its parameters are trained.
        source: Training images (or stored teacher outputs).
        optim: Epochs, optimizer, schedule, clipping, global batch, averaging.
        accelerator: Device, processes and precision.
        seed: Of order and dropout.
        batch_size: Samples per process and step, at most, 2 or more; steps make up the rest of the recipe's global
            batch. With `optim.find_batch_size` where the search for what memory admits starts.
        teach: Gives the teacher's features of a batch, as `distiller.Live` does; None passes no teacher.
        evaluate: Evaluates each epoch, given the averaged module or None; its "top1" is what `best` follows.
        averaged: Part of the trainee to keep a moving average of, where the recipe asks for one.
        compile: Compile the trainee's forward and backward, and a live teacher (torch.compile; CUDA graphs on a GPU).
        options: What is kept and shown; by default nothing is kept.

    Raises:
        NonFiniteError: A loss that is not finite.
        Stopped: SIGINT or SIGTERM; the state was saved first, where there is a folder.
        checkpoint.CheckpointError: The newest checkpoint is of another recipe.
        ValueError: A global batch of fewer than 2 samples for each process, an unknown optimizer or scheduler, or no
            memory for 2.
        OSError: A checkpoint could not be written; older ones are whole.
    """
    kept = options if options is not None else FitOptions()

    def loop(size: int) -> _Loop:
        return _Loop(trainee, source, optim, accelerator, seed, size, teach, evaluate, averaged, compile, kept)

    if optim.find_batch_size:
        optim = replace(
            optim, global_batch_size=_global_batch(batch_size, optim, accelerator)
        )  # it stays as it is at the start
        batch_size = find_batch_size(lambda size: loop(size).try_update(), trainee, optim, accelerator, batch_size)
    training = loop(batch_size)
    with catch_signals() as caught:
        try:
            return training.run(caught)
        except RuntimeError as error:
            if should_reduce_batch_size(error):
                error.add_note(f"{kept.stage}: {kept.memory_hint}")
            raise


def _global_batch(batch_size: int, optim: Optim, accelerator: Accelerator) -> int:
    return optim.global_batch_size or batch_size * accelerator.num_processes * (optim.grad_accum_steps or 1)


class _Loop:
    def __init__(
        self,
        trainee: nn.Module,
        source: Source,
        optim: Optim,
        accelerator: Accelerator,
        seed: int,
        batch_size: int,
        teach: Teach | None,
        evaluate: Evaluate | None,
        averaged: nn.Module | None,
        compile: bool,
        options: FitOptions,
    ) -> None:
        self.parallel = make_data_parallel(trainee, accelerator)
        trainee = self.parallel.trainee
        self.trainee, self.source, self.optim, self.accelerator = trainee, source, optim, accelerator
        self.seed, self.batch_size, self.evaluate, self.options = seed, batch_size, evaluate, options
        self.stage_key = mix(*options.stage.encode())
        processes = accelerator.num_processes
        self.global_batch = _global_batch(batch_size, optim, accelerator)
        self.clip_groups = trainee.clip_groups() if isinstance(trainee, HeadFitting) else [list(trainee.parameters())]
        self.objectives = [module for module in trainee.modules() if isinstance(module, Objective)]
        optimizer = build_optimizer(trainee, optim, scaled=getattr(accelerator, "scaler", None) is not None)
        self.updates_per_epoch = len(self._updates(0))
        self.schedule = build_schedule(optimizer, optim, self.updates_per_epoch)
        self.ema: ModelEmaV3 | None = None
        self.average: nn.Module | None = None
        if optim.model_ema and averaged is not None:
            ema = {"decay": optim.model_ema_decay, "use_warmup": optim.model_ema_warmup}
            self.ema, self.averaged, self.average = self.parallel.moving_average(averaged, **ema)
        self.bare_optimizer = optimizer
        # A module that was prepared before is passed back bare, without precision or processes: so a new wrapper for
        # every fit. The schedule is not prepared: accelerate would step it once per process, and not save it.
        self.statistics = RunningStatistics(trainee) if processes > 1 else None
        kept = self.statistics.names() if self.statistics is not None else []
        mode = compile_mode(accelerator) if compile else None
        size = micro_batch_size(batch_size, processes, self.global_batch)
        wrapper = Wrapper(trainee, size, mode, kept)
        self.teach = teach.compile(size, mode) if mode is not None and isinstance(teach, LiveTeachers) else teach
        self.compiled = compile
        # DDP waits for the gradient of every parameter, unless it looks in each step which there will be.
        accelerator.ddp_handler = DistributedDataParallelKwargs(find_unused_parameters=not reads_logits(trainee))
        self.model, self.optimizer = self.parallel.prepare(wrapper, optimizer)
        self.keeper = Checkpointer(options, accelerator, self.parallel, trainee, optimizer, self.ema)
        self.progress = Progress()
        self.pending: list[Tensor] = []
        self.names: list[str] = []
        # Several processes learn at a report that one of them was told to stop.
        self.log_interval = options.log_interval if processes == 1 else min(options.log_interval, 10)
        self._reset_scaler()

    def _reset_scaler(self) -> None:
        """An fp16 loss scale that an earlier fit left would make this one depend on it."""
        scaler = getattr(self.accelerator, "scaler", None)
        fresh = torch.amp.GradScaler(self.accelerator.device.type).state_dict() if scaler is not None else {}
        if scaler is not None and fresh:
            scaler.load_state_dict(fresh)

    # -- the loop
    # -------------------------------------------------------------------------------------------------------------

    def run(self, caught: list[int]) -> Fitted:
        self._check_average()
        state = self.keeper.newest()
        if state is not None and state.values["epoch"] < self.optim.epochs:
            self._settle_sums()
        self.progress = self.keeper.go_on(state)
        total = self.optim.epochs * len(self.source.ids)
        quiet = self.options.quiet or not self.accelerator.is_main_process
        start = self.progress.epoch * len(self.source.ids) + int(self.progress.sums.get("n", 0))
        with (
            tqdm(
                total=total, initial=start, desc=self.options.stage, unit="img", disable=quiet, mininterval=1.0
            ) as bar,
            print_stacks_before_timeout(self.accelerator) as start_step,
        ):
            while self.progress.epoch < self.optim.epochs:
                self._run_epoch(bar, caught, start_step)
        self.accelerator.free_memory()
        self.parallel.copy_to_caller()
        now = self.progress
        return Fitted(now.last, now.losses, now.best, now.best_epoch, now.done, now.seconds, self.average)

    def _settle_sums(self) -> None:
        """Have one backward pass whose gradients are dropped, before a state is loaded, so that a resumed run keeps its
        last bits.

        DDP sums gradients in other groups after its first pass, and of three or more processes the groups decide in
        which order a number is summed.
        """
        if isinstance(self.model, nn.parallel.DistributedDataParallel) and self.accelerator.num_processes > 2:
            self.trainee.train()
            slot = self._mine(self._updates(0)[0])[0]
            batch = next(iter(self.source.batches([slot], 0, self.accelerator.device)))
            self.accelerator.backward(self._losses(self.model, batch)[-1])
            self.optimizer.zero_grad()

    def _check_average(self) -> None:
        """Warn of a moving average that is to end with more than 1 % of the weights after the first update."""
        total = self.updates_per_epoch * self.optim.epochs
        if self.ema is None or total == 1:
            return
        # The first update's weights replace the initial ones: timm's decay is 0 there.
        first = math.prod(self.ema.get_decay(step) for step in range(2, total + 1))
        if first > 0.01:
            self.accelerator.print(
                f"warning: {100 * first:.0f} % of the moving average after {total} updates will be the weights after "
                f"the first one: lower --model-ema-decay ({self.optim.model_ema_decay})"
                f"{'' if self.optim.model_ema_warmup else ', or give --model-ema-warmup'}."
            )

    def _updates(self, epoch: int) -> list[list[Tensor]]:
        order = epoch_ids(self.source, self.seed, epoch)
        # Not accelerator.gradient_accumulation_steps here: an environment variable may override ours, which `backward`
        # undoes.
        return cut_updates(order, self.batch_size, self.accelerator.num_processes, self.global_batch)

    def _mine(self, slots: list[Tensor]) -> list[Tensor]:
        """This process's slots of an update; for an empty one the step's first, as all take part in every step, if for
        nothing."""
        processes, rank = self.accelerator.num_processes, self.accelerator.process_index
        steps = zip(slots[::processes], slots[rank::processes], strict=True)
        return [own if len(own) else first for first, own in steps]

    def _run_epoch(self, bar: tqdm, caught: list[int], start_step: Callable[[], None]) -> None:
        processes = self.accelerator.num_processes
        updates = self._updates(self.progress.epoch)
        mine = [slot for slots in updates[self.progress.update :] for slot in self._mine(slots)]
        batches = self.source.batches(mine, self.progress.epoch, self.accelerator.device)
        self.trainee.train()
        clock = time.monotonic()
        for index in range(self.progress.update, len(updates)):
            start_step()
            self._train_update(updates[index], batches)
            self.progress.update += 1
            self.progress.done += 1
            last = self.progress.update == len(updates)
            save = (
                self.options.checkpoint_interval
                and self.progress.done % self.options.checkpoint_interval == 0
                and not last
            )
            alone = bool(caught) and processes == 1
            if last or save or alone or len(self.pending) >= self.log_interval:
                stop = self._report(bar, caught)
                self.progress.seconds += time.monotonic() - clock
                clock = time.monotonic()
                if (save or stop) and not last:
                    self.keeper.save(self.progress)
                if stop and not last:
                    self._stop(caught)
        self._end_epoch()
        if any_process(self.accelerator, bool(caught)):
            self._stop(caught)

    def _train_update(self, slots: list[Tensor], batches: Iterator[Batch]) -> None:
        processes = self.accelerator.num_processes
        self.schedule.step_update(self.progress.done)
        for objective in self.objectives:
            objective.set_progress(self.progress.done / self.updates_per_epoch)
        row: Tensor | None = None
        for step in range(len(slots) // processes):
            held = step + 1 < len(slots) // processes
            with self.parallel.no_sync(self.model) if held else contextlib.nullcontext():
                numbers = self._train_step(slots, step, next(batches))
            row = numbers if row is None else row + numbers
        if self.optim.clip_grad is not None:
            self._clip_gradients(self.optim.clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.ema is not None:
            self.ema.update(self.averaged, step=self.progress.done + 1)  # timm counts updates from 1
        assert row is not None
        self.pending.append(row)

    def _clip_gradients(self, largest: float) -> None:
        # Unscale once: accelerate's own clipping does it on each call, and the second one is an error in fp16.
        self.accelerator.unscale_gradients()
        for parameters in self.clip_groups:
            nn.utils.clip_grad_norm_(parameters, largest)

    def _train_step(self, slots: list[Tensor], step: int, batch: Batch) -> Tensor:
        """Add up the gradients of this process's slot of a step; gives its numbers, zeros where it is empty."""
        processes, rank = self.accelerator.num_processes, self.accelerator.process_index
        counts = [len(slot) for slot in slots[step * processes : (step + 1) * processes]]
        count, total = counts[rank], sum(len(slot) for slot in slots)
        # Dropout and the like: the same whatever ran before, and however the slots are dealt to processes.
        position = step * processes + (rank if count else 0)
        torch.manual_seed(mix(self.seed, self.stage_key, self.progress.epoch, self.progress.update, position))
        if self.compiled:
            torch.compiler.cudagraph_mark_step_begin()  # before the teacher, whose outputs may be a graph's too
        before = self.statistics.snapshot() if self.statistics is not None else []
        terms, logits, loss = self._losses(self.model, batch)
        # Mean over the update's samples: DDP averages over processes, accelerate divides by its accumulation steps.
        share = count * processes * self.accelerator.gradient_accumulation_steps / total
        self.accelerator.backward(loss if share == 1 else loss * share)
        if self.statistics is not None:
            self.statistics.merge(before, sum(map(bool, counts)), rank)
        self.names = list(terms)
        numbers = _numbers(terms, logits, batch)
        return numbers if count else torch.zeros_like(numbers)

    def _losses(self, model: nn.Module, batch: Batch) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """The terms, the student's logits, and the sum of the terms."""
        terms, logits = model(Batch(*batch), self._shown(batch))  # a plain Batch, whatever else travels with it
        return terms, logits, torch.stack([at_least_float32(term) for term in terms.values()]).sum()

    def try_update(self) -> None:
        """Two steps of the largest slot, the optimizer's first update between them, without a word to other
        processes."""
        slots = self._updates(0)[0]
        slot = max(self._mine(slots), key=len)
        batch = next(iter(self.source.batches([slot], 0, self.accelerator.device)))
        model = self.accelerator.unwrap_model(
            self.model, keep_fp32_wrapper=True
        )  # DDP would send buffers and wait for gradients
        criteria = [module for module in self.trainee.modules() if isinstance(module, Criterion)]
        self.trainee.train()
        try:
            for criterion in criteria:
                criterion.alone = True
            for step in range(2):
                self.accelerator.backward(self._losses(model, batch)[-1])
                if step == 0:
                    self.optimizer.step()
                    if len(slots) == self.accelerator.num_processes:  # else they are added up
                        self.optimizer.zero_grad()
        finally:
            for criterion in criteria:
                criterion.alone = False

    def _shown(self, batch: Batch) -> TeacherFeatures | None:
        if self.teach is None:
            return None
        with self.accelerator.autocast():  # the teacher stands outside the wrapped module, and so outside its autocast
            return self.teach(batch)

    # -- what is watched
    # ------------------------------------------------------------------------------------------------------

    def _report(self, bar: tqdm, caught: list[int]) -> bool:
        """Bring the pending updates' losses to the host: add them up, check and show them. True if any process is to
        stop."""
        flag = torch.full_like(self.pending[0][:1], float(bool(caught)))
        flat = self.accelerator.reduce(torch.cat([flag, *self.pending]), "sum").cpu().double()
        first = self.progress.done - len(self.pending) + 1
        rows = flat[1:].view(len(self.pending), -1).tolist()
        self.pending.clear()
        shown: Metrics = {}
        for number, (*values, hits, count) in enumerate(rows, start=first):
            for name, value in zip(self.names, values, strict=True):
                if not math.isfinite(value):
                    raise NonFiniteError(
                        f"{self.options.stage}: the term {name!r} is {value} at update {number} (epoch "
                        f"{self.progress.epoch + 1}, lr {self._lr():.3g}). {self.options.advice}"
                    )
                self.progress.sums[name] = self.progress.sums.get(name, 0.0) + value
                shown[name] = value / count
            self.progress.sums["hits"] = self.progress.sums.get("hits", 0.0) + hits
            self.progress.sums["n"] = self.progress.sums.get("n", 0.0) + count
        told = shown if len(shown) <= 6 else {"loss": sum(shown.values())}
        bar.set_postfix(
            {"epoch": self.progress.epoch + 1, **{name: f"{value:.3f}" for name, value in told.items()}}, refresh=False
        )
        bar.update(int(sum(row[-1] for row in rows)))
        self._track({**shown, "lr": self._lr()})
        return bool(flat[0] > 0)

    def _track(self, values: Metrics) -> None:
        if self.options.track:
            self.accelerator.log(
                {f"{self.options.stage}/{name}": value for name, value in values.items()}, step=self.progress.done
            )

    def _lr(self) -> float:
        return float(self.bare_optimizer.param_groups[0]["lr"])

    def _end_epoch(self) -> None:
        now = self.progress
        count = now.sums.pop("n")
        train = {name: value / count for name, value in now.sums.items()}
        train["top1"] = 100 * train.pop("hits")
        # What is evaluated is what is saved and exported: the main process's, where a buffer is each process's own.
        broadcast_tensors(self.trainee.buffers(), self.accelerator)
        if self.ema is not None:
            broadcast_tensors(self.ema.module.buffers(), self.accelerator)
        metrics: Metrics = {}
        if self.evaluate is not None:
            with self.parallel.full_parameters():
                metrics = self.evaluate(self.average)
        now.last = metrics
        now.losses = {name: value for name, value in train.items() if name != "top1"}
        now.epoch, now.update, now.sums = now.epoch + 1, 0, {}
        top1 = metrics.get("top1", -1.0)
        if top1 > now.best:
            now.best, now.best_epoch = top1, now.epoch
        row = {
            "stage": self.options.stage,
            "epoch": now.epoch,
            "updates": now.done,
            "lr": self._lr(),
            "train": train,
        }
        row |= {"eval": metrics, "best_top1": now.best if now.best_epoch else None}
        row |= {
            "seconds": round(now.seconds, 3),
            "images_per_second": round(now.epoch * count / max(now.seconds, 1e-9), 1),
        }
        self.keeper.note(row)
        self._track({f"eval/{name}": value for name, value in metrics.items()})
        self.keeper.save(now)

    def _stop(self, caught: list[int]) -> None:
        number = caught[0] if caught else signal.SIGTERM
        kept = (
            "its state is saved, --resume continues it"
            if self.options.folder is not None
            else "without a folder nothing was saved"
        )
        raise Stopped(number, f"stopped by {signal.Signals(number).name} after update {self.progress.done}: {kept}")


def _numbers(terms: dict[str, Tensor], logits: Tensor, batch: Batch) -> Tensor:
    """Each term times the number of samples, hits, and the number of samples: on the device, without waiting for it."""
    with torch.no_grad():
        count = len(batch.labels)
        target = batch.labels.argmax(1) if batch.labels.is_floating_point() else batch.labels
        hits = (logits.argmax(1) == target).sum().float()
        return torch.stack(
            [*(term.detach().float() * count for term in terms.values()), hits, torch.full_like(hits, count)]
        )
