"""Sections of numbers: the tiles at the top, accuracy, costs, curves, recipes."""

from pathlib import Path
from typing import Any

import torch
import yaml

from mgd_timm.recipe.options import as_dict
from mgd_timm.report.charts import Line, legend, line_chart
from mgd_timm.report.costs import BATCHES, Costs
from mgd_timm.report.findings import NO_ALONE, Findings
from mgd_timm.report.markup import NONE, TIMES, escape, large, missing, name, note, number, section, table, with_spread
from mgd_timm.report.runs import Group, Run, baseline

SIZES = ("B", "kB", "MB", "GB")
COUNTS = ("", "k", "M", "G", "T")


def header(found: Findings) -> str:
    """Return the line below the heading, and the tiles."""
    student, groups = found.any_student, found.groups
    data = student.recipe.data
    place = Path(data.data_dir or data.dataset).name
    runs = sum(len(group.runs) for group in groups)
    images = f"{len(student.source.ids):,} evaluation images of {student.images.num_classes:,} classes"
    lead = f'<p class="lead">{name(place)}: {images}; {runs} run{"s" if runs > 1 else ""}.</p>'
    tiles = []
    if not isinstance(found.teacher, str) and found.teacher.predictions is not None:
        tiles.append((number(found.teacher.predictions.top(1)), "top-1 of the teacher, %"))
    alone = next((group for group in groups if group.first.is_alone), None)
    if alone is not None:
        tiles.append((with_spread(found.top1(alone)), "top-1 of the student alone, %"))
    if found.best is not None:
        label = name(found.best.label)
        tiles.append((with_spread(found.top1(found.best)), f"top-1 of the best distilled student, {label}, %"))
        if gains := found.gains(found.best):
            tiles.append((with_spread(gains, signed=True), "points gained over the student alone"))
        if found.teacher_costs is not None:
            times = found.teacher_costs.parameters / found.costs[found.best.label].parameters
            tiles.append((number(times, 1) + TIMES, "fewer parameters than the teacher"))
    return lead + f'<div class="tiles">{"".join(f"<div><b>{a}</b><span>{b}</span></div>" for a, b in tiles)}</div>'


def accuracy_section(found: Findings) -> str:
    """Return top-1 and top-5 of all, and what the students gain."""
    head = ["", "network", "seeds", "top-1, %", "top-5, %", "gain over alone", "gain over KD"]
    rows, teacher = [], found.teacher
    if not isinstance(teacher, str) and teacher.predictions is not None:
        tops = [number(teacher.predictions.top(count)) for count in (1, 5)]
        rows.append(["teacher", name(teacher.teacher.tap.name), NONE, *tops, NONE, NONE])
    for group in found.groups:
        tops = [with_spread([one.predictions.top(count) for one in found.of(group)]) for count in (1, 5)]
        gains = [with_spread(found.gains(group, kd=kd), signed=True) for kd in (False, True)]
        seeds = ", ".join(str(run.recipe.seed) for run in group.runs)
        rows.append([name(group.label), name(found.first(group).name), seeds, *tops, *gains])
    images = len(found.any_student.source.ids)
    example = found.any_student.predictions.top(1) / 100
    error = 100 * (example * (1 - example) / images) ** 0.5
    caption = (
        "Mean ± standard deviation over the seeds, where there are several. A gain is in points of top-1, seed by seed "
        f"where both groups have the same seeds. On {images:,} images the standard error of a top-1 of "
        f"{number(100 * example)} % is {number(error)} points."
    )
    parts = [table(head, rows, caption)]
    if isinstance(teacher, str):
        parts.append(missing(f"the teacher: {teacher}"))
    elif teacher.predictions is None:
        parts.append(missing("the teacher's accuracy: it has no logits of the data's classes."))
    if not any(baseline(found.groups, group, kd=False) for group in found.groups) and found.best is not None:
        parts.append(missing(f"the gain over the student alone: {NO_ALONE}"))
    if found.best is not None and not any(group.first.is_kd for group in found.groups):
        parts.append(missing("the gain over KD: name a run of mgd-timm distill --method none as well."))
    return section("accuracy", "Accuracy", *parts)


def costs_section(found: Findings) -> str:
    """Return parameters, multiply-accumulates, size and latency, and their ratios to the teacher's."""
    head = ["", "parameters", "MACs", "size", *(f"ms, batch {size}" for size in BATCHES)]
    base = found.teacher_costs
    rows = [["teacher", *_costs_cells(base, None)]] if base is not None else []
    rows += [[name(group.label), *_costs_cells(found.costs[group.label], base)] for group in found.groups]
    device = found.any_student.accelerator.device
    threads = torch.get_num_threads()
    where = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{device.type.upper()}, {threads} thread{'s' if threads > 1 else ''}"
    )
    caption = (
        "MACs: multiply-accumulates of one image. Size: all tensors of the weights. Latency: median of a forward pass "
        f"in float32, measured with this report ({escape(where)}); networks of one architecture are measured once. "
        "In brackets: how many times less than the teacher."
    )
    parts = [table(head, rows, caption)]
    if base is None:
        parts.append(missing(f"the ratios to the teacher: {found.teacher}"))
    return section("costs", "Size and speed", *parts)


