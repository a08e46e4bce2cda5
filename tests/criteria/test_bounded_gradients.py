"""Gradients are bounded where a row, a map or a batch has no spread or norm, and as published elsewhere."""

from collections.abc import Callable

import pytest
import torch
from cases import BATCH, CLASSES, PAIR, batch, features, of_parts, parts, wave
from cases_relational import loop_rkd
from test_criteria import CASES, trained
from torch import Tensor

import mgd_timm
from mgd_timm.criteria import CATKD, CRITERIA, DIST, DKD, KD, OFA, RKD, Criterion, Standardised, standardise
from mgd_timm.criteria.afds import attentive_difference
from mgd_timm.criteria.at import attention
from mgd_timm.criteria.catkd import class_attention
from mgd_timm.criteria.dist import pearson_distance
from mgd_timm.criteria.nst import neuron_selectivity
from mgd_timm.criteria.pkt import neighbours
from mgd_timm.criteria.sp import similarity
from mgd_timm.features import Features, Pair, Shapes

BUILD: dict[str, Callable[[], Criterion]] = {
    **{name: lambda name=name: CRITERIA[name](CASES[name].pair) for name in CRITERIA},
    "kd, standardised": lambda: Standardised(KD(PAIR)),
    "dkd, standardised": lambda: Standardised(DKD(PAIR)),
    "ofa, standardised": lambda: Standardised(OFA(PAIR)),
    "dist, T = 4": lambda: DIST(PAIR, temperature=4.0),
    "catkd, normalised": lambda: CATKD(PAIR, normalise=True),
}
# How much larger a gradient may be than that of ordinary inputs. The smallest divisor is about 1e-3 of an ordinary norm
# (SMALLEST_RMS), for RKD's directions 1e-4.
LARGEST = dict.fromkeys(BUILD, 5e3) | {"rkd": 2e4}

SPREADS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-8, 1e-12, 0)
DEGENERATE: dict[str, Callable[[Tensor, float], Tensor]] = {
    "around zero": lambda rows, spread: spread * rows,
    "around a constant": lambda rows, spread: 0.3 + spread * rows,
    "almost equal samples": lambda rows, spread: rows[:1] + spread * rows,
    "one sample around zero": lambda rows, spread: torch.cat([spread * rows[:1], rows[1:]]),
    "two samples almost equal": lambda rows, spread: torch.cat([rows[1:2] + spread * rows[:1], rows[1:]]),
}


def loss_and_gradients(name: str, student: Features, teacher: Features) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """The loss, the gradients of the student's features, and those of the criterion's own weights."""
    torch.manual_seed(0)
    criterion = BUILD[name]()
    own = of_parts({part: v.detach().clone().requires_grad_(True) for part, v in parts(student).items()})
    torch.manual_seed(5)
    loss = criterion(own, teacher, batch())
    loss.backward()
    found = (parts(own).values(), trained(criterion).values())
    return loss, *([v.grad for v in group if v.grad is not None] for group in found)


def largest(gradients: list[Tensor]) -> float:
    return max((g.abs().max().item() for g in gradients), default=0.0)


@pytest.mark.parametrize("kind", DEGENERATE)
@pytest.mark.parametrize("name", BUILD)
def test_gradients_are_bounded(name, kind):
    """At every spread down to none, so that there is no cliff beside it; of the student alone and of both networks."""
    pair = CASES[name].pair if name in CASES else PAIR
    student, teacher = features(pair.student, 1, torch.float32), features(pair.teacher, 2, torch.float32)
    _, *ordinary = loss_and_gradients(name, student, teacher)
    for spread in SPREADS:
        one, other = (
            of_parts({part: DEGENERATE[kind](v, spread) for part, v in parts(shown).items()})
            for shown in (student, teacher)
        )
        for target in (teacher, other):
            loss, *found = loss_and_gradients(name, one, target)
            assert loss.isfinite(), spread
            for gradients, usual in zip(found, ordinary, strict=True):
                assert all(g.isfinite().all() for g in gradients), spread
                assert largest(gradients) <= LARGEST[name] * largest(usual), spread


def unit(rows: Tensor, dim: int | tuple[int, ...], eps: float = 0.0) -> Tensor:
    return rows / (torch.linalg.vector_norm(rows, dim=dim, keepdim=True) + eps)


def published_dist(one: Tensor, two: Tensor) -> Tensor:
    one, two = (rows - rows.mean(1, keepdim=True) for rows in (one, two))
    return 1 - ((one * two).sum(1) / (one.norm(dim=1) * two.norm(dim=1) + 1e-8)).mean()


def published_afds(one: Tensor, two: Tensor, share: Tensor) -> Tensor:
    gaps = (unit(one, (2, 3), 1e-6) - unit(two, (2, 3), 1e-6)).pow(2).mean((2, 3))
    return (share / share.sum(1, keepdim=True) * gaps).sum(1).mean()


def published_nst(one: Tensor, two: Tensor) -> Tensor:
    a, b = unit(one.flatten(2), 2), unit(two.flatten(2), 2)
    return sum(sign * (x @ y.mT).pow(2).mean() for sign, x, y in ((1, a, a), (1, b, b), (-2, a, b)))


def published_pkt(rows: Tensor) -> Tensor:
    likeness = (unit(rows, 1, 1e-7) @ unit(rows, 1, 1e-7).T + 1) / 2
    return likeness / likeness.sum(1, keepdim=True)


