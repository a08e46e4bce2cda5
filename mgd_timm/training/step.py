"""One update: forward and backward passes of its micro-batches, then the optimizer."""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch import Tensor, nn
from torch.optim import Optimizer

from mgd_timm.criteria import CrossEntropy
from mgd_timm.criteria.base import Criterion, Objective, at_least_float32, synchronised_buffers
from mgd_timm.data.sources import Source
from mgd_timm.distiller import Distiller, LiveTeachers, TaughtPeers, TeacherFeatures, TwoNetworks, is_full
from mgd_timm.distributed.batchnorm_statistics import RunningStatistics
from mgd_timm.distributed.collectives import broadcast_tensors
from mgd_timm.distributed.sharding import MovingAverage, make_data_parallel
from mgd_timm.features import Batch, Features
from mgd_timm.granularity import HeadFitting
from mgd_timm.recipe.optim import Optim
from mgd_timm.training.optimizer import build_optimizer, build_schedule
from mgd_timm.training.own_step import OwnStep, find_own_step
from mgd_timm.training.report import sums_of
from mgd_timm.training.update_plan import MicroBatch, UpdatePlan

Teach = Callable[[Batch], TeacherFeatures]


class Wrapper(nn.Module):
    """What accelerate may wrap and patch; the trainee itself stays as it is.

    Args:
        trainee: Its forward(batch, teacher) returns its losses by name, and logits.
        micro_batch_size: Of a full update; only these are compiled.
        mode: torch.compile's; None compiles nothing.
        synchronised: Names of the trainee's buffers that are kept equal on all processes by other means than DDP's.
    """

    def __init__(
        self, trainee: nn.Module, micro_batch_size: int, mode: str | None, synchronised: Sequence[str]
    ) -> None:
        super().__init__()
        self.trainee, self.micro_batch_size = trainee, micro_batch_size
        # Beside the module, not in it: a compiled module would register the same parameters again.
        self.compiled = [torch.compile(trainee, dynamic=False, mode=mode)] if mode is not None else []
        # Read by DDP, which would broadcast them from the main process before every step.
        names = [*synchronised, *synchronised_buffers(trainee)]
        self._ddp_params_and_buffers_to_ignore = [f"trainee.{name}" for name in names]

    def forward(self, batch: Batch, teacher: TeacherFeatures | None) -> tuple[dict[str, Tensor], Tensor]:
        """Return the trainee's losses by name, and its logits without a gradient.

        DDP looks for unused parameters from the outputs: logits with a gradient would hide a classifier that no loss
        reads, and DDP would wait for its gradient.
        """
        trainee = self.compiled[0] if self.compiled and is_full(batch, self.micro_batch_size) else self.trainee
        terms, logits = trainee(batch, teacher)
        return terms, logits.detach()


def reads_logits(trainee: nn.Module) -> bool:
    """Return whether a loss reads the student's logits: else, as with maps alone, its classifier gets no gradient."""
    objectives = [module for module in trainee.modules() if isinstance(module, Objective)]
    criteria = [term for objective in objectives for term in objective.criteria.values() if isinstance(term, Criterion)]
    return not objectives or any(isinstance(term, CrossEntropy) or term.needs & {"logits", "cams"} for term in criteria)


def compile_mode(accelerator: Accelerator) -> str:
    """Return torch.compile's mode: CUDA graphs on one GPU, unless gradients accumulate, which would outlive the graph
    that made them."""
    alone = accelerator.num_processes == 1 and accelerator.gradient_accumulation_steps == 1
    return "reduce-overhead" if accelerator.device.type == "cuda" and alone else "default"


