"""Distillation in timm's own training loop: a task of timm.task around the same modules that `distill` trains."""

import logging
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from jaxtyping import Float, Int
from timm.models import group_parameters
from timm.task import TrainingTask
from timm.utils import unwrap_model
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mgd_timm.criteria import CRITERIA, Criterion, EntropyWeight
from mgd_timm.criteria.base import synchronised_buffers
from mgd_timm.criteria.terms import TermOptions, Terms, parse_terms
from mgd_timm.distiller import Distiller, Teacher
from mgd_timm.distributed.collectives import gathered, several_processes
from mgd_timm.features import Batch, FeatureTap, Pair, match_number_of_maps
from mgd_timm.granularity import GranularityHeads
from mgd_timm.models.checks import check_channels, check_classifier, check_module
from mgd_timm.models.input_adapter import InputAdapter, build_input_adapter
from mgd_timm.models.load import load_model
from mgd_timm.models.pretrained_cfg import read_channel_values
from mgd_timm.objective import build_objective
from mgd_timm.recipe.heads import Heads
from mgd_timm.recipe.options import unknown
from mgd_timm.teachers.heads import train_heads
from mgd_timm.teachers.outputs.memory import StoredOutputs
from mgd_timm.training.options import FitOptions
from mgd_timm.training.step import reads_logits, total_loss

_logger = logging.getLogger(__name__)

METHODS = ("none", "mag", "mas")


class TrainableDistiller(Distiller):
    """A Distiller as timm's optimizer factory reads it."""

    def no_weight_decay(self) -> set[str]:
        """Return the names of the parameters that the student exempts from weight decay."""
        return {f"student.{name}" for name in self.student.no_weight_decay()}

    def group_matcher(self, coarse: bool = False) -> Callable[[str], int]:
        """Return a function from a parameter's name to its layer, for layer-wise learning rates.

        Parameters of the objective have the layer of the student's classifier.
        """
        model = cast(Any, self.student.model)
        layers = group_parameters(model, model.group_matcher(coarse=coarse), reverse=True)
        last = max(layers.values(), default=0)
        return lambda name: layers.get(name.removeprefix("student.model."), last)


