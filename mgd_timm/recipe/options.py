"""Options and their values: checked against the annotation of their field, as plain data, compared and digested.

Of any dataclass whose fields are options; which ones there are is the recipe's to say.
"""

import dataclasses
import difflib
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin


def option(default: Any, help: str, *, digest: bool = True) -> Any:
    """A field of a recipe: its default, its line of --help, and whether it decides the weights that a run ends with."""
    return dataclasses.field(default=default, metadata={"help": help, "digest": digest})


def unknown(kind: str, name: str, known: Iterable[str]) -> ValueError:
    """The error for a name that does not exist, with the nearest ones that do."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = (
        f"did you mean {' or '.join(near)}?"
        if near
        else f"known: {', '.join(known[:20])}{', ...' if len(known) > 20 else ''}."
    )
    return ValueError(f"unknown {kind} {name!r}: {hint}")


def check_choices(part: Any) -> None:
    """Refuse a word that is not among a field's Literal."""
    for f in dataclasses.fields(part):
        if get_origin(f.type) is Literal:
            _chosen(f.name, getattr(part, f.name), f.type)


def _chosen(name: str, value: Any, choices: Any) -> Any:
    if value not in get_args(choices):
        raise unknown(name, str(value), get_args(choices))
    return value


def typed(name: str, value: Any, kind: Any) -> Any:
    """The value of an option as its field's annotation has it: lists and single values as tuples, whole numbers as
    floats."""
    for one in get_args(kind) if isinstance(kind, UnionType) else (kind,):
        if get_origin(one) is tuple:
            inner = get_args(one)[0]
            values = [value] if fits(value, inner) else value
            if isinstance(values, list | tuple) and all(fits(v, inner) for v in values):
                return tuple(inner(v) for v in values)
        elif get_origin(one) is Literal:
            if isinstance(value, str):
                return _chosen(name, value, one)
        elif fits(value, one):
            return value if one is NoneType else one(value)
    words = kind.__name__ if isinstance(kind, type) else str(kind).removeprefix("typing.")
    shown = repr(value) if len(repr(value)) < 80 else "(long)"
    raise ValueError(f"{name}={shown}: expected {words}, not {type(value).__name__}.")


def fits(value: Any, kind: type) -> bool:
    """Whether a value is of a kind: a whole number is a float as well, a path a word, but no boolean a number."""
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, {float: (float, int), str: (str, os.PathLike)}.get(kind, kind))


def as_dict(recipe: Any, *, digest_only: bool = False) -> dict[str, Any]:
    """The recipe's fields by name, nested as the dataclasses are; tuples as lists."""
    out: dict[str, Any] = {}
    for f in dataclasses.fields(recipe):
        value = getattr(recipe, f.name)
        if dataclasses.is_dataclass(value):
            out[f.name] = as_dict(value, digest_only=digest_only)
        elif f.metadata.get("digest", True) or not digest_only:
            out[f.name] = list(value) if isinstance(value, tuple) else value
    return out


def digest(value: Any) -> str:
    """sha256 of a JSON value, independent of the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def differences(one: dict[str, Any], two: dict[str, Any], prefix: str = "") -> list[str]:
    """'name: a -> b' for every leaf in which two nested dicts differ."""
    found: list[str] = []
    for key in sorted(set(one) | set(two)):
        a, b = one.get(key), two.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append(f"{prefix}{key}: {a!r} -> {b!r}")
    return found


def few(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
