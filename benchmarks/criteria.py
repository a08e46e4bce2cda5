"""Time and peak memory of a training step with each criterion, over those of a step with KD.

    python benchmarks/criteria.py                                 both pairs, every criterion
    python benchmarks/criteria.py --pairs cnn --criteria crd nst  some of them

A step: the frozen teacher's forward, the student's forward and backward with cross-entropy and the one criterion, SGD
with momentum, on float batches that lie ready; maps are tapped only where the criterion reads them. Each criterion
takes its turns with KD in the same process, and a ratio is that of two neighbouring turns. AB and FSP: a step of the
stage that fits the student, but with cross-entropy. DML: from a frozen teacher, so that its second student is not in
the time. KRNet: without its step of its own. CRD: banks of 50,000 samples, 16,384 negatives. Peak memory is that of a
process of its own for each: resident on a CPU, allocated on a GPU. Pairs: cnn is cifar_resnet32x4 -> cifar_resnet8x4 at
32 px, vit is vit_tiny_patch16_224 -> resnet18 at 96 px; 100 classes, batches of 64.
Writes benchmarks/results/criteria.json and criteria.png.
"""

import argparse
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import report
import torch
from tqdm import tqdm

from mgd_timm.criteria import CRITERIA, CrossEntropy, Objective
from mgd_timm.distiller import Distiller, LiveTeachers, Teacher
from mgd_timm.features import Batch, FeatureTap, Pair
from mgd_timm.models.build import build_model, set_memory_format
from mgd_timm.models.fold_batchnorm import fold_batchnorm

PAIRS = {"cnn": ("cifar_resnet32x4", "cifar_resnet8x4", 32), "vit": ("vit_tiny_patch16_224", "resnet18", 96)}
CLASSES, BATCH, SAMPLES = 100, 64, 50_000
AIMS = dict.fromkeys(CRITERIA, 1.25) | {"crd": 1.6}
FREE = ("kdsvd", "krnet", "reviewkd", "rkd", "sskd")  # to be stated, without an aim
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
    parser.add_argument("--output", type=Path, default=report.RESULTS)
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
    teach = LiveTeachers(frozen, rotate=kind.rotates)
    objective = Objective(task=(1.0, CrossEntropy(shapes)), **{name: (kind.weight, kind(shapes))})
    trainee = Distiller(tap, objective).to(device).train()
    for module in (trainee, frozen):
        set_memory_format(module, student_name, None, device)
    optimizer = torch.optim.SGD(
        [p for p in trainee.parameters() if p.requires_grad], lr=1e-3, momentum=0.9, weight_decay=5e-4
    )
    ids = torch.arange(args.batch_size, device=device)
    batch = Batch(torch.randn(args.batch_size, *size, device=device), ids % CLASSES, ids)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
            terms, _ = trainee(batch, teach(batch))
        torch.stack(list(terms.values())).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def peak_bytes(pair: str, name: str, args: argparse.Namespace) -> int:
    """Peak memory of a process of its own that takes a few steps."""
    options = ["--pairs", pair, "--only", name, "--batch-size", str(args.batch_size), *(["--amp"] if args.amp else [])]
    return int(report.last_line(__file__, *options))


def measure(pair: str, name: str, base: Step, step: Step, base_peak: int, args: argparse.Namespace) -> dict[str, Any]:
    """What is measured of a criterion in turn with KD."""
    for warm in (base, base, step, step):
        warm()

    def repeated(run: Step) -> Step:
        def loop() -> None:
            for _ in range(args.steps):
                run()

        return loop

    times = report.time_in_turn({"kd": repeated(base), "own": repeated(step)}, args.rounds, args.steps)
    return {
        "kd_ms": statistics.median(times["kd"]),
        "ms": statistics.median(times["own"]),
        "ratio": report.ratio(times["own"], times["kd"]) | {"steps": args.steps},
        "peak_bytes": base_peak if name == "kd" else peak_bytes(pair, name, args),
        "kd_peak_bytes": base_peak,
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
    return report.markdown(header, cells)


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


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["pair"], row["criterion"], row["precision"], row["batch_size"], row["machine"]["gpu"]


def section() -> str:
    """The table of docs/results.md."""
    found = report.read_rows(report.RESULTS / "criteria.json")
    rows = [row for row in found if (row["precision"], row["batch_size"]) == ("float32", BATCH)]
    measured = [row for row in rows if "refused" not in row]
    refused = "".join(
        f" Refused for `{row['pair']}`: {row['criterion']} ({row['refused'].split(':')[0]})."
        for row in rows
        if "refused" in row
    )
    sizes = sorted({(row["ratio"]["n"], row["ratio"]["steps"]) for row in measured})
    turns = " or ".join(f"{n} turns of {steps} steps" for n, steps in sizes)
    return (
        f"{table(rows)}\n\nStep time (median, quartiles) and peak memory of a process, over those of the task with KD "
        "alone; aim: the largest ratio that we aim for, a dash where none is set. "
        f"fp32, batches of {BATCH}, each criterion in turn with KD, n={turns}.{refused} "
        f"`benchmarks/criteria.py`; {report.about(*measured)}."
    )


def measure_pair(pair: str, args: argparse.Namespace, bar: Any) -> None:
    """Measure every criterion on a pair; each row is written when it is there."""
    path = args.output / "criteria.json"
    base, base_peak = maker(pair, "kd", args), peak_bytes(pair, "kd", args)
    order = list(CRITERIA)
    for name in args.criteria:
        row = {"pair": pair, "networks": list(PAIRS[pair]), "criterion": name, "batch_size": args.batch_size}
        row |= {"precision": "bfloat16" if args.amp else "float32"} | report.provenance()
        try:
            step = maker(pair, name, args)
        except ValueError as reason:
            row["refused"] = str(reason)
        else:
            row |= measure(pair, name, base, step, base_peak, args)
        rows = [row, *(old for old in report.read_rows(path) if key(old) != key(row))]
        report.write_json(path, sorted(rows, key=lambda row: (row["pair"], order.index(row["criterion"]))))
        bar.update()


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
    if args.only:
        step = maker(args.pairs[0], args.only, args)
        for _ in range(4):
            step()
        print(report.peak_memory())
        return
    with tqdm(total=len(args.pairs) * len(args.criteria), unit="criterion", desc="criteria") as bar:
        for pair in args.pairs:
            measure_pair(pair, args, bar)
    rows, precision = report.read_rows(args.output / "criteria.json"), "bfloat16" if args.amp else "float32"
    alike = [row for row in rows if (row["precision"], row["batch_size"]) == (precision, args.batch_size)]
    draw(alike, args.output / "criteria.png")
    print(table(alike))


if __name__ == "__main__":
    main()
