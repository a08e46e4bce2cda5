"""The words of --criterion and --criterion-options as Terms: which criteria, of which weight, with which options."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import yaml

from mgd_timm.criteria import CRITERIA, Criterion
from mgd_timm.criteria.base import Need
from mgd_timm.criteria.standardisation import Standardised
from mgd_timm.features import Pair
from mgd_timm.recipe.options import typed, unknown


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

    @property
    def kind(self) -> type[Criterion]:
        """The class of the criterion."""
        return CRITERIA[self.criterion]


@dataclass(frozen=True)
class Terms:
    """The terms of a run's loss, parsed once.

    Args:
        by_name: task, kd and the host methods, also those of weight 0.
        named: The criteria that --criterion names, in its order.
        standardise_logits: Standardise the logits of each criterion that reads them.
        teaches: There is a teacher or a peer; without one, only the task's loss is computed.
        peer: Two students teach each other, so that each one's features are read as a teacher's.
    """

    by_name: Mapping[str, Term]
    named: tuple[str, ...] = ()
    standardise_logits: bool = False
    teaches: bool = True
    peer: bool = False

    @property
    def active(self) -> dict[str, Term]:
        """The terms with a weight, by name."""
        return {name: term for name, term in self.by_name.items() if term.weight}

    @property
    def in_run(self) -> dict[str, Term]:
        """The active terms that are losses of the run itself: not those that fit the student before it."""
        return {name: term for name, term in self.active.items() if term.kind.fits != "student"}

    def criterion_names(self) -> list[str]:
        """The criteria that are named and have a weight, in the order of the words."""
        return [name for name in self.named if self.by_name["task" if name == "ce" else name].weight]

    def needs(self, part: Need, *, student: bool = False) -> bool:
        """True if a term of the run reads that part of the teacher's features, or of the student's."""
        if not self.teaches:
            return False
        both = student or self.peer
        kinds = [term.kind for term in self.in_run.values()]
        return any(part in (kind.needs | kind.student_needs if both else kind.needs) for kind in kinds)

    def fitted_first(self, what: Literal["teacher", "student"]) -> dict[str, Term]:
        """The terms whose criterion fits something of the teacher, or the student, before the run."""
        return {name: term for name, term in self.active.items() if self.teaches and term.kind.fits == what}


def task_alone(smoothing: float = 0.0) -> Terms:
    """The terms of training without a teacher: the labels' loss."""
    options = {"smoothing": smoothing} if smoothing else {}
    return Terms({"task": Term("ce", 1.0, options=options)}, teaches=False)


@dataclass(frozen=True)
class TermOptions:
    """What decides the terms beside --criterion; each field is the recipe's option of that name.

    Args:
        epochs: Of the run, which a warm-up must not exceed.
        method: "none", "mag" or "mas": under the last two a host method is accompanied by kd of weight 1.
        peer: A second student stands in place of the teacher.
        task_weight, kd_weight: None leaves them to the presets.
        kd_temperature: Of kd.
        smoothing: Label smoothing of the task's loss.
        standardise_logits: Standardise the logits of each criterion that reads them.
    """

    epochs: int
    method: str = "mas"
    peer: bool = False
    task_weight: float | None = None
    kd_weight: float | None = None
    kd_temperature: float = 4.0
    smoothing: float = 0.0
    standardise_logits: bool = False


def parse_terms(criterion: Sequence[str], criterion_options: Sequence[str], options: TermOptions) -> Terms:
    """Parse the words of --criterion, with the presets of the MGD authors' scripts.

    kd alone: 0.2 task, 0.8 kd. Another host X: 1 task, X's weight, and kd 1 under mag and mas, none else. Two students
    that teach each other (peer): no kd that is not asked for.

    Args:
        criterion: NAME, NAME:WEIGHT or NAME:WEIGHT:EPOCHS, several in a word separated by commas.
        criterion_options: NAME.OPTION=VALUE.
        options: What else decides the terms.

    Raises:
        ValueError: An unknown criterion or option, a weight that is no number, or two different weights of one term.
    """
    given = _given_weights(criterion, options)
    hosts = [name for name in given if name not in ("ce", "kd")]
    named = tuple(dict.fromkeys(word.partition(":")[0] for word in _words(criterion)))
    alone = "kd" in named and not hosts
    beside = hosts and options.method != "none" and not options.peer
    presets = {name: CRITERIA[name].weight for name in hosts}
    presets["ce"] = 0.2 if alone else 1.0
    presets["kd"] = CRITERIA["kd"].weight if alone else 1.0 if beside or "kd" in named else 0.0
    arguments = _arguments(criterion_options, options)
    by_name = {}
    for name in ("ce", "kd", *hosts):
        weight, warmup = given.get(name, (None, 0.0))
        term = Term(name, presets[name] if weight is None else weight, warmup, arguments.get(name, {}))
        by_name["task" if name == "ce" else name] = term
        _check_term(term, peer=options.peer, plain=weight is None)
    terms = Terms(by_name, named, options.standardise_logits, peer=options.peer)
    _check_options_are_used(terms, arguments, list(criterion), options)
    _check_something_is_learnt(terms, list(criterion), options)
    return terms