class Updater:
    """Carries out updates of a trainee.

    Args:
        trainee: As of `fit`.
        optim: Optimizer, schedule, clipping, averaging.
        accelerator: Device, processes and precision.
        plan: Of the updates.
        teach: Returns the teacher's features of a batch; None passes no teacher.
        averaged: Part of the trainee to average, where `optim` asks for it.
        compile: Compile the trainee, and a live teacher.
        epochs_before: Epochs that the objective has been trained for, which warm-ups of its terms count.
    """

    def __init__(
        self,
        trainee: nn.Module,
        optim: Optim,
        accelerator: Accelerator,
        plan: UpdatePlan,
        *,
        teach: Teach | None = None,
        averaged: nn.Module | None = None,
        compile: bool = False,
        epochs_before: int = 0,
    ) -> None:
        self.epochs_before = epochs_before
        self.parallel = make_data_parallel(trainee, accelerator)
        self.trainee = trainee = self.parallel.trainee
        self.optim, self.accelerator, self.plan, self.compiled = optim, accelerator, plan, compile
        self.clip_groups = [list(trainee.parameters())]
        if isinstance(trainee, HeadFitting | TwoNetworks):
            self.clip_groups = trainee.clip_groups()
        self.objectives = [module for module in trainee.modules() if isinstance(module, Objective)]
        scaler = getattr(accelerator, "scaler", None)
        self.bare_optimizer = build_optimizer(trainee, optim, scaled=scaler is not None)
        self.schedule = build_schedule(self.bare_optimizer, optim, plan.updates_per_epoch)
        self.own_step = find_own_step(trainee, accelerator)
        self.average: MovingAverage | None = None
        if optim.model_ema and averaged is not None:
            self.average = self.parallel.moving_average(
                averaged, decay=optim.model_ema_decay, use_warmup=optim.model_ema_warmup
            )
        self.statistics = RunningStatistics(trainee) if plan.processes > 1 else None
        synchronised = self.statistics.names() if self.statistics is not None else []
        mode, size = compile_mode(accelerator) if compile else None, plan.micro_batch_size
        self.teach = teach.compile(size, mode) if mode is not None and isinstance(teach, LiveTeachers) else teach
        # DDP waits for the gradient of every parameter, unless it looks in each step which there will be.
        accelerator.ddp_handler = DistributedDataParallelKwargs(find_unused_parameters=not reads_logits(trainee))
        # A new wrapper for every fit: accelerate passes a module that it prepared before back bare, without precision
        # or processes. The schedule is not prepared: accelerate would step it once per process, and not save it.
        self.model, self.optimizer = self.parallel.prepare(
            Wrapper(trainee, size, mode, synchronised), self.bare_optimizer
        )
        # An fp16 loss scale that an earlier fit left would make this one depend on it.
        fresh = torch.amp.GradScaler(accelerator.device.type).state_dict() if scaler is not None else {}
        if scaler is not None and fresh:
            scaler.load_state_dict(fresh)

    @property
    def optimizers(self) -> dict[str, Optimizer]:
        """The optimizers by the name of their state in a checkpoint."""
        own = {"own_step": self.own_step.optimizer} if self.own_step is not None else {}
        return {"optimizer": self.bare_optimizer, **own}

    @property
    def lr(self) -> float:
        """The learning rate."""
        return float(self.bare_optimizer.param_groups[0]["lr"])

    def run(self, update: list[MicroBatch], batches: Iterator[Batch], done: int) -> dict[str, Tensor]:
        """Carry out an update.

        Args:
            update: This process's micro-batches.
            batches: Yields their batches.
            done: Updates before this one.

        Returns:
            This process's sums, by name; see `sums_of`.
        """
        self.schedule.step_update(done)
        for objective in self.objectives:
            objective.set_progress(self.epochs_before + done / self.plan.updates_per_epoch)
        own_step = self.own_step if self.own_step is not None and self.own_step.is_due(done) else None
        sums: dict[str, Tensor] = {}
        for step, micro_batch in enumerate(update, start=1):
            with self.parallel.no_sync(self.model) if step < len(update) else contextlib.nullcontext():
                found = self._run_step(micro_batch, next(batches), own_step if step == 1 else None)
            sums = {name: sums[name] + value for name, value in found.items()} if sums else found
        if self.optim.clip_grad is not None:
            # Unscale once: accelerate's own clipping does it on each call, and the second one is an error in fp16.
            self.accelerator.unscale_gradients()
            for parameters in self.clip_groups:
                nn.utils.clip_grad_norm_(parameters, self.optim.clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.average is not None:
            self.average.ema.update(self.average.followed, step=done + 1)  # timm counts updates from 1
        return sums

    def _run_step(self, micro_batch: MicroBatch, batch: Batch, own_step: OwnStep | None) -> dict[str, Tensor]:
        """Accumulate a micro-batch's gradients, after a criterion's step of its own. Return its sums: zeros where it is
        empty."""
        if self.compiled:
            torch.compiler.cudagraph_mark_step_begin()  # before the teacher, whose outputs may be a graph's too
        features = self._teach(batch)
        if own_step is not None:
            assert isinstance(features, Features)  # of one teacher
            _seed_generators(micro_batch.seed, self.accelerator.device)
            own_step.run(Batch(*batch), features, micro_batch.count)
        _seed_generators(micro_batch.seed, self.accelerator.device)
        before = self.statistics.snapshot() if self.statistics is not None else []
        terms, logits = self.model(Batch(*batch), features)  # without what else travels with the batch
        # Mean over the update's samples: DDP averages over processes, accelerate divides by its accumulation steps.
        count, steps = micro_batch.count, self.accelerator.gradient_accumulation_steps
        share = count * self.plan.processes * steps / micro_batch.total
        loss = total_loss(terms)
        self.accelerator.backward(loss if share == 1 else loss * share)
        if self.statistics is not None:
            self.statistics.merge(before, micro_batch.filled, self.plan.rank)
        sums = sums_of(terms, logits, batch, self._sample_weights(features))
        return sums if count else {name: torch.zeros_like(value) for name, value in sums.items()}

    def _teach(self, batch: Batch) -> TeacherFeatures | None:
        """Return the teacher's features of a batch."""
        if self.teach is None:
            return None
        with self.accelerator.autocast():  # the teacher is not in the wrapped module, and so not in its autocast
            return self.teach(batch)

    def _sample_weights(self, features: TeacherFeatures | None) -> dict[str, Tensor]:
        """Return the weights of samples by name."""
        if features is None or not isinstance(self.trainee, Distiller | TaughtPeers):
            return {}
        return self.trainee.sample_weights(features)

    def _read(self, source: Source, micro_batch: MicroBatch) -> Batch:
        return next(iter(source.batches([micro_batch.ids], 0, self.accelerator.device)))

    def rebuild_buckets(self, source: Source) -> None:
        """Settle the order of DDP's sums, before a state is loaded; see `Replicated.rebuild_buckets`."""

        def backward() -> None:
            self.trainee.train()
            batch = self._read(source, self.plan.updates(0)[0][0])
            terms, _ = self.model(Batch(*batch), self._teach(batch))
            self.accelerator.backward(total_loss(terms))
            self.optimizer.zero_grad()

        self.parallel.rebuild_buckets(self.model, backward)

    def try_update(self, source: Source) -> None:
        """Run two steps of the largest micro-batch, with the first optimizer step between them, without collectives."""
        update = self.plan.updates(0)[0]
        batch = self._read(source, max(update, key=lambda micro_batch: len(micro_batch.ids)))
        # Not DDP's: it would broadcast buffers, and wait for gradients.
        model = self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=True)
        criteria = [module for module in self.trainee.modules() if isinstance(module, Criterion)]
        self.trainee.train()
        try:
            for criterion in criteria:
                criterion.alone = True
            for step in range(2):
                terms, _ = model(Batch(*batch), self._teach(batch))
                self.accelerator.backward(total_loss(terms))
                if step == 0:
                    self.optimizer.step()
                    if len(update) == 1:  # else gradients accumulate
                        self.optimizer.zero_grad()
        finally:
            for criterion in criteria:
                criterion.alone = False

    def broadcast_buffers(self) -> None:
        """Take the main process's buffers: what is evaluated is then what is saved and exported."""
        broadcast_tensors(self.trainee.buffers(), self.accelerator)
        if self.average is not None:
            broadcast_tensors(self.average.ema.module.buffers(), self.accelerator)

    def check_average(self) -> None:
        """Warn of a moving average that will end with more than 1 % of the weights after the first update."""
        total = self.plan.updates_per_epoch * self.optim.epochs
        if self.average is None or total == 1:
            return
        # The first update's weights replace the initial ones: timm's decay is 0 there.
        first = math.prod(self.average.ema.get_decay(step) for step in range(2, total + 1))
        if first > 0.01:
            self.accelerator.print(
                f"warning: {100 * first:.0f} % of the moving average after {total} updates will be the weights after "
                f"the first one: lower --model-ema-decay ({self.optim.model_ema_decay})"
                f"{'' if self.optim.model_ema_warmup else ', or give --model-ema-warmup'}."
            )


def _seed_generators(seed: int, device: torch.device) -> None:
    """Seed the generators of all devices. On a CPU alone its own: for each backend that is not in use,
    `torch.manual_seed` formats the stack."""
    (torch.default_generator if device.type == "cpu" else torch).manual_seed(seed)


def total_loss(terms: dict[str, Tensor]) -> Tensor:
    """Return the sum of weighted losses, at least float32."""
    return torch.stack([at_least_float32(term) for term in terms.values()]).sum()
