"""The paper's grid on CIFAR: what KD, MAG and MAS each add to a host method, the effects kept apart.

    python benchmarks/cifar.py --data-dir cifar100 --pair resnet32x4-resnet8x4 --seeds 0 1 2    full length: for a GPU
    python benchmarks/cifar.py --data-dir cifar100 --pair resnet56-resnet20 --student cifar_resnet8 --epochs 6 \\
        --teacher-epochs 15
    python benchmarks/cifar.py --quick    embedded data, minutes on two cores

For every host X the arms are X, X+KD, MAG+X and MAS+X, of which the last two hold KD as well (as in the authors'
scripts); for X = KD they are KD, MAG+KD and MAS+KD. All students of a seed start from the same weights, see the same
batches and learn from one pass of the teacher; each ends with the weights that `mgd-timm distill` gives it alone. Every
finished cell is one line of the results; what is there is not done again, and an interrupted pass goes on from its last
epoch.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from cifar_tables import FILE, ORDER, TITLES, arms, draw, noise_table, table
from report import append_rows, provenance, read_metrics, read_rows
from torch import Tensor, nn

from mgd_timm.data.dataset import Images, load_images
from mgd_timm.distiller import LiveTeachers, Teacher
from mgd_timm.features import Batch, Features, FeatureTap
from mgd_timm.models.load import load_model
from mgd_timm.pipeline import cifar_stages as cifar
from mgd_timm.pipeline.connect import Networks, connect, find_defaults, finish_teachers
from mgd_timm.pipeline.plan import accelerator_of, context_of, fix_global_batch, terms_of
from mgd_timm.recipe import presets
from mgd_timm.recipe.options import as_dict, digest
from mgd_timm.recipe.recipe import Recipe, make_recipe
from mgd_timm.storage.digests import module_digest
from mgd_timm.teachers.heads import fit_heads
from mgd_timm.training.evaluation import Metrics, evaluate_taps
from mgd_timm.training.loop import Fitted, fit
from mgd_timm.training.noise import evaluate_noise
from mgd_timm.training.options import FitOptions

DISTINCT = ("pair", "teacher", "teacher_sha256", "student", "arm", "seed", "recipe", "data_sha256")
"""What tells one cell from another."""


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", nargs="+", default=["resnet32x4-resnet8x4"], help=", ".join(presets.PAIRS))
    parser.add_argument("--teacher", help="run or export folder of the teacher, instead of training the pair's")
    parser.add_argument("--student", help="another student than the pair's")
    parser.add_argument("--hosts", nargs="+", default=["kd", "fitnet", "at"], choices=list(TITLES))
    parser.add_argument("--arms", nargs="+", choices=ORDER, help="only these, as the table names them")
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
    args.results = args.results or (args.output / "quick.jsonl" if args.quick else FILE)
    return args


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
    made_by = provenance()
    first = next(iter(cells.values()))
    accelerator = accelerator_of(first)
    first = fix_global_batch(first, accelerator)
    model = load_model(teacher)
    images = load_images(first.data, seed, find_defaults(first, model, None), log=accelerator.print)
    assert images.evaluation is not None
    networks = {arm: connect_cell(recipe, images, accelerator, model) for arm, recipe in cells.items()}
    # All arms read the maps of one teacher, whichever of them read maps.
    arm_with_maps = next((arm for arm in cells if terms_of(cells[arm]).needs("maps")), next(iter(cells)))
    (frozen,) = networks[arm_with_maps].teachers
    made_of: dict[str, Any] = {arm: as_dict(recipe, digest_only=True) for arm, recipe in cells.items()}
    made_of |= {"teacher": frozen.digest, "images": [images.train.digest, images.evaluation.digest]}
    group = digest(made_of)[:12]
    folder = args.output / f"pass-{name}-{seed}-{group}"
    folder.mkdir(parents=True, exist_ok=True)
    teacher_top1 = evaluate_taps({"t": frozen}, images.evaluation, accelerator, 256)["t"]["top1"]
    taught_by, heads = with_heads(frozen, cells, images, accelerator, folder)
    fit_options = FitOptions(folder=folder, fingerprint={"group": group}, resume=True, stage="cohort")
    fitted = train_cohort(networks, taught_by, first, images, accelerator, fit_options)
    curves = [row["eval"] for row in read_metrics(folder) if row["stage"] == "cohort"]
    given: dict[str, Any] = {"std": images.std, "noise": args.noise, "seeds": args.noise_seeds}
    common = {
        "teacher_top1": round(teacher_top1, 2),
        "heads": {name: round(value, 2) for name, value in heads.items()},
        "command": shlex.join(["python", *sys.argv]),
        "students_in_pass": len(cells),
        "pass_seconds": round(fitted.seconds, 1),
        "n_test": len(images.evaluation.ids),
        "precision": str(accelerator.mixed_precision),
        **made_by,
    }
    rows = []
    for arm, recipe in cells.items():
        curve = [round(metrics[arm], 2) for metrics in curves]
        best = max(curve)
        scores = {"last": curve[-1], "best": best, "best_epoch": 1 + curve.index(best), "epochs": len(curve)}
        _, noisy = evaluate_noise(networks[arm].student.model, images.evaluation, accelerator, 256, **given)
        noise = {sigma: round(metrics["top1"], 2) for sigma, metrics in noisy.items()}
        key = key_of(name, frozen.tap.name, frozen.digest, images.train.digest, recipe, arm)
        rows.append({**key, **scores, "noise": noise, "curve": curve, **common})
    return rows


def connect_cell(recipe: Recipe, images: Images, accelerator: Accelerator, teacher: nn.Module) -> Networks:
    """The networks of one student's run."""
    networks = connect(recipe, terms_of(recipe), images, accelerator, [teacher])
    return finish_teachers(networks, fold=recipe.fold_teacher, fitted=False)


