"""Time and peak memory of our MAS+KD training step beside other loops, on the same batches, timed in turn.

    python benchmarks/step.py                                    against a bare KD loop, as precise: our overhead
    python benchmarks/step.py --against plain --amp              against the eager float32 loop of public scripts
    python benchmarks/step.py --against plain --amp --stored     with the teacher's outputs read from a store
    python benchmarks/step.py --against alone --amp --stored     against training the student without a teacher
    python benchmarks/step.py --against unfrozen --amp --compile what the compiled teacher's constant weights save
    python benchmarks/step.py --teacher cifar_resnet20 --student cifar_resnet8x05 --size 28 --classes 10

bare: frozen teacher's forward, student's forward and backward with cross-entropy and KD, SGD with momentum, on float
batches that lie ready. plain: MAS+KD as one writes it first: float32, NCHW, everything eager, losses and accuracies
fetched every step; its float batches lie ready as well, which spares it its loader. alone: `fit` on labels only.
unfrozen: ours with a teacher that torch.compile compiles by its defaults, its weights as inputs. Ours is `fit` itself,
from uint8 images in the store to the new weights: order, augmentation, heads, both code losses, stable excitation,
schedule, checks and logging are all in its time. Peak memory is that of a process of its own for each loop.
Writes benchmarks/results/step.json.
"""

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import report
import timm
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from mgd_timm import models  # noqa: F401  # registers cifar_*
from mgd_timm.criteria import KD, CrossEntropy, Objective
from mgd_timm.data.sources import SmallImageSource
from mgd_timm.distiller import Distiller, LiveTeachers, Teacher
from mgd_timm.features import Features, FeatureTap, Pair
from mgd_timm.granularity import MAS, GranularityHeads
from mgd_timm.models.fold_batchnorm import fold_batchnorm
from mgd_timm.recipe.data import Data
from mgd_timm.recipe.optim import Optim
from mgd_timm.teachers.outputs.layout import Layout
from mgd_timm.teachers.outputs.store import TeacherStore
from mgd_timm.teachers.outputs.stored_source import StoredSource, stored_teacher
from mgd_timm.training.loop import fit
from mgd_timm.training.options import FitOptions
from mgd_timm.training.step import compile_mode

FILE = report.RESULTS / "step.json"
AGAINST = ("bare", "plain", "alone", "unfrozen")
Loop = Callable[[], None]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", choices=AGAINST, default="bare")
    parser.add_argument("--teacher", default="cifar_resnet32x4")
    parser.add_argument("--student", default="cifar_resnet8x4")
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument(
        "--steps", type=int, default=40, help="steps in a timed run; starting and ending a run count in"
    )
    parser.add_argument("--rounds", type=int, default=6, help="timed runs of each")
    parser.add_argument("--amp", action="store_true", help="bfloat16 autocast in ours and in the bare loop")
    parser.add_argument("--compile", action="store_true", help="ours compiled")
    parser.add_argument("--stored", action="store_true", help="ours with the teacher's outputs read from a store")
    parser.add_argument(
        "--only", choices=("ours", *AGAINST), help=argparse.SUPPRESS
    )  # a process that measures its own memory
    args = parser.parse_args()
    if args.against == "unfrozen" and (args.stored or not args.compile):
        parser.error("--against unfrozen compares compiled live teachers: give --compile, not --stored")
    return args


def networks(args: argparse.Namespace, channels_last: bool) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    options = {"num_classes": args.classes}
    teacher, student = timm.create_model(args.teacher, **options), timm.create_model(args.student, **options)
    if channels_last:
        teacher.to(memory_format=torch.channels_last)
        student.to(memory_format=torch.channels_last)
    return teacher, student


def ready_batches(
    args: argparse.Namespace, images: Tensor, labels: Tensor, device: torch.device, form: torch.memory_format
) -> Any:
    def ready(x: Tensor) -> Tensor:
        return x.float().div(255).sub(0.5).div(0.25).to(device, memory_format=form)

    pairs = zip(images.split(args.batch_size), labels.split(args.batch_size), strict=True)
    return [(ready(x), y.to(device)) for x, y in pairs]


