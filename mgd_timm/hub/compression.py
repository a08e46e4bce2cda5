"""The table that sets a student beside its teacher and beside other runs on the same images."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mgd_timm.features.tap import model_name
from mgd_timm.hub.markdown import NONE, code, escape, table
from mgd_timm.hub.student import Student, accuracy_of, as_list
from mgd_timm.models.input_adapter import build_input_adapter
from mgd_timm.models.load import load_model
from mgd_timm.pipeline.load_teachers import load_named_teacher
from mgd_timm.recipe.recipe import Recipe
from mgd_timm.report.costs import Work, count_work
from mgd_timm.report.runs import Group, group_runs, read_run
from mgd_timm.storage.digests import module_digest


@dataclass(frozen=True)
class Row:
    """A network of the table.

    Args:
        label: What it is, in Markdown.
        top1, top5: In %, of one or of several seeds; empty where they are not known.
        work: None where the network is not at hand.
    """

    label: str
    top1: Sequence[float]
    top5: Sequence[float]
    work: Work | None


def compression_rows(student: Student, compare: Sequence[str], log: Callable[[str], None]) -> list[Row]:
    """Return the rows of the teachers, of the other runs, and of the student, which is the last.

    Args:
        student: Published.
        compare: Folders of other runs on the same evaluation images.
        log: Logs one line.

    Raises:
        ValueError: A folder is no run, or one that was evaluated on other images.
    """
    accuracy = student.accuracy
    label = f"**this student** (`{student.architecture}`)"
    own = Row(label, _known([accuracy.top1]), _known([accuracy.top5]), count_work(student.model, student.input_size))
    return [*_teacher_rows(student, log), *_other_rows(student, compare), own]


def _teacher_rows(student: Student, log: Callable[[str], None]) -> list[Row]:
    recipe, origin = student.recipe, student.origin
    if recipe is None or recipe.teacher is None:
        return []
    names = as_list(origin.get("teacher_architecture")) or [None] * len(recipe.teacher)
    tops = [as_list(origin.get("metrics", {}).get(f"teacher_{name}")) for name in ("top1", "top5")]
    rows = []
    for place, architecture in enumerate(names):
        work = _teacher_work(student, place, log)
        word = "teacher" if len(names) == 1 else f"teacher {place + 1}"
        label = word if architecture is None else f"{word} ({code(architecture)})"
        top1, top5 = (_known(values[place : place + 1]) for values in tops)
        top5 = top5 if student.num_classes > 5 else []
        rows.append(Row(label, top1, top5, work))
    return rows


def _teacher_work(student: Student, place: int, log: Callable[[str], None]) -> Work | None:
    """Return the work of a teacher of the run, whose recipe has its path; None where it cannot be loaded."""
    recipe = student.run.recipe if student.run is not None else student.recipe
    assert recipe is not None
    assert recipe.teacher is not None
    known = as_list(student.origin.get("teacher_loaded_sha256", student.origin.get("teacher_sha256")))
    try:
        model = load_named_teacher(recipe, recipe.teacher[place]).eval()
        if known and module_digest(model) != known[place]:
            raise ValueError("there are other weights under its name now")
        return count_work(model, _teacher_input_size(student, recipe, model))
    except (ValueError, OSError, RuntimeError) as error:
        log(f"the size of the teacher {recipe.teacher[place]!r} is left out of the card: {error}")
        return None


def _teacher_input_size(student: Student, recipe: Recipe, model: Any) -> tuple[int, int, int]:
    config = student.config["pretrained_cfg"]
    adapter = build_input_adapter(model, config["mean"], config["std"], student.input_size, recipe.teacher_img_size)
    height, width = adapter.size or student.input_size[1:]
    return student.input_size[0], height, width


def _other_rows(student: Student, compare: Sequence[str]) -> list[Row]:
    runs = [read_run(Path(folder)) for folder in dict.fromkeys(compare)]
    for run in runs:
        digests = [one.get("evaluation_sha256") for one in (run.provenance, student.origin)]
        if digests[0] != digests[1] or digests[0] is None:
            raise ValueError(
                f"--compare {run.folder}: it was evaluated on other images than the student, so that their accuracies "
                "cannot stand in one table. Compare runs on the same data."
            )
    return [_group_row(student, group) for group in group_runs(runs)]


def _group_row(student: Student, group: Group) -> Row:
    found = [accuracy_of(run.summary, student.num_classes) for run in group.runs]
    model = load_model(str(group.first.folder)).eval()
    work = count_work(model, student.input_size)
    words = "student alone" if group.first.is_alone else group.label
    words += f", {len(group.runs)} seeds" if len(group.runs) > 1 else ""
    label = f"{escape(words)} (`{model_name(model)}`)"
    return Row(label, _known([one.top1 for one in found]), _known([one.top5 for one in found]), work)


def _known(values: Sequence[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def compression_table(rows: Sequence[Row], has_teacher: bool) -> str:
    """Return the table; in brackets, how many times less than the first teacher."""
    base = rows[0].work if has_teacher else None
    body = [[row.label, _with_spread(row.top1), _with_spread(row.top5), *_costs(row.work, base)] for row in rows]
    return table(["", "top-1, %", "top-5, %", "parameters, M", "MACs, M", "weights, MB"], body)


def _costs(work: Work | None, base: Work | None) -> list[str]:
    if work is None:
        return [NONE] * 3
    return [
        _millions(work.parameters, base.parameters if base is not None else None),
        _millions(work.macs, base.macs if base is not None else None),
        _millions(work.size, base.size if base is not None else None),
    ]


def _with_spread(values: Sequence[float]) -> str:
    if not values:
        return NONE
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}"


def _millions(count: int, base: int | None) -> str:
    if base is None or base == count:
        return number_of(count / 1e6)
    ratio = f"{base / count:.1f}x less" if base > count else f"{count / base:.1f}x more"
    return f"{number_of(count / 1e6)} ({ratio})"


def number_of(value: float) -> str:
    """Return a number with about three digits."""
    digits = 0 if value >= 100 else 1 if value >= 10 else 2 if value >= 0.1 else 4
    return f"{value:,.{digits}f}"
