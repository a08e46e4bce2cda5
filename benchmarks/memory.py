"""Predict the memory of a distillation step on any machine, by the flags of `mgd-timm distill`.

    python benchmarks/memory.py --teacher resnet34 --student resnet18 --img-size 224 --batch-size 256 --amp --gpus 8
    python benchmarks/memory.py --teacher vit_large_patch16_224 --student vit_small_patch16_224 --img-size 224 \\
        --classes 21841 --opt adamw --model-ema --amp --gpus 64 --fsdp
    python benchmarks/memory.py --check      compare predictions with what torch's allocator hands out on this machine

The step itself (teacher, heads, student, losses, backward, optimizer) runs on tensors without values, and every
allocation is counted. Kernels' workspaces are not in it. The check writes benchmarks/results/memory.json.
"""

import argparse
import contextlib
import gc
import statistics
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from report import RESULTS, about, markdown, provenance, read_rows, write_json
from timm.models import get_pretrained_cfg
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from tqdm import tqdm

from mgd_timm.cli.parser import given_options, run_parser
from mgd_timm.distiller import Distiller, Teacher
from mgd_timm.distributed.sharding import fsdp_units
from mgd_timm.features import Batch, FeatureTap, Pair
from mgd_timm.granularity import GranularityHeads
from mgd_timm.models.build import build_model, set_memory_format
from mgd_timm.models.fold_batchnorm import fold_batchnorm
from mgd_timm.models.input_adapter import InputAdapter
from mgd_timm.pipeline.plan import objective_of, terms_of
from mgd_timm.recipe.recipe import Recipe, make_recipe
from mgd_timm.training.optimizer import build_optimizer

CHECKED = (
    ("resnet18", "vit_tiny_patch16_224", 224, 4),
    ("resnet34", "resnet18", 96, 16),
    ("resnet50", "mobilenetv1_100", 128, 8),
    ("regnety_008", "deit_tiny_patch16_224", 128, 8),
    ("vit_small_patch16_224", "mobilenetv3_large_100", 128, 4),
    ("convnext_atto", "resnet26", 128, 8),
    ("efficientnet_b0", "levit_128s", 224, 8),
    ("cifar_resnet32x4", "cifar_resnet8x4", 32, 16),
)
HALF = (torch.bfloat16, torch.float16)


class Step:
    """A training step, which runs on fake and real tensors alike. Build it under `torch.device("meta")` for a fake one.

    Args:
        recipe: Of the run, at 224 pixels where it has no size. A teacher of fixed input size sees the images resized
            to it. Weights do not matter.
        classes: Number of classes.
    """

    def __init__(self, recipe: Recipe, classes: int) -> None:
        self.recipe, self.classes, self.side = recipe, classes, recipe.data.img_size or 224
        (teacher,) = recipe.teacher or ()
        size = (recipe.data.in_chans, self.side, self.side)
        config = get_pretrained_cfg(teacher)
        teacher_size = config.input_size if config is not None and config.fixed_input_size else size
        terms = terms_of(recipe)
        maps = [recipe.maps if terms.needs("maps", student=student) else None for student in (True, False)]
        tap = FeatureTap(build_model(recipe.student, size, classes), maps[0], input_size=size)
        teacher_model = build_model(teacher, teacher_size, classes)
        teacher_tap = FeatureTap(teacher_model, maps[1], input_size=teacher_size)
        labels = torch.arange(recipe.data.batch_size, device="cpu") % classes
        shapes = tap.shapes(self.side), teacher_tap.shapes(teacher_size[1])
        pair = Pair(*shapes, len(labels), labels, teacher_tap.classifier)
        heads = GranularityHeads(teacher_tap.embed_dim, classes) if recipe.method != "none" else None
        half = (0.5,) * size[0]
        with torch.device("cpu"):  # it compares values
            adapter = InputAdapter(half, half, half, half, teacher_size[1:]) if teacher_size != size else None
        self.teacher = Teacher(
            fold_batchnorm(teacher_tap) or teacher_tap, heads, input_adapter=adapter, digest="not needed"
        )
        self.trainee = Distiller(tap, objective_of(recipe, terms, [pair])).train()
        for module, name in ((self.teacher, teacher), (self.trainee, recipe.student)):
            set_memory_format(module, name, recipe.channels_last, torch.device("cpu"))

    def allocate(self) -> None:
        """Make the optimizer and the batch."""
        self.optimizer = build_optimizer(self.trainee, self.recipe.optim)
        ids = torch.arange(self.recipe.data.batch_size)
        images = torch.zeros(len(ids), self.recipe.data.in_chans, self.side, self.side)
        self.batch = Batch(images, ids % self.classes, ids)

    def run(self) -> None:
        """One update."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.recipe.amp):
            terms, logits = self.trainee(self.batch, self.teacher(self.batch.images))
            loss = torch.stack([term.float() for term in terms.values()]).sum()
        del terms, logits
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


# Functions that CUDA's autocast computes in float32 and the CPU's does not, and those with a result in float32.
WIDENED = {"layer_norm", "group_norm", "rms_norm", "normalize", "interpolate", "softplus"}
WIDENED |= {"exp", "log", "square", "pow", "__pow__"}
WIDE_RESULT = {"softmax", "log_softmax", "sum", "cumsum", "norm"}


class GpuCasts(TorchFunctionMode):
    """Autocast's choice of float32 as on a GPU, whose list is longer, while the operations and all else are the CPU's.

    Operations on fake tensors of a GPU would choose by themselves, but their backward needs a driver.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if torch.is_autocast_enabled("cpu"):
            if name in WIDENED:
                args, kwargs = tree_map_only(Tensor, lambda t: t.float() if t.dtype in HALF else t, (args, kwargs))
            elif name in WIDE_RESULT and args[0].dtype in HALF:
                kwargs = {"dtype": torch.float32, **kwargs}
        return func(*args, **kwargs)


