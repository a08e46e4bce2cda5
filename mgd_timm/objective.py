"""The objective of a run: criteria from parsed terms, MAG or MAS around them, and several teachers of one student.

Several teachers give one target, the mean of their probabilities, or the sum of the losses of each.

References: You, Xu, Xu, Tao, "Learning from Multiple Teacher Networks" (KDD 2017): the mean of softened probabilities.
Fukuda et al., "Efficient Knowledge Distillation from an Ensemble of Teachers" (Interspeech 2017): weighted losses of
each.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mgd_timm.criteria import Objective
from mgd_timm.criteria.base import Need, at_least_float32
from mgd_timm.criteria.terms import Terms, build_criterion
from mgd_timm.features import Batch, Features, Pair
from mgd_timm.granularity import MAG, MAS
from mgd_timm.recipe.granularity import Granularity


def mean_of_probabilities(logits: Sequence[Float[Tensor, "b k"]], weights: Sequence[float]) -> Float[Tensor, "b k"]:
    """Logits whose softmax is the weighted mean of each one's softmax: log sum_i w_i softmax(z_i), with weights that
    add up to 1.

    At a temperature T the target is softmax(these / T): the mean is of probabilities at T = 1.
    """
    scores = torch.stack([at_least_float32(one).log_softmax(1) for one in logits])
    shares = torch.tensor(weights, dtype=scores.dtype, device=scores.device)
    return (scores + (shares / shares.sum()).log()[:, None, None]).logsumexp(0)


class SeveralTeachers(nn.Module):
    """Shaped like an Objective, but that it reads a tuple of teachers' features.

    "sum": each teacher has an objective of its own, with its own adapters and encoders; the terms of teacher i are
    named NAME_i (from 1) and multiplied by its weight. "mean": the first objective reads logits alone, and is given
    those of the mean of probabilities (under MAS: of each teacher's stable excitation); the codes are each teacher's
    own all the same.

    Args:
        parts: The first whole; of the others, for "sum" without the task, for "mean" without an objective: codes alone.
            None of what reads nothing of its teacher.
        weights: Of each teacher.
        mean: Take the mean of probabilities.
    """

    def __init__(self, parts: Sequence[Objective | MAG | None], weights: Sequence[float], *, mean: bool) -> None:
        super().__init__()
        self.parts = nn.ModuleDict(
            {str(number): part for number, part in enumerate(parts, start=1) if part is not None}
        )
        self.shares, self.mean = tuple(weights), mean

    @property
    def needs(self) -> frozenset[Need]:
        """The parts of the teachers' features that are read."""
        return frozenset[Need]().union(
            *(part.needs for part in self.parts.values() if isinstance(part, Objective | MAG))
        )

    def forward(
        self, student: Features, teacher: Features | tuple[Features, ...], batch: Batch
    ) -> dict[str, Float[Tensor, ""]]:
        """Weighted scalars by name."""
        shown = (teacher,) * len(self.shares) if isinstance(teacher, Features) else teacher
        return self._mean(student, shown, batch) if self.mean else self._sum(student, shown, batch)

    def _sum(self, student: Features, shown: tuple[Features, ...], batch: Batch) -> dict[str, Tensor]:
        terms = {}
        for number, (weight, one) in enumerate(zip(self.shares, shown, strict=True), start=1):
            if str(number) not in self.parts:
                continue
            for name, term in self.parts[str(number)](student, one, batch).items():
                terms["task" if name == "task" else f"{name}_{number}"] = term if name == "task" else weight * term
        return terms

    def _mean(self, student: Features, shown: tuple[Features, ...], batch: Batch) -> dict[str, Tensor]:
        first = self.parts["1"]
        plain = first.objective if isinstance(first, MAG) else first
        targets = [first.stable(one) if isinstance(first, MAS) else one for one in shown]
        assert plain is not None
        target = shown[0]
        if "logits" in self.needs:
            target = target._replace(logits=mean_of_probabilities([one.logits for one in targets], self.shares))
        terms = dict(plain(student, target, batch))
        whole = sum(self.shares)
        for number, (weight, one) in enumerate(zip(self.shares, shown, strict=True), start=1):
            if str(number) in self.parts and isinstance(part := self.parts[str(number)], MAG):
                codes = part.code_terms(student, one)
                terms |= {f"{name}_{number}": weight / whole * term for name, term in codes.items()}
        return terms


def build_objective(
    terms: Terms, pair: Pair, method: str = "none", granularities: Sequence[Granularity] = (), *, task: bool = True
) -> Objective | MAG:
    """The criteria of the terms, and MAG or MAS around them.

    Args:
        terms: Which criteria, of which weight.
        pair: Both networks.
        method: "none", "mag" or "mas"; nothing is wrapped where there is no teacher.
        granularities: Of MAG and MAS.
        task: With the labels' loss; without it for a second teacher.

    Raises:
        ValueError: What criteria refuse about the pair, MAS without logit distillation among it.
    """
    criteria = {
        name: (
            term.weight,
            build_criterion(term, pair, standardise_logits=terms.standardise_logits),
            term.warmup,
        )
        for name, term in terms.in_run.items()
        if task or name != "task"
    }
    objective = Objective(**criteria)
    if method == "none" or not terms.teaches:
        return objective
    return {"mag": MAG, "mas": MAS}[method](pair, objective, granularities)


def build_several(
    terms: Terms,
    pairs: Sequence[Pair],
    method: str,
    granularities: Sequence[Granularity],
    *,
    weights: Sequence[float] | None = None,
    mean: bool,
) -> SeveralTeachers:
    """The objective of a student of several teachers, a Pair for each.

    Args:
        terms: Which criteria, of which weight.
        pairs: The student with each teacher.
        method: "none", "mag" or "mas".
        granularities: Of MAG and MAS.
        weights: Of each teacher; by default equal ones that add up to 1.
        mean: One target, the mean of the teachers' probabilities, instead of the sum of each one's losses.

    Raises:
        ValueError: What criteria refuse about a pair.
    """
    weights = weights or (1 / len(pairs),) * len(pairs)
    first = build_objective(terms, pairs[0], method, granularities)
    reads = any(name != "task" for name in terms.active)
    if not mean and reads:
        others = [build_objective(terms, pair, method, granularities, task=False) for pair in pairs[1:]]
        return SeveralTeachers([first, *others], weights, mean=False)
    codes = [MAG(pair, None, granularities) if method != "none" else None for pair in pairs[1:]]
    return SeveralTeachers([first, *codes], weights, mean=mean)
