"""Every criterion at work on the embedded data: a small student taught by it alone, with logit KD, and under MAS.

    python benchmarks/hosts.py                             all of them; continues where it was stopped
    python benchmarks/hosts.py --hosts crd at --seeds 0    some of them

Each student learns from the task and the one criterion with its usual weight (X), from these and KD of weight 1 (X+KD),
and from the same under MAS. AB, FSP and FT have a fitting stage of 2 epochs first. DML: a second student of the same
architecture, none and MAG. The runs are short, and the data are easy: this shows that each method trains at its usual
weight, and does not rank them. Writes benchmarks/results/hosts.jsonl.
"""

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from report import RESULTS, about, append_rows, gains, has_row, markdown, provenance, read_rows, spread

from mgd_timm.criteria import CRITERIA
from mgd_timm.pipeline.run import run
from mgd_timm.recipe.recipe import make_recipe
from mgd_timm.training.report import NonFiniteError

FILE = RESULTS / "hosts.jsonl"
BUDGET: dict[str, Any] = {"student": "cifar_resnet8x05", "lr": 0.1, "batch_size": 64, "pad": 2, "channels_last": True}
# CAT-KD's weight goes with the scale of the networks' maps: the usual one is too large for these.
HOSTS = ["alone", *(name for name in CRITERIA if name != "ce"), "catkd:1"]


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", nargs="+", choices=HOSTS, default=HOSTS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--results", type=Path, default=FILE)
    parser.add_argument("--output", type=Path, default=Path("runs/hosts"))
    return parser.parse_args(arguments)


def arms(host: str) -> dict[str, dict[str, Any]]:
    """Options of each arm of a host."""
    if host == "alone":
        return {"alone": {"teacher": None, "method": "none"}}
    if host == "kd":
        weights = {"task_weight": 0.2, "kd_weight": 0.8}
        return {"KD": {"method": "none", **weights}, "MAS+KD": {"method": "mas", **weights}}
    if CRITERIA[host.partition(":")[0]].peers:
        peer = {"peer": BUDGET["student"], "criterion": (host,)}
        return {"X": {**peer, "method": "none"}, "MAG+X": {**peer, "method": "mag"}}
    both = {"criterion": (host,), "fitting_epochs": 2}
    taught = {**both, "teacher": "embedded"}  # selfkd has none by default
    return {
        "X": {**both, "method": "none", "kd_weight": 0.0},
        "X+KD": {**taught, "method": "none", "kd_weight": 1.0},
        "MAS+X": {**taught, "method": "mas", "kd_weight": 1.0},
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A line per host: mean top-1 of its arms, and what MAS adds to the host with KD, seed by seed."""
    found: dict[tuple[str, str], dict[int, float]] = {}
    for row in rows:
        found.setdefault((row["host"], row["arm"]), {})
        if row["top1"] is not None:
            found[row["host"], row["arm"]][row["seed"]] = row["top1"]

    def cell(host: str, *names: str) -> str:
        values = next((found[host, name] for name in names if (host, name) in found), None)
        return "" if values is None else spread(list(values.values())) or "diverged"

    cells = []
    for host in [host for host in HOSTS if any(row["host"] == host for row in rows)]:
        base = found.get((host, "KD" if host == "kd" else "X" if host == "dml" else "X+KD"), {})
        top = next((found[host, name] for name in ("MAS+X", "MAS+KD", "MAG+X") if (host, name) in found), {})
        arms_of_host = [cell(host, "alone", "X"), cell(host, "X+KD", "KD"), cell(host, "MAS+X", "MAS+KD", "MAG+X")]
        cells.append([host, *arms_of_host, spread(gains(top, base), "+")])
    return markdown(["host", "X top-1 %", "X+KD", "MAS+X (dml: MAG+X)", "MAS adds to X+KD (dml: MAG to X)"], cells)


def section() -> str:
    """The table of docs/results.md."""
    rows = read_rows(FILE)
    seeds, epochs = {row["seed"] for row in rows}, {row["epochs"] for row in rows}
    return (
        f"{table(rows)}\n\nFashion-MNIST, {int(rows[0]['n_test']):,} test images, cifar_resnet8x05 after {min(epochs)} "
        f"epochs from the embedded ResNet-20; mean ± standard deviation over {len(seeds)} seeds, without those that "
        f"diverged. `benchmarks/hosts.py`; {about(*rows)}."
    )


def run_arm(options: dict[str, Any]) -> dict[str, Any]:
    """Train a student; what a row holds of it."""
    row: dict[str, Any] = {"top1": None, "seconds": None}
    made_by = provenance()
    recipe = make_recipe(**options)
    try:
        summary = run(recipe).summary
        row |= {"top1": summary["top1"], "seconds": summary["seconds"], "n_test": summary["last"]["n"]}
    except NonFiniteError as error:
        print(f"diverged: {error}")
    return row | made_by


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
    for seed in args.seeds:
        for host in args.hosts:
            for arm, options in arms(host).items():
                key = {"host": host, "arm": arm, "seed": seed, "epochs": args.epochs}
                if has_row(args.results, key):
                    continue
                print(f"\n== {host}: {arm}, seed {seed}", flush=True)
                folder = args.output / f"{host}-{arm}-{seed}"
                shutil.rmtree(folder, ignore_errors=True)
                given = BUDGET | {"epochs": args.epochs, "seed": seed, "output": str(folder)} | options
                append_rows(args.results, [key | run_arm(given)])
                shutil.rmtree(folder)
    print("\n" + table(read_rows(args.results)))


if __name__ == "__main__":
    main()
