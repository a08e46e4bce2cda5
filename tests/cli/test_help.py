"""--help is short and names flags that exist, --help-all names them all, and neither loads anything heavy."""

import dataclasses
import re
import subprocess
import sys

import pytest

from mgd_timm.cli.main import COMMANDS, main
from mgd_timm.cli.parser import run_parser
from mgd_timm.recipe.data import OF_TRAINING, Data
from mgd_timm.recipe.heads import Heads
from mgd_timm.recipe.optim import Optim
from mgd_timm.recipe.options import flag
from mgd_timm.recipe.recipe import OF_DISTILLING, PARTS, TRAIN_NAMES, TRAIN_ONLY, Recipe

FIELDS = [
    field for kind in (Recipe, Data, Optim, Heads) for field in dataclasses.fields(kind) if field.name not in PARTS
]
HEAVY = ("torch", "timm", "accelerate", "datasets", "numpy", "transformers", "PIL", "pyarrow", "huggingface_hub")


def flags_in(text: str) -> set[str]:
    """The flags that begin a line of a help."""
    return {
        found for line in re.findall(r"^  (-.*)", text, re.MULTILINE) for found in re.findall(r"--[\w-]+", line[:34])
    }


def print_help(capsys, *words: str) -> str:
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_short_and_shows_flags_that_exist(command, capsys):
    short, whole = (print_help(capsys, command, flag) for flag in ("--help", "--help-all"))
    assert len(short.splitlines()) < 60
    assert all(len(line) <= 100 for line in (short + whole).splitlines())
    assert flags_in(short) <= flags_in(whole)
    assert short.startswith(f"usage: mgd-timm {command} ")


@pytest.mark.parametrize("command", ["distill", "train"])
def test_help_all_names_every_field_and_help_the_common_ones(command, capsys):
    names = TRAIN_NAMES if command == "train" else {}
    left_out = OF_DISTILLING if command == "train" else TRAIN_ONLY
    taken = {flag(names.get(field.name, field.name)): field for field in FIELDS if field.name not in left_out}
    own = {"--help", "--help-all", "--config", "--print_config"}
    whole = {found for found in flags_in(print_help(capsys, command, "--help-all")) if not found.startswith("--no-")}
    assert whole - own == set(taken)
    common = {name for name, field in taken.items() if field.metadata["common"]}
    text = print_help(capsys, command, "--help")
    assert flags_in(text) - own == common
    assert f"{len(taken) - len(common)} more flags: mgd-timm {command} --help-all" in text


def test_evaluate_takes_no_flag_of_training(capsys):
    whole = flags_in(print_help(capsys, "evaluate", "--help-all"))
    assert {"--noise", "--val-split", "--validation-batch-size"} <= whole
    assert not whole & {flag(name) for name in OF_TRAINING}


def test_help_shows_the_defaults_of_a_script():
    parser = run_parser("script.py", distill=True, without={"maps": "script.py sets it"}, defaults={"epochs": 7})
    assert re.search(r"--epochs N +passes over the training images \(default: 7\)", parser.format_help())
    assert not any("--maps" in action.option_strings for action in parser._actions)


def test_trackers_and_grey_images_are_named_in_the_help(capsys):
    text = " ".join(print_help(capsys, "distill", "--help-all").split())
    for word in ("tensorboard", "wandb", "trackio", "mlflow", "comet_ml", "clearml", "1 for grey"):
        assert word in text


@pytest.mark.parametrize(
    ("words", "code"),
    [
        *(((command, kind), 0) for command in COMMANDS for kind in ("--help", "--help-all")),
        (("--help",), 0),
        (("--version",), 0),
        (("distil",), 2),
        (("distill", "--bach-size", "3"), 2),
        (("distill", "--epochs", "0"), 1),
        (("train", "--peer", "test_vit"), 2),
        (("evaluate", "embedded", "--aa", "x"), 2),
    ],
)
def test_nothing_heavy_is_imported_for_help_or_a_wrong_call(words, code):
    program = f"""
import sys
from mgd_timm.cli.main import main
try:
    code = main({list(words)})
except SystemExit as end:
    code = end.code
assert code == {code}, code
print("heavy:", [name for name in {HEAVY} if name in sys.modules], file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert done.stderr.splitlines()[-1] == "heavy: []"
