"""Time of our MAS+KD training step over a bare hand-written loop, on the same batches, timed in turn.

    python benchmarks/step.py
    python benchmarks/step.py --teacher cifar_resnet20 --student cifar_resnet8x05 --size 28 --classes 10

The bare loop: frozen teacher's forward, student's forward and backward with cross-entropy and KD, SGD with momentum; at the same
precision and memory format. Ours is `fit` itself, from uint8 images in the store to the new weights: order, augmentation, heads,
both code losses, stable excitation, schedule, checks and logging are all in its time. Writes benchmarks/results/step.json.
"""

import argparse
import contextlib
import json
import statistics
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from mgd_timm import models  # noqa: F401  # registers cifar_*
from mgd_timm.criteria import KD, CrossEntropy, Objective
from mgd_timm.data import StoreSource
from mgd_timm.distiller import Distiller, Teacher
from mgd_timm.export import versions
from mgd_timm.features import Batch, FeatureTap, Pair
from mgd_timm.fit import Upkeep, fit
from mgd_timm.granularity import MAS, GranularityHeads
from mgd_timm.recipe import Data, Optim
from mgd_timm.report import machine, markdown

RESULTS = Path(__file__).parent / "results" / "step.json"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default="cifar_resnet32x4")
    parser.add_argument("--student", default="cifar_resnet8x4")
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=40, help="steps in a timed run; starting and ending a run count in")
    parser.add_argument("--rounds", type=int, default=6, help="timed runs of each")
    parser.add_argument("--no-channels-last", action="store_true")
    parser.add_argument("--amp", action="store_true", help="bfloat16 autocast in both")
    return parser.parse_args()


def build(args: argparse.Namespace) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    options = {"num_classes": args.classes}
    teacher, student = timm.create_model(args.teacher, **options), timm.create_model(args.student, **options)
    if not args.no_channels_last:
        teacher.to(memory_format=torch.channels_last)
        student.to(memory_format=torch.channels_last)
    return teacher, student


def bare(args: argparse.Namespace, images: Tensor, labels: Tensor, device: torch.device) -> Callable[[], None]:
    """What one would write by hand for KD, and nothing else: normalised float batches lie ready."""
    teacher, student = (network.to(device) for network in build(args))
    teacher.eval().requires_grad_(False)
    student.train()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    form = torch.contiguous_format if args.no_channels_last else torch.channels_last
    ready = [
        (x.float().div(255).sub(0.5).div(0.25).to(device, memory_format=form), y.to(device))
        for x, y in batches(args, images, labels)
    ]

    def amp() -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(device.type, torch.bfloat16) if args.amp else contextlib.nullcontext()

    def loop() -> None:
        for x, y in ready:
            with amp():
                with torch.no_grad():
                    target = teacher(x)
                logits = student(x)
            soft = F.kl_div(F.log_softmax(logits.float() / 4, 1), F.softmax(target.float() / 4, 1), reduction="batchmean") * 16
            loss = 0.2 * F.cross_entropy(logits.float(), y) + 0.8 * soft
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    return loop


def batches(args: argparse.Namespace, images: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    yield from zip(images.split(args.batch_size), labels.split(args.batch_size), strict=True)


def ours(args: argparse.Namespace, images: Tensor, labels: Tensor, accelerator: Accelerator) -> Callable[[], None]:
    teacher, student = build(args)
    device, size = accelerator.device, (3, args.size, args.size)
    taps = [FeatureTap(network.to(device), input_size=size) for network in (teacher, student)]
    heads = GranularityHeads(taps[0].embed_dim, args.classes).to(device)
    frozen = Teacher(taps[0], heads)
    pair = Pair(taps[1].shapes(args.size), taps[0].shapes(args.size))
    objective = MAS(pair, Objective(task=(0.2, CrossEntropy(pair)), kd=(0.8, KD(pair))))
    distiller = Distiller(taps[1], objective).to(device)
    if not args.no_channels_last:
        distiller.to(memory_format=torch.channels_last)
    stats = torch.full((3, 1, 1), 0.5), torch.full((3, 1, 1), 0.25)
    source = StoreSource(images, labels, torch.arange(len(images)), "random", Data(), stats, seed=0)

    def teach(batch: Batch) -> Any:
        return frozen(batch.images)

    def loop() -> None:
        optim = Optim(epochs=1, lr=0.05)
        fit(distiller, source, optim, accelerator, seed=0, batch_size=args.batch_size, teach=teach, upkeep=Upkeep(quiet=True))

    return loop


def main() -> None:
    args = parse()
    accelerator = Accelerator(mixed_precision="bf16" if args.amp else None)
    generator = torch.Generator().manual_seed(0)
    count = args.steps * args.batch_size
    images = torch.randint(0, 256, (count, 3, args.size, args.size), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, args.classes, (count,), generator=generator)
    loops = {"bare": bare(args, images, labels, accelerator.device), "ours": ours(args, images, labels, accelerator)}
    for loop in loops.values():  # first calls allocate and choose kernels
        loop()
    times: dict[str, list[float]] = {name: [] for name in loops}
    for _ in range(args.rounds):
        for name, loop in loops.items():
            start = time.perf_counter()
            loop()
            if accelerator.device.type == "cuda":
                torch.cuda.synchronize()
            times[name].append((time.perf_counter() - start) / args.steps * 1000)
    ratios = [b / a for a, b in zip(times["bare"], times["ours"], strict=True)]
    quartiles = statistics.quantiles(ratios, n=4)
    row = {
        "pair": f"{args.teacher} -> {args.student}",
        "batch": [args.batch_size, *images.shape[1:]],
        "precision": "bfloat16" if args.amp else "float32",
        "channels_last": not args.no_channels_last,
        "bare_ms": statistics.median(times["bare"]),
        "ours_ms": statistics.median(times["ours"]),
        "ratio": {"median": statistics.median(ratios), "quartiles": [quartiles[0], quartiles[2]], "n": args.rounds},
        "steps": args.steps,
        "machine": machine(),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "date": datetime.now(UTC).date().isoformat(),
    }
    known = json.loads(RESULTS.read_text()) if RESULTS.is_file() else []
    key = ("pair", "batch", "precision", "channels_last")
    known = [old for old in known if any(old[k] != row[k] for k in key) or old["machine"]["gpu"] != row["machine"]["gpu"]]
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps([*known, row], indent=2) + "\n")
    cells = [[row["pair"], row["precision"], f"{row['bare_ms']:.1f}", f"{row['ours_ms']:.1f}", f"{row['ratio']['median']:.3f}"]]
    print(markdown(["pair", "precision", "bare ms", "ours ms", "ours / bare"], cells))
    print(f"quartiles {quartiles[0]:.3f} to {quartiles[2]:.3f}, n={args.rounds} runs of {args.steps} steps; wrote {RESULTS}")


if __name__ == "__main__":
    main()
