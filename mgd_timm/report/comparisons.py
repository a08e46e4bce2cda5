"""Sections that compare predictions and features: classes, agreement, calibration, heads, CKA."""

import torch

from mgd_timm.features import FeatureTap
from mgd_timm.pipeline.turns import turns_of
from mgd_timm.report.calibration import BINS, measure_calibration
from mgd_timm.report.charts import change_bar, heat_map, reliability_diagram
from mgd_timm.report.cka import cka_table
from mgd_timm.report.findings import NO_ALONE, NO_TEACHER, Findings, agreement, class_accuracy, divergence
from mgd_timm.report.markup import missing, name, note, number, section, table, with_spread
from mgd_timm.report.measure import Predictions, Student, pooled_maps
from mgd_timm.report.runs import Group, baseline

CLASSES = 15
"""Of many classes, how many gains and how many losses are shown."""
CKA_IMAGES = 512


def classes_section(found: Findings) -> str:
    """Return each class's accuracy alone, and what distilling changes."""
    title = ("classes", "Change per class")
    best = found.best
    if best is None:
        return section(*title, missing(f"the change per class: {NO_TEACHER}"))
    alone = baseline(found.groups, best, kd=False)
    if alone is None:
        return section(*title, missing(f"the change per class: {NO_ALONE}"))
    names = found.any_student.images.class_names
    before = _mean_by_class(found, alone, len(names))
    others = [group for group in found.groups if not group.first.is_alone and group is not best]
    same = [group for group in others if baseline(found.groups, group, kd=False) is alone]
    changes = {group.label: _mean_by_class(found, group, len(names)) - before for group in (best, *same)}
    change = changes[best.label]
    order = [place for place in change.argsort(descending=True, stable=True).tolist() if not change[place].isnan()]
    shown = order if len(order) <= 2 * CLASSES else order[:CLASSES] + order[-CLASSES:]
    largest = float(change[order].abs().max())
    counts = torch.bincount(found.any_student.predictions.labels, minlength=len(names))
    rows = []
    for place in shown:
        cells = [number(float(changes[label][place]), 1, signed=True) for label in changes]
        numbers = [f"{int(counts[place]):,}", number(float(before[place]), 1)]
        rows.append([name(names[place]), *numbers, change_bar(float(change[place]), largest), *cells])
    head = ["class", "images", "alone, %", "change", *(name(label) for label in changes)]
    left = len(order) - len(shown)
    caption = f"Points of each class's accuracy, means over the seeds; the bars are of {name(best.label)}."
    caption += f" {left:,} classes between the largest gains and losses are not shown." if left else ""
    return section(*title, table(head, rows, caption))


def _mean_by_class(found: Findings, group: Group, count: int) -> torch.Tensor:
    return torch.stack([class_accuracy(student.predictions, count) for student in found.of(group)]).mean(0)


def agreement_section(found: Findings) -> str:
    """Return how often the students predict what the teacher predicts."""
    title = ("agreement", "Agreement with the teacher")
    teacher = found.teacher
    if isinstance(teacher, str):
        return section(*title, missing(f"the agreement: {teacher}"))
    if teacher.predictions is None:
        return section(*title, missing("the agreement: the teacher has no logits of the data's classes."))
    theirs, rows = teacher.predictions, []
    right = theirs.hits
    for group in found.groups:
        students = [student.predictions for student in found.of(group)]
        cells = [
            [agreement(one, theirs) for one in students],
            *([_share(one, theirs, where) for one in students] for where in (right, ~right)),
        ]
        apart = [divergence(theirs, one) for one in students]
        rows.append([name(group.label), *(with_spread(values) for values in cells), with_spread(apart, 3)])
    head = ["", "same class, %", "where the teacher is right, %", "where it is wrong, %", "KL from the teacher, nats"]
    about = f"The teacher is {name(teacher.teacher.tap.name)}, of the run {name(teacher.run.folder.name)}."
    key = "teacher_sha256"
    taught = [group for group in found.groups if key in group.first.provenance]
    others = [one.label for one in taught if one.first.provenance[key] != teacher.run.provenance.get(key)]
    about += f" Taught by another one: {', '.join(map(name, others))}." if others else ""
    return section(*title, table(head, rows, about + " KL(teacher ‖ student) of probabilities at temperature 1."))