def with_heads(
    teacher: Teacher, cells: dict[str, Recipe], images: Images, accelerator: Accelerator, folder: Path
) -> tuple[Teacher, Metrics]:
    """The teacher with the heads that its students need, fitted once for all, and the heads' metrics."""
    recipe = next((recipe for recipe in cells.values() if recipe.method != "none"), None)
    if recipe is None:
        return teacher, {}
    (folder / "for_heads").mkdir(exist_ok=True)
    recipe = replace(recipe, output=str(folder / "for_heads"), resume=True)
    fitted = fit_heads(teacher, recipe.heads, context_of(recipe, images, accelerator))
    return teacher.with_heads(fitted.heads), fitted.metrics


def train_cohort(
    networks: dict[str, Networks],
    teacher: Teacher,
    recipe: Recipe,
    images: Images,
    accelerator: Accelerator,
    fit_options: FitOptions,
) -> Fitted:
    """Train all students on the same batches and outputs of the teacher."""
    cohort = Cohort({arm: connected.trainee() for arm, connected in networks.items()}).to(accelerator.device)
    cohort.to(memory_format=torch.channels_last)
    taps: dict[str, nn.Module] = {arm: connected.student for arm, connected in networks.items()}
    assert images.evaluation is not None
    evaluation = images.evaluation

    def watch(_: nn.Module | None) -> Metrics:
        found = evaluate_taps(taps, evaluation, accelerator, 256)
        return {arm: metrics["top1"] for arm, metrics in found.items()}

    return fit(
        cohort,
        images.train,
        recipe.optim,
        accelerator,
        teach=LiveTeachers(teacher),
        evaluate=watch,
        options=fit_options,
        seed=recipe.seed,
        batch_size=recipe.data.batch_size,
    )


def run_cells(args: argparse.Namespace, name: str, teacher: str, cells: dict[str, Recipe], seed: int) -> None:
    """One pass; where a GPU's memory does not hold its students, two of half as many."""
    print(f"\n== {name}, seed {seed}: {', '.join(cells)}", flush=True)
    try:
        append_rows(args.results, run_pass(args, name, teacher, cells, seed))
        return
    except torch.cuda.OutOfMemoryError:
        if len(cells) == 1:
            raise
    torch.cuda.empty_cache()
    names = list(cells)
    for part in (names[: len(names) // 2], names[len(names) // 2 :]):
        run_cells(args, name, teacher, {arm: cells[arm] for arm in part}, seed)


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
            done = [{k: row[k] for k in DISTINCT} for row in read_rows(args.results)]
            open_cells = {
                arm: r for arm, r in recipes.items() if key_of(name, architecture, weights, images, r, arm) not in done
            }
            names = list(open_cells)
            for start in range(0, len(names), args.students_per_pass):
                chosen = {arm: open_cells[arm] for arm in names[start : start + args.students_per_pass]}
                run_cells(args, name, teacher, chosen, seed)
    print("\n" + table(read_rows(args.results)))
    print("\n" + noise_table(read_rows(args.results)))
    draw(read_rows(args.results), args.results.with_suffix(".png"))
    print(f"\nresults: {args.results}; picture: {args.results.with_suffix('.png')}")


if __name__ == "__main__":
    main()
