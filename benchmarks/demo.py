"""`mgd-timm demo` with curves, and over several seeds.

make demo                              one seed, two and a half minutes on 2 cores
python benchmarks/demo.py --seeds 5    mean and spread, written to benchmarks/results/demo.json
"""

import argparse
import json
import shutil
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from report import about, draw_curves, provenance, write_json

from mgd_timm.cli.demo_runs import BUDGET, Student, export_best, of_arms, table, train_students

RESULTS = Path(__file__).parent / "results" / "demo.json"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1, help="how many; 2 or more write benchmarks/results/demo.json")
    parser.add_argument("--epochs", type=int, default=BUDGET["epochs"])
    parser.add_argument("--output", type=Path, default=Path("runs/demo"))
    return parser.parse_args()


def main() -> None:
    args = parse()
    start, made_by = time.monotonic(), provenance()
    shutil.rmtree(args.output, ignore_errors=True)
    students = train_students(args.output, args.epochs, range(args.seeds))
    text = table(students)
    print(f"\n{text}")
    found = of_arms(students)
    teacher = found["KD"][0].result.summary["teacher_top1"]
    folders = {arm: [student.folder for student in group] for arm, group in found.items()}
    title = "cifar_resnet8x05 on 10,000 images of Fashion-MNIST"
    draw_curves(folders, args.output / "curves.png", title=title, level=("teacher", teacher))
    print(f"\ncurves: {args.output / 'curves.png'}")
    export_best(students, args.output)
    if args.seeds > 1:
        write(students, text, made_by, args)
    print(f"{time.monotonic() - start:.0f} s in all")


def write(students: Sequence[Student], text: str, made_by: dict[str, Any], args: argparse.Namespace) -> None:
    """Write benchmarks/results/demo.json."""
    found = {arm: [student.result.summary for student in group] for arm, group in of_arms(students).items()}
    arms = {
        arm: {
            "last_top1": [summary["top1"] for summary in summaries],
            "best_top1": [summary["best_top1"] for summary in summaries],
            "seconds": [summary["seconds"] for summary in summaries],
        }
        for arm, summaries in found.items()
    }
    body = {
        "what": "python benchmarks/demo.py",
        "seeds": list(range(args.seeds)),
        "n_test": int(found["alone"][0]["last"]["n"]),
        "budget": {**BUDGET, "epochs": args.epochs},
        "teacher_top1": found["KD"][0]["teacher_top1"],
        "heads": [summary["heads"] for summary in found["MAS+KD"]],
        "arms": arms,
        "table": text,
    }
    write_json(RESULTS, body | made_by)
    print(f"wrote {RESULTS}")


def section() -> str:
    """The table of docs/results.md."""
    row = json.loads(RESULTS.read_text())
    means = {name: statistics.fmean(h[name] for h in row["heads"]) for name in ("abstract", "detailed", "top1")}
    seeds = len(row["seeds"])
    return (
        f"{row['table']}\n\n"
        f"Fashion-MNIST, {row['n_test']:,} test images, accuracy after the last of {row['budget']['epochs']} epochs; "
        f"mean ± standard deviation over {seeds} seeds, gains are of means. The teacher saw 60,000 images, the "
        f"students 10,000. Heads, mean top-1: abstract {means['abstract']:.2f}, detailed {means['detailed']:.2f}, "
        f"stable logits {means['top1']:.2f} %. `{row['what']} --seeds {seeds}`; {about(row)}."
    )


if __name__ == "__main__":
    main()
