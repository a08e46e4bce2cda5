"""Time and peak memory of a training step with each criterion, over those of a step with KD.

    python benchmarks/criteria.py                                 both pairs, every criterion
    python benchmarks/criteria.py --pairs cnn --criteria crd nst  some of them

A step: the frozen teacher's forward, the student's forward and backward with cross-entropy and the one criterion, SGD
with momentum, on float batches that lie ready; maps are tapped only where the criterion reads them. Each criterion
takes its turns with KD in the same process, and a ratio is that of two neighbouring turns. AB and FSP: a step of the
stage that fits the student, but with cross-entropy. DML: from a frozen teacher, so that its second student is not in
the time. CRD: banks of 50,000 samples, 16,384 negatives. Peak memory is that of a process of its own for each: resident
on a CPU, allocated on a GPU. Pairs: cnn is cifar_resnet32x4 -> cifar_resnet8x4 at 32 px, vit is vit_tiny_patch16_224 ->
resnet18 at 96 px; 100 classes, batches of 64. Writes benchmarks/results/criteria.json and criteria.png.
"""

import argparse
import contextlib
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from report import machine, markdown
from tqdm import tqdm

from mgd_timm.criteria import CRITERIA, CrossEntropy, Objective
from mgd_timm.distiller import Distiller, Teacher
from mgd_timm.features import Batch, FeatureTap, Pair
from mgd_timm.models.build import build_model
from mgd_timm.models.fold_batchnorm import fold_batchnorm
from mgd_timm.storage.versions import versions

RESULTS = Path(__file__).parent / "results"
PAIRS = {"cnn": ("cifar_resnet32x4", "cifar_resnet8x4", 32), "vit": ("vit_tiny_patch16_224", "resnet18", 96)}
CLASSES, BATCH, SAMPLES = 100, 64, 50_000
AIMS = dict.fromkeys(CRITERIA, 1.25) | {"crd": 1.6}
FREE = ("kdsvd", "reviewkd", "rkd")  # to be stated, without an aim
Step = Callable[[], None]


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", nargs="+", choices=tuple(PAIRS), default=list(PAIRS))
    parser.add_argument(
        "--criteria", nargs="+", choices=tuple(CRITERIA), default=[name for name in CRITERIA if name != "ce"]
    )
    parser.add_argument("--steps", type=int, default=3, help="steps in a turn")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each, 2 or more")
    parser.add_argument("--batch-size", type=int, default=BATCH)
    parser.add_argument("--amp", action="store_true", help="bfloat16 autocast")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument(
        "--only", choices=tuple(CRITERIA), help=argparse.SUPPRESS
    )  # a process that measures its own memory
    args = parser.parse_args(arguments)
    if args.rounds < 2:
        parser.error(f"--rounds {args.rounds}: expected 2 or more, for quartiles")
    return args


def maker(pair: str, name: str, args: argparse.Namespace) -> Step:
    """A training step with one criterion.

    Raises:
        ValueError: Why it is none for this pair.
    """
    teacher_name, student_name, side = PAIRS[pair]
    kind, size = CRITERIA[name], (3, side, side)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    models = [build_model(model, size, CLASSES) for model in (teacher_name, student_name)]
    # The networks may differ in their number of stages.
    counts = [len(FeatureTap(model, "stages", input_size=size).indices) for model in models]
    maps = "stages" if len(set(counts)) == 1 else str(min(counts))
    both = [maps if "maps" in read else None for read in (kind.needs, kind.needs | kind.student_needs)]
    taps = [
        FeatureTap(model, word, input_size=size, preact=kind.preact, cam="cams" in kind.needs)
        for model, word in zip(models, both, strict=True)
    ]
    seen, tap = (network.to(device) for network in taps)
    shapes = Pair(tap.shapes(side), seen.shapes(side), SAMPLES, torch.arange(SAMPLES) % CLASSES, seen.classifier)
    frozen = Teacher(fold_batchnorm(seen) or seen).to(device)
    objective = Objective(task=(1.0, CrossEntropy(shapes)), **{name: (kind.weight, kind(shapes))})
    trainee = Distiller(tap, objective).to(device).train()
    if device.type == "cuda" or student_name.startswith("cifar_"):
        trainee.to(memory_format=torch.channels_last)
        frozen.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(
        [p for p in trainee.parameters() if p.requires_grad], lr=1e-3, momentum=0.9, weight_decay=5e-4
    )
    ids = torch.arange(args.batch_size, device=device)
    batch = Batch(torch.randn(args.batch_size, *size, device=device), ids % CLASSES, ids)

    def amp() -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(device.type, torch.bfloat16) if args.amp else contextlib.nullcontext()

    def step() -> None:
        with amp():
            terms, _ = trainee(batch, frozen(batch.images))
        torch.stack(list(terms.values())).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def peak_bytes(pair: str, name: str, args: argparse.Namespace) -> int:
    """Peak memory of a process of its own that takes a few steps."""
    options = ["--pairs", pair, "--only", name, "--batch-size", str(args.batch_size), *(["--amp"] if args.amp else [])]
    return int(
        subprocess.run([sys.executable, __file__, *options], check=True, capture_output=True, text=True).stdout.split()[
            -1
        ]
    )


def measure_memory(args: argparse.Namespace) -> None:
    step = maker(args.pairs[0], args.only, args)
    for _ in range(4):
        step()
    if torch.cuda.is_available():
        print(torch.cuda.max_memory_allocated())
    elif sys.platform == "linux":  # not ru_maxrss, which counts what the parent held when it forked
        (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
        print(int(line.split()[1]) * 1024)
    else:
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024))