def _costs_cells(costs: Costs, base: Costs | None) -> list[str]:
    shown = [
        (large(costs.parameters, COUNTS), costs.parameters, base and base.parameters),
        (large(costs.macs, COUNTS), costs.macs, base and base.macs),
        (large(costs.size, SIZES), costs.size, base and base.size),
        *((number(costs.latency[n]), costs.latency[n], base and base.latency[n]) for n in BATCHES),
    ]
    return [
        text + (f' <span class="unit">({number(theirs / ours, 1)}{TIMES})</span>' if theirs and ours else "")
        for text, ours, theirs in shown
    ]


def curves_section(found: Findings) -> str:
    """Return the curves of accuracy, and of every term of the loss."""
    charts = []
    for title, part in (("top-1, evaluation", "eval"), ("top-1, training", "train")):
        charts.append(_curve(found, title, "%", part, "top1"))
    charts.append(_curve(found, "cross-entropy, evaluation", "nats", "eval", "loss"))
    rows = [row for group in found.groups for run in group.runs for row in run.epochs]
    terms = dict.fromkeys(term for row in rows for term in row.get("train", {}) if term != "top1")
    charts += [_curve(found, f"{term}, training", "weighted loss", "train", term) for term in terms]
    drawn = [chart for chart in charts if chart]
    if not drawn:
        return section("curves", "Training", missing("the curves: the runs have no metrics.jsonl."))
    labels = [group.label for group in found.groups]
    about = note(
        "One line per run; runs that differ in their seed share a colour. Each training loss is a term as the "
        "objective adds it up, with its weight, so terms of different recipes differ in scale as well."
    )
    return section("curves", "Training", legend(labels), f'<div class="grid-of">{"".join(drawn)}</div>', about)


def _curve(found: Findings, title: str, unit: str, part: str, key: str) -> str:
    """Return a chart of one number of metrics.jsonl; nothing if no run has it."""
    lines = []
    for place, group in enumerate(found.groups):
        for run in group.runs:
            points = [point for row in run.epochs if (point := _point(row, part, key)) is not None]
            if points:
                label = f"{group.label}, seed {run.recipe.seed}" if len(group.runs) > 1 else group.label
                lines.append(Line(place, label, points))
    return line_chart(title, lines, x_label="epoch", y_label=unit) if lines else ""


def _point(row: dict[str, Any], part: str, key: str) -> tuple[float, float] | None:
    values, epoch = row.get(part), row.get("epoch")
    value = values.get(key) if isinstance(values, dict) else None
    if not isinstance(value, int | float) or not isinstance(epoch, int) or not abs(value) < float("inf"):
        return None
    return float(epoch), float(value)


def recipes_section(found: Findings) -> str:
    """Return recipes and digests of all runs."""
    parts = [_recipe(group, found) for group in found.groups]
    return section("recipes", "Recipes and fingerprints", *parts)


def _recipe(group: Group, found: Findings) -> str:
    rows = []
    for run in group.runs:
        digests = [_digest(run, key) for key in ("teacher_sha256", "data_sha256", "evaluation_sha256", "model_sha256")]
        rows.append([f"seed {run.recipe.seed}", name(run.folder.name), *digests])
    head = ["", "folder", "teacher", "training data", "evaluation data", "student"]
    options = as_dict(group.first.recipe, digest_only=True)
    text = yaml.safe_dump({"student": options.pop("student"), **options}, sort_keys=False)
    versions = group.first.provenance.get("versions", {})
    listed = ", ".join(f"{escape(key)} {escape(value)}" for key, value in dict(versions).items() if key != "commit")
    teacher = f"taught by {name(_teacher_names(group.first))}" if group.first.recipe.teacher else "without a teacher"
    return (
        f"<h3>{name(group.label)}</h3><p>{name(found.first(group).name)}, {teacher}.</p>"
        + table(head, rows, f"First 16 digits of each sha256. Versions: {listed or NONE}.")
        + f"<details><summary>recipe (seed {group.first.recipe.seed})</summary>"
        f"<pre>{escape_lines(text)}</pre></details>"
    )


def _teacher_names(run: Run) -> str:
    """Return the names of a run's teachers; of a folder, its last part: paths are of the machine."""
    return ", ".join(Path(one).name if "/" in one and "hub" not in one else one for one in run.recipe.teacher or ())


def _digest(run: Run, key: str) -> str:
    value = run.provenance.get(key)
    values = value if isinstance(value, list) else [value]
    return "<br>".join(f"<code>{escape(str(one)[:16])}</code>" if one else NONE for one in values)


def escape_lines(text: str) -> str:
    """Escape text of several lines."""
    return "\n".join(escape(line) for line in text.splitlines())
