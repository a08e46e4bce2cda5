"""The ten related systems beside KD, MAG and MAS on CIFAR-100: what each gives, and what it costs.

    python benchmarks/related.py --data-dir cifar100                        cifar_resnet20 teaches cifar_resnet8
    python benchmarks/related.py --data-dir cifar100 --arms KD sskd --seeds 0    some of them
    python benchmarks/related.py --data-dir cifar100 --images 10000         the students see 10,000 of the images
    python benchmarks/related.py --data-dir cifar100 --teacher cifar_resnet32x4 --student cifar_resnet8x4 \\
        --epochs 240 --teacher-epochs 240                                   the paper's pair, at full length: a GPU

Each method has its own default weights, without KD beside it unless it brings it. The teachers are trained here once:
the teacher with snapshots of its training, a weaker one that teaches first in the sequence, and the teacher fine-tuned
for the student. A student's cost is the time of its training beside that of KD of the same seed, without what is fitted
or trained before it. Every finished cell is one line of the results; what is there is not done again. Writes
benchmarks/results/related.jsonl.
"""

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from datasets import load_dataset
from report import RESULTS, about, append_rows, gains, has_row, markdown, provenance, read_rows, spread

import mgd_timm
from mgd_timm.models.load import find_weights_folder
from mgd_timm.pipeline import cifar_stages as cifar
from mgd_timm.pipeline.run import run
from mgd_timm.recipe import presets
from mgd_timm.recipe.recipe import make_recipe
from mgd_timm.training.report import NonFiniteError

FILE = RESULTS / "related.jsonl"
WITH_HEADS = ("MAG+KD", "MAS+KD", "sskd")
SNAPSHOTS = 10
WATCHED = 500
_FITNET = {"criterion": ("fitnet",), "criterion_options": ("fitnet.adapter=false",)}
ARMS: dict[str, dict[str, Any]] = {
    "alone": {"teacher": None},
    "KD": {},
    "MAG+KD": {"method": "mag"},
    "MAS+KD": {"method": "mas"},
    "entropy": {"sample_weight": "entropy"},
    "entropy, peer": {"sample_weight": "entropy", "criterion": ("kd", "dml"), "peer": "STUDENT"},
    "bdd": {"criterion_options": ("kd.divergence=bdd",)},
    "sequence": {"teacher": ("WEAKER", "TEACHER"), "teachers_as": "sequence"},
    "trajectory": {"teacher": None, "teacher_trajectory": "TEACHER"},
    "krnet": {"criterion": ("krnet",)},
    "selfkd": {"teacher": None, "criterion": ("selfkd",)},
    "selfkd, byot": {"teacher": None, "criterion": ("selfkd",), "criterion_options": ("selfkd.form=byot",)},
    "fitnet, no adapter": _FITNET,
    "fitnet, matched": {**_FITNET, "match_channels": 1000},
    "ekd": {"teacher": None, "criterion": ("ekd",), "peer": "UNTRAINED"},
    "for the student": {"teacher": ("FRIENDLY",)},
    "sskd": {"criterion": ("sskd",)},
}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", required=True, help="folder of CIFAR-100 or CIFAR-10")
    parser.add_argument("--teacher", default="cifar_resnet20")
    parser.add_argument("--weaker", default="cifar_resnet14", help="the first teacher of the sequence")
    parser.add_argument("--student", default="cifar_resnet8")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--teacher-epochs", type=int, default=60)
    parser.add_argument("--images", type=int, help="for students and the heads; default: all")
    parser.add_argument("--fitting-epochs", type=int, default=10, help="of the teacher that is tuned for the student")
    parser.add_argument(
        "--heads-epochs", type=int, default=60, help="of granularity heads and SSKD's; few images: more"
    )
    parser.add_argument("--amp", action="store_true", help="bfloat16")
    parser.add_argument("--results", type=Path, default=FILE)
    parser.add_argument("--output", type=Path, default=Path("runs/related"))
    return parser.parse_args(arguments)


