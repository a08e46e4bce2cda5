"""Write the report of runs."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mgd_timm.report.comparisons import (
    agreement_section,
    calibration_section,
    cka_section,
    classes_section,
    heads_section,
)
from mgd_timm.report.complexity import complexity_section
from mgd_timm.report.costs import Costs, measure_costs
from mgd_timm.report.findings import NO_TEACHER, Findings, teaching_run
from mgd_timm.report.learnt import learnt_section
from mgd_timm.report.measure import Student, check_same_images, measure_student
from mgd_timm.report.page import page
from mgd_timm.report.runs import Group, group_runs, read_run
from mgd_timm.report.tables import accuracy_section, costs_section, curves_section, header, recipes_section
from mgd_timm.report.teacher import MeasuredTeacher, measure_teacher
from mgd_timm.storage.atomic_write import write_text_atomically


def write_report(
    folders: Sequence[Path],
    output: Path,
    *,
    options: dict[str, Any] | None = None,
    log: Callable[[str], None] = print,
) -> None:
    """Compare the students of runs with each other and with their teacher, and write the report.

    What an earlier report left in `output` is replaced.

    Args:
        folders: Of finished runs on the same data.
        output: The HTML file.
        options: Options of Data that replace those of the runs.
        log: Logs one line.

    Raises:
        ValueError: No run, one that has not finished, or runs that are evaluated on different images.
        OSError: The file cannot be written.
    """
    found = find(folders, options or {}, log)
    sections = [
        ("accuracy", "Accuracy", accuracy_section(found)),
        ("costs", "Size and speed", costs_section(found)),
        ("curves", "Training", curves_section(found)),
        ("classes", "Classes", classes_section(found)),
        ("agreement", "Agreement", agreement_section(found)),
        ("calibration", "Calibration", calibration_section(found)),
        ("complexity", "Complexity", complexity_section(found)),
        ("heads", "Heads", heads_section(found)),
        ("cka", "Stages", cka_section(found)),
        ("learnt", "Images", learnt_section(found)),
        ("recipes", "Recipes", recipes_section(found)),
    ]
    write_text_atomically(output, page("Distillation report", header(found), sections))


def find(folders: Sequence[Path], options: dict[str, Any], log: Callable[[str], None]) -> Findings:
    """Measure the students of runs, and their teacher."""
    runs = [read_run(folder) for folder in dict.fromkeys(folders)]
    students: list[Student] = []
    for run in runs:
        log(f"{run.folder}: evaluating the student")
        students.append(measure_student(run, options, log if not students else lambda _: None))
    check_same_images(students)
    by_folder = {student.run.folder: student for student in students}
    teaching = teaching_run(runs)
    teacher: MeasuredTeacher | str = NO_TEACHER
    if teaching is not None:
        log(f"{teaching.folder}: evaluating the teacher")
        teacher = measure_teacher(by_folder[teaching.folder], log)
    groups = group_runs(runs)
    log("measuring the speed")
    return Findings(groups, by_folder, teacher, _costs(groups, by_folder), _teacher_costs(teacher, by_folder))


def _costs(groups: Sequence[Group], students: dict[Path, Student]) -> dict[str, Costs]:
    """Return the costs of each group's networks, measured once for each architecture and size of images."""
    measured: dict[Any, Costs] = {}
    costs = {}
    for group in groups:
        student = students[group.first.folder]
        key = (student.name, student.images.input_size, sum(one.numel() for one in student.model.parameters()))
        if key not in measured:
            measured[key] = measure_costs(student.model, student.images.input_size)
        costs[group.label] = measured[key]
    return costs


def _teacher_costs(teacher: MeasuredTeacher | str, students: dict[Path, Student]) -> Costs | None:
    if isinstance(teacher, str):
        return None
    size = students[teacher.run.folder].images.input_size
    height, width = teacher.teacher.size(size[1:])
    return measure_costs(teacher.teacher.tap.model, (size[0], height, width))
