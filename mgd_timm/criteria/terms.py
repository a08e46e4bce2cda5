"""The objective of a run from a recipe's words: which criteria, of which weight, with which options."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import yaml

from mgd_timm.criteria import CRITERIA, Criterion
from mgd_timm.criteria.base import Need
from mgd_timm.criteria.standardisation import Standardised
from mgd_timm.features import Pair
from mgd_timm.recipe.options import typed, unknown
from mgd_timm.recipe.recipe import Recipe


@dataclass(frozen=True)
class Term:
    """A criterion as a recipe asks for it.

    Args:
        criterion: Its name in CRITERIA.
        weight: 0 leaves it out.
        warmup: Epochs over which the weight rises linearly from 0.
        options: Hyper-parameters of its constructor.
    """

    criterion: str
    weight: float
    warmup: float = 0.0
    options: Mapping[str, Any] = field(default_factory=dict)


def parse_terms(recipe: Recipe) -> dict[str, Term]:
    """Terms by name (task, kd, and the host methods), from the recipe's words and the presets of the MGD authors'
    scripts.

    The only host KD: 0.2 task, 0.8 kd. Another host X: 1 task, X's weight, and kd 1 under mag and mas, none else. Two
    students that teach each other (peer): no kd that is not asked for.

    Raises:
        ValueError: An unknown criterion or option, a weight that is no number, or two different weights of one term.
    """
    given: dict[str, tuple[float | None, float]] = {}
    for word in (part.strip() for words in recipe.criterion for part in words.split(",")):
        name, weight, warmup = _word(word)
        if warmup > recipe.optim.epochs:
            raise ValueError(
                f"criterion {word!r} warms up over {warmup:g} of {recipe.optim.epochs} epochs: it would never be whole."
            )
        if name in given and given[name] != (weight, warmup):
            raise ValueError(f"two weights of {name} in criterion {list(recipe.criterion)}: give one.")
        given[name] = (weight, warmup)
    named = set(given)
    for name, value in (("ce", recipe.task_weight), ("kd", recipe.kd_weight)):
        if value is not None:
            weight, warmup = given.get(name, (None, 0.0))
            if weight not in (None, value):
                raise ValueError(f"two weights of {name}: {weight} in --criterion and {value} as an option of its own.")
            given[name] = (value, warmup)
    hosts = [name for name in given if name not in ("ce", "kd")]
    alone = "kd" in named and not hosts
    beside = hosts and recipe.method != "none" and recipe.peer is None
    presets = {name: CRITERIA[name].weight for name in hosts}
    presets["ce"] = 0.2 if alone else 1.0
    presets["kd"] = CRITERIA["kd"].weight if alone else 1.0 if beside or "kd" in named else 0.0
    options = _options(recipe)
    terms = {}
    for name in ("ce", "kd", *hosts):
        weight, warmup = given.get(name, (None, 0.0))
        term = Term(name, presets[name] if weight is None else weight, warmup, options.get(name, {}))
        terms["task" if name == "ce" else name] = term
        _check_term(term, recipe, plain=weight is None)
    for flag, value, default, term in (
        ("kd_temperature", recipe.kd_temperature, 4.0, terms["kd"]),
        ("smoothing", recipe.smoothing, 0.0, terms["task"]),
    ):
        if value != default and not term.weight:
            raise ValueError(
                f"{flag}={value} does nothing: {term.criterion} has weight 0. Give it one, or leave {flag} out."
            )
    for name in options:
        if name not in given and name not in ("ce", "kd"):
            raise ValueError(
                f"criterion options of {name}, which the criterion {list(recipe.criterion)} does not name."
            )
        if not terms["task" if name == "ce" else name].weight:
            raise ValueError(f"criterion options of {name}, whose weight is 0: give it one, or leave them out.")
    kinds = [CRITERIA[term.criterion] for term in terms.values() if term.weight]
    if all(kind.fits == "student" for kind in kinds):
        codes = "" if recipe.method == "none" else ", and the codes teach the classifier nothing"
        raise ValueError(f"every weight is 0: {', '.join(terms)}{codes}. Give task_weight or a criterion one.")
    if recipe.standardise_logits and not any("logits" in kind.needs for kind in kinds):
        raise ValueError(
            f"standardise_logits: no criterion of {list(recipe.criterion)} reads logits. Give kd a weight "
            "(kd_weight=1)."
        )
    return terms


def criterion_names(recipe: Recipe) -> list[str]:
    """The criteria that a recipe names, in its order, without those of weight 0."""
    terms = parse_terms(recipe)
    names = dict.fromkeys(word.strip().partition(":")[0] for words in recipe.criterion for word in words.split(","))
    return [name for name in names if terms["task" if name == "ce" else name].weight]


def _check_term(term: Term, recipe: Recipe, *, plain: bool) -> None:
    """Raise ValueError for a criterion that goes with a peer alone or with a teacher alone, or whose weight would do
    nothing."""
    kind, name = CRITERIA[term.criterion], term.criterion
    if not term.weight:
        return
    if kind.peers and recipe.peer is None:
        raise ValueError(
            f"{name} is for two students that teach each other: give --peer NAME instead of a teacher. From a frozen "
            "teacher its divergence is --criterion kd --kd-temperature 1."
        )
    if kind.fits is not None and recipe.peer is not None:
        raise ValueError(
            f"{name} is fitted on a trained teacher before the run, and a peer is not trained yet: leave {name} out."
        )
    if kind.fits == "student" and (term.warmup or not plain):
        raise ValueError(
            f"{name} fits the student before the run, by its loss alone: a weight or warm-up would change nothing. "
            f"Give {name} plain (its rate: --fitting-lr), or leave it out."
        )


_FORM = "NAME, NAME:WEIGHT or NAME:WEIGHT:EPOCHS"


def _word(word: str) -> tuple[str, float | None, float]:
    """Name, weight and warm-up of NAME[:WEIGHT[:WARMUP_EPOCHS]]."""
    name, *numbers = word.split(":")
    if name not in CRITERIA:
        raise unknown("criterion", name, CRITERIA)
    values: list[float | None] = []
    for text in numbers:
        try:
            values.append(float(text) if text else None)
        except ValueError:
            raise ValueError(f"criterion {word!r}: expected {_FORM}, and {text!r} is no number.") from None
    if len(values) > 2:
        raise ValueError(f"criterion {word!r}: expected {_FORM}.")
    for value in values:
        if value is not None and not 0 <= value < float("inf"):
            raise ValueError(f"criterion {word!r}: expected finite numbers, 0 or more.")
    weight, warmup = (*values, None, None)[:2]
    return name, weight, warmup or 0.0


def _options(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """Hyper-parameters by criterion from words such as crd.queue=65536, typed as their constructors have them."""
    found: dict[str, dict[str, Any]] = {}
    for word in recipe.criterion_options:
        place, _, text = word.partition("=")
        name, _, option = place.partition(".")
        if not text or not option:
            raise ValueError(f"criterion option {word!r}: expected NAME.OPTION=VALUE, such as kd.divergence=reverse.")
        if name not in CRITERIA:
            raise unknown("criterion", name, CRITERIA)
        known = hyper_parameters(CRITERIA[name])
        if option not in known:
            raise (
                unknown(f"option of {name}", option, known)
                if known
                else ValueError(f"criterion {name!r} has no options.")
            )
        if option in found.setdefault(name, {}):
            raise ValueError(f"two values of {place}: give one.")
        found[name][option] = typed(place, _value(text, known[option].annotation), known[option].annotation)
    for name, option, value, default in (
        ("kd", "temperature", recipe.kd_temperature, 4.0),
        ("ce", "smoothing", recipe.smoothing, 0.0),
    ):
        kept = found.setdefault(name, {}) if value != default else {}
        if value != default and kept.setdefault(option, value) != value:
            raise ValueError(
                f"two values of {name}.{option}: {kept[option]} in criterion_options and {value} as an option of its "
                "own."
            )
    return found


def _value(text: str, annotation: Any) -> Any:
    """A number, none, true or false, or a list of numbers, as YAML has them; a word, where it is none of these."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    if isinstance(value, str):
        try:
            value = None if value.lower() == "none" else float(value)  # YAML wants a dot in 1e-3
        except ValueError:
            return value
    if isinstance(value, float) and value.is_integer() and float not in (annotation, *get_args(annotation)):
        return int(value)
    return value