MAPS, OTHER_MAPS = wave((4, 6, 5, 5), 0.23, 0.1), wave((4, 6, 5, 5), 0.19, 0.4)
FEW = wave((4, 3, 6, 6), 0.37, 0.2), wave((4, 3, 6, 6), 0.31, 0.5)  # fewer channels than positions
ROWS, OTHER_ROWS = wave((4, 10), 0.7, 0.1, 3), wave((4, 10), 0.9, 0.3, 3)
SHARES = wave((4, 6), 0.3, 0.2).abs() + 0.1


@pytest.mark.parametrize(
    ("ours", "published", "values"),
    [
        (standardise, lambda z: (z - z.mean(1, keepdim=True)) / (z.std(1, keepdim=True) + 1e-7), (ROWS,)),
        (pearson_distance, published_dist, (ROWS.softmax(1), OTHER_ROWS.softmax(1))),
        (attention, lambda m: unit(m.pow(2).mean(1).flatten(1), 1), (MAPS,)),
        (similarity, lambda m: unit(m.flatten(1) @ m.flatten(1).T, 1), (MAPS,)),
        (lambda m: class_attention(m, (5, 5), True), lambda m: unit(m, (2, 3)), (MAPS,)),
        (attentive_difference, published_afds, (MAPS, OTHER_MAPS, SHARES)),
        (neighbours, published_pkt, (ROWS,)),
        (neuron_selectivity, published_nst, (MAPS, OTHER_MAPS)),
        (neuron_selectivity, published_nst, FEW),
    ],
    ids=["standardise", "dist", "at", "sp", "catkd", "afds", "pkt", "nst by channels", "nst by positions"],
)
def test_ordinary_inputs_have_the_published_values_and_gradients(ours, published, values):
    found = []
    for function in (ours, published):
        inputs = [v.clone().requires_grad_(True) for v in values]
        output = function(*inputs)
        weights = torch.ones_like(output) if output.ndim == 0 else wave(tuple(output.shape), 0.7, 0.2)
        found.append([output, *torch.autograd.grad((weights * output).sum(), inputs)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("gap", [1.0, 1e-1, 1e-2, 1e-3])
@pytest.mark.parametrize("scale", [0.3, 1.0, 30.0])
def test_gradients_of_near_duplicates_under_rkd_survive_float32(gap, scale):
    """Against differences of a plain loop in float64, at distances that are a share of the spread."""
    generator = torch.Generator().manual_seed(0)
    rows, teacher = (torch.randn(6, 12, generator=generator, dtype=torch.float64) for _ in range(2))
    rows[:2] = rows[2:4] + gap * rows[:2]
    rows, teacher = (scale * rows).float(), teacher.float()
    student = rows.clone().requires_grad_(True)
    loss = RKD(PAIR)(Features(student[:, :1], student), Features(teacher[:, :1], teacher), batch())
    loss.backward()
    step, expected = 1e-4 * gap * scale, torch.zeros(6, 12, dtype=torch.float64)
    exact = rows.double()
    for place in torch.cartesian_prod(torch.arange(6), torch.arange(12)).tolist():
        moved = torch.zeros_like(exact)
        moved[tuple(place)] = step
        up, down = (loop_rkd(exact + sign * moved, teacher.double()) for sign in (1, -1))
        expected[tuple(place)] = (up - down) / (2 * step)
    assert loss.item() == pytest.approx(loop_rkd(exact, teacher.double()), rel=1e-4)
    assert (student.grad - expected).norm() <= 1e-3 * expected.norm()


def test_equal_samples_have_the_gradient_of_almost_equal_ones_under_rkd():
    generator = torch.Generator().manual_seed(0)
    rows, teacher = (torch.randn(BATCH, 10, generator=generator) for _ in range(2))
    gradients = []
    for gap in (0.0, 1e-6):
        student = rows.clone()
        student[0] = student[1] + gap * student[0]
        student.requires_grad_(True)
        RKD(PAIR)(Features(student[:, :1], student), Features(teacher[:, :1], teacher), batch()).backward()
        gradients.append(student.grad)
    assert (gradients[0] - gradients[1]).norm() <= 0.05 * gradients[0].norm()


@pytest.mark.parametrize("classes", [3, CLASSES, 1000])
@pytest.mark.parametrize("build", [DIST, lambda pair: Standardised(KD(pair)), lambda pair: Standardised(DKD(pair))])
def test_a_classifier_that_starts_at_zero_is_taught(build, classes):
    """Zero logits have a gradient, and it is not much larger than that of plain KD."""
    shapes = Shapes(classes, 1, ())
    generator = torch.Generator().manual_seed(0)
    teacher = Features(3 * torch.randn(BATCH, classes, generator=generator), torch.zeros(BATCH, 1))
    sizes = []
    for criterion in (build(Pair(shapes, shapes)), KD(Pair(shapes, shapes))):
        logits = torch.zeros(BATCH, classes, requires_grad=True)
        criterion(Features(logits, torch.zeros(BATCH, 1)), teacher, batch(torch.arange(BATCH) % classes)).backward()
        sizes.append(logits.grad.norm().item())
    assert 0 < sizes[0] < 50 * sizes[1]


@pytest.mark.parametrize(
    "options",
    [{"criterion": ("dist",)}, {"criterion": ("kd:9",), "kd_temperature": 2.0, "standardise_logits": True}],
    ids=["dist", "standardised"],
)
def test_a_student_whose_classifier_starts_at_zero_trains(options, small_data, tmp_path):
    """At the default learning rate; NonFiniteError ends a run whose loss overflows."""
    student = mgd_timm.distill(
        "embedded",
        "resmlp_12_224",
        str(small_data),
        output=tmp_path / "run",
        method="none",
        img_size=32,
        batch_size=32,
        epochs=1,
        **options,
    )
    assert all(p.isfinite().all() for p in student.parameters())
    assert student.get_classifier().weight.any()