def _share(one: Predictions, other: Predictions, where: torch.Tensor) -> float:
    """Return the share of the images at `where`, in %, for which both predict the same class; nan without images."""
    return 100 * float((one.classes == other.classes)[where].double().mean())


def calibration_section(found: Findings) -> str:
    """Return expected calibration errors and reliability diagrams."""
    rows, diagrams = [], []
    named = [(group.label, [one.predictions for one in found.of(group)]) for group in found.groups]
    if not isinstance(found.teacher, str) and found.teacher.predictions is not None:
        named.insert(0, ("teacher", [found.teacher.predictions]))
    for label, predictions in named:
        measured = [measure_calibration(one.logits, one.labels) for one in predictions]
        sure = [100 * float(one.logits.double().softmax(1).amax(1).mean()) for one in predictions]
        errors = [100 * one.error for one in measured]
        rows.append([name(label), with_spread(errors), with_spread(sure), with_spread([p.top(1) for p in predictions])])
        diagrams.append(reliability_diagram(label, measured[0]))
    head = ["", "ECE, %", "mean confidence, %", "top-1, %"]
    about = (
        f"Expected calibration error with {BINS} bins of equal width. A calibrated network's bars end on the diagonal: "
        "below it the network is too sure. Faint bars hold few images. Of several seeds the lowest is drawn."
    )
    return section(
        "calibration", "Calibration", table(head, rows, about), f'<div class="grid-of">{"".join(diagrams)}</div>'
    )


def heads_section(found: Findings) -> str:
    """Return the accuracy of the granularity heads and of the stable logits, as their runs measured it."""
    title = ("heads", "Granularity heads")
    rows: list[list[str]] = []
    for group in found.groups:
        # Of several teachers the first's; of a sequence the last's.
        keys = ("heads", f"heads_{len(turns_of(group.first.recipe))}")
        fitted = [run.summary[key] for run in group.runs for key in keys if key in run.summary]
        fitted = [row for row in fitted if row]
        if not fitted:
            continue
        columns = ("teacher", *(g.name for g in group.first.recipe.heads.granularities), "top1")
        rows.append([name(group.label), *(with_spread([row[key] for row in fitted if key in row]) for key in columns)])
    if not rows:
        return section(*title, missing("the heads: no run here has any; they come with --method mag or mas."))
    head = ["", "teacher, %", "abstract, %", "detailed, %", "stable logits, %"]
    about = (
        "Top-1 on the run's evaluation images. The abstract and the detailed head each map the teacher's embedding to "
        "a code and the code to logits, its view; the stable logits are the mean of the teacher's logits and both "
        "views."
    )
    return section(*title, table(head, rows, about))


def cka_section(found: Findings) -> str:
    """Return linear CKA of the students' stages with the teacher's."""
    title = ("cka", "Likeness of the stages")
    teacher = found.teacher
    if isinstance(teacher, str):
        return section(*title, missing(f"CKA with the teacher's stages: {teacher}"))
    # Each network sees the images as its own run showed them.
    shown, _ = found.students[teacher.run.folder].some(CKA_IMAGES)
    theirs, images, charts = pooled_maps(teacher.teacher, shown, 64), len(shown), []
    for group in found.groups:
        student = found.first(group)
        tables = cka_table(theirs, pooled_maps(_tap(student), student.some(CKA_IMAGES)[0], 64))
        charts.append(heat_map(group.label, tables, rows="stage of the teacher", columns="stage of the student"))
    about = note(
        f"Linear CKA of the stages' maps, averaged over positions, on {images} evaluation images: 1 for features that "
        "differ by a rotation and a scale only. It rises with wide stages and few images, so compare students with "
        "each other. Of several seeds the lowest is drawn."
    )
    return section(*title, f'<div class="grid-of">{"".join(charts)}</div>', about)


def _tap(student: Student) -> FeatureTap:
    return FeatureTap(student.model, "stages", input_size=student.images.input_size).eval()
