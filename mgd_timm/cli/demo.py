"""`mgd-timm demo`: the main job on the embedded images."""

from collections.abc import Sequence
from pathlib import Path

from mgd_timm.cli.parser import Parser
from mgd_timm.recipe.options import expand_home

_EPOCHS = 8


def main(arguments: Sequence[str]) -> None:
    """Run the command."""
    values = _parser().parse_args(list(arguments))
    output = Path(expand_home(values.output, "output"))
    if values.quick and values.epochs != _EPOCHS:
        raise ValueError(f"--epochs {values.epochs} with --quick, which trains for one epoch: give one of them.")
    if values.epochs < 1:
        raise ValueError(f"--epochs {values.epochs}: expected 1 or more.")
    if output.exists():
        raise FileExistsError(f"--output {output} exists: choose another folder, or delete it.")
    from mgd_timm.cli.demo_runs import run_demo  # after the flags are checked, as it loads torch

    run_demo(output, 1 if values.quick else values.epochs, quick=values.quick)


def _parser() -> Parser:
    about = (
        "Train one small student four ways (alone, KD, MAG+KD, MAS+KD) on the images in the package, compare the four, "
        "export the best and load it back. No network or data is needed."
    )
    parser = Parser(prog="mgd-timm demo", description=about)
    parser.add_flag("output", str, "mgd-timm-demo", "folder to write; must not exist", group="demo", value="FOLDER")
    parser.add_flag("epochs", int, _EPOCHS, "epochs of each student", group="demo")
    about = "one epoch of everything: shows that the package works, not what distillation gains"
    parser.add_flag("quick", bool, False, about, group="demo")
    return parser
