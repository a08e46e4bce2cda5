"""Declare the fields of a recipe's dataclasses, check their types, compare and digest them."""

import dataclasses
import difflib
import hashlib
import json
import math
import os
from collections.abc import Iterable, Sequence
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin


@dataclasses.dataclass(frozen=True)
class Range:
    """Numbers that an option takes: finite ones between these bounds.

    Args:
        minimum: The smallest.
        above: All are greater than this.
        maximum: The largest.
        below: All are less than this.
    """

    minimum: float = -math.inf
    above: float = -math.inf
    maximum: float = math.inf
    below: float = math.inf

    def __contains__(self, value: float) -> bool:
        return math.isfinite(value) and self.minimum <= value <= self.maximum and self.above < value < self.below

    def __str__(self) -> str:
        if self == Range(above=0):
            return "a positive number"
        if self.minimum > -math.inf and self.maximum < math.inf:
            return f"{self.minimum} to {self.maximum}"
        bounds = [
            f"{self.minimum} or more" if self.minimum > -math.inf else "",
            f"more than {self.above}" if self.above > -math.inf else "",
            f"at most {self.maximum}" if self.maximum < math.inf else "",
            f"less than {self.below}" if self.below < math.inf else "",
        ]
        return " and ".join(filter(None, bounds)) or "a finite number"


def option(
    default: Any,
    help: str,
    *,
    group: str | None = None,
    common: bool = False,
    value: str | None = None,
    digest: bool = True,
    **bounds: float,
) -> Any:
    """Declare a field of a recipe.

    Args:
        default: Default value.
        help: Text in --help-all. --help shows the words before the first semicolon.
        group: Heading in the help; by default that of its dataclass.
        common: Whether --help shows it.
        value: Word for its value in the help; by default one for its type.
        digest: Whether it changes a run's final weights.
        **bounds: Of its value, or of each of its values, as `Range` takes them.
    """
    metadata = {"help": help, "group": group, "common": common, "value": value, "digest": digest}
    return dataclasses.field(default=default, metadata={**metadata, "range": Range(**bounds)})


def flag(name: str) -> str:
    """Return the command line's flag for an option."""
    return f"--{name.replace('_', '-')}"


def unknown(kind: str, name: str, known: Iterable[str]) -> ValueError:
    """Return the error for an unknown name, with the nearest known ones."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = (
        f"did you mean {' or '.join(near)}?"
        if near
        else f"known: {', '.join(known[:20])}{', ...' if len(known) > 20 else ''}."
    )
    return ValueError(f"unknown {kind} {name!r}: {hint}")


def check_choice(name: str, value: Any, choices: Any) -> Any:
    """Return the value of an option. Raise ValueError unless it is among the words of a Literal."""
    if value not in get_args(choices):
        raise unknown(name, str(value), get_args(choices))
    return value


def typed(name: str, value: Any, kind: Any) -> Any:
    """Return the value of an option in the type of its field: lists and single values as tuples, integers as floats.

    Raises:
        ValueError: A value of another type.
    """
    for one in get_args(kind) if isinstance(kind, UnionType) else (kind,):
        if get_origin(one) is tuple:
            inner = get_args(one)[0]
            values = [value] if fits(value, inner) else value
            if isinstance(values, list | tuple) and all(fits(v, inner) for v in values):
                return tuple(_converted(name, v, inner) for v in values)
        elif get_origin(one) is Literal:
            if isinstance(value, str):
                return check_choice(name, value, one)
        elif fits(value, one):
            return value if one is NoneType else _converted(name, value, one)
    words = kind.__name__ if isinstance(kind, type) else str(kind).removeprefix("typing.")
    text = repr(value) if len(repr(value)) < 80 else "(long)"
    raise ValueError(f"{name}={text}: expected {words}, not {type(value).__name__}.")


def _converted(name: str, value: Any, kind: type) -> Any:
    """Return a value in a type that it fits; a path that begins with ~ has the home folder in its place."""
    if kind is not str:
        return kind(value)
    text = str(value)
    if not text:  # such as of a shell's variable that is not set: Path("") would be the current folder
        raise ValueError(f"{name}='': expected text. For the default leave {flag(name)} out.")
    return expand_home(text, name)


def expand_home(place: str, name: str) -> str:
    """Return a place with the user's home folder for a ~ at its beginning, also after `local-dir:`.

    Args:
        place: A path, or another name, which is returned as it is.
        name: Of the option, for messages.

    Raises:
        ValueError: The home folder is unknown, or the place is not valid text.
    """
    try:
        place.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name}={place!a}: its bytes are not UTF-8: rename it, or set PYTHONUTF8=1 if it is UTF-8 and the locale "
            "(LC_ALL) is not."
        ) from error
    kind = "local-dir:" if place.startswith("local-dir:") else ""
    path = os.path.expanduser(place.removeprefix(kind))
    if path == "~" or path.startswith("~/"):
        raise ValueError(f"{name}={place!r}: the home folder is unknown: set HOME, or give the whole path.")
    return kind + path


def plain_model_name(name: str) -> str:
    """Return the name of a model as timm writes it, for one that was copied from a page of the hub.

    `timm/NAME` is timm's NAME, unless there is such a folder; `hf_hub:ID` is the old form of `hf-hub:ID`.
    """
    if name.startswith("hf_hub:"):
        name = f"hf-hub:{name.removeprefix('hf_hub:')}"
    return name if os.path.exists(name) else name.removeprefix("timm/")


def plain_architecture(name: str) -> str:
    """Return the name as `plain_model_name` does, and for `hf-hub:timm/NAME` timm's NAME, which needs no network."""
    return plain_model_name(name).removeprefix("hf-hub:timm/")


def fits(value: Any, kind: type) -> bool:
    """Return whether a value has a type. An integer is also a float and a path a string; a boolean is no number."""
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, {float: (float, int), str: (str, os.PathLike)}.get(kind, kind))


def as_dict(recipe: Any, *, digest_only: bool = False) -> dict[str, Any]:
    """Return a recipe's fields by name, nested as its dataclasses are, with tuples as lists.

    Args:
        recipe: A dataclass of options.
        digest_only: Leave out the options that do not change the weights.
    """
    out: dict[str, Any] = {}
    for f in dataclasses.fields(recipe):
        value = getattr(recipe, f.name)
        if dataclasses.is_dataclass(value):
            out[f.name] = as_dict(value, digest_only=digest_only)
        elif f.metadata.get("digest", True) or not digest_only:
            out[f.name] = list(value) if isinstance(value, tuple) else value
    return out


def digest(value: Any) -> str:
    """Return the sha256 of a JSON value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def differences(one: dict[str, Any], two: dict[str, Any], prefix: str = "") -> list[str]:
    """Return 'name: a -> b' for every leaf in which two nested dicts differ."""
    found: list[str] = []
    for key in sorted(set(one) | set(two)):
        a, b = one.get(key), two.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append(f"{prefix}{key}: {a!r} -> {b!r}")
    return found


def few(names: Sequence[str]) -> str:
    """Return the first five names and the number of the others, in words."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
