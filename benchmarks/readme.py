"""Write the README's tables from benchmarks/results/: `python benchmarks/readme.py`, or with --check only compare."""

import argparse
import json
import re
from pathlib import Path
from typing import Any

from mgd_timm.report import markdown

HERE = Path(__file__).parent
README = HERE.parent / "README.md"


def about(row: dict[str, Any]) -> str:
    machine, versions = row["machine"], row["versions"]
    device = machine["gpu"] or f"{machine['cores']} cores of {machine['cpu']}"
    commit = str(versions.get("commit"))[:10]
    return f"{device}; torch {versions['torch']}, timm {versions['timm']}; commit {commit}; {row['date']}"


def demo() -> str:
    row = json.loads((HERE / "results" / "demo.json").read_text())
    heads = row["heads"]
    means = {name: sum(h[name] for h in heads) / len(heads) for name in ("abstract", "detailed", "top1")}
    seeds = len(row["seeds"])
    return (
        f"{row['table']}\n\n"
        f"Fashion-MNIST, {row['n_test']:,} test images, accuracy after the last of {row['budget']['epochs']} epochs; mean ± "
        f"standard deviation over {seeds} seeds, gains are of means. The teacher saw 60,000 images, the students 10,000. "
        f"Heads, mean top-1: abstract {means['abstract']:.2f}, detailed {means['detailed']:.2f}, "
        f"stable logits {means['top1']:.2f} %. `{row['what']} --seeds {seeds}`; {about(row)}."
    )


def step() -> str:
    rows = json.loads((HERE / "results" / "step.json").read_text())
    cells = [
        [
            row["pair"],
            f"{row['batch'][0]} x {row['batch'][2]} px",
            row["precision"],
            f"{row['bare_ms']:.1f}",
            f"{row['ours_ms']:.1f}",
            f"{row['ratio']['median']:.3f} ({row['ratio']['quartiles'][0]:.3f} to {row['ratio']['quartiles'][1]:.3f})",
        ]
        for row in rows
    ]
    header = ["pair", "batch", "precision", "bare loop, ms", "ours, ms", "ours / bare (quartiles)"]
    lines = "\n".join(
        f"- {row['pair']}, {row['precision']}: n={row['ratio']['n']} runs of each in turn; {about(row)}." for row in rows
    )
    return f"{markdown(header, cells)}\n\nMAS+KD by `benchmarks/step.py` against a bare KD loop:\n{lines}"


def filled(text: str) -> str:
    for name, make in (("demo", demo), ("step", step)):
        text = re.sub(
            rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", lambda m, make=make: f"{m[1]}{make()}\n{m[2]}", text, flags=re.S
        )
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail if the tables are not those of the results")
    args = parser.parse_args()
    text = README.read_text()
    if args.check:
        raise SystemExit(
            0 if filled(text) == text else "README.md: tables differ from benchmarks/results; run benchmarks/readme.py"
        )
    README.write_text(filled(text))


if __name__ == "__main__":
    main()