class MultiGranularityTask(TrainingTask):
    """A task of timm's training loop: any criterion, under MAG, MAS or neither, from any timm model to any other.

    `task(input, target)` returns a dict with "loss", "output" (the student's logits) and each weighted term by name:
    "task", "kd", "abstract", "detailed", ... The losses are those of `distill` with the same options. Checkpoints hold
    the student alone under "state_dict", as timm's own do; the adapters of the criteria, the student's encoders and
    the teacher's heads are in "task_state". The teacher is in neither.

    Args:
        student_model: A timm model with a classifier, on its device.
        teacher_model: A timm model with weights, or what `distill` takes as a teacher's name: a timm name, a run
            folder, local-dir:PATH or hf-hub:ID.
        criterion: Criteria, as --criterion: "kd", "at:1000", ("dkd", "at").
        method: "none", "mag" or "mas".
        heads: The teacher's fitted heads; or the options of heads that `fit_heads` fits before training.
        criterion_options: Hyper-parameters, as --criterion-options: ("kd.divergence=reverse",).
        task_weight, kd_weight: Weights of the labels' loss and of logit KD; None for the defaults of `distill`.
        kd_temperature: Temperature of logit KD.
        smoothing: Label smoothing of the labels' loss. timm's Mixup smooths targets itself: leave it 0 then.
        standardise_logits: Standardise the logits of each criterion that reads them.
        sample_weight: Weights of samples by the teacher's certainty, as --sample-weight entropy; None for equal ones.
        maps: Maps for criteria that read them, as --maps.
        input_size: (channels, height, width) of the images; by default the student's nominal input size.
        mean, std: Normalisation of the images, from which the teacher's is computed; by default those of the student's
            pretrained_cfg.
        labels: Class ids of all training samples by sample id, for crd, which also needs the `sample_ids` of each call.
        device: Of the teacher and the objective; by default the student's.
        dtype: Of the weights; float32 only. Mixed precision is autocast's.
        verbose: Log the terms.

    Raises:
        ValueError: An unknown name or option; networks and criteria that do not fit; or a criterion that this task
            does not take (ab, fsp, ft and sskd, which fit something first; krnet, which takes a step of its own;
            dml and ekd, which train two networks; warm-ups; crd without `labels`).
    """

    def __init__(
        self,
        student_model: nn.Module,
        teacher_model: str | nn.Module,
        criterion: str | Sequence[str] = "kd",
        method: str = "mas",
        heads: GranularityHeads | Heads = Heads(),  # noqa: B008 - immutable
        *,
        criterion_options: Sequence[str] = (),
        task_weight: float | None = None,
        kd_weight: float | None = None,
        kd_temperature: float = 4.0,
        smoothing: float = 0.0,
        standardise_logits: bool = False,
        sample_weight: EntropyWeight | None = None,
        maps: str = "stages",
        input_size: tuple[int, int, int] | None = None,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
        labels: Int[Tensor, " n"] | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        verbose: bool = True,
    ) -> None:
        if method not in METHODS:
            raise unknown("method", method, METHODS)
        options = TermOptions(
            epochs=sys.maxsize,  # warm-ups are refused below, with another reason
            method=method,
            task_weight=task_weight,
            kd_weight=kd_weight,
            kd_temperature=kd_temperature,
            smoothing=smoothing,
            standardise_logits=standardise_logits,
            sample_weight=sample_weight,
        )
        named = (criterion,) if isinstance(criterion, str) else criterion
        _check_one_student(named)
        terms = parse_terms(named, criterion_options, options)
        _check_terms(terms, labels)
        teacher = load_model(teacher_model) if isinstance(teacher_model, str) else teacher_model
        check_module(student_model, "student")
        check_classifier(student_model)
        check_module(teacher, "teacher")
        super().__init__(device or next(student_model.parameters()).device, dtype, verbose)
        self.method, self.needs_ids = method, "crd" in terms.active
        self.head_options = heads if isinstance(heads, Heads) else None
        self.granularities = heads.granularities

        student_maps = maps if terms.needs("maps", student=True) else None
        student = FeatureTap(student_model, student_maps, input_size=input_size, cam=terms.needs("cams"))
        fitted = heads if isinstance(heads, GranularityHeads) and method != "none" else None
        adapter = _build_adapter(teacher, student, mean, std)
        self.teacher = _build_teacher(teacher, student, adapter, terms, maps, fitted).to(self.device)
        match_number_of_maps(maps, student, self.teacher.tap)
        pair = _pair(student, self.teacher, method, labels)
        objective = build_objective(terms, pair, method, self.granularities).to(self.device)
        self.trainable_module: nn.Module = TrainableDistiller(student, objective)
        if self.verbose:
            _log_terms(terms, method, objective)

    @property
    def distiller(self) -> TrainableDistiller:
        """The trainable module without DDP or torch.compile around it."""
        return cast(TrainableDistiller, unwrap_model(self.trainable_module))

    def fit_heads(self, loader: Iterable[tuple[Tensor, Tensor]], *, seed: int = 42) -> GranularityHeads:
        """Fit the teacher's heads on the images of a loader, before the task is compiled or trained.

        The loader is read `heads_augmentations` times; the teacher's outputs are kept in memory. All processes call it,
        each with its own part of the images. torch's random state stays as it was.

        Args:
            loader: Yields (input, target) as the training loop gets them.
            seed: Of the heads' initial weights, and of the order of samples.

        Returns:
            The heads, which the task uses from now on; another task takes them as `heads`.

        Raises:
            ValueError: The task has no heads to fit, or the loader gives no batch.
        """
        options = self.head_options
        if options is None or self.method == "none":
            reason = "it was given fitted heads" if options is None else "method='none' reads no heads"
            raise ValueError(f"fit_heads: {reason}. Leave the call out, or build the task with heads=Heads(...).")
        AcceleratorState._reset_state(reset_partial_state=False)  # an earlier one may be of another precision
        accelerator = Accelerator(cpu=self.device.type == "cpu")
        gpus = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=gpus):
            outputs = self._store_outputs(loader, options.heads_augmentations)
            torch.manual_seed(seed)
            heads = self._new_heads().to(self.device)
            quiet = FitOptions(
                stage="heads", quiet=not self.verbose, track=False, advice="Lower heads_lr or heads_clip_grad."
            )
            train_heads(heads, outputs, outputs.features, options, accelerator, seed=seed, fit_options=quiet)
        self.teacher = self.teacher.with_heads(heads)
        return heads

    def _new_heads(self) -> GranularityHeads:
        student = self.distiller.student
        return GranularityHeads(self.teacher.tap.embed_dim, student.num_classes, self.granularities)

    def _store_outputs(self, loader: Iterable[tuple[Tensor, Tensor]], passes: int) -> StoredOutputs:
        found: list[list[Tensor]] = []
        for number in range(passes):
            before = len(found)
            for images, target in loader:
                features = self.teacher(images.to(self.device))
                rows = [features.embedding.float(), features.logits.float(), target.to(self.device)]
                found.append([row.cpu() for row in (gathered(*rows) if several_processes() else rows)])
            if len(found) == before:
                raise ValueError(
                    f"fit_heads: the loader gave no batch in pass {number + 1} of {passes}: give a loader that can be "
                    "iterated again, not a generator, or Heads(heads_augmentations=1)."
                )
        embedding, logits, target = (torch.cat(part) for part in zip(*found, strict=True))
        return StoredOutputs(embedding, logits, target, "loader")

    def forward(
        self,
        input: Float[Tensor, "b c h w"],
        target: Int[Tensor, " b"] | Float[Tensor, "b k"],
        sample_ids: Int[Tensor, " b"] | None = None,
    ) -> dict[str, Tensor]:
        """Return "loss", "output" and each weighted term by name; where samples have weights, also "sample_weight" and
        "sample_weight_std", their mean and standard deviation.

        Args:
            input: Images as the student is trained on.
            target: Class ids, or distributions over classes.
            sample_ids: Rows of the training data, from 0; only crd reads them.

        Raises:
            ValueError: The heads are not fitted; or crd has no sample ids, or images that are mixed.
        """
        if self.method != "none" and self.teacher.heads is None:
            raise ValueError(
                f"method={self.method!r} reads the teacher's heads, which are not fitted: call task.fit_heads(loader) "
                "before training, or give fitted ones with heads=."
            )
        if self.needs_ids and (sample_ids is None or target.is_floating_point()):
            raise ValueError(
                "crd stores one embedding of each training sample: call task(input, target, sample_ids) in a loop of "
                "your own, with class ids and without mixup or cutmix; or choose a criterion without a memory (rkd)."
            )
        ids = sample_ids if sample_ids is not None else torch.arange(len(input), device=input.device)
        features = self.teacher(input)
        terms, logits = self.trainable_module(Batch(input, target, ids), features)
        found = {**terms, "loss": total_loss(terms), "output": logits}
        for weights in self.distiller.sample_weights(features).values():
            found |= {"sample_weight": weights.mean(), "sample_weight_std": weights.std(correction=0)}
        return found

    def prepare_distributed(self, device_ids: list[Any] | None = None, **ddp_kwargs: Any) -> "MultiGranularityTask":
        """Wrap the student and the objective in DistributedDataParallel; the teacher stays as it is.

        Args:
            device_ids: As DDP's.
            **ddp_kwargs: As DDP's. `find_unused_parameters` is set where no loss reads the student's logits.
        """
        names = synchronised_buffers(self.distiller)
        # DDP sees a compiled module's names with a prefix.
        cast(Any, self.trainable_module)._ddp_params_and_buffers_to_ignore = names + [f"_orig_mod.{n}" for n in names]
        ddp_kwargs = {"find_unused_parameters": not reads_logits(self.distiller), **ddp_kwargs}
        self.trainable_module = DistributedDataParallel(self.trainable_module, device_ids=device_ids, **ddp_kwargs)
        return self

    def compile(  # type: ignore[override]  # timm's own
        self, backend: str = "inductor", mode: str | None = None, **compile_kwargs: Any
    ) -> nn.Module:
        """Compile the step of the student, the teacher, and the student for evaluation, which is returned."""

        def compiled(module: nn.Module | None) -> Any:
            assert module is not None
            return torch.compile(module, backend=backend, mode=mode, **compile_kwargs)

        self.eval_model: nn.Module = compiled(self.get_eval_model())
        self.trainable_module = compiled(self.trainable_module)
        self.teacher = compiled(self.teacher)
        return self.eval_model

    def get_eval_model(self, module: nn.Module | None = None, ema: bool = False) -> nn.Module | None:
        """Return the student as the timm model that it is, or its compiled form."""
        found = super().get_eval_model(module, ema)
        inner = unwrap_model(found) if found is not None else None
        return inner.student.model if isinstance(inner, Distiller) else found

    def get_clip_parameters(self, exclude_head: bool = False) -> list[nn.Parameter]:
        """Return the parameters to clip: the student's, without its last two if `exclude_head`, and the objective's."""
        student = list(self.distiller.student.parameters())
        return (student[:-2] if exclude_head else student) + list(self.distiller.objective.parameters())

    def get_task_state(self, module: nn.Module | None = None, ema: bool = False) -> dict[str, Any]:
        """Return the state of the objective and, but for the moving average's, of the teacher's heads."""
        module = module if module is not None else self.get_trainable_module(ema=ema)
        if module is None:
            return {}
        state = {"objective": unwrap_model(module).objective.state_dict()}
        if self.teacher.heads is not None and not ema:
            state["heads"] = self.teacher.heads.state_dict()
        return {name: tensors for name, tensors in state.items() if tensors}

    def load_task_state(
        self,
        state: Mapping[str, Any] | None,
        strict: bool = True,
        module: nn.Module | None = None,
        ema: bool = False,
    ) -> None:
        """Load what `get_task_state` returned. The heads need not be fitted first.

        Raises:
            RuntimeError: There is no moving average to load into, or the state is of another criterion or teacher.
        """
        if not state:
            return
        module = module if module is not None else self.get_trainable_module(ema=ema)
        if module is None:
            raise RuntimeError("no moving average to load the task state into: call setup_ema() first.")
        unwrap_model(module).objective.load_state_dict(state.get("objective", {}), strict=strict)
        if "heads" in state and self.method != "none":
            heads = self.teacher.heads if self.teacher.heads is not None else self._new_heads()
            heads.load_state_dict(state["heads"], strict=strict)
            if self.teacher.heads is None:
                self.teacher = self.teacher.with_heads(heads)


