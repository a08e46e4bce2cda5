"""`mgd-timm evaluate`: evaluate a model and print its metrics as JSON."""

import dataclasses
import json
import os
from collections.abc import Sequence
from typing import Any

from mgd_timm.cli.parser import Parser, add_fields, options_of
from mgd_timm.recipe.data import OF_TRAINING, Data


def main(arguments: Sequence[str]) -> None:
    """Run the command."""
    values = options_of(_parser().parse_args(list(arguments)))
    given: dict[str, Any] = {name: value for name, value in values.items() if value is not None}
    model = given.pop("model")
    from mgd_timm.api import evaluate_named  # after the flags are checked, as it loads torch

    found = evaluate_named(model, **given)
    if int(os.environ.get("RANK", "0")) == 0:
        clean = {name: value for name, value in found.metrics.items() if name != "noise"}
        noisy = {sigma: _rounded(row) for sigma, row in found.metrics.get("noise", {}).items()}
        print(json.dumps({**_rounded(clean), "data": found.data, **({"noise": noisy} if noisy else {})}))


def _parser() -> Parser:
    elsewhere = dict.fromkeys(OF_TRAINING, "only training takes it")
    elsewhere["batch_size"] = "give --validation-batch-size instead"
    parser = Parser(
        prog="mgd-timm evaluate",
        description="Print top-1, top-5 and loss of a model as JSON. The defaults are the options of the model's run.",
        elsewhere=elsewhere,
    )
    parser.add_argument(
        "model",
        type=str,
        help="run folder, exported folder, exported file such as model.onnx, hf-hub:ID, timm name with weights, or "
        "'embedded'",
    )
    about = "standard deviations of Gaussian noise, added to pixels in [0, 1] before normalisation, as in 0.05 0.1"
    parser.add_flag("noise", tuple[float, ...] | None, None, about, group="noise")
    parser.add_flag("noise_seeds", int, 5, "noise seeds to average over", group="noise")
    about = "refuse an exported folder whose weights are not those that its recipe.json has the digest of"
    parser.add_flag("verify", bool, True, about, group="model")
    # None: the value of the model's run.
    unset = {field.name: None for field in dataclasses.fields(Data)}
    add_fields(parser, Data, group="data", leave_out=OF_TRAINING, defaults=unset)
    return parser


def _rounded(numbers: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 6) for name, value in numbers.items()}
