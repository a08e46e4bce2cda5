"""Several teachers: the mean of their probabilities against plain arithmetic, the sum of losses against each one's
own."""

import math

import pytest
import torch

from mgd_timm.features import Batch, Features, Pair, Shapes
from mgd_timm.granularity import MAG, MAS, stable_excitation
from mgd_timm.objective import mean_of_probabilities
from mgd_timm.pipeline.plan import objective_of, terms_of
from mgd_timm.recipe.recipe import make_recipe

STUDENT, ONE, TWO = Shapes(5, 12, ((4, 6, 6),)), Shapes(5, 20, ((8, 6, 6),)), Shapes(5, 16, ((3, 6, 6),))


def features(shapes: Shapes, seed: int, heads: bool = False) -> Features:
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator)

    maps = tuple(draw(4, *size) for size in shapes.maps)
    codes = {"abstract": draw(4, 64), "detailed": draw(4, 256)} if heads else {}
    views = {"abstract": draw(4, 5), "detailed": draw(4, 5)} if heads else {}
    return Features(draw(4, 5), draw(4, shapes.embed_dim), maps, codes, views)


@pytest.fixture
def batch() -> Batch:
    return Batch(torch.empty(4, 0, 0, 0), torch.tensor([0, 1, 2, 4]), torch.arange(4))


def objective(**options):
    recipe = make_recipe(teacher=("a", "b"), **options)
    torch.manual_seed(0)
    return recipe, objective_of(recipe, terms_of(recipe), [Pair(STUDENT, ONE), Pair(STUDENT, TWO)])


def test_the_mean_is_of_probabilities():
    logits = [torch.randn(3, 5, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    found = mean_of_probabilities(logits, (1.0, 3.0)).softmax(1).tolist()
    for row in range(3):
        chances = []
        for one in logits:
            scores = [math.exp(value) for value in one[row].tolist()]
            chances.append([score / sum(scores) for score in scores])
        assert found[row] == pytest.approx([0.25 * a + 0.75 * b for a, b in zip(*chances, strict=True)], rel=1e-5)


@pytest.mark.parametrize("method", ["none", "mag", "mas"])
def test_two_equal_teachers_are_one(method, batch):
    """By the mean as by the sum, with weights of a half each: but for encoders, which each teacher's codes have their
    own of."""
    recipe, _ = objective(method=method)
    student, teacher = features(STUDENT, 1), features(ONE, 2, heads=True)
    torch.manual_seed(0)
    alone = objective_of(recipe, terms_of(recipe), [Pair(STUDENT, ONE)])(student, teacher, batch)
    for way in ("mean", "sum"):
        torch.manual_seed(0)
        recipe = make_recipe(teacher=("a", "b"), method=method, teachers_as=way)
        both = objective_of(recipe, terms_of(recipe), [Pair(STUDENT, ONE)] * 2)
        terms = both(student, (teacher, teacher), batch)
        assert terms["task"].item() == pytest.approx(alone["task"].item())
        kd = terms["kd"] if way == "mean" else terms["kd_1"] + terms["kd_2"]
        assert kd.item() == pytest.approx(alone["kd"].item(), rel=1e-5)
        if method != "none":
            assert terms["abstract_1"].item() == pytest.approx(alone["abstract"].item() / 2, rel=1e-5)
            assert set(terms) > {"abstract_1", "abstract_2", "detailed_1", "detailed_2"}


def test_the_sum_has_each_teachers_own_adapters_and_weight(batch):
    _, whole = objective(method="mag", criterion=("fitnet:100",), teachers_as="sum", teacher_weights=(2.0, 0.5))
    student, shown = features(STUDENT, 1), (features(ONE, 2, heads=True), features(TWO, 3, heads=True))
    terms = whole(student, shown, batch)
    assert set(terms) == {"task", *(f"{n}_{i}" for n in ("kd", "fitnet", "abstract", "detailed") for i in (1, 2))}
    for number, weight, one in ((1, 2.0, shown[0]), (2, 0.5, shown[1])):
        part = whole.parts[str(number)]
        assert isinstance(part, MAG)
        for name, value in part(student, one, batch).items():
            if name != "task":
                assert terms[f"{name}_{number}"].item() == pytest.approx(weight * value.item())
    torch.stack(list(terms.values())).sum().backward()
    assert all(parameter.grad is not None for parameter in whole.parameters())


def test_under_mas_the_mean_is_of_each_teachers_stable_excitation(batch):
    _, whole = objective(method="mas", teacher_weights=(1.0, 2.0))
    student, shown = features(STUDENT, 1), (features(ONE, 2, heads=True), features(TWO, 3, heads=True))
    first = whole.parts["1"]
    assert isinstance(first, MAS)
    target = mean_of_probabilities([stable_excitation(one.logits, one.views) for one in shown], (1.0, 2.0))
    expected = first.objective(student, shown[0]._replace(logits=target), batch)["kd"]
    assert whole(student, shown, batch)["kd"].item() == pytest.approx(expected.item())
    # A teacher without logits takes part with its views.
    mute = (shown[0], shown[1]._replace(logits=shown[1].logits[:, :0]))
    target = mean_of_probabilities(
        [stable_excitation(*pair) for pair in ((mute[0].logits, mute[0].views), (mute[1].logits, mute[1].views))],
        (1, 2),
    )
    expected = first.objective(student, shown[0]._replace(logits=target), batch)["kd"]
    assert whole(student, mute, batch)["kd"].item() == pytest.approx(expected.item())


def test_needs_are_those_of_all_parts():
    assert objective(method="none")[1].needs == {"logits"}
    assert objective(method="mas")[1].needs == {"logits", "embedding"}
    assert objective(method="none", criterion=("at",), teachers_as="sum")[1].needs == {"maps"}


@pytest.mark.parametrize("way", ["mean", "sum"])
def test_codes_alone_of_each_teacher(way, batch):
    _, whole = objective(method="mag", kd_weight=0.0, teachers_as=way)
    terms = whole(features(STUDENT, 1), (features(ONE, 2, heads=True), features(TWO, 3, heads=True)), batch)
    assert set(terms) == {"task", "abstract_1", "abstract_2", "detailed_1", "detailed_2"}
    alone = objective(method="none", criterion=("ce",), teachers_as=way)[1]
    assert set(alone(features(STUDENT, 1), (features(ONE, 2), features(TWO, 3)), batch)) == {"task"}
