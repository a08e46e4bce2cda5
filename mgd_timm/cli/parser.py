"""Build the parsers of the commands from the recipe's dataclasses, and write the errors of wrong flags."""

import dataclasses
import difflib
import json
import re
import sys
import typing
from argparse import SUPPRESS, Action
from collections.abc import Collection, Mapping, Sequence
from types import UnionType
from typing import Any, NoReturn

import yaml
from jsonargparse import ActionYesNo, ArgumentParser, Namespace, get_loader

from mgd_timm.cli.help import Text, format_help, text_of
from mgd_timm.recipe.data import Data
from mgd_timm.recipe.heads import Heads
from mgd_timm.recipe.optim import Optim
from mgd_timm.recipe.options import fits, flag
from mgd_timm.recipe.recipe import OF_DISTILLING, PARTS, TRAIN_NAMES, TRAIN_ONLY, Recipe

BY_PEER = ("teacher", "criterion", "method")
"""Options whose defaults depend on --peer or --criterion; make_recipe sets them."""

GROUPS = (
    "teacher",
    "model",
    "method",
    "granularity heads",
    "data",
    "augmentation",
    "optimisation",
    "int8",
    "speed and memory",
    "run",
)
"""Headings of flags in the order of the help."""

_REPEATED = ("teacher", "teacher_classes")
"""Flags that may be given again, for one more value."""

_VALUES = {int: "N", float: "X", str: "NAME"}
"""Words for values in the help."""


def _gathered(words: Sequence[str]) -> list[str]:
    """Return a command's words with the values of each repeated flag in one list."""
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
"""jsonargparse's error about a value: several lines, with Python types for what it expected."""


def _in_one_line(message: str, actions: Sequence[Action]) -> str:
    """Return an error of jsonargparse about a value in one line: flag, value, what was expected. Keep other errors."""
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
    spelled = next((one for action in actions if action.dest == name for one in action.option_strings), name)
    return f"{spelled}: {value!r}: expected {expected}."


class _HelpAll(Action):
    """Prints every flag and exits."""

    def __init__(self, option_strings: Sequence[str], dest: str, **options: Any) -> None:
        super().__init__(option_strings, dest, nargs=0, default=SUPPRESS, **options)

    def __call__(self, parser: Any, *_: Any) -> NoReturn:
        print(format_help(parser, parser.texts, everything=True), end="")
        parser.exit()