def data_of_students(args: argparse.Namespace) -> str:
    """The folder of the students' images: the data, or a random part of its training split, and 500 more to watch."""
    if args.images is None:
        return args.data_dir
    folder = args.output / f"images-{args.images}"
    if not folder.exists():
        folder.mkdir(parents=True)
        source = str(Path(args.data_dir) / "train.parquet")
        images = load_dataset("parquet", data_files=source, split="train").shuffle(seed=0)
        images.select(range(args.images)).to_parquet(str(folder / "train.parquet"))
        images.select(range(args.images, args.images + WATCHED)).to_parquet(str(folder / "val.parquet"))
    return str(folder)


def options_of(args: argparse.Namespace, data: str, network: str, epochs: int, classes: int) -> dict[str, Any]:
    """Options of the CIFAR protocol for a network."""
    shared = {"data_dir": data, "amp": args.amp, "channels_last": True}
    return presets.training_options(network, epochs, classes=classes) | shared


def teachers_of(args: argparse.Namespace, arms: Sequence[str], classes: int) -> dict[str, str]:
    """The folders of the teachers that the arms name, trained where they are missing."""
    named = {word for arm in arms for word in _words(ARMS[arm].get("teacher", ("TEACHER",)))}
    named |= {"TEACHER"} if any("teacher_trajectory" in ARMS[arm] for arm in arms) or "FRIENDLY" in named else set()
    found = {}
    if "TEACHER" in named:
        options = options_of(args, args.data_dir, args.teacher, args.teacher_epochs, classes)
        kept = {"keep_checkpoints": min(SNAPSHOTS, args.teacher_epochs), "seed": 1}
        found["TEACHER"] = str(cifar.teacher_stage(args.output, args.teacher, options | kept))
    if "WEAKER" in named:
        options = options_of(args, args.data_dir, args.weaker, args.teacher_epochs, classes) | {"seed": 1}
        found["WEAKER"] = str(cifar.teacher_stage(args.output, args.weaker, options))
    if "FRIENDLY" in named:
        weights = find_weights_folder(found["TEACHER"])
        assert weights is not None
        options = options_of(args, args.data_dir, args.teacher, args.fitting_epochs, classes) | {"lr": 0.01, "seed": 1}
        options |= {"for_student": args.student, "student_checkpoint": str(weights / "model.safetensors")}
        found["FRIENDLY"] = str(cifar.teacher_stage(args.output, args.teacher, options))
    return found


def _words(teacher: Sequence[str] | None) -> Sequence[str]:
    return teacher or ()


