"""`mgd-timm train`: train a model without a teacher."""

from collections.abc import Sequence

from mgd_timm.cli.parser import options_of, run_parser
from mgd_timm.recipe.recipe import TRAIN_NAMES, make_recipe


def main(arguments: Sequence[str]) -> None:
    """Run the command."""
    values = options_of(run_parser("mgd-timm train", distill=False).parse_args(list(arguments)))
    for name, flag in TRAIN_NAMES.items():
        values[name] = values.pop(flag)
    recipe = make_recipe(teacher=None, method="none", **values)
    from mgd_timm.pipeline.run import run  # after the options are checked, as it loads torch

    run(recipe)
