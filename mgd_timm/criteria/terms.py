"""Parse --criterion and --criterion-options into Terms: which criteria, with which weights and options."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import yaml

from mgd_timm.criteria import CRITERIA, Criterion
from mgd_timm.criteria.base import Need
from mgd_timm.criteria.sample_weight import EntropyWeight
from mgd_timm.criteria.standardisation import Standardised
from mgd_timm.features import Pair
from mgd_timm.recipe.options import typed, unknown


@dataclass(frozen=True)
class Term:
    """One term of the loss: a criterion with its weight and options.

    Args:
        criterion: Its name in CRITERIA.
        weight: 0 leaves the term out.
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
        by_name: task, kd and the other criteria, including those of weight 0.
        named: The criteria that --criterion names, in its order.
        standardise_logits: Standardise the logits of each criterion that reads them.
        teacher: There is a teacher.
        peer: There are two students. Without a teacher, each is the other's; beside one, they teach each other by the
            criteria for peers, and the teacher teaches both by the others.
        sample_weight: Weights of samples; None for equal ones.
    """

    by_name: Mapping[str, Term]
    named: tuple[str, ...] = ()
    standardise_logits: bool = False
    teacher: bool = True
    peer: bool = False
    sample_weight: EntropyWeight | None = None

    @property
    def teaches(self) -> bool:
        """Whether there is a teacher or a peer; without one, the task is the only loss."""
        return self.teacher or self.peer

    @property
    def trained_teacher(self) -> str | None:
        """The criterion with a weight whose teacher trains in the run, if there is one."""
        return next((name for name, term in self.active.items() if term.kind.trains_teacher), None)

    @property
    def active(self) -> dict[str, Term]:
        """The terms with a weight, by name."""
        return {name: term for name, term in self.by_name.items() if term.weight}

    @property
    def in_run(self) -> dict[str, Term]:
        """The active terms without those that fit the student before the run."""
        return {name: term for name, term in self.active.items() if term.kind.fits != "student"}

    @property
    def weighted(self) -> dict[str, Term]:
        """The terms of the run whose samples are weighted: those with a loss per sample, where there are weights."""
        has_weights = self.sample_weight is not None
        return {name: term for name, term in self.in_run.items() if has_weights and term.kind.per_sample}

    def describe_weights(self, method: str) -> str:
        """Return which terms of a run of "none", "mag" or "mas" have weighted samples, and which have not."""
        weighted = [*self.weighted, *([] if method == "none" else ["the codes"])]
        others = [name for name in self.in_run if name not in ("task", *weighted)]
        plain = f", not of {', '.join(others)}" if others else ""
        return f"samples are weighted in the loss of {', '.join(weighted)}{plain}"

    def of_labels(self) -> "Terms":
        """Return the task's term alone."""
        return replace(self, by_name={"task": self.by_name["task"]})

    def of_teacher(self) -> "Terms":
        """Return the terms that are not of peers alone: beside a peer, what is learnt from labels and teacher."""
        return replace(self, by_name={name: term for name, term in self.by_name.items() if not term.kind.peers})

    def of_peer(self) -> "Terms":
        """Return the terms that are of peers alone: beside a teacher, what is learnt from the other student."""
        return replace(self, by_name={name: term for name, term in self.by_name.items() if term.kind.peers})

    def criterion_names(self) -> list[str]:
        """Return the criteria that --criterion names and that have a weight, in its order."""
        return [name for name in self.named if self.by_name["task" if name == "ce" else name].weight]

    def needs(self, part: Need, *, student: bool = False) -> bool:
        """Return whether a term of the run reads that part of the teacher's features, or of the student's."""
        both = student or (self.peer and not self.teacher)
        kinds = [term.kind for term in self.in_run.values()]
        return any(part in (kind.needs | kind.student_needs if both else kind.needs) for kind in kinds)

    def fitted_first(self, what: Literal["teacher", "student"]) -> dict[str, Term]:
        """Return the terms whose criterion is fitted before the run, on the teacher or with the student."""
        return {name: term for name, term in self.active.items() if self.teaches and term.kind.fits == what}


def task_alone(smoothing: float = 0.0) -> Terms:
    """Return the terms of training without a teacher: cross-entropy with the labels."""
    return Terms({"task": Term("ce", 1.0, options={"smoothing": smoothing})}, teacher=False)