def student_options(
    args: argparse.Namespace, arm: str, seed: int, teachers: dict[str, str], classes: int
) -> dict[str, Any]:
    """Options of one student's run."""
    names = teachers | {"STUDENT": args.student, "UNTRAINED": args.teacher}
    options = {"teacher": ("TEACHER",), "criterion": ("kd",), "method": "none"} | ARMS[arm]
    if options["teacher"] is not None:
        options["teacher"] = tuple(names[word] for word in options["teacher"])
    for name in ("peer", "teacher_trajectory"):
        if name in options:
            options[name] = names[options[name]]
    if arm == "trajectory":
        del options["teacher"]  # the trajectory's run is the teacher
    if arm == "sequence":
        options["teacher_epochs"] = (args.epochs // 2, args.epochs - args.epochs // 2)
    heads = {"heads_epochs": args.heads_epochs, "fitting_epochs": args.heads_epochs, "maps": "mid"}
    shared = options_of(args, data_of_students(args), args.student, args.epochs, classes)
    return shared | heads | {"student": args.student, "seed": seed} | options


def run_cell(options: dict[str, Any], data: str) -> dict[str, Any]:
    """Train a student, and evaluate it on the test images; what a row holds of it."""
    row: dict[str, Any] = {"top1": None, "seconds": None}
    made_by = provenance()
    try:
        summary = run(make_recipe(**options)).summary
    except NonFiniteError as error:
        print(f"diverged: {error}")
        return row | made_by
    folder = Path(options["output"])
    found = mgd_timm.evaluate(folder / "export", data)
    row |= {"top1": found["top1"], "n_test": found["n"], "seconds": summary["seconds"]}
    if "peer" in summary:
        row["peer_top1"] = mgd_timm.evaluate(folder / "export_peer", data)["top1"]
    return row | made_by


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A line per arm: top-1, gains over the student alone and over KD seed by seed, and the time beside KD's."""
    top1: dict[str, dict[int, float]] = {}
    seconds: dict[str, dict[int, float]] = {}
    for row in rows:
        if row["top1"] is not None:
            top1.setdefault(row["arm"], {})[row["seed"]] = row["top1"]
            seconds.setdefault(row["arm"], {})[row["seed"]] = row["seconds"]
    cells = []
    for arm in (arm for arm in ARMS if any(row["arm"] == arm for row in rows)):
        own, kd = seconds.get(arm, {}), seconds.get("KD", {})
        times = [own[seed] / kd[seed] for seed in sorted(set(own) & set(kd))]
        gained = [spread(gains(top1.get(arm, {}), top1.get(base, {})), "+") if base != arm else "" for base in _BASES]
        values = list(top1.get(arm, {}).values())
        cost = f"{median(times):.2f}" if times else ""
        cells.append([arm, spread(values) or "diverged", *gained, cost, str(len(values))])
    return markdown(["arm", "top-1 %", "over alone", "over KD", "time / KD's", "seeds"], cells)


_BASES = ("alone", "KD")


def section() -> str:
    """The table of docs/results.md."""
    rows = read_rows(FILE)
    first = rows[0]
    tops = {row["teacher_top1"] for row in rows if row["arm"] == "KD"}
    taught = f"{first['teacher']} ({', '.join(f'{top:.2f}' for top in sorted(tops))} %) -> {first['student']}"
    seen = "all" if first["images"] is None else f"{first['images']:,}"
    return (
        f"{taught}, {first['epochs']} epochs of {seen} training images\n\n{table(rows)}\n\nCIFAR-100, top-1 on "
        f"{int(first['n_test']):,} test images after the last epoch; the teachers were trained on all training images "
        f"for {first['teacher_epochs']} epochs; mean ± standard deviation over seeds, gains seed by seed; median of "
        "training times beside that of KD with the same seed, two runs at a time. "
        f"`benchmarks/related.py`; {about(*rows)}."
    )


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
    classes = cifar.images_of(make_recipe(data_dir=args.data_dir)).num_classes
    teachers = teachers_of(args, args.arms, classes)
    top1 = mgd_timm.evaluate(teachers["TEACHER"], args.data_dir)["top1"] if "TEACHER" in teachers else None
    for seed in args.seeds:
        for arm in args.arms:
            key: dict[str, Any] = {"arm": arm, "seed": seed, "teacher": args.teacher, "student": args.student}
            key |= {"epochs": args.epochs, "teacher_epochs": args.teacher_epochs, "images": args.images}
            key |= {"heads_epochs": args.heads_epochs} if arm in WITH_HEADS else {}
            key |= {"fitting_epochs": args.fitting_epochs} if arm == "for the student" else {}
            if has_row(args.results, key):
                continue
            print(f"\n== {arm}, seed {seed}", flush=True)
            folder = args.output / f"{arm.replace(', ', '-').replace(' ', '-')}-{seed}"
            shutil.rmtree(folder, ignore_errors=True)
            options = student_options(args, arm, seed, teachers, classes) | {"output": str(folder)}
            append_rows(args.results, [key | {"teacher_top1": top1} | run_cell(options, args.data_dir)])
            shutil.rmtree(folder)
    print("\n" + table(read_rows(args.results)))


if __name__ == "__main__":
    main()