class Parser(ArgumentParser):
    """jsonargparse's parser with a short --help and a full --help-all, repeated flags, and errors that name the flag.

    In a --config, a list of one may be given as a single value. The error for an unknown flag names the command that
    takes it, or the nearest flags.

    Args:
        elsewhere: Explanations for options that this command does not take, by their names with underscores.
        **options: Of jsonargparse's parser.
    """

    def __init__(self, *, elsewhere: Mapping[str, str] | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.elsewhere = dict(elsewhere or {})
        self.elements: dict[str, type] = {}
        """Of each option that is a list, the type of its elements."""
        self.texts: dict[str, Text] = {}
        """Help of the options that have a short and a long one, by destination."""
        self._groups: dict[str, Any] = {}
        self._positionals.title, self._optionals.title = "arguments", "help and configuration"
        self.add_argument("--help-all", action=_HelpAll, dest=SUPPRESS, help="show all flags and exit")

    def group(self, title: str) -> Any:
        """Return the group of flags with a title, created if it is missing."""
        if title not in self._groups:
            self._groups[title] = self.add_argument_group(title)
        return self._groups[title]

    def add_flag(
        self, name: str, kind: Any, default: Any, help: str, *, group: str, value: str | None = None, **options: Any
    ) -> None:
        """Add a flag with a typed value.

        Args:
            name: Name of the option, with underscores.
            kind: Type of the value. A tuple takes one or more, and bool also --no-NAME.
            default: Value if the flag is not given.
            help: Text in the help.
            group: Heading in the help.
            value: Word for the value in the help; by default one for its type.
            **options: Of jsonargparse's `add_argument`.
        """
        element = _element_type(kind)
        options |= {"help": help, "default": default}
        if element is not None:
            self.elements[name] = element
        if bool in _members(kind):
            options["action"] = ActionYesNo(no_prefix="no-")
        elif name in _REPEATED:
            options["type"] = list[str] | str | None
        elif element is not None:
            options |= {"type": element, "nargs": "+" if default or default is None else "*"}
            options["default"] = list(default) if isinstance(default, tuple) else default
        else:
            options["type"] = kind
        words = [word for one, word in _VALUES.items() if one in (element, *_members(kind))]
        if words:
            options["metavar"] = value or words[0]
        self.group(group).add_argument(flag(name), **options)

    def format_help(self, *_: Any) -> str:
        """Return the text of --help."""
        return format_help(self, self.texts, everything=False)

    def parse_args(self, args: Sequence[str] | None = None, *more: Any, **options: Any) -> Namespace:  # type: ignore[override]
        """Parse as jsonargparse does, with repeated flags."""
        return super().parse_args(_gathered(sys.argv[1:] if args is None else args), *more, **options)

    def parse_string(self, content: str, *more: Any, **options: Any) -> Namespace:
        """Parse the content of a --config as jsonargparse does, with single values for lists."""
        try:
            values = get_loader("yaml")(content)
        except yaml.YAMLError as error:
            self.error(f"--config: invalid YAML: {' '.join(str(error).split())}; --print_config writes a valid file.")
        if not isinstance(values, dict):
            self.error(
                f"--config: {content[:80]!r}: expected flags with values, as in epochs: 20; --print_config writes "
                "such a file."
            )
        listed = {name: self._listed(name, value) for name, value in values.items()}
        content = content if listed == values else json.dumps(listed)
        return super().parse_string(content, *more, **options)

    def _listed(self, name: str, value: Any) -> Any:
        """Return the value of an option in a --config, as a list where the option is one."""
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
        """Print what is wrong in one line and exit with 2."""
        wrong = re.search(
            r"(?:unrecognized arguments|ambiguous option): (--[\w-]+)|option '([\w.]+)' is not accepted", message, re.I
        )
        if wrong:
            name = (wrong[1] or f"--{wrong[2]}").replace("_", "-")
            words = self.elsewhere.get(name.removeprefix("--").removeprefix("no-").replace("-", "_"))
            flags = [one for action in self._actions for one in action.option_strings if one.startswith("--")]
            near = difflib.get_close_matches(name, flags, n=2, cutoff=0.6)
            if name.startswith(("--data.", "--optim.", "--heads.")):
                words = "give --config a file that --print_config wrote, not a recipe.yaml; --resume continues a run"
            message += f": {words}." if words else f"; did you mean {' or '.join(near)}?" if near else ""
        if message.endswith("expected one argument"):
            message += ", and one that begins with a dash after an equals sign (--output=-name)"
        message = _in_one_line(message, self._actions)
        self.usage = "%(prog)s ..."  # without all its flags above the wrong one
        super().error(message, ex)


def add_fields(
    parser: Parser,
    kind: type,
    *,
    group: str,
    leave_out: Collection[str] = (),
    names: Mapping[str, str] | None = None,
    defaults: Mapping[str, Any] | None = None,
) -> None:
    """Add a flag for every field of a recipe's dataclass.

    Args:
        parser: To add the flags to.
        kind: The dataclass.
        group: Heading in the help for fields without their own.
        leave_out: Fields without a flag.
        names: Names of flags, with underscores, that differ from the field's.
        defaults: Defaults that differ from the field's.
    """
    types = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        if field.name not in leave_out and field.name not in PARTS:
            name = (names or {}).get(field.name, field.name)
            default = (defaults or {}).get(field.name, field.default)
            parser.texts[name] = text = text_of(field, default)
            heading, value = field.metadata["group"] or group, field.metadata["value"]
            parser.add_flag(name, types[field.name], default, text.full, group=heading, value=value)


def _members(kind: Any) -> tuple[Any, ...]:
    """Return the types of a union, or the one type."""
    return typing.get_args(kind) if isinstance(kind, UnionType) else (kind,)


def _element_type(kind: Any) -> Any:
    """Return X of tuple[X, ...] or tuple[X, ...] | None, and None for other types."""
    for member in _members(kind):
        if typing.get_origin(member) is tuple:
            return typing.get_args(member)[0]
    return None


def run_parser(
    prog: str, *, distill: bool, without: Mapping[str, str] | None = None, defaults: Mapping[str, Any] | None = None
) -> Parser:
    """Build the parser of `mgd-timm distill` or `train`, also for scripts that take the same flags.

    Args:
        prog: Name of the program in messages.
        distill: Build the parser of distill, else that of train.
        without: Options that a script does not take, each with an explanation for the error.
        defaults: Defaults of a script that differ from the recipe's.
    """
    if distill:
        about = "Distil a teacher into a student."
        elsewhere = dict.fromkeys(TRAIN_ONLY, "only mgd-timm train takes it")
        elsewhere |= {theirs: f"give {flag(ours)} instead" for ours, theirs in TRAIN_NAMES.items()}
    else:
        about = "Train a model without a teacher: a future teacher, or a student as a baseline."
        elsewhere = dict.fromkeys(OF_DISTILLING, "only mgd-timm distill takes it")
        elsewhere |= {ours: f"give {flag(theirs)} instead" for ours, theirs in TRAIN_NAMES.items()}
    parser = Parser(prog=prog, description=about, elsewhere={**elsewhere, **(without or {})})
    parser.add_argument("--config", action="config", metavar="FILE", help="YAML file of flags")
    printing = next(action for action in parser._actions if action.dest == "print_config")
    printing.help = "print the flags of this call as a file for --config and exit"
    leave_out = (TRAIN_ONLY if distill else OF_DISTILLING) | set(without or {})
    for title in GROUPS:
        parser.group(title)
    names = {} if distill else TRAIN_NAMES
    defaults = {**({} if distill else {"output": "runs/train"}), **(defaults or {})}
    # Optim before Recipe, which has flags under the same heading.
    for kind, title in ((Data, "data"), (Optim, "optimisation"), (Recipe, "run"), (Heads, "granularity heads")):
        add_fields(parser, kind, group=title, leave_out=leave_out, names=names, defaults=defaults)
    if distill:
        parser.set_defaults(dict.fromkeys(BY_PEER))
    return parser


def options_of(namespace: Namespace) -> dict[str, Any]:
    """Return the parsed values as options of `make_recipe`: without --config, and with tuples for lists."""
    values = dict(vars(namespace))
    values.pop("config", None)
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def given_options(parser: ArgumentParser, arguments: Sequence[str]) -> dict[str, Any]:
    """Return the options of `make_recipe` that the arguments or their --config give, without the defaults."""
    parser.set_defaults({name: None for name in vars(parser.get_defaults()) if name != "config"})
    return {name: value for name, value in options_of(parser.parse_args(list(arguments))).items() if value is not None}