@dataclass(frozen=True)
class TermOptions:
    """The options of a recipe, besides --criterion, that the terms depend on.

    Args:
        epochs: Epochs of the run, which a warm-up must not exceed.
        method: "none", "mag" or "mas": the last two add kd with weight 1 to other criteria.
        teacher: There is a teacher.
        peer: There is a second student, in place of a teacher or beside it.
        task_weight, kd_weight: Weights of ce and kd; None for the presets.
        kd_temperature: Temperature of kd.
        smoothing: Label smoothing of the task's loss.
        standardise_logits: Standardise the logits of each criterion that reads them.
        sample_weight: Weights of samples; None for equal ones.
    """

    epochs: int
    method: str = "mas"
    teacher: bool = True
    peer: bool = False
    task_weight: float | None = None
    kd_weight: float | None = None
    kd_temperature: float = 4.0
    smoothing: float = 0.0
    standardise_logits: bool = False
    sample_weight: EntropyWeight | None = None


def parse_terms(criterion: Sequence[str], criterion_options: Sequence[str], options: TermOptions) -> Terms:
    """Parse --criterion and --criterion-options, with the default weights of the MGD authors' scripts.

    kd alone: task 0.2, kd 0.8. Any other criterion: task 1, its own weight, and under mag and mas kd 1; a criterion may
    bring other weights of both (`Criterion.beside`). With a peer in place of a teacher, kd is used only if it is named.

    Args:
        criterion: NAME, NAME:WEIGHT or NAME:WEIGHT:EPOCHS, several in a word separated by commas.
        criterion_options: NAME.OPTION=VALUE.
        options: The other options that the terms depend on.

    Raises:
        ValueError: An unknown criterion or option, a weight that is not a number, two weights of one criterion, or
            options without an effect.
    """
    given = _given_weights(criterion, options)
    hosts = [name for name in given if name not in ("ce", "kd")]
    named = tuple(dict.fromkeys(word.partition(":")[0] for word in _words(criterion)))
    alone = "kd" in named and not hosts
    beside = hosts and options.method != "none" and options.teacher
    presets = {name: CRITERIA[name].weight for name in hosts}
    presets["ce"] = 0.2 if alone else 1.0
    presets["kd"] = CRITERIA["kd"].weight if alone else 1.0 if beside or "kd" in named else 0.0
    for name in hosts:
        presets |= CRITERIA[name].beside if given[name][0] != 0 else {}
    arguments = _arguments(criterion_options, options)
    by_name = {}
    for name in ("ce", "kd", *hosts):
        weight, warmup = given.get(name, (None, 0.0))
        term = Term(name, presets[name] if weight is None else weight, warmup, arguments.get(name, {}))
        by_name["task" if name == "ce" else name] = term
        _check_term(term, options, plain=weight is None)
    terms = Terms(
        by_name, named, options.standardise_logits, options.teacher, options.peer, sample_weight=options.sample_weight
    )
    _check_options_are_used(terms, arguments, list(criterion))
    _check_something_is_learnt(terms, list(criterion), options)
    _check_weights_are_used(terms, options)
    _check_labels_are_learnt(terms)
    if options.teacher and options.peer:
        _check_both_teach(terms, options)
    elif options.peer and options.method == "none" and not any(term.kind.needs for term in terms.active.values()):
        raise ValueError(
            f"--peer: with {', '.join(terms.active)} alone, neither network learns anything of the other. Name dml or "
            "ekd, or leave --peer out."
        )
    return terms


def _words(criterion: Sequence[str]) -> list[str]:
    return [part.strip() for words in criterion for part in words.split(",")]


def _given_weights(criterion: Sequence[str], options: TermOptions) -> dict[str, tuple[float | None, float]]:
    """Return weight (None for the preset) and warm-up of each criterion that is named or has a weight option."""
    given: dict[str, tuple[float | None, float]] = {}
    for word in _words(criterion):
        name, weight, warmup = _word(word)
        if warmup > options.epochs:
            raise ValueError(
                f"criterion {word!r} warms up over {warmup:g} of {options.epochs} epochs: it would never reach its "
                "weight. Give a shorter warm-up or more --epochs."
            )
        if name in given and given[name] != (weight, warmup):
            raise ValueError(f"two weights of {name} in --criterion {' '.join(criterion)}: give one.")
        given[name] = (weight, warmup)
    for name, flag, value in (("ce", "task", options.task_weight), ("kd", "kd", options.kd_weight)):
        if value is not None:
            weight, warmup = given.get(name, (None, 0.0))
            if weight not in (None, value):
                raise ValueError(
                    f"two weights of {name}: {weight} in --criterion and --{flag}-weight {value}: give one."
                )
            given[name] = (value, warmup)
    return given