def _words(criterion: Sequence[str]) -> list[str]:
    return [part.strip() for words in criterion for part in words.split(",")]


def _given_weights(criterion: Sequence[str], options: TermOptions) -> dict[str, tuple[float | None, float]]:
    """Weight (None where it is left open) and warm-up of each criterion that is named or has a weight option."""
    given: dict[str, tuple[float | None, float]] = {}
    for word in _words(criterion):
        name, weight, warmup = _word(word)
        if warmup > options.epochs:
            raise ValueError(
                f"criterion {word!r} warms up over {warmup:g} of {options.epochs} epochs: it would never reach its "
                "weight. Give a shorter warm-up or more --epochs."
            )
        if name in given and given[name] != (weight, warmup):
            raise ValueError(f"two weights of {name} in criterion {list(criterion)}: give one.")
        given[name] = (weight, warmup)
    for name, flag, value in (
        ("ce", "--task-weight", options.task_weight),
        ("kd", "--kd-weight", options.kd_weight),
    ):
        if value is not None:
            weight, warmup = given.get(name, (None, 0.0))
            if weight not in (None, value):
                raise ValueError(f"two weights of {name}: {weight} in --criterion and {flag} {value}: give one.")
            given[name] = (value, warmup)
    return given


def _check_options_are_used(
    terms: Terms, arguments: Mapping[str, Any], criterion: list[str], options: TermOptions
) -> None:
    """Raise ValueError for an option of a criterion that is not named or has weight 0."""
    for flag, value, default, name in (
        ("kd_temperature", options.kd_temperature, 4.0, "kd"),
        ("smoothing", options.smoothing, 0.0, "task"),
    ):
        term = terms.by_name[name]
        if value != default and not term.weight:
            raise ValueError(
                f"{flag}={value} does nothing: {term.criterion} has weight 0. Give it one, or leave {flag} out."
            )
    for name in arguments:
        if name not in terms.named and name not in ("ce", "kd"):
            raise ValueError(f"criterion options of {name}, which the criterion {criterion} does not name.")
        if not terms.by_name["task" if name == "ce" else name].weight:
            raise ValueError(f"criterion options of {name}, whose weight is 0: give it one, or leave them out.")


def _check_something_is_learnt(terms: Terms, criterion: list[str], options: TermOptions) -> None:
    """Raise ValueError where every weight of the run is 0, or logits are standardised that no criterion reads."""
    if not terms.in_run:
        codes = "" if options.method == "none" else ", and the codes teach the classifier nothing"
        raise ValueError(f"every weight is 0: {', '.join(terms.by_name)}{codes}. Give task_weight or a criterion one.")
    if terms.standardise_logits and not any("logits" in term.kind.needs for term in terms.active.values()):
        raise ValueError(
            f"standardise_logits: no criterion of {criterion} reads logits. Give kd a weight (kd_weight=1)."
        )


def _check_term(term: Term, *, peer: bool, plain: bool) -> None:
    """Raise ValueError for a criterion that goes with a peer alone or with a teacher alone, or whose weight would do
    nothing."""
    kind, name = term.kind, term.criterion
    if not term.weight:
        return
    if kind.peers and not peer:
        raise ValueError(
            f"{name} is for two students that teach each other: give --peer NAME instead of a teacher. From a frozen "
            "teacher its divergence is --criterion kd --kd-temperature 1."
        )
    if kind.fits is not None and peer:
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


def _arguments(words: Sequence[str], options: TermOptions) -> dict[str, dict[str, Any]]:
    """Hyper-parameters by criterion from words such as crd.queue=65536, typed as their constructors have them."""
    found: dict[str, dict[str, Any]] = {}
    for word in words:
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
        ("kd", "temperature", options.kd_temperature, 4.0),
        ("ce", "smoothing", options.smoothing, 0.0),
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


def build_criterion(term: Term, pair: Pair, *, standardise_logits: bool = False) -> Criterion:
    """One criterion, its logits standardised where that is asked for and it reads them.

    Raises:
        ValueError: What the criterion refuses, with its name.
    """
    try:
        criterion = term.kind(pair, **term.options)
        return Standardised(criterion) if standardise_logits and "logits" in term.kind.needs else criterion
    except ValueError as error:
        raise ValueError(f"criterion {term.criterion!r}: {error}") from error
