"""`mgd-timm order`: print an order for teachers in sequence."""

import dataclasses
import itertools
import json
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mgd_timm.cli.parser import Parser, add_fields, options_of
from mgd_timm.recipe.data import OF_TRAINING, Data

if TYPE_CHECKING:
    from mgd_timm.pipeline.order import Order


def main(arguments: Sequence[str]) -> None:
    """Run the command."""
    values = options_of(_parser().parse_args(list(arguments)))
    as_json, student = values.pop("json"), values.pop("student")
    given: dict[str, Any] = {name: value for name, value in values.items() if value is not None}
    named = given.pop("teacher", ())
    from mgd_timm.pipeline.order import order_teachers  # after the flags are checked, as it loads torch

    order = order_teachers((named,) if isinstance(named, str) else named, student, **given)
    if int(os.environ.get("RANK", "0")) == 0:
        print(_as_json(order, student) if as_json else "\n".join(_table(order, student)))


def _parser() -> Parser:
    about = (
        "Print an order for teachers in sequence (distill --teachers-as sequence): a heuristic. The residual of a step "
        "is the share of the next teacher's embedding that no linear map of the network before it explains."
    )
    parser = Parser(prog="mgd-timm order", description=about, elsewhere=dict.fromkeys(OF_TRAINING, "training takes it"))
    help_teacher = "run folder, local-dir:PATH, hf-hub:ID or timm name with weights; twice or more"
    parser.add_flag("teacher", tuple[str, ...] | None, None, help_teacher, group="networks")
    help_student = "the same, or an architecture of timm without a tag, which then has random weights"
    parser.add_flag("student", str, "cifar_resnet8x05", help_student, group="networks")
    help_classes = "as of mgd-timm distill"
    parser.add_flag("teacher_classes", tuple[str, ...] | None, None, help_classes, group="networks")
    parser.add_flag("teacher_img_size", int | None, None, help_classes, group="networks")
    parser.add_flag("images", int, 2000, "training images, evenly spaced", group="order")
    help_ridge = "penalty of the linear map, in units of the mean variance"
    parser.add_flag("ridge", float, 1e-3, help_ridge, group="order")
    parser.add_flag("json", bool, False, "print one JSON object", group="output")
    parser.add_flag("seed", int, 42, "random seed of the student's weights and of augmentations", group="order")
    add_fields(parser, Data, group="data", leave_out=OF_TRAINING)
    return parser


def _steps(order: "Order", student: str) -> list[tuple[str, str, float]]:
    path = [student, *order.teachers]
    return [(one, other, order.residuals[one][other]) for one, other in itertools.pairwise(path)]


def _as_json(order: "Order", student: str) -> str:
    steps = [{"from": one, "to": other, "residual": value} for one, other, value in _steps(order, student)]
    return json.dumps({"student": student, **dataclasses.asdict(order), "steps": steps}, ensure_ascii=False)


def _table(order: "Order", student: str) -> list[str]:
    rows = [
        (f"{one} -> {other}", f"{value:.3f}", _percent(order.top1[other]))
        for one, other, value in _steps(order, student)
    ]
    width = max(len(step) for step, _, _ in rows)
    lines = [f"{'step':{width}}  residual   top-1"]
    lines += [f"{step:{width}}  {residual:>8}  {top1:>6}" for step, residual, top1 in rows]
    lines += [
        f"left out: {name} (residual to {order.teachers[0]} {order.residuals[name][order.teachers[0]]:.3f}, "
        f"the student's {order.residuals[student][order.teachers[0]]:.3f})"
        for name in order.left_out
    ]
    flags = " ".join(f"--teacher {name}" for name in order.teachers)
    return [*lines, f"A heuristic, on {order.images:,} images. To use it: {flags} --teachers-as sequence"]


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