class Recorder(TorchDispatchMode):
    """Count the bytes of all live tensors: `now`, and the most so far in `peak`."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._live: set[int] = set()

    def hold(self, tensors: Any) -> None:
        """Count tensors as allocated until they are gone; views share their storage."""
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
        out = func(*args, **(kwargs or {}))
        self.hold(out)
        return out


@dataclass(frozen=True)
class Counts:
    """Bytes of one process's step.

    Args:
        state: All that is there before a step: both modules, the optimizer's state and the batch.
        peak: The most that is allocated at once, without kernels' workspaces.
        trained, optimizer: The trained parameters, which is that of their gradients too, and the optimizer's state.
        student: The student's parameters and buffers, which an average of its weights takes too.
        unit, rest: The largest layer that FSDP gathers by itself, and all that it gathers once for the whole step.
    """

    state: int
    peak: int
    trained: int
    optimizer: int
    student: int
    unit: int
    rest: int

    def of_processes(self, processes: int, *, fsdp: bool = False, ema: bool = False) -> float:
        """The peak of each process.

        DDP copies the gradients into buckets. FSDP keeps a share of weights, gradients and optimizer state; in the
        backward it holds what is gathered for the whole step, the layer in use, and the next one twice: as it arrives
        and as it is laid out.
        """
        share = 1 / processes if fsdp else 1.0
        buckets = self.rest + 3 * self.unit if fsdp else self.trained if processes > 1 else 0
        average = self.student * share if ema else 0
        return self.peak - (self.trained + self.optimizer) * (1 - share) + buckets + average


def count(recipe: Recipe, classes: int = 1000, *, gpu: bool = False) -> Counts:
    """Count the memory of a step. Nothing is computed and no weights are allocated.

    Args:
        recipe, classes: As of `Step`.
        gpu: Mixed precision casts as on a GPU, instead of as on this CPU.

    Raises:
        ValueError: Unknown names, networks that do not take the image size, or what a criterion refuses about the pair.
    """
    with torch.device("meta"):
        step = Step(recipe, classes)
        taps = [module for module in step.trainee.modules() if isinstance(module, FeatureTap)]
        layers = [_bytes(tap.get_submodule(name).parameters()) for tap in taps for name in fsdp_units(tap)]
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in (step.teacher, step.trainee):
            module._apply(lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cpu"))
        step.allocate()
        recorder = Recorder()
        recorder.hold([[*module.parameters(), *module.buffers()] for module in (step.teacher, step.trainee)])
        recorder.hold(tuple(step.batch))
        before = recorder.now
        with recorder, GpuCasts() if gpu else contextlib.nullcontext():
            step.run()  # makes the optimizer's state
            state = recorder.peak = recorder.now
            step.run()
    student = step.trainee.student
    return Counts(
        state=state,
        peak=recorder.peak,
        trained=_bytes(p for p in step.trainee.parameters() if p.requires_grad),
        optimizer=state - before,
        student=_bytes([*student.parameters(), *student.buffers()]),
        unit=max(layers, default=0),
        rest=_bytes(step.trainee.parameters()) - sum(layers),
    )


def _bytes(tensors: Any) -> int:
    return sum(t.numel() * t.itemsize for t in tensors)


def allocated(run: Callable[[], Any], at: str = "[memory]") -> tuple[int, int]:
    """Bytes that a call leaves allocated, and the most above its start, as torch's CPU allocator reports them.

    Args:
        run: What is called; what it returns lives until the end.
        at: Name of the profiler's events at which the most is looked for; by default each block handed out.
    """
    gc.collect()  # what is freed during the call would count against it
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:  # or 2.10 warns
        kept = run()
    assert profiler.profiler is not None
    now = peak = 0
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
        if event.name() == at:
            peak = max(peak, now)
    del kept
    return now, peak


def measure(recipe: Recipe, classes: int = 1000, at: str = "[memory]") -> tuple[int, int]:
    """Bytes that torch's allocator has handed out before a step of one process, and at its peak (`allocated`)."""
    steps: list[Step] = []

    def build() -> None:
        steps.append(Step(recipe, classes))
        steps[0].allocate()
        steps[0].run()  # makes the optimizer's state
        gc.collect()

    state, _ = allocated(build)
    return state, state + allocated(steps[0].run, at)[1]


