"""Markdown of text that is not ours: names of classes, folders and data sets may hold any character."""

import re
from collections.abc import Sequence

NONE = "–"  # noqa: RUF001 - the dash of an empty cell
_SYMBOLS = re.compile(r"([\\`*_{}\[\]#!|~$])")
_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}


def escape(text: object, longest: int = 80) -> str:
    """Return text in one line that a page shows as it is: without Markdown, HTML, tables and characters that are not
    printed; what is longer is cut."""
    words = " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())
    words = words if len(words) <= longest else words[: longest - 1] + "…"
    words = "".join(_ENTITIES.get(c, c) for c in words)
    return _SYMBOLS.sub(r"\\\1", words)


def code(text: object) -> str:
    """Return a name as code in a line, without what would end it."""
    return f"`{' '.join(''.join(c if c.isprintable() and c not in '`|' else ' ' for c in str(text)).split())}`"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table of cells that are Markdown already; the first column is text, the others are numbers."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def pairs(rows: Sequence[tuple[str, str]], head: tuple[str, str] = ("", "")) -> str:
    """Return a table of names and values."""
    return "\n".join(
        [f"| {head[0]} | {head[1]} |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows)]
    )
