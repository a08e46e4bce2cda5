"""The runs of `mgd-timm demo`: one small student trained four ways at the same budget, compared, exported, loaded back.

The teacher (ResNet-20) saw all 60,000 images of Fashion-MNIST's training set; the students see 10,000 of them, so the
teacher knows something that the labels do not say.
"""

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
from torch import nn

from mgd_timm.api import evaluate
from mgd_timm.export.timm_folder import export_model
from mgd_timm.models.load import load_model
from mgd_timm.pipeline.run import Result, run
from mgd_timm.recipe.recipe import Recipe, make_recipe
from mgd_timm.report.costs import measure_costs
from mgd_timm.report.text import markdown, spread

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
QUICK: dict[str, Any] = {"heads_epochs": 1, "heads_augmentations": 1}


@dataclass(frozen=True)
class Student:
    """A trained student of the demo.

    Args:
        arm: How it was trained, one of ARMS.
        recipe: Of its run.
        result: Of its run.
    """

    arm: str
    recipe: Recipe
    result: Result

    @property
    def folder(self) -> Path:
        """Folder of its run."""
        return Path(self.recipe.output)

    @property
    def top1(self) -> float:
        """Accuracy after the last epoch in %."""
        return float(self.result.summary["top1"])


def run_demo(output: Path, epochs: int, *, quick: bool) -> None:
    """Train, compare, export, load back, and print how to go on.

    Args:
        output: Folder to write; must not exist.
        epochs: Of each student.
        quick: Fit the heads for one epoch only.
    """
    start = time.monotonic()
    students = train_students(output, epochs, **(QUICK if quick else {}))
    print(f"\n{table(students)}")
    place = export_best(students, output)
    runs = " ".join(str(student.folder) for student in students)
    print(
        f"\nLoad it in Python:\n\n"
        f"    import mgd_timm.models, timm  # mgd_timm.models registers cifar_*; other students need timm alone\n"
        f"    model = timm.create_model('local-dir:{place}', pretrained=True)\n\n"
        f"Look at the runs: mgd-timm report {runs}\n"
        f"Your own images:  mgd-timm distill --teacher NAME --student NAME --data-dir FOLDER\n\n"
        f"{time.monotonic() - start:.0f} s in all"
    )


def train_students(output: Path, epochs: int, seeds: Sequence[int] = (0,), **options: Any) -> list[Student]:
    """Train each arm with each seed.

    Args:
        output: Folder for the runs' folders.
        epochs: Of each student.
        seeds: Random seeds.
        **options: Of all recipes, over those of BUDGET.
    """
    print("Fashion-MNIST: 10,000 training and 4,000 test images, in the package; no network needed")
    students: list[Student] = []
    for seed in seeds:
        for arm, of_arm in ARMS.items():
            print(f"\n== {len(students) + 1} of {len(seeds) * len(ARMS)}: {arm}, seed {seed}")
            folder = output / f"{arm.lower().replace('+', '_')}_{seed}"
            recipe = make_recipe(**{**BUDGET, "epochs": epochs, **options, **of_arm}, seed=seed, output=str(folder))
            students.append(Student(arm, recipe, run(recipe)))
    return students


def of_arms(students: Sequence[Student]) -> Mapping[str, list[Student]]:
    """Return the students of each arm."""
    return {arm: [student for student in students if student.arm == arm] for arm in ARMS}


def table(students: Sequence[Student]) -> str:
    """Return accuracy, size and cost of the teacher and of each arm, and what students gain."""
    top1 = {arm: [student.top1 for student in found] for arm, found in of_arms(students).items()}
    means = {arm: statistics.fmean(values) for arm, values in top1.items()}
    teacher = next(s.result.summary["teacher_top1"] for s in students if s.arm == "KD")
    rows = [["teacher (ResNet-20)", f"{teacher:.2f}", *_costs(load_model("embedded")), "", ""]]
    for arm, values in top1.items():
        student = next(s.result.student for s in students if s.arm == arm)
        gains = [f"{means[arm] - means[base]:+.2f}" if arm != base else "" for base in ("alone", "KD")]
        rows.append([arm, spread(values), *_costs(student), *gains])
    header = [f"student {BUDGET['student']}", "top-1 %", "parameters", "MACs", "bytes", "over alone", "over KD"]
    return markdown(header, rows)


def _costs(model: nn.Module) -> list[str]:
    costs = measure_costs(model, (3, 28, 28), batches=())
    return [f"{costs.parameters:,}", f"{costs.macs / 1e6:.2f} M", f"{costs.size:,}"]


def export_best(students: Sequence[Student], output: Path) -> Path:
    """Export the best student, load it with timm, and evaluate it again.

    Raises:
        RuntimeError: The exported student has another accuracy.
    """
    best = max(students, key=lambda student: student.top1)
    place = export_model(best.result.student, output / "student", provenance={"run": best.folder.name})
    after = evaluate(timm.create_model(f"local-dir:{place}", pretrained=True), best.recipe.data)["top1"]
    if after != best.top1:
        raise RuntimeError(f"{place}: top-1 {after} % when loaded with timm, and {best.top1} % when it was trained.")
    print(f"\nbest student ({best.arm}): {place}, top-1 {after:.2f} % when trained, and when loaded with timm")
    return place
