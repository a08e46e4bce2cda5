"""`mgd-timm export`: write a run's student as a folder for timm, ONNX, OpenVINO and others, and measure each file."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from mgd_timm.cli.parser import Parser, add_fields, options_of
from mgd_timm.recipe.data import OF_SHOWING, OF_TRAINING, Data

_OF_RUN = set(OF_SHOWING) - {"img_size"}


def main(arguments: Sequence[str]) -> None:
    """Run the command."""
    values = options_of(_parser().parse_args(list(arguments)))
    given: dict[str, Any] = {name: value for name, value in values.items() if value is not None}
    from mgd_timm.api import export_formats  # after the flags are checked, as it loads torch

    export_formats(given.pop("run"), given.pop("folder"), **given)


def _parser() -> Parser:
    elsewhere = dict.fromkeys(OF_TRAINING, "only training takes it")
    elsewhere |= dict.fromkeys(_OF_RUN, "files are exported for images as the run showed them")
    parser = Parser(
        prog="mgd-timm export",
        description="Write a run's student as a folder of files, and print accuracy, size and latency of each.",
        elsewhere={**elsewhere, "format": "give --to instead", "formats": "give --to instead"},
    )
    parser.add_argument("run", type=str, help="run folder, exported folder, timm name with weights, or 'embedded'")
    parser.add_argument("folder", type=str, help="folder to write; must not exist")
    # As text: importing the formats would load torch.
    about = "formats, with commas: timm, onnx, int8, openvino, pt2, executorch; default: timm"
    parser.add_flag("to", str, "timm", about, group="formats", value="NAMES")
    about = "points of top-1 that a file may lose; what loses more is left out, and the exit code is 1"
    parser.add_flag("max_drop", float, 1.0, about, group="formats")
    for name, about in (("license", "licence of the weights"), ("tag", "timm's tag of the weights")):
        parser.add_flag(name, str | None, None, f"{about}; default: the run's", group="labels")
    about = "refuse weights that are not those that recipe.json has the digest of"
    parser.add_flag("verify", bool, True, about, group="labels")
    # None: the value of the model's run.
    unset = {field.name: None for field in dataclasses.fields(Data)}
    add_fields(parser, Data, group="data", leave_out=OF_TRAINING | _OF_RUN, defaults=unset)
    return parser