def soft(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    log_p, q = F.log_softmax(student / temperature, 1), F.softmax(teacher / temperature, 1)
    return F.kl_div(log_p, q, reduction="batchmean") * temperature**2


def bare(args: argparse.Namespace, images: Tensor, labels: Tensor, accelerator: Accelerator) -> Loop:
    """What one would write by hand for KD, and nothing else: normalised float batches lie ready."""
    device = accelerator.device
    teacher, student = (network.to(device) for network in networks(args, True))
    teacher.eval().requires_grad_(False)
    student.train()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    ready = ready_batches(args, images, labels, device, torch.channels_last)

    def loop() -> None:
        for x, y in ready:
            with torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
                with torch.no_grad():
                    target = teacher(x)
                logits = student(x)
            loss = 0.2 * F.cross_entropy(logits.float(), y) + 0.8 * soft(logits.float(), target.float(), 4)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    return loop


def plain(args: argparse.Namespace, images: Tensor, labels: Tensor, accelerator: Accelerator) -> Loop:
    """MAS+KD in eager float32, NCHW, with its losses and accuracies fetched every step for meters and a printed
    line."""
    device = accelerator.device
    teacher, student = (network.to(device) for network in networks(args, False))
    size = (3, args.size, args.size)
    taps = [FeatureTap(network, input_size=size) for network in (teacher, student)]
    theirs, own = (GranularityHeads(tap.embed_dim, args.classes).to(device) for tap in taps)
    teacher.eval()
    theirs.eval()
    student.train()
    parameters = [*student.parameters(), *own.encoders.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=5e-4)
    ready = ready_batches(args, images, labels, device, torch.contiguous_format)

    def loop() -> None:
        sums = {"loss": 0.0, "task": 0.0, "kd": 0.0, "top1": 0.0, "top5": 0.0}
        for x, y in ready:
            mine: Features = taps[1](x)
            with torch.no_grad():
                shown: Features = taps[0](x)
                codes = {name: encoder(shown.embedding) for name, encoder in theirs.encoders.items()}
                views = [decoder(codes[name]) for name, decoder in theirs.decoders.items()]
                target = (shown.logits + views[0] + views[1]) / 3
            task, kd = F.cross_entropy(mine.logits, y), soft(mine.logits, target, 4)
            loss = 0.2 * task + 0.8 * kd
            for (name, encoder), temperature in zip(own.encoders.items(), (2, 8), strict=True):
                loss = loss + soft(encoder(mine.embedding), codes[name], temperature)
            hits = mine.logits.topk(5).indices == y[:, None]
            now = {
                "loss": loss,
                "task": task,
                "kd": kd,
                "top1": hits[:, 0].float().mean(),
                "top5": hits.float().sum(1).mean(),
            }
            for name, value in now.items():
                sums[name] += value.item() * len(y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return loop


def ours(
    args: argparse.Namespace,
    images: Tensor,
    labels: Tensor,
    accelerator: Accelerator,
    *,
    taught: bool = True,
    freeze: bool = True,
) -> Loop:
    teacher, student = networks(args, True)
    device, size = accelerator.device, (3, args.size, args.size)
    teacher_tap, tap = (FeatureTap(network.to(device), input_size=size) for network in (teacher, student))
    pair = Pair(tap.shapes(args.size), teacher_tap.shapes(args.size))
    teacher_tap = fold_batchnorm(teacher_tap) or teacher_tap
    frozen = Teacher(teacher_tap, GranularityHeads(teacher_tap.embed_dim, args.classes).to(device))
    terms = Objective(task=(0.2, CrossEntropy(pair)), kd=(0.8, KD(pair)))
    objective = MAS(pair, terms) if taught else Objective(task=(1.0, CrossEntropy(pair)))
    distiller = Distiller(tap, objective).to(device)
    for module in (distiller, frozen):
        module.to(memory_format=torch.channels_last)
    stats = torch.full((3, 1, 1), 0.5), torch.full((3, 1, 1), 0.25)
    source: Any = SmallImageSource(images, labels, torch.arange(len(images)), "random", Data(), stats, seed=0)
    teach: Any = LiveTeachers(frozen) if taught else None
    if not freeze:
        look = torch.compile(frozen, dynamic=False, mode=compile_mode(accelerator))
        teach = lambda batch: look(batch.images)  # noqa: E731  # not LiveTeachers, which fit would compile
    if taught and args.stored:
        layout = Layout(teacher_tap.embed_dim, args.classes)
        store = TeacherStore(Path(args.folder) / "store", {"random": True}, layout, len(images), 1, accelerator)
        source = StoredSource(source, store)
        source.fill(frozen, accelerator, 256, quiet=True)
        teach = stored_teacher(frozen.heads)

    def loop() -> None:
        options: dict[str, Any] = {"seed": 0, "batch_size": args.batch_size, "compile": args.compile}
        fit(
            distiller,
            source,
            Optim(epochs=1, lr=0.05),
            accelerator,
            teach=teach,
            options=FitOptions(quiet=True),
            **options,
        )

    return loop


def alone(args: argparse.Namespace, images: Tensor, labels: Tensor, accelerator: Accelerator) -> Loop:
    """Our training of the student on labels only."""
    return ours(args, images, labels, accelerator, taught=False)


def unfrozen(args: argparse.Namespace, images: Tensor, labels: Tensor, accelerator: Accelerator) -> Loop:
    """Our step with a teacher that is compiled as any module is, its weights as inputs."""
    return ours(args, images, labels, accelerator, freeze=False)


MAKERS: dict[str, Callable[..., Loop]] = {
    "ours": ours,
    "bare": bare,
    "plain": plain,
    "alone": alone,
    "unfrozen": unfrozen,
}


def random_data(args: argparse.Namespace, steps: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    count = steps * args.batch_size
    images = torch.randint(0, 256, (count, 3, args.size, args.size), dtype=torch.uint8, generator=generator)
    return images, torch.randint(0, args.classes, (count,), generator=generator)


def measure(args: argparse.Namespace, accelerator: Accelerator) -> None:
    """Time ours in turn with the other loop, and put the row into the results."""
    names = (args.against, "ours")
    peaks = {name: int(report.last_line(__file__, *sys.argv[1:], "--only", name)) for name in names}
    images, labels = random_data(args, args.steps)
    loops = {name: MAKERS[name](args, images, labels, accelerator) for name in names}
    for loop in loops.values():  # first calls allocate, choose kernels and compile
        loop()
    times = report.time_in_turn(loops, args.rounds, args.steps)
    key = {
        "against": args.against,
        "pair": f"{args.teacher} -> {args.student}",
        "batch": [args.batch_size, *images.shape[1:]],
        "precision": "bfloat16" if args.amp else "float32",
        "compile": args.compile,
        "stored": args.stored,
    }
    row: dict[str, Any] = key | {
        "other_ms": statistics.median(times[args.against]),
        "ours_ms": statistics.median(times["ours"]),
        "ratio": report.ratio(times["ours"], times[args.against]),
        "peak_bytes": {"other": peaks[args.against], "ours": peaks["ours"]},
        "steps": args.steps,
    }
    row |= report.provenance()
    others = [
        old
        for old in report.read_rows(FILE)
        if any(old[name] != value for name, value in key.items()) or old["machine"]["gpu"] != row["machine"]["gpu"]
    ]
    report.write_json(FILE, [*others, row])
    print(table([row]))


def table(rows: list[dict[str, Any]]) -> str:
    cells = []
    for row in rows:
        median, (low, high) = row["ratio"]["median"], row["ratio"]["quartiles"]
        extra = [name for name in ("compile", "stored") if row[name]]
        cells.append(
            [
                row["pair"].replace("cifar_", ""),
                row["against"],
                ", ".join([{"float32": "fp32", "bfloat16": "bf16"}[row["precision"]], *extra]),
                f"{row['other_ms']:.1f}",
                f"{row['ours_ms']:.1f}",
                f"{median:.3f} ({low:.3f} to {high:.3f})",
                f"{1 / median:.2f}",
                " / ".join(f"{row['peak_bytes'][name] / 2**20:.0f}" for name in ("ours", "other")),
            ]
        )
    header = ["pair", "against", "ours", "theirs, ms", "ours, ms", "ours / theirs (quartiles)", "theirs / ours"]
    return report.markdown([*header, "peak MiB, ours / theirs"], cells)


def section() -> str:
    """The table of docs/results.md."""
    rows = report.read_rows(FILE)
    rounds = sorted({row["ratio"]["n"] for row in rows})
    sizes = " or ".join(str(size) for size in sorted({row["batch"][0] for row in rows}))
    return (
        f"{table(rows)}\n\nMAS+KD by `benchmarks/step.py`, batches of {sizes}, each in turn with the other, "
        f"n={' or '.join(map(str, rounds))} runs of each: {report.about(*rows)}."
    )


def main() -> None:
    args = parse()
    accelerator = Accelerator(mixed_precision="bf16" if args.amp else None)
    with tempfile.TemporaryDirectory() as args.folder:
        if args.only:
            loop = MAKERS[args.only](args, *random_data(args, 4), accelerator)
            loop()
            loop()
            print(report.peak_memory())
        else:
            measure(args, accelerator)


if __name__ == "__main__":
    main()
