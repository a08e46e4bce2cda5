"""The paper's grid on CIFAR: what KD, MAG and MAS each add to a host method, the effects kept apart.

    python benchmarks/cifar.py --data-dir cifar100 --pair resnet32x4-resnet8x4 --seeds 0 1 2      full length: for a GPU
    python benchmarks/cifar.py --data-dir cifar100 --pair resnet56-resnet20 --student cifar_resnet8 --epochs 8
    --teacher-epochs 15 python benchmarks/cifar.py --quick                                                      embedded
    data, minutes on two cores

For every host X the arms are X, X+KD, MAG+X and MAS+X, of which the last two hold KD as well (as in the authors'
scripts); for X = KD they are KD, MAG+KD and MAS+KD. All students of a seed start from the same weights, see the same
batches and learn from one pass of the teacher; each ends with the weights that `mgd-timm distill` gives it alone. Every
finished cell is one line of the results; what is there is not done again, and an interrupted pass goes on from its last
epoch.
"""

import argparse
import contextlib
import json
import statistics
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from report import machine, markdown, read_metrics
from torch import Tensor, nn

from mgd_timm.data.dataset import load_images
from mgd_timm.data.sources import Source
from mgd_timm.distiller import Teacher
from mgd_timm.features import Batch, Features, FeatureTap
from mgd_timm.models.load import load_model
from mgd_timm.pipeline import cifar_stages as cifar
from mgd_timm.pipeline.connect import connect, find_defaults, finish_teachers
from mgd_timm.pipeline.plan import accelerator_of, context_of, fix_global_batch, terms_of
from mgd_timm.recipe import presets
from mgd_timm.recipe.options import as_dict, digest
from mgd_timm.recipe.recipe import Recipe, make_recipe
from mgd_timm.storage.digests import module_digest
from mgd_timm.storage.versions import versions
from mgd_timm.teachers.heads import fit_heads
from mgd_timm.training.evaluation import Metrics, evaluate, evaluate_taps
from mgd_timm.training.loop import fit
from mgd_timm.training.noise import pixel_noise
from mgd_timm.training.options import FitOptions

HERE = Path(__file__).parent
PUBLISHED: dict[str, Any] = json.loads((HERE / "published.json").read_text())
# Hosts without a fitting stage, class activation maps or a peer, which a pass does not know.
TITLES = {
    "kd": "KD",
    "fitnet": "FitNet",
    "at": "AT",
    "sp": "SP",
    "vid": "VID",
    "rkd": "RKD",
    "crd": "CRD",
    "afd": "AFD",
}
DISTINCT = ("pair", "teacher", "teacher_sha256", "student", "arm", "seed", "recipe", "data_sha256")
"""What tells one cell from another."""
ALIKE = ("pair", "teacher", "teacher_sha256", "student", "data_sha256", "epochs", "precision")
"""What rows of one table have in common."""


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", nargs="+", default=["resnet32x4-resnet8x4"], help=", ".join(presets.PAIRS))
    parser.add_argument("--teacher", help="run or export folder of the teacher, instead of training the pair's")
    parser.add_argument("--student", help="another student than the pair's")
    parser.add_argument("--hosts", nargs="+", default=["kd", "fitnet", "at"], choices=list(TITLES))
    parser.add_argument("--arms", nargs="+", help="only these, as the table names them: alone KD MAG+KD ...")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=presets.EPOCHS)
    parser.add_argument("--teacher-epochs", type=int, default=presets.EPOCHS)
    parser.add_argument("--heads-epochs", type=int, default=presets.HEADS_EPOCHS)
    parser.add_argument("--heads-protocol", choices=["live", "stored"], default="live")
    parser.add_argument("--data-dir", help="folder of CIFAR-100 or CIFAR-10")
    parser.add_argument("--dataset", default="uoft-cs/cifar100", help="hub id, where there is no --data-dir")
    parser.add_argument(
        "--students-per-pass", type=int, default=100, help="how many learn from one pass of the teacher"
    )
    parser.add_argument(
        "--noise", nargs="*", type=float, default=[0.02, 0.05, 0.1], help="standard deviations, see mgd-timm evaluate"
    )
    parser.add_argument("--noise-seeds", type=int, default=2)
    parser.add_argument("--no-amp", action="store_true", help="float32 instead of bfloat16")
    parser.add_argument("--quick", action="store_true", help="embedded data and teacher, two short seeds")
    parser.add_argument("--output", type=Path, default=Path("runs/cifar"), help="teachers and passes under way")
    parser.add_argument(
        "--results", type=Path, help="default: benchmarks/results/cifar.jsonl; with --quick: in the output folder"
    )
    args = parser.parse_args(arguments)
    if args.quick:
        args.pair, args.teacher, args.student = ["embedded"], "embedded", args.student or "cifar_resnet8x05"
        args.seeds, args.epochs, args.heads_epochs, args.heads_protocol = (
            args.seeds[:2],
            min(args.epochs, 2),
            8,
            "stored",
        )
    else:
        for name in args.pair:
            presets.pair(name)
    args.results = args.results or (args.output / "quick.jsonl" if args.quick else HERE / "results" / "cifar.jsonl")
    return args


