"""What a training step of a pair costs, counted without computing it: the step itself runs on tensors that hold no
numbers.

Networks are built on the meta device, then shown to torch as fake CPU tensors, so that autocast and attention choose
kernels as in a run, and neither weights nor memory are needed. Of every operation it is recorded how many
floating-point operations it takes (by torch's own formulas) and how many bytes it reads and writes; and of every
moment, how much is allocated.
"""

import contextlib
import weakref
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from timm.models import get_pretrained_cfg
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry

from mgd_timm.distiller import Distiller, Teacher
from mgd_timm.distributed.sharding import units
from mgd_timm.features import Batch, Features, FeatureTap, Pair
from mgd_timm.granularity import GranularityHeads
from mgd_timm.models.build import build_model
from mgd_timm.models.fold_batchnorm import fold_batchnorm
from mgd_timm.models.input_adapter import InputAdapter
from mgd_timm.pipeline.plan import objective_of, terms_of
from mgd_timm.recipe.recipe import Recipe, make_recipe
from mgd_timm.training.optimizer_state import build_optimizer

aten = torch.ops.aten
_hooks = torch.autograd.graph.saved_tensors_hooks
HALF = (torch.bfloat16, torch.float16)
PHASES = ("teacher", "heads", "forward", "backward", "optimizer")


@dataclass(frozen=True)
class Case:
    """A step to be counted or measured.

    Args:
        teacher, student: timm architectures; their weights do not matter.
        img_size: Side in pixels. A teacher of fixed input size sees the images resized to it, as in a run.
        batch_size: Images per process.
        amp: bfloat16 autocast.
        classes: Number of classes.
        opt, method, criterion: As the flags of `mgd-timm distill`.
        stored: The teacher's logits and embedding come from a store.
    """

    teacher: str
    student: str
    img_size: int
    batch_size: int
    amp: bool = False
    classes: int = 1000
    opt: str = "momentum"
    method: str = "mas"
    criterion: tuple[str, ...] = ("kd",)
    stored: bool = False

    @property
    def recipe(self) -> Recipe:
        """The run that the step is of."""
        names = ("teacher", "student", "opt", "method", "criterion", "amp")
        return make_recipe(**{name: getattr(self, name) for name in names})

    @property
    def words(self) -> dict[str, Any]:
        """Pair, size, batch and precision, for a table."""
        precision = "bf16" if self.amp else "fp32"
        return {
            "pair": f"{self.teacher} -> {self.student}",
            "img_size": self.img_size,
            "batch_size": self.batch_size,
        } | {"precision": precision}


