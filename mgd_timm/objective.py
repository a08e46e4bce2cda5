"""Several teachers of one student: one target, the mean of their probabilities, or the sum of the losses of each.

References: You, Xu, Xu, Tao, "Learning from Multiple Teacher Networks" (KDD 2017): the mean of softened probabilities.
Fukuda et al., "Efficient Knowledge Distillation from an Ensemble of Teachers" (Interspeech 2017): losses of each,
weighted.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mgd_timm.criteria import CRITERIA, Criterion, CrossEntropy, Objective
from mgd_timm.criteria.base import Need, at_least_float32
from mgd_timm.criteria.terms import build_criterion, parse_terms
from mgd_timm.features import Batch, Features, Pair
from mgd_timm.granularity import MAG, MAS
from mgd_timm.recipe.recipe import Recipe


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


def build_several(recipe: Recipe, pairs: Sequence[Pair]) -> SeveralTeachers:
    """The objective of a recipe with several teachers, a Pair for each.

    Raises:
        ValueError: What criteria refuse about a pair.
    """
    weights = recipe.teacher_weights or (1 / len(pairs),) * len(pairs)
    first = build_objective(recipe, pairs[0])
    reads = any(term.weight for name, term in parse_terms(recipe).items() if name != "task")
    if recipe.teachers_as == "sum" and reads:
        return SeveralTeachers(
            [first, *(build_objective(recipe, pair, task=False) for pair in pairs[1:])], weights, mean=False
        )
    codes = [MAG(pair, None, recipe.heads.granularities) if recipe.method != "none" else None for pair in pairs[1:]]
    return SeveralTeachers([first, *codes], weights, mean=recipe.teachers_as == "mean")


def build_objective(recipe: Recipe, pair: Pair, *, task: bool = True) -> Objective | MAG:
    """The recipe's terms, and MAG or MAS around them.

    Args:
        recipe: Of the run.
        pair: Both networks.
        task: With the labels' loss; without it for a second teacher.

    Raises:
        ValueError: What criteria refuse about the pair, MAS without logit distillation among it.
    """
    if recipe.teacher is None and recipe.peer is None:
        return Objective(task=(1.0, CrossEntropy(pair, smoothing=recipe.smoothing)))
    terms: dict[str, tuple[float, Criterion, float]] = {}
    for name, term in parse_terms(recipe).items():
        if term.weight and CRITERIA[term.criterion].fits != "student" and (task or name != "task"):
            terms[name] = (term.weight, build_criterion(term, pair, recipe), term.warmup)
    objective = Objective(**terms)
    if recipe.method == "none":
        return objective
    return {"mag": MAG, "mas": MAS}[recipe.method](pair, objective, recipe.heads.granularities)
