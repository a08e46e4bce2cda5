"""recipes/imagenet.py for real, on Imagenette (ten classes of ImageNet) with a teacher of ImageNet's thousand.

    python benchmarks/imagenette.py --data-dir DIR --teacher local-dir:tf_efficientnet_lite2
    python benchmarks/imagenette.py --data-dir DIR --teacher NAME --seeds 0 1 2 --epochs 16

A small student from scratch, alone, with logit KD and with MAS over it. The teacher's rows are found by the class
folders' names (--teacher-classes auto); what it shows of every view is stored once and read by all students. A row per
run goes to benchmarks/results/imagenette.jsonl; what is there already is not run again.
"""

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from report import RESULTS, about, append_rows, gains, has_row, markdown, provenance, read_rows, spread

RECIPE = Path(__file__).parents[1] / "recipes" / "imagenet.py"
FILE = RESULTS / "imagenette.jsonl"
SCHEDULE = (
    *("--batch-size", "64", "--grad-accum-steps", "1", "--opt", "adamw", "--lr", "0.002", "--weight-decay", "0.05"),
    *("--sched", "cosine", "--warmup-epochs", "1", "--clip-grad", "1"),
    *("--scale", "0.35", "1.0", "--interpolation", "bicubic", "--heads-augmentations", "4"),
)
KD = ["--task-weight", "0.2", "--kd-weight", "0.8"]
ARMS: dict[str, list[str]] = {
    "alone": ["--method", "none", "--criterion", "ce"],
    "KD": ["--method", "none", "--criterion", "kd", *KD],
    "MAS+KD": ["--method", "mas", "--criterion", "kd", *KD],
}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data-dir", type=Path, required=True, help="folder with train/ and val/, a folder per class (synset) in each"
    )
    parser.add_argument(
        "--teacher", required=True, help="as of mgd-timm distill: an ImageNet-1k model with its weights"
    )
    parser.add_argument("--student", default="mobilenetv4_conv_small_050")
    parser.add_argument("--img-size", type=int, default=128)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--results", type=Path, default=FILE)
    parser.add_argument("--output", type=Path, default=Path("runs/imagenette"))
    return parser.parse_args(arguments)


def command(args: argparse.Namespace, arm: str, seed: int, folder: Path) -> list[str]:
    """A run of the recipe, as a user starts it."""
    flags = {
        "data-dir": args.data_dir,
        "eval-split": "validation",
        "teacher": args.teacher,
        "teacher-classes": "auto",
        "student": args.student,
        "img-size": args.img_size,
        "teacher-store": args.output / "store",
        "epochs": args.epochs,
        "workers": args.workers,
        "seed": seed,
        "output": folder,
    }
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    return [sys.executable, str(RECIPE), *words, *SCHEDULE, *ARMS[arm]]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Top-1 of each arm, and what it gains over the arm before it, seed by seed."""
    found: dict[str, dict[int, float]] = {}
    for row in rows:
        found.setdefault(row["arm"], {})[row["seed"]] = row["top1"]
    cells: list[list[str]] = []
    before: dict[int, float] = {}
    for arm in (arm for arm in ARMS if arm in found):
        top1 = found[arm]
        cells.append([arm, spread(list(top1.values())), spread(gains(top1, before), "+"), str(len(top1))])
        before = top1
    return markdown(["", "top-1 %", "over the line above", "seeds"], cells)


def section() -> str:
    """The table of docs/results.md."""
    rows = read_rows(FILE)
    first = rows[0]
    return (
        f"{table(rows)}\n\nTop-1 after the last of {first['epochs']} epochs on {int(first['n_test']):,} images of "
        f"{first['img_size']} px; mean ± standard deviation over the seeds, gains seed by seed. Student "
        f"{first['student']}, {first['parameters']:,} parameters; teacher {first['teacher']}, "
        f"{first['teacher_top1']:.2f} % among the ten classes; the schedule was not tuned and is short. "
        f"`benchmarks/imagenette.py`; {about(*rows)}."
    )


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
    for seed in args.seeds:
        for arm in args.arms:
            key = {"arm": arm, "seed": seed, "student": args.student, "img_size": args.img_size, "epochs": args.epochs}
            if has_row(args.results, key):
                continue
            print(f"\n== {arm}, seed {seed}", flush=True)
            folder = args.output / f"{arm}-{seed}"
            shutil.rmtree(folder, ignore_errors=True)
            made_by = provenance()
            subprocess.run(command(args, arm, seed, folder), check=True)
            summary = json.loads((folder / "summary.json").read_text())
            kept = ("teacher_top1", "top1", "best_top1", "parameters", "heads", "seconds")
            row = {**key, "teacher": Path(args.teacher).name, **{name: summary.get(name) for name in kept}}
            row |= {"n_test": summary["last"]["n"], "schedule": " ".join(SCHEDULE)}
            append_rows(args.results, [row | made_by])
    print("\n" + table(read_rows(args.results)))


if __name__ == "__main__":
    main()