def _check_options_are_used(terms: Terms, arguments: Mapping[str, Mapping[str, Any]], criterion: list[str]) -> None:
    """Raise ValueError for options of a criterion that is not named or has weight 0."""
    for name, given in arguments.items():
        if name not in terms.named and name not in ("ce", "kd"):
            raise ValueError(
                f"criterion options of {name}, which --criterion {' '.join(criterion)} does not name: name it, or "
                "leave out its options."
            )
        if not terms.by_name["task" if name == "ce" else name].weight:
            raise ValueError(
                f"options of {name} without effect, as its weight is 0: {dict(given)}. Give it a weight, or leave out "
                "its options (--criterion-options, --kd-temperature, --smoothing)."
            )


def _check_something_is_learnt(terms: Terms, criterion: list[str], options: TermOptions) -> None:
    """Raise ValueError if all weights of the run are 0, or no criterion reads the logits to be standardised."""
    if not terms.in_run:
        codes = "" if options.method == "none" else " (the codes alone do not train the classifier)"
        raise ValueError(
            f"all weights are 0: {', '.join(terms.by_name)}{codes}. Set --task-weight or --criterion NAME:WEIGHT."
        )
    if terms.standardise_logits and not any("logits" in term.kind.needs for term in terms.active.values()):
        raise ValueError(
            f"--standardise-logits: no criterion of {criterion} reads logits. "
            + ("Give kd a weight with --kd-weight 1." if options.teacher else "Leave --standardise-logits out.")
        )


def _check_weights_are_used(terms: Terms, options: TermOptions) -> None:
    """Raise ValueError if samples are to be weighted, and nothing in the run has a loss per sample."""
    if terms.sample_weight is not None and not terms.weighted and options.method == "none":
        known = ", ".join(name for name, kind in CRITERIA.items() if kind.per_sample)
        raise ValueError(
            f"--sample-weight: none of {', '.join(terms.active)} has a loss per sample. Add one of {known}, or the "
            "codes of --method mag or mas; or leave --sample-weight out."
        )


def _check_labels_are_learnt(terms: Terms) -> None:
    """Raise ValueError where a criterion learns from what only the labels' loss trains, and this has weight 0."""
    if terms.by_name["task"].weight:
        return
    for name, term in terms.active.items():
        if term.kind.own_step:
            raise ValueError(
                f"{name} learns from the student's loss of the labels, which has weight 0: give --task-weight 1, or "
                f"leave {name} out."
            )
        if name == "selfkd" and term.options.get("form") == "byot":
            raise ValueError(
                "selfkd.form=byot teaches with the student's classifier, which only the labels' loss trains, and this "
                "has weight 0: give --task-weight 1, or leave selfkd.form out."
            )


def _check_both_teach(terms: Terms, options: TermOptions) -> None:
    """Raise ValueError where nothing is learnt of the teacher, or of the other student, beside the other."""
    if not terms.of_peer().in_run:
        known = ", ".join(name for name, kind in CRITERIA.items() if kind.peers and not kind.trains_teacher)
        raise ValueError(
            f"--peer beside a teacher: the students learn nothing of each other. Name {known} (--criterion kd,dml), or "
            "leave --peer out."
        )
    if options.method == "none" and not set(terms.of_teacher().in_run) - {"task"}:
        raise ValueError(
            "--peer beside a teacher: the students learn nothing of the teacher. Name another criterion (--criterion "
            "kd,dml), or leave --teacher out."
        )


def _check_term(term: Term, options: TermOptions, *, plain: bool) -> None:
    """Raise ValueError for a criterion that needs a peer or a teacher and lacks it, or a weight without an effect."""
    kind, name = term.kind, term.criterion
    if not term.weight:
        return
    if kind.trains_teacher and (options.teacher or not options.peer):
        raise ValueError(
            f"{name} trains its teacher in the run: name the teacher with --peer NAME in place of --teacher. It starts "
            "from random weights, or from those of --peer-pretrained or --peer-checkpoint FILE."
        )
    if kind.needs and not options.peer and not options.teacher:
        raise ValueError(
            f"{name} reads the teacher's {', '.join(sorted(kind.needs))}, and there is no teacher: name one with "
            f"--teacher NAME, or leave {name} out."
        )
    if kind.peers and not options.peer:
        raise ValueError(
            f"{name} is for two students that teach each other: give --peer NAME in place of a teacher or "
            "beside it. With a frozen teacher alone, the same divergence is --criterion kd --kd-temperature 1."
        )
    if kind.fits is not None and options.peer:
        why = "there are two students" if options.teacher else "a peer is not trained yet"
        raise ValueError(f"{name} is fitted on a trained teacher before the run, and {why}: leave {name} out.")
    if kind.own_step and options.peer:
        raise ValueError(f"{name} takes a virtual step of one student, and there are two: leave {name} or --peer out.")
    if kind.fits == "student" and (term.warmup or not plain):
        raise ValueError(
            f"{name} fits the student before the run, with no other loss, so a weight or warm-up has no effect: use "
            f"--criterion {name} (its learning rate is --fitting-lr)."
        )


