"""The main job on the embedded data: one small student trained four ways at the same budget, compared, exported and
loaded back.

    make demo                              one seed, two and a half minutes on 2 cores
    python benchmarks/demo.py --seeds 5    mean and spread, written to benchmarks/results/demo.json

The teacher (ResNet-20) saw all 60,000 images of Fashion-MNIST's training set; the students see 10,000 of them, so the
teacher knows something that the labels do not say.
"""

import argparse
import json
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

ARMS: dict[str, dict[str, Any]] = {
    "alone": {"teacher": None, "method": "none"},
    "KD": {"method": "none"},
    "MAG+KD": {"method": "mag"},
    "MAS+KD": {"method": "mas"},
}
BUDGET: dict[str, Any] = {
    "student": "cifar_resnet8x05",
    "epochs": 8,
    "lr": 0.1,
    "batch_size": 64,
    "pad": 2,
    "channels_last": True,
}
RESULTS = Path(__file__).parent / "results" / "demo.json"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1, help="how many; 2 or more write benchmarks/results/demo.json")
    parser.add_argument("--epochs", type=int, default=BUDGET["epochs"])
    parser.add_argument("--output", type=Path, default=Path("runs/demo"))
    return parser.parse_args()


def main() -> None:
    args = parse()
    start = time.monotonic()
    print("mgd_timm demo: Fashion-MNIST (10,000 training and 4,000 test images, in the package), no network needed")
    from report import draw_curves, provenance

    from mgd_timm.pipeline.run import run
    from mgd_timm.recipe.recipe import make_recipe

    made_by = provenance()

    shutil.rmtree(args.output, ignore_errors=True)
    found: dict[str, list[Any]] = {name: [] for name in ARMS}
    folders: dict[str, list[Path]] = {name: [] for name in ARMS}
    for seed in range(args.seeds):
        for name, options in ARMS.items():
            print(f"\n== {name}, seed {seed}")
            folder = args.output / f"{name.lower().replace('+', '_')}_{seed}"
            recipe = make_recipe(**BUDGET | {"epochs": args.epochs} | options, seed=seed, output=str(folder))
            found[name].append(run(recipe))
            folders[name].append(folder)
    teacher = found["KD"][0].summary["teacher_top1"]
    text = table(found, teacher)
    print("\n" + text)
    picture = args.output / "curves.png"
    draw_curves(
        folders, picture, title="cifar_resnet8x05 on 10,000 images of Fashion-MNIST", level=("teacher", teacher)
    )
    print(f"\ncurves: {picture}")
    load_back(found, folders, args.output)
    if args.seeds > 1:
        write(found, teacher, text, made_by, args)
    print(f"{time.monotonic() - start:.0f} s in all")


def table(found: dict[str, list[Any]], teacher: float) -> str:
    """Accuracy, size and cost of the teacher and each student, and what students gain."""
    from report import macs, markdown, spread

    from mgd_timm.models.load import load_model

    def cost(model: Any) -> list[str]:
        parameters = sum(p.numel() for p in model.parameters())
        size = sum(t.numel() * t.element_size() for t in model.state_dict().values())
        return [f"{parameters:,}", f"{macs(model, (3, 28, 28)) / 1e6:.2f} M", f"{size:,}"]

    top1 = {name: [r.summary["top1"] for r in results] for name, results in found.items()}
    means = {name: statistics.fmean(values) for name, values in top1.items()}
    rows = [["teacher (ResNet-20)", f"{teacher:.2f}", *cost(load_model("embedded")), "", ""]]
    for name, results in found.items():
        gained = [f"{means[name] - means[base]:+.2f}" if name != base else "" for base in ("alone", "KD")]
        rows.append([name, spread(top1[name]), *cost(results[0].student), *gained])
    header = ["student cifar_resnet8x05", "top-1 %", "parameters", "MACs", "bytes", "over alone", "over KD"]
    return markdown(header, rows)


def load_back(found: dict[str, list[Any]], folders: dict[str, list[Path]], output: Path) -> None:
    """Export the best student, load it as any timm user would, and measure it again."""
    import timm

    from mgd_timm.api import evaluate
    from mgd_timm.export.timm_folder import export_model

    name, index = max(
        ((n, i) for n, rs in found.items() for i in range(len(rs))), key=lambda at: found[at[0]][at[1]].summary["top1"]
    )
    best, before = found[name][index].student, found[name][index].summary["top1"]
    place = export_model(best, output / "student", provenance={"run": folders[name][index].name})
    model = timm.create_model(f"local-dir:{place}", pretrained=True)
    after = evaluate(model)["top1"]
    print(f"best student ({name}): {place}")
    same = "the same" if after == before else "NOT the same"
    print(
        f"timm.create_model('local-dir:{place}', pretrained=True): top-1 {after:.2f} %, trained {before:.2f} %: {same}"
    )
    if after != before:
        raise SystemExit(1)


def write(
    found: dict[str, list[Any]], teacher: float, text: str, made_by: dict[str, Any], args: argparse.Namespace
) -> None:
    """Write benchmarks/results/demo.json."""
    from report import write_json

    arms = {
        name: {
            "last_top1": [r.summary["top1"] for r in results],
            "best_top1": [r.summary["best_top1"] for r in results],
            "seconds": [r.summary["seconds"] for r in results],
        }
        for name, results in found.items()
    }
    body = {
        "what": "python benchmarks/demo.py",
        "seeds": list(range(args.seeds)),
        "n_test": int(found["alone"][0].summary["last"]["n"]),
        "budget": {**BUDGET, "epochs": args.epochs},
        "teacher_top1": teacher,
        "heads": [r.summary["heads"] for r in found["MAS+KD"]],
        "arms": arms,
        "table": text,
    }
    write_json(RESULTS, body | made_by)
    print(f"wrote {RESULTS}")


def section() -> str:
    """The table of docs/results.md."""
    from report import about

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
