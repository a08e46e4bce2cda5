"""`mgd-timm report`: write an HTML page that compares runs with each other and with their teacher."""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mgd_timm.cli.parser import Parser, add_fields, options_of
from mgd_timm.recipe.data import OF_TRAINING, Data
from mgd_timm.recipe.options import expand_home


def main(arguments: Sequence[str]) -> None:
    """Run the command."""
    values = options_of(_parser().parse_args(list(arguments)))
    given: dict[str, Any] = {name: value for name, value in values.items() if value is not None}
    runs = [Path(expand_home(run, "RUN")) for run in given.pop("runs")]
    output = Path(expand_home(given.pop("output"), "output")) if "output" in given else runs[0] / "report.html"
    if output.is_dir():
        raise ValueError(f"--output {output}: this is a folder, expected a file such as {output / 'report.html'}.")
    from mgd_timm.report.write import write_report  # after the flags are checked, as it loads torch

    write_report(runs, output, options=given, log=lambda line: print(line, file=sys.stderr))
    print(f"wrote {output}")


def _parser() -> Parser:
    elsewhere = dict.fromkeys(OF_TRAINING, "only training takes it")
    elsewhere["batch_size"] = "give --validation-batch-size instead"
    parser = Parser(
        prog="mgd-timm report",
        description="Write one HTML page that compares the students of runs with each other and with their teacher.",
        elsewhere=elsewhere,
    )
    parser.add_argument("runs", type=str, nargs="+", help="run folders, of distilled students and of the student alone")
    help_output = "HTML file to write; default: report.html in the first run's folder"
    parser.add_flag("output", str | None, None, help_output, group="output", value="FILE")
    # None: the value of each run.
    unset = {field.name: None for field in dataclasses.fields(Data)}
    add_fields(parser, Data, group="data", leave_out=OF_TRAINING, defaults=unset)
    return parser
