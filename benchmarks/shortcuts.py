"""What the fast step costs in accuracy: the same seeds trained plainly (float32, NCHW, eager) and with every shortcut
at once.

    python benchmarks/shortcuts.py              three seeds of MAS+KD on the embedded data, about six minutes on 2 cores

Shortcuts: bfloat16 autocast, channels-last, the teacher's BatchNorm folded, teacher and train step compiled. Writes
benchmarks/results/shortcuts.json.
"""

import argparse
import json
import statistics
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from report import machine, markdown

from mgd_timm.pipeline.run import run
from mgd_timm.recipe.recipe import make_recipe
from mgd_timm.storage.versions import versions

BUDGET: dict[str, Any] = {"student": "cifar_resnet8x05", "epochs": 8, "lr": 0.1, "pad": 2}
ARMS: dict[str, dict[str, Any]] = {
    "plain": {"channels_last": False, "fold_teacher": False},
    "fast": {"channels_last": True, "fold_teacher": True, "amp": True, "compile": True},
}
RESULTS = Path(__file__).parent / "results" / "shortcuts.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=BUDGET["epochs"])
    args = parser.parse_args()
    if args.seeds < 2:
        parser.error(f"--seeds {args.seeds}: expected 2 or more, of one there is no spread.")
    top1: dict[str, list[float]] = {name: [] for name in ARMS}
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(args.seeds):
            for name, options in ARMS.items():
                print(f"\n== {name}, seed {seed}")
                budget = {**BUDGET, "epochs": args.epochs}
                found = run(make_recipe(**budget, **options, seed=seed, output=f"{folder}/{name}_{seed}")).summary
                top1[name].append(found["top1"])
    differences = [b - a for a, b in zip(top1["plain"], top1["fast"], strict=True)]
    rows = [
        [
            name,
            f"{statistics.fmean(top1[name]):.2f} ± {statistics.stdev(top1[name]):.2f}",
            " ".join(f"{v:.2f}" for v in top1[name]),
        ]
        for name in ARMS
    ]
    table = markdown(["MAS+KD", "top-1 %", "by seed"], rows)
    print(
        f"\n{table}\nfast - plain, same seed: {statistics.fmean(differences):+.2f} ± "
        f"{statistics.stdev(differences):.2f}"
    )
    body = {
        "what": f"python benchmarks/shortcuts.py --seeds {args.seeds}",
        "budget": {**BUDGET, "epochs": args.epochs},
        "seeds": list(range(args.seeds)),
        "n_test": int(found["last"]["n"]),
        "top1": top1,
        "difference": {"mean": statistics.fmean(differences), "std": statistics.stdev(differences)},
        "table": table,
        "machine": machine(),
        "versions": versions(),
        "date": datetime.now(UTC).date().isoformat(),
    }
    RESULTS.write_text(json.dumps(body, indent=2) + "\n")
    print(f"wrote {RESULTS}")


if __name__ == "__main__":
    main()