def arms(hosts: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Options of every arm; the weights beside them are the presets of the authors' scripts."""
    found: dict[str, dict[str, Any]] = {"alone": {"teacher": None, "method": "none"}}
    for host in hosts:
        title = TITLES[host]
        if host == "kd":
            found["KD"] = {"criterion": ("kd",), "method": "none"}
        else:
            found[title] = {"criterion": (host,), "method": "none"}
            found[f"{title}+KD"] = {"criterion": (host,), "method": "none", "kd_weight": 1.0}
        for method in ("mag", "mas"):
            found[f"{method.upper()}+{title}"] = {"criterion": (host,), "method": method}
    return found


class Cohort(nn.Module):
    """Several distillers that learn from one pass of the teacher: the sum of their losses has each one's own
    gradients."""

    def __init__(self, distillers: dict[str, nn.Module]) -> None:
        super().__init__()
        self.distillers = nn.ModuleDict(distillers)

    def forward(self, batch: Batch, teacher: Features) -> tuple[dict[str, Tensor], Tensor]:
        """Every distiller's terms, and the logits of the last one."""
        terms: dict[str, Tensor] = {}
        for name, distiller in self.distillers.items():
            found, logits = distiller(batch, teacher)
            terms |= {f"{name}/{term}": value for term, value in found.items()}
        return terms, logits


def recipe_of(args: argparse.Namespace, student: str, options: dict[str, Any], seed: int, classes: int) -> Recipe:
    if args.quick:
        shown = {"epochs": args.epochs, "lr": 0.1, "batch_size": 64, "pad": 2}
        heads = {"heads_epochs": args.heads_epochs}
    else:
        shown = (
            presets.training_options(student, args.epochs, classes=classes)
            | presets.distillation_options()
            | data_options(args)
        )
        heads = (
            presets.heads_options(args.heads_epochs)
            if args.heads_protocol == "live"
            else {"heads_epochs": args.heads_epochs}
        )
    return make_recipe(student=student, seed=seed, amp=not args.no_amp, channels_last=True, **shown, **heads, **options)


def data_options(args: argparse.Namespace) -> dict[str, Any]:
    return {"data_dir": args.data_dir} if args.data_dir else {"dataset": args.dataset}


def teacher_of(args: argparse.Namespace, network: str, classes: int) -> str:
    """The teacher's folder: the one that is named, else the one that was trained for its recipe, else it is trained."""
    if args.teacher:
        return str(args.teacher)
    options = presets.training_options(network, args.teacher_epochs, classes=classes) | data_options(args)
    options |= {"seed": 1, "amp": not args.no_amp, "channels_last": True}
    return str(cifar.teacher_stage(args.output, network, options))


def run_pass(
    args: argparse.Namespace, name: str, teacher: str, cells: dict[str, Recipe], seed: int
) -> list[dict[str, Any]]:
    """Train the students of one seed's cells side by side; gives a result for each."""
    running = versions()  # of the code that runs, whatever is committed meanwhile
    first = next(iter(cells.values()))
    accelerator = accelerator_of(first)
    first = fix_global_batch(first, accelerator)
    network = load_model(teacher)
    images = load_images(first.data, seed, find_defaults(first, network, None), log=accelerator.print)
    taps: dict[str, nn.Module] = {}
    distillers: dict[str, nn.Module] = {}
    frozen: Teacher | None = None
    for arm, recipe in cells.items():
        terms = terms_of(recipe)
        networks = connect(recipe, terms, images, accelerator, [network])
        networks = finish_teachers(networks, fold=recipe.fold_teacher, fitted=False)
        taps[arm], distillers[arm] = networks.student, networks.trainee()
        if frozen is None or terms.needs("maps"):  # all arms read the maps of one teacher, whichever of them read maps
            (frozen,) = networks.teachers
    assert frozen is not None
    weights = frozen.digest
    made_of = {arm: as_dict(r, digest_only=True) for arm, r in cells.items()}
    group = digest(
        made_of | {"teacher": weights, "images": [images.train.digest, images.evaluation and images.evaluation.digest]}
    )[:12]
    folder = args.output / f"pass-{name}-{seed}-{group}"
    folder.mkdir(parents=True, exist_ok=True)
    summary: dict[str, Any] = {}
    assert images.evaluation is not None
    watched = images.evaluation
    summary["teacher_top1"] = evaluate_taps({"t": frozen}, watched, accelerator, 256)["t"]["top1"]
    if any(r.method != "none" for r in cells.values()):
        (folder / "for_heads").mkdir(exist_ok=True)
        with_heads = next(r for r in cells.values() if r.method != "none")
        of_heads = make_recipe(**{**flat(with_heads), "output": str(folder / "for_heads"), "resume": True})
        fitted_heads = fit_heads(frozen, of_heads.heads, context_of(of_heads, images, accelerator))
        summary["heads"] = fitted_heads.metrics
        frozen = frozen.with_heads(fitted_heads.heads)
    cohort = Cohort(distillers).to(accelerator.device)
    cohort.to(memory_format=torch.channels_last)

    def watch(_: nn.Module | None) -> Metrics:
        found = evaluate_taps(taps, watched, accelerator, 256)
        return {arm: metrics["top1"] for arm, metrics in found.items()}

    def teach(batch: Batch) -> Features:
        return frozen(batch.images)

    fit_options = FitOptions(folder=folder, fingerprint={"group": group}, resume=True, stage="cohort")
    fitted = fit(
        cohort,
        images.train,
        first.optim,
        accelerator,
        seed=seed,
        batch_size=first.data.batch_size,
        teach=teach,
        evaluate=watch,
        options=fit_options,
    )
    curves = [row["eval"] for row in read_metrics(folder) if row["stage"] == "cohort"]
    common = {
        "teacher_top1": round(summary["teacher_top1"], 2),
        "heads": {k: round(v, 2) for k, v in summary.get("heads", {}).items()},
        "students_in_pass": len(cells),
        "pass_seconds": round(fitted.seconds, 1),
        "n_test": len(watched.ids),
        "machine": machine(),
        "threads": torch.get_num_threads(),
        "precision": str(accelerator.mixed_precision),
        "versions": running,
        "date": datetime.now(UTC).date().isoformat(),
    }
    noisy = under_noise(taps, watched, accelerator, images.std, args.noise, args.noise_seeds)
    rows = []
    for arm, recipe in cells.items():
        curve = [round(metrics[arm], 2) for metrics in curves]
        scores = {
            "last": curve[-1],
            "best": max(curve),
            "best_epoch": 1 + curve.index(max(curve)),
            "epochs": len(curve),
        }
        key = key_of(name, frozen.tap.name, weights, images.train.digest, recipe, arm)
        rows.append({**key, **scores, "noise": noisy[arm], "curve": curve, **common})
    return rows


def under_noise(
    taps: dict[str, nn.Module],
    source: Source,
    accelerator: Accelerator,
    std: Sequence[float],
    sigmas: Sequence[float],
    seeds: int,
) -> dict[str, dict[str, float]]:
    """Top-1 of every student by standard deviation of the noise, mean over noise seeds; all see the same noisy
    images."""
    if not sigmas:
        return {arm: {} for arm in taps}
    scale = 1 / torch.tensor(std, device=accelerator.device)[:, None, None]
    cells = {(arm, sigma, seed): f"{arm} {sigma} {seed}" for arm in taps for sigma in sigmas for seed in range(seeds)}
    for tap in taps.values():
        tap.eval()

    def predict(batch: Batch) -> dict[str, Tensor]:
        shown: dict[str, Tensor] = {}
        for seed in range(seeds):
            drawn = pixel_noise(batch.images, batch.sample_ids, seed) * scale
            for sigma in sigmas:
                images = batch.images + sigma * drawn
                shown |= {cells[arm, sigma, seed]: tap(images).logits for arm, tap in taps.items()}
        return shown

    found = evaluate(predict, tuple(cells.values()), source, accelerator, 256)
    return {
        arm: {
            f"{s:g}": round(statistics.fmean(found[cells[arm, s, seed]]["top1"] for seed in range(seeds)), 2)
            for s in sigmas
        }
        for arm in taps
    }


def run_cells(args: argparse.Namespace, name: str, teacher: str, cells: dict[str, Recipe], seed: int) -> None:
    """One pass; where a GPU's memory does not hold its students, two of half as many."""
    print(f"\n== {name}, seed {seed}: {', '.join(cells)}", flush=True)
    try:
        add_rows(args.results, run_pass(args, name, teacher, cells, seed))
        return
    except torch.cuda.OutOfMemoryError:
        if len(cells) == 1:
            raise
    torch.cuda.empty_cache()
    names = list(cells)
    for part in (names[: len(names) // 2], names[len(names) // 2 :]):
        run_cells(args, name, teacher, {arm: cells[arm] for arm in part}, seed)


def flat(recipe: Recipe) -> dict[str, Any]:
    from mgd_timm.recipe.recipe import flatten

    return flatten(as_dict(recipe))


def key_of(name: str, teacher: str, weights: str, images: str, recipe: Recipe, arm: str) -> dict[str, Any]:
    return {
        "pair": name,
        "teacher": teacher,
        "teacher_sha256": weights,
        "student": recipe.student,
        "arm": arm,
        "seed": recipe.seed,
        "recipe": digest(as_dict(recipe, digest_only=True))[:12],
        "data_sha256": images,
    }


def known_rows(path: Path) -> list[dict[str, Any]]:
    """Finished cells; what an interrupted write left of a line does not count."""
    rows = []
    for line in path.read_text().splitlines() if path.is_file() else ():
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows


def add_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    whole = not path.is_file() or path.read_text().endswith("\n") or not path.stat().st_size
    with path.open("a") as file:
        file.write(("" if whole else "\n") + "".join(json.dumps(row) + "\n" for row in rows))


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Mean and spread by arm, gains paired by seed, and the literature's figures where the pair is the paper's own."""
    out = []
    for alike in dict.fromkeys(tuple(row[key] for key in ALIKE) for row in rows):
        chosen = [row for row in rows if tuple(row[key] for key in ALIKE) == alike]
        name, teacher, student, epochs = (chosen[0][key] for key in ("pair", "teacher", "student", "epochs"))
        by_arm: dict[str, dict[int, dict[str, Any]]] = {}
        for row in chosen:
            by_arm.setdefault(row["arm"], {})[row["seed"]] = row
        cells = []
        known = list(arms(TITLES))
        for arm, found in sorted(by_arm.items(), key=lambda item: known.index(item[0])):
            last = [r["last"] for r in found.values()]
            best = [r["best"] for r in found.values()]
            own_pair = (teacher, student) == presets.PAIRS.get(name)  # figures of the paper's networks only
            paper, other = (
                PUBLISHED[key]["top1"].get(arm, {}).get(name) if own_pair else None for key in ("paper", "repdistiller")
            )
            gains = [gain(found, by_arm.get(base, {})) for base in ("alone", control(arm))]
            figures = [f"{paper:.2f}" if paper else "", f"{other:.2f}" if other else ""]
            cells.append([arm, spread(last), spread(best), *gains, str(len(last)), *figures])
        tops = sorted({r["teacher_top1"] for r in chosen})
        title = f"{teacher} ({', '.join(f'{t:.2f}' for t in tops)} %) -> {student}, {epochs} epochs"
        header = [
            "arm",
            "last top-1 %",
            "best top-1 %",
            "over alone",
            "over its control",
            "seeds",
            "paper",
            "RepDistiller",
        ]
        out.append(f"{title}\n\n{markdown(header, cells)}")
    return "\n\n".join(out)


def noise_table(rows: Sequence[dict[str, Any]]) -> str:
    """Mean and spread of top-1 under noise by arm, of the same students as in `table`."""
    known = list(arms(TITLES))
    out = []
    for alike in dict.fromkeys(tuple(row[key] for key in ALIKE) for row in rows if row.get("noise")):
        chosen = [row for row in rows if tuple(row[key] for key in ALIKE) == alike and row.get("noise")]
        sigmas = sorted({sigma for row in chosen for sigma in row["noise"]}, key=float)
        by_arm: dict[str, list[dict[str, float]]] = {}
        for row in chosen:
            by_arm.setdefault(row["arm"], []).append({"0": row["last"], **row["noise"]})
        cells = [
            [arm, *(spread([found[sigma] for found in by_arm[arm] if sigma in found]) for sigma in ["0", *sigmas])]
            for arm in sorted(by_arm, key=known.index)
        ]
        title = f"{chosen[0]['teacher']} -> {chosen[0]['student']}, top-1 % under Gaussian noise of standard deviation"
        out.append(f"{title}\n\n{markdown(['arm', '0', *sigmas], cells)}")
    return "\n\n".join(out)


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Every student a dot and every arm's mean a line, as a PNG: how large the effects are beside the spread of
    seeds."""
    from matplotlib.figure import Figure

    known = list(arms(TITLES))
    colours = {"MAG": "#E69F00", "MAS": "#D55E00", "KD": "#0072B2", "": "#000000"}
    groups = list(dict.fromkeys(tuple(row[key] for key in ALIKE) for row in rows))
    figure: Any = Figure(figsize=(8, 0.6 + 3.6 * len(groups)), layout="constrained")
    for axis, alike in zip(figure.subplots(len(groups), squeeze=False)[:, 0], groups, strict=True):
        chosen = [row for row in rows if tuple(row[key] for key in ALIKE) == alike]
        names = sorted({row["arm"] for row in chosen}, key=known.index)
        for place, arm in enumerate(names):
            values = [row["last"] for row in chosen if row["arm"] == arm]
            kind = arm[:3] if arm[:3] in colours else "KD" if arm.endswith("KD") else ""
            axis.plot(values, [place] * len(values), "o", color=colours[kind], markersize=5, alpha=0.7)
            axis.plot([statistics.fmean(values)] * 2, [place - 0.3, place + 0.3], color=colours[kind], linewidth=2)
        axis.set_yticks(range(len(names)), names)
        axis.invert_yaxis()
        first = chosen[0]
        axis.set_title(
            f"{first['teacher']} ({first['teacher_top1']:.1f} %) teaches {first['student']}, {first['epochs']} epochs"
        )
        axis.set_xlabel("top-1 (%) on test images after the last epoch; a dot is a seed, a line the mean")
        axis.grid(axis="x", alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def control(arm: str) -> str:
    """The arm that differs from this one by MAG or MAS alone: the host with KD."""
    host = arm.partition("+")[2]
    if not arm.startswith(("MAG", "MAS")):
        return ""
    return host if host == "KD" else f"{host}+KD"


def spread(values: Sequence[float]) -> str:
    return f"{statistics.fmean(values):.2f}" + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")


def gain(found: dict[int, dict[str, Any]], base: dict[int, dict[str, Any]]) -> str:
    """Mean and spread of the differences between last accuracies of the same seed."""
    both = sorted(set(found) & set(base))
    differences = [found[seed]["last"] - base[seed]["last"] for seed in both]
    if not differences or found is base:
        return ""
    text = f"{statistics.fmean(differences):+.2f}"
    return text + (f" ± {statistics.stdev(differences):.2f}" if len(differences) > 1 else "")


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
    args.results.parent.mkdir(parents=True, exist_ok=True)
    classes = 10 if args.quick else cifar.images_of(make_recipe(**data_options(args))).num_classes
    for name in args.pair:
        network, student = ("embedded", "") if args.quick else presets.pair(name)
        student = args.student or student
        teacher = teacher_of(args, network, classes)
        module = load_model(teacher)
        architecture, weights = FeatureTap(module).name, module_digest(module)
        for seed in args.seeds:
            recipes = {
                arm: recipe_of(args, student, options, seed, classes)
                for arm, options in arms(args.hosts).items()
                if not args.arms or arm in args.arms
            }
            images = cifar.images_of(next(iter(recipes.values()))).train.digest
            done = [{k: row[k] for k in DISTINCT} for row in known_rows(args.results)]
            open_cells = {
                arm: r for arm, r in recipes.items() if key_of(name, architecture, weights, images, r, arm) not in done
            }
            names = list(open_cells)
            for start in range(0, len(names), args.students_per_pass):
                chosen = {arm: open_cells[arm] for arm in names[start : start + args.students_per_pass]}
                run_cells(args, name, teacher, chosen, seed)
    print("\n" + table(known_rows(args.results)))
    print("\n" + noise_table(known_rows(args.results)))
    draw(known_rows(args.results), args.results.with_suffix(".png"))
    print(f"\nresults: {args.results}; picture: {args.results.with_suffix('.png')}")


if __name__ == "__main__":
    main()