def _word(word: str) -> tuple[str, float | None, float]:
    """Return name, weight (None if not given) and warm-up of a word of --criterion."""
    form = "NAME, NAME:WEIGHT or NAME:WEIGHT:EPOCHS"
    name, *numbers = word.split(":")
    if name not in CRITERIA:
        raise unknown("criterion", name, CRITERIA)
    values: list[float | None] = []
    for text in numbers:
        try:
            values.append(float(text) if text else None)
        except ValueError:
            raise ValueError(f"criterion {word!r}: expected {form}, and {text!r} is not a number.") from None
    if len(values) > 2:
        raise ValueError(f"criterion {word!r}: expected {form}.")
    for value in values:
        if value is not None and not 0 <= value < float("inf"):
            raise ValueError(f"criterion {word!r}: expected finite numbers, 0 or more.")
    weight, warmup = (*values, None, None)[:2]
    return name, weight, warmup or 0.0


def _arguments(words: Sequence[str], options: TermOptions) -> dict[str, dict[str, Any]]:
    """Return hyper-parameters by criterion from words such as crd.queue=65536, with the types of the constructor."""
    found: dict[str, dict[str, Any]] = {}
    for word in words:
        place, _, text = word.partition("=")
        name, _, option = place.partition(".")
        if not text or not option:
            raise ValueError(f"criterion option {word!r}: expected NAME.OPTION=VALUE, such as kd.divergence=reverse.")
        if name not in CRITERIA:
            raise unknown("criterion", name, CRITERIA)
        known = hyper_parameters(CRITERIA[name])
        if not known:
            raise ValueError(f"criterion {name!r} has no options: leave out {word!r}.")
        if option not in known:
            raise unknown(f"option of {name}", option, known)
        if option in found.setdefault(name, {}):
            raise ValueError(f"two values of {place}: give one.")
        found[name][option] = typed(place, _value(text, known[option].annotation), known[option].annotation)
    for name, option, value, default, flag in (
        ("kd", "temperature", options.kd_temperature, 4.0, "--kd-temperature"),
        ("ce", "smoothing", options.smoothing, 0.0, "--smoothing"),
    ):
        if value == default:
            continue
        given = found.setdefault(name, {}).setdefault(option, value)
        if given != value:
            raise ValueError(
                f"two values of {name}.{option}: {given} in --criterion-options and {flag} {value}: give one."
            )
    return found


def _value(text: str, annotation: Any) -> Any:
    """Parse a number, none, true, false or a list of numbers as YAML does; otherwise return the text."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    if isinstance(value, str):
        try:
            value = None if value.lower() == "none" else float(value)  # YAML reads 1e-3 as text
        except ValueError:
            return value
    if isinstance(value, float) and value.is_integer() and float not in (annotation, *get_args(annotation)):
        return int(value)
    return value


def hyper_parameters(kind: type[Criterion]) -> dict[str, inspect.Parameter]:
    """Return the keyword-only arguments of a criterion's constructor."""
    parameters = inspect.signature(kind.__init__).parameters
    return {name: p for name, p in parameters.items() if p.kind is inspect.Parameter.KEYWORD_ONLY}


def build_criterion(term: Term, pair: Pair, *, standardise_logits: bool = False) -> Criterion:
    """Build a criterion. It is wrapped in Standardised if `standardise_logits` and it reads logits.

    Raises:
        ValueError: The criterion does not take the pair or an option; the message names it.
    """
    try:
        criterion = term.kind(pair, **term.options)
        return Standardised(criterion) if standardise_logits and "logits" in term.kind.needs else criterion
    except ValueError as error:
        raise ValueError(f"criterion {term.criterion!r}: {error}") from error
