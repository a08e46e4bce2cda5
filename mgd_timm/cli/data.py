"""`mgd-timm data`: print what a run would train and evaluate on, without training."""

import json
import sys
from collections.abc import Sequence
from typing import Any

from mgd_timm.cli.parser import Parser, add_fields, options_of
from mgd_timm.recipe.data import Data


def main(arguments: Sequence[str]) -> None:
    """Run the command."""
    values = options_of(_parser().parse_args(list(arguments)))
    as_json, sheet, model = (values.pop(name) for name in ("json", "sheet", "model"))
    from mgd_timm.api import inspect_data  # after the flags are checked, as it loads torch

    found = inspect_data(model=model, sheet=sheet, log=lambda line: print(line, file=sys.stderr), **values)
    if as_json:
        print(json.dumps(found, ensure_ascii=False))
    else:
        print("\n".join(_table(found)))


def _parser() -> Parser:
    about = "Print what a run would train and evaluate on, without training."
    parser = Parser(prog="mgd-timm data", description=about)
    parser.add_flag("json", bool, False, "print one JSON object", group="output")
    help_sheet = "write a contact sheet: a PNG with images of each class as a network is shown them in training"
    parser.add_flag("sheet", str | None, None, help_sheet, group="output", value="FILE")
    help_model = "timm name or run folder, whose image size, mean and std the sheet is drawn with"
    parser.add_flag("model", str | None, None, help_model, group="output")
    add_fields(parser, Data, group="data")
    for name in ("train_split", "eval_split", "input_key", "target_key", "first_label"):  # what refusals name
        parser.texts[name] = parser.texts[name]._replace(short=parser.texts[name].full)
    return parser


def _table(found: dict[str, Any]) -> list[str]:
    """Return what was understood of a data set, in lines."""
    train, evaluation = found["train"], found["eval"]
    lines = [f"train       split {train['split']!r}, {train['images']:,} images"]
    if evaluation is None:
        lines.append("evaluation  none: --val-split 0.1 holds out a part of the training images")
    else:
        lines.append(f"evaluation  split {evaluation['split']!r}, {evaluation['images']:,} images")
    if found["image_column"] is not None:
        lines.append(f"columns     {found['image_column']!r} with images, {found['label_column']!r} with labels")
    kept = "decoded once and kept in memory" if found["path"] == "memory" else "read from files when they are used"
    lines.append(f"images      {kept}")
    if evaluation is not None:
        lines.append(f"duplicates  {found['duplicates']:,} evaluation images are also training images, byte by byte")
        lines += [f"            {one} = {other}" for one, other in found["duplicate_examples"]]
    lines.append(f"left out    {found['ignored_count']:,} files and folders")
    lines += [f"            {row['path']}: {row['why']}" for row in found["ignored"]]
    width = max(len(name) for name in found["classes"])
    lines.append(f"\n{'class':{width}}  {'train':>9}  {'evaluation':>10}")
    for name in found["classes"]:
        count = f"{evaluation['per_class'][name]:,}" if evaluation is not None else "-"
        lines.append(f"{name:{width}}  {train['per_class'][name]:>9,}  {count:>10}")
    return lines