def hyper_parameters(kind: type[Criterion]) -> dict[str, inspect.Parameter]:
    """The keyword-only arguments of a criterion's constructor."""
    parameters = inspect.signature(kind.__init__).parameters
    return {name: p for name, p in parameters.items() if p.kind is inspect.Parameter.KEYWORD_ONLY}


def needs(recipe: Recipe, part: Need, *, student: bool = False) -> bool:
    """Whether a term with a weight reads that part of the teacher's features, or of the student's; none does in
    training alone."""
    if recipe.teacher is None and recipe.peer is None:
        return False
    kinds = [CRITERIA[term.criterion] for term in parse_terms(recipe).values() if term.weight]
    both = student or recipe.peer is not None
    return any(
        part in (kind.needs | kind.student_needs if both else kind.needs) for kind in kinds if kind.fits != "student"
    )


def fitted_first(recipe: Recipe, what: Literal["teacher", "student"]) -> dict[str, Term]:
    """The terms whose criterion fits something of the teacher, or the student, before the run."""
    if recipe.teacher is None:
        return {}
    return {
        name: term
        for name, term in parse_terms(recipe).items()
        if term.weight and CRITERIA[term.criterion].fits == what
    }


def build_criterion(term: Term, pair: Pair, recipe: Recipe) -> Criterion:
    """One criterion of a recipe, its logits standardised where the recipe says so.

    Raises:
        ValueError: What the criterion refuses, with its name.
    """
    kind = CRITERIA[term.criterion]
    try:
        criterion = kind(pair, **term.options)
        return Standardised(criterion) if recipe.standardise_logits and "logits" in kind.needs else criterion
    except ValueError as error:
        raise ValueError(f"criterion {term.criterion!r}: {error}") from error
