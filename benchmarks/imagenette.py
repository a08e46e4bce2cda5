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
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import hosts as each
from report import machine, markdown

from mgd_timm.storage.versions import versions

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results" / "imagenette.jsonl"
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
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--output", type=Path, default=Path("runs/imagenette"))
    return parser.parse_args(arguments)


def command(args: argparse.Namespace, arm: str, seed: int, folder: Path) -> list[str]:
    """A run of the recipe, as a user starts it."""
    words = [
        sys.executable,
        str(ROOT / "recipes" / "imagenet.py"),
        "--data-dir",
        str(args.data_dir),
        "--eval-split",
        "validation",
    ]
    words += [
        "--teacher",
        args.teacher,
        "--teacher-classes",
        "auto",
        "--student",
        args.student,
        "--img-size",
        str(args.img_size),
    ]
    words += [
        "--teacher-store",
        str(args.output / "store"),
        "--epochs",
        str(args.epochs),
        *SCHEDULE,
        "--workers",
        str(args.workers),
    ]
    return [*words, *ARMS[arm], "--seed", str(seed), "--output", str(folder)]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Top-1 of each arm, and what it gains over the arm before it, seed by seed."""
    found: dict[str, dict[int, float]] = {}
    for row in rows:
        found.setdefault(row["arm"], {})[row["seed"]] = row["top1"]
    cells: list[list[str]] = []
    before: str | None = None
    for arm in (arm for arm in ARMS if arm in found):
        base = found[before] if before is not None else {}
        gains = [found[arm][s] - base[s] for s in sorted(found[arm]) if s in base]
        cells.append([arm, each.spread(list(found[arm].values())), each.spread(gains, "+"), str(len(found[arm]))])
        before = arm
    return markdown(["", "top-1 %", "over the line above", "seeds"], cells)


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
    args.results.parent.mkdir(parents=True, exist_ok=True)
    for seed in args.seeds:
        for arm in args.arms:
            key = {"arm": arm, "seed": seed, "student": args.student, "img_size": args.img_size, "epochs": args.epochs}
            if any(all(row.get(name) == value for name, value in key.items()) for row in each.known_rows(args.results)):
                continue
            print(f"\n== {arm}, seed {seed}", flush=True)
            folder = args.output / f"{arm}-{seed}"
            shutil.rmtree(folder, ignore_errors=True)
            running = versions()  # of the code that runs, whatever is committed meanwhile
            subprocess.run(command(args, arm, seed, folder), check=True)
            summary = json.loads((folder / "summary.json").read_text())
            row = {
                **key,
                "teacher": Path(args.teacher).name,
                "teacher_top1": summary.get("teacher_top1"),
                "top1": summary["top1"],
                "best_top1": summary["best_top1"],
                "parameters": summary["parameters"],
                "heads": summary.get("heads"),
                "seconds": summary["seconds"],
                "n_test": summary["last"]["n"],
                "schedule": " ".join(SCHEDULE),
                "machine": machine(),
                "versions": running,
                "date": datetime.now(UTC).date().isoformat(),
            }
            with args.results.open("a") as file:
                file.write(json.dumps(row) + "\n")
    print("\n" + table(each.known_rows(args.results)))


if __name__ == "__main__":
    main()
