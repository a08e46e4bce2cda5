"""Flags from the recipe's dataclasses, and what is said of wrong ones."""

import dataclasses
import difflib
import json
import re
import sys
import typing
from argparse import Action
from collections.abc import Mapping, Sequence
from types import NoneType, UnionType
from typing import Any, NoReturn

import yaml
from jsonargparse import ActionYesNo, ArgumentParser, Namespace, get_loader

from mgd_timm.recipe.options import fits

# Flags of `train`, as timm's train.py has them, that `distill` spells with the student's name.
TRAIN_NAMES = {"student": "model", "student_pretrained": "pretrained", "student_checkpoint": "initial_checkpoint"}
_TRAIN_ONLY = {"train_only", "adapt_batchnorm"}

BY_PEER = ("teacher", "criterion", "method")
"""What these are by default depends on whether there is a peer: make_recipe says it."""


_REPEATED = ("teacher", "teacher_classes")
"""Flags that may be given again, for one more value."""


def _gathered(words: Sequence[str]) -> list[str]:
    """The words of a call, the values of a repeated flag put into one list."""
    left = list(words)
    for name in (option.replace("_", "-") for option in _REPEATED):
        values: list[str] = []
        rest: list[str] = []
        waiting = False
        for word in left:
            if waiting or word.startswith(f"--{name}="):
                values.append(word if waiting else word.partition("=")[2])
                waiting = False
            elif word == f"--{name}":
                waiting = True
            else:
                rest.append(word)
        # A flag without a value stays for the parser to refuse.
        left = [*rest, *([f"--{name}={json.dumps(values)}"] if len(values) > 1 else [f"--{name}={v}" for v in values])]
        left += [f"--{name}"] if waiting else []
    return left


_WRONG_VALUE = re.compile(r'Parser key "([\w.]+)"(?: element \d+)?:\s(.*)(?:Got|Given) value: (.*)', re.DOTALL)
"""How jsonargparse refuses a value: in several lines, and in Python's words for what it expected."""


def _in_words(message: str, actions: Sequence[Action]) -> str:
    """An error of jsonargparse about a value in one line: the flag, its value and what was expected; any other one as
    it is."""
    found = _WRONG_VALUE.search(message)
    if found is None:
        return message
    name, kinds, value = found.groups()
    if choices := re.search(r"Literal\[(.*?)\]", kinds):
        expected = f"one of {choices[1].replace(chr(39), '')}"
    elif kind := re.search(r"<class '(int|float)'>", kinds):
        expected = {"int": "a whole number", "float": "a number"}[kind[1]]
    else:
        return message
    flag = next((f for action in actions if action.dest == name for f in action.option_strings), name)
    return f"{flag}: {value!r}: expected {expected}."