def _check_one_student(criterion: Sequence[str]) -> None:
    """Raise ValueError for a criterion of two networks that train in one run."""
    for word in ",".join(criterion).split(","):
        name = word.strip().split(":")[0]
        if name in CRITERIA and CRITERIA[name].peers:
            raise ValueError(
                f"criterion {name!r} trains two networks in one run, and a task trains one: use "
                f"mgd_timm.distill(..., criterion=({name!r},), peer=NAME), or another criterion."
            )


def _check_terms(terms: Terms, labels: Tensor | None) -> None:
    """Raise ValueError for what timm's loop cannot serve."""
    for name, term in terms.active.items():
        if term.kind.fits is not None:
            raise ValueError(
                f"criterion {name!r} fits a module or the student before training, which a task does not: use "
                f"mgd_timm.distill(..., criterion=({name!r},)), or another criterion."
            )
        if term.kind.own_step:
            raise ValueError(
                f"criterion {name!r} takes a step of its own between the updates, for which timm's loop has no place: "
                f"use mgd_timm.distill(..., criterion=({name!r},)), or another criterion."
            )
        if term.warmup:
            raise ValueError(
                f"criterion {name!r} warms up over {term.warmup:g} epochs, and timm's loop does not tell a task the "
                f"epoch: give {name}:{term.weight:g} alone, or use mgd_timm.distill."
            )
    if "crd" in terms.active and labels is None:
        raise ValueError(
            "criterion 'crd' stores every training sample: give labels=, the class ids of all samples by sample id, "
            "and call task(input, target, sample_ids). timm's own loop passes no sample ids: with it choose a "
            "criterion without a memory, such as 'rkd'."
        )


