"""What --help and --help-all print: a command's usage, and its flags in groups."""

import textwrap
from argparse import SUPPRESS, Action
from collections.abc import Iterator, Mapping
from dataclasses import Field
from typing import Any, NamedTuple

from jsonargparse import ActionYesNo, ArgumentParser

WIDTH = 100
"""Columns of a line."""


class Text(NamedTuple):
    """Text of a flag in --help, None if only --help-all shows it, and in --help-all."""

    short: str | None
    full: str


def text_of(field: Field[Any], default: Any) -> Text:
    """Return the texts of a recipe's field, with its default unless the help explains it."""
    full = field.metadata["help"]
    short = with_default(full.partition(";")[0], default) if field.metadata["common"] else None
    return Text(short, with_default(full, default))


def with_default(about: str, default: Any) -> str:
    """Return the text of a flag with its default, unless the text names a default or there is none."""
    return about if not default or "default" in about else f"{about} (default: {_words(default)})"


def _words(default: Any) -> str:
    if isinstance(default, tuple | list):
        return " ".join(map(_words, default))
    if isinstance(default, bool):
        return "on" if default else "off"
    return f"{default:g}" if isinstance(default, float) else str(default)


def format_help(parser: ArgumentParser, texts: Mapping[str, Text], *, everything: bool) -> str:
    """Return the help of a command.

    Args:
        parser: Parser of the command.
        texts: Short and full texts of flags, by their destination. Flags without are always shown.
        everything: Show every flag with its full text, else the common ones with their short texts.
    """
    words = [_invocation(action) for action in parser._actions if not action.option_strings]
    usage = parser.usage or " ".join(["%(prog)s", *words, "[--FLAG VALUE ...]"])
    lines = [f"usage: {usage % {'prog': parser.prog}}", "", *textwrap.wrap(parser.description or "", WIDTH)]
    # --help and --config come last; argparse puts them first.
    for group in sorted(parser._action_groups, key=lambda group: group is parser._optionals):
        rows = [row for action in group._group_actions for row in _rows(action, texts.get(action.dest), everything)]
        lines += ["", f"{group.title}:", *rows] if rows else []
    hidden = sum(text.short is None for text in texts.values())
    if hidden and not everything:
        lines += ["", f"{hidden} more flags: {parser.prog} --help-all"]
    return "\n".join(lines) + "\n"


def _rows(action: Action, text: Text | None, everything: bool) -> Iterator[str]:
    """Yield the lines of a flag, none if it is not shown."""
    if text is not None:
        about = text.full if everything else text.short
    else:
        about = action.help and with_default(action.help, None if action.default == SUPPRESS else action.default)
    if not about or about == SUPPRESS:
        return
    indent = 34 if everything else 27
    left = f"  {_invocation(action, both=everything)}"
    wrapped = textwrap.wrap(about, WIDTH - indent, break_on_hyphens=False)
    if len(left) < indent - 1:
        left = left.ljust(indent) + wrapped.pop(0)
    yield left
    yield from (" " * indent + line for line in wrapped)


def _invocation(action: Action, *, both: bool = False) -> str:
    """Return a flag with a word for its value, as a user types it."""
    if not action.option_strings:
        return str(action.metavar or action.dest).upper()
    flags = [flag for flag in action.option_strings if not flag.endswith("+")]
    if isinstance(action, ActionYesNo):
        return ", ".join(flags if both else flags[:1])
    if action.nargs == 0 or action.dest == "print_config":
        return ", ".join(flags)
    value = action.metavar or "VALUE"
    return f"{', '.join(flags)} {value}{' ...' if action.nargs in ('+', '*') else ''}"