class Parser(ArgumentParser):
    """Takes a repeated flag as a list, and in a --config a single value for a list of one; the error for a flag that
    does not exist
    says where it belongs, or names the nearest.

    Args:
        elsewhere: Words for the error about an option, by its name with underscores, that this command does not take.
        **options: Of jsonargparse's parser.
    """

    def __init__(self, *, elsewhere: Mapping[str, str] | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.elsewhere = dict(elsewhere or {})
        self.elements: dict[str, type] = {}
        """Of each option that is a list, the kind of its elements."""

    def parse_args(self, args: Sequence[str] | None = None, *more: Any, **options: Any) -> Namespace:  # type: ignore[override]
        """As jsonargparse's, of words in which a flag may be repeated."""
        return super().parse_args(_gathered(sys.argv[1:] if args is None else args), *more, **options)

    def parse_string(self, content: str, *more: Any, **options: Any) -> Namespace:
        """As jsonargparse's, of a --config's content."""
        try:
            values = get_loader("yaml")(content)
        except yaml.YAMLError as error:
            self.error(f"--config: no YAML: {' '.join(str(error).split())}; --print_config writes a file of flags.")
        if not isinstance(values, dict):
            self.error(
                f"--config: {content[:80]!r}: expected flags with values, as in epochs: 20; --print_config writes "
                "such a file."
            )
        listed = {name: self._listed(name, value) for name, value in values.items()}
        content = content if listed == values else json.dumps(listed)
        return super().parse_string(content, *more, **options)

    def _listed(self, name: str, value: Any) -> Any:
        """The value of an option in a --config, a single one of an option that is a list as a list."""
        kind = self.elements.get(name)
        values = value if isinstance(value, list) else [value]
        if kind is None or value is None:
            return value
        if not all(fits(one, kind) for one in values):
            word, example = ("word", "[a, b]") if kind is str else ("number", "[0.5, 0.5]")
            self.error(
                f"{name}: {value!r} in --config: expected a {word} or a list of {word}s, as in {name}: {example}."
            )
        return values

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Say what is wrong in one line and exit with 2."""
        wrong = re.search(
            r"(?:unrecognized arguments|ambiguous option): (--[\w-]+)|option '([\w.]+)' is not accepted", message, re.I
        )
        if wrong:
            name = (wrong[1] or f"--{wrong[2]}").replace("_", "-")
            words = self.elsewhere.get(name.removeprefix("--").removeprefix("no-").replace("-", "_"))
            flags = [flag for action in self._actions for flag in action.option_strings if flag.startswith("--")]
            near = difflib.get_close_matches(name, flags, n=2, cutoff=0.6)
            if name.startswith(("--data.", "--optim.", "--heads.")):
                words = "a run's recipe.yaml is no file of flags, which --print_config writes; --resume continues a run"
            message += f": {words}." if words else f"; did you mean {' or '.join(near)}?" if near else ""
        message = _in_words(message, self._actions)
        self.usage = "%(prog)s ..."  # not its hundred flags, above the one that is wrong
        super().error(message, ex)


def add_fields(parser: Parser, kind: type, title: str, leave: set[str], names: dict[str, str]) -> None:
    """A flag for every field of a dataclass: typed, spelled with dashes, its help from the field."""
    group = parser.add_argument_group(title)
    types = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        if field.name in leave or dataclasses.is_dataclass(types[field.name]):
            continue
        flag = f"--{names.get(field.name, field.name).replace('_', '-')}"
        default: Any = None if field.default is dataclasses.MISSING else field.default
        options: dict[str, Any] = {"help": field.metadata["help"], "default": default}
        inner = _element(types[field.name])
        if inner is not None:
            parser.elements[field.name] = inner
        if types[field.name] in (bool, bool | None):
            group.add_argument(flag, action=ActionYesNo(no_prefix="no-"), **options)
        elif field.name in _REPEATED:
            group.add_argument(flag, type=list[str] | str | None, **options)
        elif inner is not None:
            options["default"] = list(default) if isinstance(default, tuple) else default
            group.add_argument(flag, type=inner, nargs="+" if default or default is None else "*", **options)
        else:
            group.add_argument(flag, type=types[field.name], **options)


def _element(kind: Any) -> Any:
    """The element type of tuple[X, ...] or tuple[X, ...] | None; None for what is no tuple."""
    for option in typing.get_args(kind) if isinstance(kind, UnionType) else (kind,):
        if option is not NoneType and typing.get_origin(option) is tuple:
            return typing.get_args(option)[0]
    return None


def run_parser(prog: str, *, distill: bool, without: Mapping[str, str] | None = None) -> ArgumentParser:
    """The parser of `mgd-timm distill` or `train`, for scripts that take the same flags.

    Args:
        prog: What is called.
        distill: Which of both.
        without: Options that a script does not take, and the words for who gives one.
    """
    from mgd_timm.recipe.recipe import OF_DISTILLING, Data, Heads, Optim, Recipe

    about = (
        "Distil a teacher into a student." if distill else "Train a model on its own: a teacher, or a student alone."
    )
    if distill:
        elsewhere = dict.fromkeys(_TRAIN_ONLY, "mgd-timm train takes it")
        elsewhere |= {theirs: f"here it is --{ours.replace('_', '-')}" for ours, theirs in TRAIN_NAMES.items()}
    else:
        elsewhere = dict.fromkeys(OF_DISTILLING, "mgd-timm distill takes it")
        elsewhere |= {ours: f"here it is --{theirs.replace('_', '-')}" for ours, theirs in TRAIN_NAMES.items()}
    parser = Parser(prog=prog, description=about, elsewhere={**elsewhere, **(without or {})})
    parser.add_argument("--config", action="config", help="YAML file of flags")
    leave = (_TRAIN_ONLY if distill else OF_DISTILLING) | set(without or {})
    add_fields(parser, Recipe, "run", leave, {} if distill else TRAIN_NAMES)
    add_fields(parser, Data, "images", set(), {})
    add_fields(parser, Optim, "optimisation", set(), {})
    if distill:
        add_fields(parser, Heads, "granularity heads", set(), {})
        parser.set_defaults(dict.fromkeys(BY_PEER))
    else:
        parser.set_defaults(output="runs/train")
    return parser


def options_of(namespace: Namespace) -> dict[str, Any]:
    """A call's values as `make_recipe` takes them: without --config, lists as tuples."""
    values = dict(vars(namespace))
    values.pop("config", None)
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def given_options(parser: ArgumentParser, arguments: Sequence[str]) -> dict[str, Any]:
    """The options of `make_recipe` that a call or its --config names, and none of those that it leaves alone."""
    parser.set_defaults({name: None for name in vars(parser.get_defaults()) if name != "config"})
    return {name: value for name, value in options_of(parser.parse_args(list(arguments))).items() if value is not None}