def _build_adapter(
    teacher: nn.Module, student: FeatureTap, mean: tuple[float, ...] | None, std: tuple[float, ...] | None
) -> InputAdapter:
    """Return what gives the student's images the teacher's normalisation and size."""
    config = getattr(student.model, "pretrained_cfg", {}) or {}
    mean, std = mean or read_channel_values(config, "mean"), std or read_channel_values(config, "std")
    if mean is None or std is None:
        raise ValueError(
            f"{student.name} has no mean and std in its pretrained_cfg: give mean= and std= of the images' "
            "normalisation, from which the teacher's is computed."
        )
    channels, height, width = student.input_size
    check_channels(teacher, "teacher", channels)
    return build_input_adapter(teacher, mean, std, (channels, height, width))


def _build_teacher(
    model: nn.Module,
    student: FeatureTap,
    adapter: InputAdapter,
    terms: Terms,
    maps: str,
    heads: GranularityHeads | None,
) -> Teacher:
    """Return the frozen teacher, with the maps that criteria read; one of other classes shows no logits."""
    channels, height, width = student.input_size
    size = (channels, *(adapter.size or (height, width)))
    tap = FeatureTap(model, maps if terms.needs("maps") else None, input_size=size, cam=terms.needs("cams"))
    return Teacher(tap, heads, input_adapter=adapter, logits=tap.num_classes == student.num_classes)


def _pair(student: FeatureTap, teacher: Teacher, method: str, labels: Tensor | None) -> Pair:
    """Return both shapes. Under MAS, the heads' views stand in for the logits of a teacher without a classifier."""
    size = (student.input_size[1], student.input_size[2])
    theirs = teacher.tap.shapes(teacher.size(size))
    if method == "mas" and not theirs.num_classes:
        theirs = theirs._replace(num_classes=student.num_classes)
    num_samples = len(labels) if labels is not None else 0
    return Pair(student.shapes(size), theirs, num_samples, labels, teacher.tap.classifier)


def _log_terms(terms: Terms, method: str, objective: nn.Module) -> None:
    weights = ", ".join(f"{name}={term.weight:g}" for name, term in terms.in_run.items())
    _logger.info(f"MultiGranularityTask: {weights}")
    if terms.sample_weight is not None:
        _logger.info(terms.describe_weights(method))
    for criterion in objective.modules():
        if isinstance(criterion, Criterion) and (remark := criterion.remark()) is not None:
            _logger.info(remark)
