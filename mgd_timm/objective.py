"""Build the objective of a run: criteria from parsed terms, MAG or MAS around them, and several teachers.

Several teachers give one target, the mean of their probabilities, or the sum of the losses of each.

References: You, Xu, Xu, Tao, "Learning from Multiple Teacher Networks" (KDD 2017): the mean of softened probabilities.
Fukuda et al., "Efficient Knowledge Distillation from an Ensemble of Teachers" (Interspeech 2017): weighted losses of
each.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mgd_timm.criteria import Criterion, Objective, Weighted
from mgd_timm.criteria.base import Need, at_least_float32
from mgd_timm.criteria.terms import Terms, build_criterion
from mgd_timm.features import Batch, Features, Pair
from mgd_timm.granularity import MAG, MAS
from mgd_timm.recipe.granularity import Granularity


def mean_of_probabilities(logits: Sequence[Float[Tensor, "b k"]], weights: Sequence[float]) -> Float[Tensor, "b k"]:
    """Return logits whose softmax is the weighted mean of the given softmaxes: log(sum_i w_i softmax(z_i) / sum_i w_i).

    The mean is of probabilities at temperature 1: at T the target is the softmax of the result divided by T.
    """
    total = sum(weights)
    scores = [
        at_least_float32(one).log_softmax(1) + math.log(weight / total)
        for one, weight in zip(logits, weights, strict=True)
    ]
    return torch.stack(scores).logsumexp(0)


class SeveralTeachers(nn.Module):
    """An objective of a student with several teachers, called with a tuple of their features.

    "sum": each teacher has an objective with its own adapters and encoders; the terms of teacher i (from 1) but the
    task are named NAME_i and multiplied by its weight. "mean": one objective reads only logits, those of the mean of
    the teachers' probabilities (under MAS: of their stable excitations); the codes are each teacher's own.

    Args:
        parts: Per teacher. The first is a full objective. For "sum" the others have no task term; for "mean" they have
            only codes (a MAG without an objective). None if nothing of a teacher is read.
        weights: One per teacher.
        mean: "mean" instead of "sum".
    """

    def __init__(self, parts: Sequence[Objective | MAG | None], weights: Sequence[float], *, mean: bool) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({str(i): part for i, part in enumerate(parts, start=1) if part is not None})
        self.shares, self.mean = tuple(weights), mean

    @property
    def needs(self) -> frozenset[Need]:
        """Parts of the teachers' features that the terms use."""
        return frozenset[Need]().union(
            *(part.needs for part in self.parts.values() if isinstance(part, Objective | MAG))
        )

    def forward(
        self, student: Features, teacher: Features | tuple[Features, ...], batch: Batch
    ) -> dict[str, Float[Tensor, ""]]:
        """Return the weighted losses by name."""
        teachers = (teacher,) * len(self.shares) if isinstance(teacher, Features) else teacher
        return self._mean(student, teachers, batch) if self.mean else self._sum(student, teachers, batch)

    def _sum(self, student: Features, teachers: tuple[Features, ...], batch: Batch) -> dict[str, Tensor]:
        terms = {}
        for number, (weight, one) in enumerate(zip(self.shares, teachers, strict=True), start=1):
            if str(number) not in self.parts:
                continue
            for name, term in self.parts[str(number)](student, one, batch).items():
                terms["task" if name == "task" else f"{name}_{number}"] = term if name == "task" else weight * term
        return terms

    def _mean(self, student: Features, teachers: tuple[Features, ...], batch: Batch) -> dict[str, Tensor]:
        first = self.parts["1"]
        plain = first.objective if isinstance(first, MAG) else first
        targets = self._targets(teachers)
        assert plain is not None
        terms = dict(plain(student, self._mean_of(targets), batch))
        total = sum(self.shares)
        for number, (weight, one) in enumerate(zip(self.shares, targets, strict=True), start=1):
            if str(number) in self.parts and isinstance(part := self.parts[str(number)], MAG):
                codes = part.code_terms(student, one)
                terms |= {f"{name}_{number}": weight / total * term for name, term in codes.items()}
        return terms

    def _targets(self, teachers: tuple[Features, ...]) -> tuple[Features, ...]:
        """Return the teachers' features as one objective reads them: under MAS, with their stable excitations."""
        first = self.parts["1"]
        return tuple(first.stable(one) for one in teachers) if isinstance(first, MAS) else teachers

    def _mean_of(self, targets: tuple[Features, ...]) -> Features:
        """Return the features of one target: where logits are read, those of the mean of the probabilities."""
        if "logits" not in self.needs:
            return targets[0]
        return targets[0]._replace(logits=mean_of_probabilities([one.logits for one in targets], self.shares))

    def sample_weights(self, teacher: Features | tuple[Features, ...]) -> dict[str, Float[Tensor, " b"]]:
        """Return the weights of a batch's samples, for logs: by the mean target under the name "", by teacher i under
        "_i"; nothing where there are none."""
        teachers = (teacher,) * len(self.shares) if isinstance(teacher, Features) else teacher
        targets = self._targets(teachers)
        first = self.parts["1"]
        plain = first.objective if isinstance(first, MAG) else first
        found = plain.sample_weights(self._mean_of(targets)) if self.mean and isinstance(plain, Objective) else {}
        for number, part in self.parts.items():
            if isinstance(part, MAG) or (isinstance(part, Objective) and not self.mean):
                weight = part.sample_weight
                found |= {} if weight is None else {f"_{number}": weight(targets[int(number) - 1].logits)}
        return found