def measure(pair: str, name: str, base: Step, step: Step, base_peak: int, args: argparse.Namespace) -> dict[str, Any]:
    """One row: a criterion in turn with KD."""
    for warm in (base, step):
        for _ in range(2):
            warm()
    times: list[list[float]] = []
    for number in range(args.rounds):
        turn = {}
        for run in (base, step)[:: 1 - 2 * (number % 2)]:  # each is first in turn
            start = time.perf_counter()
            for _ in range(args.steps):
                run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            turn[run] = (time.perf_counter() - start) / args.steps * 1000
        times.append([turn[base], turn[step]])
    ratios = [own / other for other, own in times]
    low, _, high = statistics.quantiles(ratios, n=4)
    peak = base_peak if name == "kd" else peak_bytes(pair, name, args)
    return {
        "pair": pair,
        "networks": list(PAIRS[pair]),
        "criterion": name,
        "precision": "bfloat16" if args.amp else "float32",
        "batch_size": args.batch_size,
        "kd_ms": statistics.median(other for other, _ in times),
        "ms": statistics.median(own for _, own in times),
        "ratio": {"median": statistics.median(ratios), "quartiles": [low, high], "n": args.rounds, "steps": args.steps},
        "peak_bytes": peak,
        "kd_peak_bytes": base_peak,
        "machine": machine(),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "date": datetime.now(UTC).date().isoformat(),
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A line per criterion, a pair of columns per pair of networks."""
    pairs = [pair for pair in PAIRS if any(row["pair"] == pair for row in rows)]
    found = {(row["criterion"], row["pair"]): row for row in rows}
    cells = []
    for name in dict.fromkeys(row["criterion"] for row in rows):
        line = [name, "-" if name in FREE else f"{AIMS[name]:g}"]
        for pair in pairs:
            row = found.get((name, pair))
            if row is None or "refused" in row:
                line += ["" if row is None else "refused", ""]
                continue
            (low, high), extra = row["ratio"]["quartiles"], (row["peak_bytes"] - row["kd_peak_bytes"]) / 2**20
            line += [f"{row['ratio']['median']:.2f} ({low:.2f} to {high:.2f})", f"{extra:+.0f}"]
        cells.append(line)
    header = ["criterion", "aim"]
    for pair in pairs:
        teacher, student, side = PAIRS[pair]
        header += [f"time over KD's, {teacher} -> {student} at {side} px", "MiB over KD's"]
    return markdown(header, cells)


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    pairs = [pair for pair in PAIRS if any(row["pair"] == pair for row in rows)]
    names = list(dict.fromkeys(row["criterion"] for row in rows))
    figure: Any = Figure(figsize=(2 + 4 * len(pairs), 3 + 0.28 * len(names)), layout="constrained")
    axes = figure.subplots(1, len(pairs), sharey=True, squeeze=False)[0]
    for axis, pair in zip(axes, pairs, strict=True):
        found = {row["criterion"]: row for row in rows if row["pair"] == pair and "refused" not in row}
        for place, name in enumerate(names):
            if name in found:
                ratio, (low, high) = found[name]["ratio"]["median"], found[name]["ratio"]["quartiles"]
                missed = name not in FREE and ratio > AIMS[name]
                axis.barh(
                    place,
                    ratio,
                    color="#c44e52" if missed else "#4c72b0",
                    xerr=[[ratio - low], [high - ratio]],
                    ecolor="0.3",
                )
            else:
                axis.text(0.02, place, "refused", va="center", fontsize=8, color="0.4")
        axis.set_xlim(0, 1.05 * max([1.25, *(row["ratio"]["quartiles"][1] for row in found.values())]))
        axis.axvline(1.0, color="0.3", linewidth=0.8)
        axis.axvline(1.25, color="0.6", linewidth=0.8, linestyle="--")
        teacher, student, side = PAIRS[pair]
        axis.set_title(f"{teacher}\n-> {student}, {side} px", fontsize=9)
        axis.set_xlabel("step time over KD's (dashed: the aim)", fontsize=9)
    axes[0].set_yticks(range(len(names)), names, fontsize=8)
    axes[0].invert_yaxis()
    figure.savefig(path, dpi=110)


def known_rows(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text()) if path.is_file() else []


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["pair"], row["criterion"], row["precision"], row["batch_size"], row["machine"]["gpu"]


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
    if args.only:
        measure_memory(args)
        return
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / "criteria.json"
    with tqdm(total=len(args.pairs) * len(args.criteria), unit="criterion", desc="criteria") as bar:
        for pair in args.pairs:
            base, base_peak = maker(pair, "kd", args), peak_bytes(pair, "kd", args)
            for name in args.criteria:
                try:
                    step = maker(pair, name, args)
                except ValueError as reason:
                    row = {"pair": pair, "criterion": name, "precision": "bfloat16" if args.amp else "float32"}
                    row |= {
                        "batch_size": args.batch_size,
                        "machine": machine(),
                        "versions": versions(),
                        "refused": str(reason),
                    }
                else:
                    row = measure(pair, name, base, step, base_peak, args)
                rows = [old for old in known_rows(path) if key(old) != key(row)]
                order = {name: place for place, name in enumerate(CRITERIA)}
                rows = sorted([*rows, row], key=lambda row: (row["pair"], order.get(row["criterion"], len(order))))
                path.write_text(json.dumps(rows, indent=2) + "\n")
                bar.update()
    mine = [other for other in rows if key(other)[2:] == key(row)[2:]]
    draw(mine, args.output / "criteria.png")
    print(table(mine))
    for row in mine:
        if "refused" in row:
            print(f"{row['pair']}, {row['criterion']}: {row['refused']}")
    print(f"wrote {path} and {args.output / 'criteria.png'}")


if __name__ == "__main__":
    main()