class Step:
    """A training step: the same code on meta, fake and real tensors.

    Args:
        case: What it is of.
    """

    def __init__(self, case: Case) -> None:
        self.case, recipe = case, case.recipe
        size = (3, case.img_size, case.img_size)
        seen_size = _seen_by(case.teacher, size)
        terms = terms_of(recipe)
        words = (recipe.maps if terms.needs("maps", student=student) else None for student in (True, False))
        sides = ((case.student, size), (case.teacher, seen_size))
        tap, seen = (
            FeatureTap(build_model(name, side, case.classes), word, input_size=side)
            for (name, side), word in zip(sides, words, strict=True)
        )
        labels = torch.arange(case.batch_size, device="cpu") % case.classes
        pair = Pair(tap.shapes(case.img_size), seen.shapes(seen_size[1]), case.batch_size, labels, seen.classifier)
        heads = GranularityHeads(seen.embed_dim, case.classes) if case.method != "none" else None
        half = (0.5, 0.5, 0.5)
        with torch.device("cpu"):  # it compares values
            view = InputAdapter(half, half, half, half, seen_size[1:]) if seen_size != size else None
        self.teacher = Teacher(fold_batchnorm(seen) or seen, heads, view=view, digest="not needed")
        self.trainee = Distiller(tap, objective_of(recipe, terms, [pair])).train()
        for module, name in ((self.teacher, case.teacher), (self.trainee, case.student)):
            if name.startswith("cifar_"):  # as a run on a CPU
                module.to(memory_format=torch.channels_last)
        self.optimizer: Optimizer
        self.batch: Batch

    def place(self, empty: Callable[[Tensor], Tensor] | None = None) -> None:
        """Make optimizer and batch; `empty` first replaces every parameter and buffer."""
        for module in (self.teacher, self.trainee):
            if empty is not None:
                module._apply(empty)
        self.optimizer = build_optimizer(self.trainee, self.case.recipe.optim)
        side, count = self.case.img_size, self.case.batch_size
        ids = torch.arange(count)
        self.batch = Batch(torch.zeros(count, 3, side, side), ids % self.case.classes, ids)

    def shown(self, enter: Callable[[str], None] = lambda _: None) -> Features:
        """The teacher's features of the batch, live or as if read from a store."""
        teacher, count = self.teacher, len(self.batch.labels)
        with torch.no_grad():  # as Teacher.forward, in two phases
            enter("teacher")
            if self.case.stored:
                features = Features(torch.zeros(count, self.case.classes), torch.zeros(count, teacher.tap.embed_dim))
            else:
                features = teacher.tap(teacher.input_adapter(self.batch.images))
            enter("heads")
            if teacher.heads is None:
                return features
            codes = teacher.heads.encode(features.embedding)
            return features._replace(codes=codes, views=teacher.heads.decode(codes))

    def run(
        self, enter: Callable[[str], None] = lambda _: None, keep: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        """One update; `enter` is told which of PHASES begins, `keep` is shown what is kept for the backward."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.case.amp):
            shown = self.shown(enter)
            enter("forward")
            with _hooks(keep, lambda tensor: tensor) if keep is not None else contextlib.nullcontext():
                terms, logits = self.trainee(self.batch, shown)
                loss = torch.stack([term.float() for term in terms.values()]).sum()
        del shown, terms, logits
        enter("backward")
        loss.backward()
        enter("optimizer")
        self.optimizer.step()
        self.optimizer.zero_grad()

    def start_optimizer(self) -> None:
        """Let the optimizer make its state, as a first update does."""
        for parameter in self.trainee.parameters():
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()
        self.optimizer.zero_grad()


def _seen_by(teacher: str, size: tuple[int, int, int]) -> tuple[int, int, int]:
    """The size at which a teacher sees images of a size."""
    config = get_pretrained_cfg(teacher)
    channels, height, width = config.input_size if config is not None and config.fixed_input_size else size
    return channels, height, width


WIDENED = frozenset(
    (
        "layer_norm",
        "group_norm",
        "rms_norm",
        "normalize",
        "interpolate",
        "softplus",
        "exp",
        "log",
        "square",
        "pow",
        "__pow__",
    )
)
"""Functions of networks that CUDA's autocast computes in float32 from float32 copies of its arguments, and the CPU's
does not."""
TYPED = frozenset(["softmax", "log_softmax", "sum", "cumsum", "norm"])
"""Those of which it asks for a result in float32."""


class GpuCasts(TorchFunctionMode):
    """Autocast's choice of float32 as on a GPU, whose list is longer, while the operations and all else are the CPU's.

    Operations on fake tensors of a GPU would choose by themselves, but their backward needs a driver.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if torch.is_autocast_enabled("cpu"):
            if name in WIDENED:
                args, kwargs = tree_map_only(Tensor, _widened, (args, kwargs))
            elif name in TYPED and args[0].dtype in HALF:
                kwargs = {"dtype": torch.float32, **kwargs}
        return func(*args, **kwargs)


def _widened(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in HALF else tensor


class Op(NamedTuple):
    """An operation: its kind, where in the step it is, and what it takes."""

    kind: str
    phase: str
    half: bool
    flops: int
    bytes: int


class Recorder(TorchDispatchMode):
    """Records operations in `ops`, the bytes that are allocated in `now` and `peak`, those kept for the backward in
    `saved`."""

    def __init__(self) -> None:
        super().__init__()
        self.phase = PHASES[0]
        self.ops: list[Op] = []
        self.now = self.peak = self.saved = 0
        self._live: set[int] = set()
        self._there: set[int] = set()

    def enter(self, phase: str) -> None:
        """A phase begins."""
        self.phase = phase
        if phase == "forward":
            self._there = set(self._live)

    def keep(self, tensor: Tensor) -> Tensor:
        """Count what is kept for the backward, unless it was there before the student's forward."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self._there:
            self._there.add(storage._cdata)
            self.saved += storage.nbytes()
        return tensor

    def hold(self, tensors: Any) -> None:
        """Count tensors as allocated until they are gone."""
        for tensor in tree_leaves(tensors):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                if key not in self._live:
                    self._live.add(key)
                    weakref.finalize(storage, self._free, key, size)
                    self.now += size
        self.peak = max(self.peak, self.now)

    def _free(self, key: int, size: int) -> None:
        self._live.remove(key)
        self.now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        self.hold(out)
        self.note(func, args, kwargs, out)
        return out

    def note(self, func: Any, args: Any, kwargs: Any, out: Any) -> bool:
        """Record an operation, and say so, unless it only looks at memory that is there."""
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        outputs = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        packet, in_place = func._overloadpacket, func._schema.is_mutable
        there = {tensor.untyped_storage()._cdata for tensor in inputs}
        looks = bool(inputs) and not in_place and all(tensor.untyped_storage()._cdata in there for tensor in outputs)
        if func.is_view or packet in _FREE or not outputs or looks:
            return False
        # In place, the first argument is written as well as read.
        moved = sum(tensor.numel() * tensor.itemsize for tensor in (*inputs, *(inputs[:1] if in_place else outputs)))
        flops = _flops(packet, args, kwargs, out)
        half = bool(inputs) and inputs[0].dtype in HALF
        self.ops.append(Op(_kind(packet, args, flops), self.phase, half, flops, moved))
        return True


_FREE = {aten.empty, aten.empty_strided, aten.empty_like, aten.detach, aten.lift_fresh}


def _flops(packet: Any, args: Any, kwargs: Any, out: Any) -> int:
    if packet is aten.convolution_backward:
        # Each gradient that is wanted takes what the forward takes; torch's formula counts that of a grouped weight as
        # if dense.
        gradient, weight, mask, transposed = args[0], args[2], args[10], args[7]
        positions = (args[1] if transposed else gradient).numel() // weight.shape[0]
        return 2 * positions * weight.numel() * sum(mask[:2])
    return int(flop_registry[packet](*args, **kwargs, out_val=out)) if packet in flop_registry else 0


def _kind(packet: Any, args: Any, flops: int) -> str:
    """What an operation is timed as: a kind of convolution, attention, a matrix product, or its own name."""
    if packet in (aten.convolution, aten.convolution_backward):
        weight, groups = (args[1], args[8]) if packet is aten.convolution else (args[2], args[9])
        if groups > 1:
            return "depthwise" if weight.shape[1] == 1 else "grouped"
        return "conv" if weight.shape[2:].numel() > 1 else "conv1x1"
    name = str(packet.__name__)
    return "attention" if "attention" in name else "matmul" if flops else name


@dataclass(frozen=True)
class Counts:
    """A step of a case, counted. Bytes are of one process; of the peak, they are what tensors hold, without a library's
    workspace.

    Args:
        ops: Every operation of an update.
        teacher, student, beside: Parameters of the teacher with its heads, the student, and its encoders and adapters.
        state: Bytes of all that is there before a step: both modules, the optimizer's state and the batch.
        trained, optimizer: Bytes of the trained parameters, which is that of their gradients too, and of the
            optimizer's state.
        saved: Bytes kept by the student's forward for its backward.
        peak: The most that is allocated at once.
        unit, rest: Bytes of the largest part that FSDP gathers by itself, and of all that it gathers once for the whole
            step.
        student_state: Bytes of the student's parameters and buffers, which an average of its weights takes too.
        embed_dim: Width of the teacher's embedding.
    """

    ops: tuple[Op, ...]
    teacher: int
    student: int
    beside: int
    state: int
    trained: int
    optimizer: int
    saved: int
    peak: int
    unit: int
    rest: int
    student_state: int
    embed_dim: int

    def macs(self, phase: str) -> int:
        """Multiply-accumulates of a phase, of the whole batch."""
        return sum(op.flops for op in self.ops if op.phase == phase) // 2


def count(case: Case, gpu: bool = False) -> Counts:
    """Count a step. Nothing is computed and no weights are allocated.

    Args:
        case: The step.
        gpu: Mixed precision casts as on a GPU, instead of as on this CPU.

    Raises:
        ValueError: Unknown names, networks that do not take the image size, or what a criterion refuses about the pair.
    """
    with torch.device("meta"):
        step = Step(case)
        unit, rest = _gathered(step.trainee)
    with FakeTensorMode(allow_non_fake_inputs=True):
        step.place(lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cpu"))
        recorder = Recorder()
        recorder.hold([[*module.parameters(), *module.buffers()] for module in (step.teacher, step.trainee)])
        recorder.hold(tuple(step.batch))
        before = recorder.now
        with recorder, GpuCasts() if gpu else contextlib.nullcontext():
            step.start_optimizer()
            state, recorder.peak = recorder.now, recorder.now
            recorder.ops.clear()
            step.run(recorder.enter, recorder.keep)
    student = step.trainee.student
    trained = [p for p in step.trainee.parameters() if p.requires_grad]
    return Counts(
        ops=tuple(recorder.ops),
        teacher=_numbers(step.teacher),
        student=_numbers(student),
        beside=_numbers(step.trainee) - _numbers(student),
        state=state,
        trained=_bytes(trained),
        optimizer=state - before,
        saved=recorder.saved,
        peak=recorder.peak,
        unit=unit,
        rest=rest,
        student_state=_bytes([*student.parameters(), *student.buffers()]),
        embed_dim=step.teacher.tap.embed_dim,
    )


def _gathered(trainee: nn.Module) -> tuple[int, int]:
    """Bytes of the largest part that FSDP gathers by itself, and of what it gathers once for the whole step."""
    taps = [module for module in trainee.modules() if isinstance(module, FeatureTap)]
    sizes = [_bytes(tap.get_submodule(name).parameters()) for tap in taps for name in units(tap)]
    return max(sizes, default=0), _bytes(trainee.parameters()) - sum(sizes)


def _numbers(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _bytes(tensors: Any) -> int:
    return sum(t.numel() * t.itemsize for t in tensors)


def as_values(case: Case) -> dict[str, Any]:
    """The case as JSON values."""
    return {**asdict(case), "criterion": list(case.criterion)}
