"""What the fast step costs in accuracy: the same seeds trained plainly (float32, NCHW, eager) and with every shortcut
at once.

    python benchmarks/shortcuts.py              three seeds of MAS+KD on the embedded data, about six minutes on 2 cores

Shortcuts: bfloat16 autocast, channels-last, the teacher's BatchNorm folded, teacher and train step compiled. Writes
benchmarks/results/shortcuts.json.
"""

import argparse
import json
import tempfile
from typing import Any

from report import RESULTS, about, markdown, provenance, spread, write_json

from mgd_timm.pipeline.run import run
from mgd_timm.recipe.recipe import make_recipe

FILE = RESULTS / "shortcuts.json"
BUDGET: dict[str, Any] = {"student": "cifar_resnet8x05", "epochs": 8, "lr": 0.1, "pad": 2}
ARMS: dict[str, dict[str, Any]] = {
    "plain": {"channels_last": False, "fold_teacher": False},
    "fast": {"channels_last": True, "fold_teacher": True, "amp": True, "compile": True},
}


def section() -> str:
    """The table of docs/results.md."""
    row = json.loads(FILE.read_text())
    cells = [[name, spread(values), " ".join(f"{v:.2f}" for v in values)] for name, values in row["top1"].items()]
    differences = [fast - plain for plain, fast in zip(row["top1"]["plain"], row["top1"]["fast"], strict=True)]
    return (
        f"{markdown(['MAS+KD', 'top-1 %', 'by seed'], cells)}\n\n"
        f"fast - plain, same seed: {spread(differences, '+')} points over {len(row['seeds'])} seeds. "
        f"`{row['what']}`; {about(row)}."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=BUDGET["epochs"])
    args = parser.parse_args()
    if args.seeds < 2:
        parser.error(f"--seeds {args.seeds}: expected 2 or more, of one there is no spread.")
    made_by, top1 = provenance(), {name: list[float]() for name in ARMS}
    budget = {**BUDGET, "epochs": args.epochs}
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(args.seeds):
            for name, options in ARMS.items():
                print(f"\n== {name}, seed {seed}")
                recipe = make_recipe(**budget, **options, seed=seed, output=f"{folder}/{name}_{seed}")
                summary = run(recipe).summary
                top1[name].append(summary["top1"])
    body: dict[str, Any] = {"what": f"python benchmarks/shortcuts.py --seeds {args.seeds}", "budget": budget}
    body |= {"seeds": list(range(args.seeds)), "n_test": int(summary["last"]["n"]), "top1": top1}
    write_json(FILE, body | made_by)
    print(section())


if __name__ == "__main__":
    main()
