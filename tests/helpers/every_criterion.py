"""The cases of all criteria, and what their tests share."""

import copy
import math

import cases_logits
import cases_maps
import cases_relational
import pytest
import torch
from cases import BATCH, CLASSES, PAIR, Case, batch, features, loop_ce, loop_kl, loop_pool, of_parts, parts
from torch import Tensor, nn

from mgd_timm import models  # noqa: F401  # registers cifar_*
from mgd_timm.criteria import AT, CRITERIA, Criterion, FitNet
from mgd_timm.features import Batch, Features, Pair


def loop_attention(sample: list[list[list[float]]], size: int) -> list[float]:
    channels = [loop_pool(channel, size) for channel in sample]
    flat = [sum(c[i][j] ** 2 for c in channels) / len(channels) for i in range(size) for j in range(size)]
    norm = math.sqrt(sum(v * v for v in flat))
    return [v / norm for v in flat]


def loop_at(student: Tensor, teacher: Tensor) -> float:
    size = min(student.shape[2], teacher.shape[2])
    squares = []
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
        pairs = zip(loop_attention(s, size), loop_attention(t, size), strict=True)
        squares += [(p - q) ** 2 for p, q in pairs]
    return sum(squares) / len(squares)


def loop_fitnet(criterion: FitNet, student: Features, teacher: Features) -> float:
    """Equal sizes at the second map: 1x1 convolution, BatchNorm over the batch, ReLU, mean square."""
    weight, bias = criterion.adapter.conv.weight[:, :, 0, 0].tolist(), criterion.adapter.conv.bias.tolist()
    x, y = student.maps[1].tolist(), teacher.maps[1].tolist()
    side = range(len(x[0][0]))
    places = [(b, i, j) for b in range(BATCH) for i in side for j in side]
    total = 0.0
    for c, (row, shift) in enumerate(zip(weight, bias, strict=True)):
        values = [sum(w * x[b][k][i][j] for k, w in enumerate(row)) + shift for b, i, j in places]
        mean = sum(values) / len(values)
        scale = math.sqrt(sum((v - mean) ** 2 for v in values) / len(values) + 1e-5)
        total += sum(
            (max(0.0, (v - mean) / scale) - y[b][c][i][j]) ** 2 for v, (b, i, j) in zip(values, places, strict=True)
        )
    return total / (len(places) * len(weight))


def zero_ce(criterion: Criterion, student: Features) -> tuple[Features, Features]:
    return student._replace(logits=1e4 * torch.eye(CLASSES, dtype=torch.float64)[batch().labels]), student


def zero_fitnet(criterion: FitNet, student: Features) -> tuple[Features, Features]:
    return student, student._replace(maps=tuple(criterion.adapter(m) if i else m for i, m in enumerate(student.maps)))


def zero_at(criterion: AT, student: Features) -> tuple[Features, Features]:
    return student, student._replace(maps=tuple(-3 * m for m in student.maps))  # neither sign nor scale is attention


CASES: dict[str, Case] = {
    "ce": Case(lambda c, s, t, b: loop_ce(s.logits, torch.eye(CLASSES, dtype=torch.float64)[b.labels]), zero_ce),
    "kd": Case(lambda c, s, t, b: loop_kl(s.logits, t.logits, 4.0), lambda c, s: (s, s)),
    "fitnet": Case(lambda c, s, t, b: loop_fitnet(c, s, t), zero_fitnet),
    "at": Case(lambda c, s, t, b: sum(loop_at(*maps) for maps in zip(s.maps, t.maps, strict=True)), zero_at),
    **cases_relational.CASES,
    **cases_maps.CASES,
    **cases_logits.CASES,
}


every = pytest.mark.parametrize("name", CRITERIA)


def term_names(name: str) -> list[str]:
    """The names of a criterion's terms in logs."""
    parts = {"sskd": ("rotated", "similarity"), "ekd": ("logits", "guided", "features", "labels")}
    return [f"{name}_{part}" for part in parts[name]] if name in parts else [name]


def built(name: str, pair: Pair | None = None, seed: int = 0) -> Criterion:
    torch.manual_seed(seed)
    return CRITERIA[name](CASES[name].pair if pair is None else pair).double()


def both(name: str, grad: bool = False) -> tuple[Features, Features]:
    pair = CASES[name].pair
    return features(pair.student, 1, grad=grad), features(pair.teacher, 2)


def value(criterion: Criterion, student: Features, teacher: Features, shown: Batch | None = None) -> Tensor:
    """The loss of a copy, whose buffers may move, with the same random numbers on every call."""
    criterion = copy.deepcopy(criterion)
    torch.manual_seed(5)
    return criterion(student, teacher, batch() if shown is None else shown)


def trained(criterion: Criterion) -> dict[str, nn.Parameter]:
    return {name: p for name, p in criterion.named_parameters() if p.requires_grad}


def exchanged(shown: Features, part: str) -> Features:
    """The same, but for one part, which is other random numbers."""
    generator = torch.Generator().manual_seed(7)
    tensors = {name: torch.randn(t.shape, generator=generator, dtype=t.dtype) for name, t in parts(shown).items()}
    return of_parts({**parts(shown), part: tensors[part]})


def depends(criterion: Criterion, student: Features, teacher: Features) -> dict[str, bool]:
    """Whether the loss depends on each part of the student's features, by trial."""
    loss = value(criterion, student, teacher)
    return {part: not torch.equal(value(criterion, exchanged(student, part), teacher), loss) for part in parts(student)}


def check_gradients(criterion: Criterion, student: Features, teacher: Features) -> None:
    """One backward pass; the student's features and all that is trained have the gradients that they should have.

    A part of the student's features has one of more than rounding where the loss depends on it, and exactly none
    elsewhere: so no method trains nothing silently. So has every trained weight; one of one dimension may have 0, as
    the bias before a BatchNorm.
    """
    dependent = depends(criterion, student, teacher)
    torch.manual_seed(5)
    own = criterion.teacher_parts(teacher, batch())  # of modules on a teacher that trains
    (criterion(student, teacher, batch()) + sum(own.values())).backward()
    for part, tensor in parts(student).items():
        size = 0.0 if tensor.grad is None else tensor.grad.abs().max().item()
        assert math.isfinite(size), part
        assert size > 1e-8 if dependent[part] else size == 0, (part, size)
    for name, p in trained(criterion).items():
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name
        assert p.ndim == 1 or p.grad.abs().max() > 1e-8, name


FEWER = PAIR._replace(teacher=PAIR.teacher._replace(maps=PAIR.teacher.maps[:1]))