def build_objective(
    terms: Terms, pair: Pair, method: str = "none", granularities: Sequence[Granularity] = (), *, task: bool = True
) -> Objective | MAG:
    """Build the criteria of the terms, and MAG or MAS around them.

    Args:
        terms: Criteria with their weights.
        pair: Shapes of both networks.
        method: "none", "mag" or "mas"; ignored without a teacher.
        granularities: Those of MAG and MAS.
        task: Include the loss of the task; False for a second teacher.

    Raises:
        ValueError: A criterion does not take the pair, or MAS has no term that reads logits.
    """
    criteria = {
        name: (term.weight, _build(name, terms, pair), term.warmup)
        for name, term in terms.in_run.items()
        if task or name != "task"
    }
    objective = Objective(**criteria)
    if method == "none" or not terms.teaches:
        return objective
    return {"mag": MAG, "mas": MAS}[method](pair, objective, granularities, sample_weight=terms.sample_weight)


def _build(name: str, terms: Terms, pair: Pair) -> Criterion:
    """Build the criterion of a term, on standardised logits and with weighted samples where the terms say so."""
    criterion = build_criterion(terms.by_name[name], pair, standardise_logits=terms.standardise_logits)
    if terms.sample_weight is None or name not in terms.weighted:
        return criterion
    return Weighted(criterion, terms.sample_weight)


def build_several(
    terms: Terms,
    pairs: Sequence[Pair],
    method: str,
    granularities: Sequence[Granularity],
    *,
    weights: Sequence[float] | None = None,
    mean: bool,
) -> SeveralTeachers:
    """Build the objective of a student with several teachers.

    Args:
        terms: Criteria with their weights.
        pairs: Shapes of the student and each teacher.
        method: "none", "mag" or "mas".
        granularities: Those of MAG and MAS.
        weights: One per teacher; by default equal ones that add up to 1.
        mean: Use the mean of the teachers' probabilities as one target, instead of the sum of the losses of each.

    Raises:
        ValueError: A criterion does not take a pair.
    """
    weights = weights or (1 / len(pairs),) * len(pairs)
    first = build_objective(terms, pairs[0], method, granularities)
    if not mean and any(name != "task" for name in terms.active):
        others = [build_objective(terms, pair, method, granularities, task=False) for pair in pairs[1:]]
        return SeveralTeachers([first, *others], weights, mean=False)
    weight = terms.sample_weight
    codes = [MAG(pair, None, granularities, sample_weight=weight) if method != "none" else None for pair in pairs[1:]]
    return SeveralTeachers([first, *codes], weights, mean=mean)