def check() -> list[dict[str, Any]]:
    """Predict and measure one thread's step: a row for each pair in each precision."""
    rows = []
    torch.set_num_threads(1)
    for amp in (False, True):
        for teacher, student, side, batch_size in tqdm(CHECKED, desc="memory", unit="pair"):
            row = {"teacher": teacher, "student": student, "img_size": side, "batch_size": batch_size, "amp": amp}
            recipe = make_recipe(**row)
            row |= {"predicted": count(recipe).peak, "measured": measure(recipe)[1]}
            rows.append(row | provenance())
    return rows


def section() -> str:
    """The table of docs/scaling.md."""
    rows = read_rows(RESULTS / "memory.json")
    ratios = [row["predicted"] / row["measured"] for row in rows]
    cells = [
        [
            f"{row['teacher']} -> {row['student']}",
            f"{row['img_size']} px, {row['batch_size']}, {'bf16' if row['amp'] else 'fp32'}",
            *(f"{row[name] / 2**20:.0f}" for name in ("predicted", "measured")),
            f"{ratio:.3f}",
        ]
        for row, ratio in zip(rows, ratios, strict=True)
    ]
    off = [max(ratio, 1 / ratio) - 1 for ratio in ratios]
    return (
        f"{markdown(['pair', 'size, batch', 'predicted MiB', 'measured MiB', 'ratio'], cells)}\n\n"
        f"Predictions are off by {statistics.median(off):.1%} in the median and {max(off):.1%} at worst. Measured: the "
        "most that torch's CPU allocator has handed out in a step of one process. "
        f"`benchmarks/memory.py --check`; {about(*rows)}."
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--fsdp", action="store_true", help="shard the student over all GPUs, instead of DDP")
    parser.add_argument("--check", action="store_true", help="measure on this machine what is predicted for it")
    args, flags = parser.parse_known_args(arguments)
    if args.gpus < 1:
        parser.error(f"--gpus {args.gpus}: expected 1 or more.")
    if args.check:
        write_json(RESULTS / "memory.json", check())
        print(section())
        return
    recipe = make_recipe(**given_options(run_parser(parser.prog, distill=True), flags))
    if len(recipe.teacher or ()) != 1 or recipe.peer is not None:
        parser.error("--teacher: expected one, as memory of several teachers or of --peer is not predicted.")
    counts = count(recipe, args.classes, gpu=True)
    peak = counts.of_processes(args.gpus, fsdp=args.fsdp, ema=recipe.optim.model_ema)
    print(f"predicted: {peak / 1e9:.2f} GB of tensors per process at the peak of a step.")
    print(f"Networks, optimizer state and batch of one process: {counts.state / 1e9:.2f} GB.")
    print(f"A GPU needs about {(1.1 * peak + 1e9) / 1e9:.1f} GB, assuming 10% of fragments and 1 GB of CUDA's context.")


if __name__ == "__main__":
    main()
