"""`mgd-timm distill`: distil a teacher into a student."""

from collections.abc import Sequence

from mgd_timm.cli.parser import BY_PEER, options_of, run_parser
from mgd_timm.recipe.recipe import make_recipe


def main(arguments: Sequence[str]) -> None:
    """Run the command."""
    values = options_of(run_parser("mgd-timm distill", distill=True).parse_args(list(arguments)))
    recipe = make_recipe(**{name: value for name, value in values.items() if name not in BY_PEER or value is not None})
    from mgd_timm.pipeline.run import run  # after the options are checked, as it loads torch

    run(recipe)
