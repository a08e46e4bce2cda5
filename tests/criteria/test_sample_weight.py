"""Weights of samples by the teacher's entropy: against plain loops, at both ends, and in every kind of objective."""

import math

import pytest
import torch
from cases import BATCH, CLASSES, PAIR, batch, features, log_softmax, loop_kl, rows, wave
from every_criterion import built
from torch import Tensor

from mgd_timm.criteria import CRITERIA, EntropyWeight, Weighted
from mgd_timm.features import Batch, Features, Pair, Shapes
from mgd_timm.granularity import MAG, GranularityHeads, stable_excitation
from mgd_timm.objective import mean_of_probabilities
from mgd_timm.pipeline.plan import objective_of, terms_of
from mgd_timm.recipe.recipe import make_recipe

PER_SAMPLE = [name for name, kind in CRITERIA.items() if kind.per_sample]
UNIFORM = torch.full((BATCH, CLASSES), -2.7, dtype=torch.float64)
ONE_HOT = 1e4 * torch.eye(CLASSES, dtype=torch.float64)[torch.tensor([1, 3, 5, 0])]
STUDENT = features(PAIR.student, 1)


def taught(logits: Tensor | None = None, seed: int = 2) -> Features:
    """A teacher's features with heads' codes and views."""
    shown = features(PAIR.teacher, seed)
    torch.manual_seed(seed)
    heads = GranularityHeads(PAIR.teacher.embed_dim, CLASSES).double().requires_grad_(False)
    codes = heads.encode(shown.embedding)
    shown = shown._replace(codes=codes, views=heads.decode(codes))
    return shown if logits is None else shown._replace(logits=logits)


def objective(pairs: int = 1, **options):
    recipe = make_recipe(sample_weight="entropy", **{"method": "none", **options})
    torch.manual_seed(0)
    return objective_of(recipe, terms_of(recipe), [PAIR] * pairs).double()


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_weight_is_one_less_the_share_of_the_largest_entropy(temperature):
    logits = wave((BATCH, CLASSES), 0.9, 0.3, 3)
    for row, weight in zip(logits.tolist(), EntropyWeight(temperature)(logits).tolist(), strict=True):
        entropy = -sum(math.exp(v) * v for v in log_softmax([value / temperature for value in row]))
        assert weight == pytest.approx(1 - entropy / math.log(CLASSES), abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("classes", [2, 10, 1000])
def test_the_weight_is_exact_at_both_ends(dtype, classes):
    for shift in (-300.0, 0.1, 77.7):
        weights = EntropyWeight()(torch.full((3, classes), shift, dtype=dtype))
        assert weights.tolist() == [0, 0, 0]
        assert weights.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    certain = torch.zeros(1, classes, dtype=dtype)
    certain[0, 1] = 1e4
    assert EntropyWeight()(certain).item() == 1


@pytest.mark.parametrize("name", PER_SAMPLE)
def test_a_weighted_criterion_is_the_mean_of_weights_times_losses(name):
    criterion, teacher = built(name), taught()
    alone = criterion.sample_values(STUDENT, teacher, batch())
    assert alone.shape == (BATCH,)
    torch.testing.assert_close(alone.mean(), criterion(STUDENT, teacher, batch()))
    expected = sum(w * v for w, v in zip(EntropyWeight()(teacher.logits).tolist(), alone.tolist(), strict=True)) / BATCH
    if name != "ofa":  # whose branches normalise the batch
        one = Batch(*(part[2:3] for part in batch()))
        torch.testing.assert_close(criterion(rows(STUDENT, slice(2, 3)), rows(teacher, slice(2, 3)), one), alone[2])
    weighted = Weighted(criterion, EntropyWeight())
    assert weighted(STUDENT, teacher, batch()).item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("divergence", ["forward", "bdd"])
@pytest.mark.parametrize("method", ["none", "mag"])
def test_a_certain_teacher_teaches_as_without_weights_and_an_uncertain_one_nothing(divergence, method):
    options = {"criterion": ("kd,dkd",), "criterion_options": (f"kd.divergence={divergence}",), "method": method}
    weighted = objective(**options)
    recipe = make_recipe(**options)
    torch.manual_seed(0)
    plain = objective_of(recipe, terms_of(recipe), [PAIR]).double()
    terms, expected = (one(STUDENT, taught(ONE_HOT), batch()) for one in (weighted, plain))
    assert set(terms) == set(expected)
    for name, term in terms.items():
        torch.testing.assert_close(term, expected[name])
    terms = weighted(STUDENT, taught(UNIFORM), batch())
    assert {name for name, term in terms.items() if term.item() == 0} == set(terms) - {"task"}
    torch.testing.assert_close(terms["task"], plain(STUDENT, taught(UNIFORM), batch())["task"])


def test_codes_are_weighted_by_the_teachers_logits_and_under_mas_by_the_stable_ones():
    teacher = taught()
    stable = stable_excitation(teacher.logits, teacher.views)
    for method, logits in (("mag", teacher.logits), ("mas", stable)):
        whole, weights = objective(method=method), EntropyWeight()(logits)
        assert isinstance(whole, MAG)
        codes = whole.student_heads.encode(STUDENT.embedding)
        terms = whole(STUDENT, teacher, batch())
        for name, temperature in (("abstract", 2.0), ("detailed", 8.0)):
            samples = zip(codes[name].split(1), teacher.codes[name].split(1), weights.tolist(), strict=True)
            expected = sum(w * loop_kl(s, t, temperature) for s, t, w in samples) / BATCH
            assert terms[name].item() == pytest.approx(expected, rel=1e-9)
        samples = zip(STUDENT.logits.split(1), logits.split(1), weights.tolist(), strict=True)
        expected = 0.8 * sum(w * loop_kl(s, t, 4.0) for s, t, w in samples) / BATCH
        assert terms["kd"].item() == pytest.approx(expected, rel=1e-9)
        torch.testing.assert_close(whole.sample_weights(teacher)[""], weights)


def test_standardised_logits_are_weighted_by_the_raw_ones():
    whole, teacher = objective(standardise_logits=True), taught()
    plain = whole.criteria["kd"].criterion.sample_values(STUDENT, teacher, batch())
    expected = 0.8 * (EntropyWeight()(teacher.logits) * plain).mean()
    torch.testing.assert_close(whole(STUDENT, teacher, batch())["kd"], expected)


def test_with_several_teachers_the_mean_or_each_one_weighs():
    shown = taught(), taught(seed=3)
    own = [EntropyWeight()(one.logits) for one in shown]
    mean = EntropyWeight()(mean_of_probabilities([one.logits for one in shown], (1, 1)))
    options = {"teacher": ("a", "b"), "method": "mag"}
    for way, names in (("mean", ("", "_1", "_2")), ("sum", ("_1", "_2"))):
        whole = objective(2, teachers_as=way, **options)
        found = whole.sample_weights(shown)
        expected = {"": mean, "_1": own[0], "_2": own[1]}
        assert set(found) == set(names)
        for name in names:
            torch.testing.assert_close(found[name], expected[name])
        terms = whole(STUDENT, shown, batch())
        kd = terms["kd"] if way == "mean" else terms["kd_2"]
        weights, share = (mean, 0.8) if way == "mean" else (own[1], 0.4)
        target = mean_of_probabilities([one.logits for one in shown], (1, 1)) if way == "mean" else shown[1].logits
        samples = zip(STUDENT.logits.split(1), target.split(1), weights.tolist(), strict=True)
        assert kd.item() == pytest.approx(share * sum(w * loop_kl(s, t, 4.0) for s, t, w in samples) / BATCH, rel=1e-9)
    # Of codes alone, the logits are read for the weights.
    assert objective(2, **options, kd_weight=0.0).needs == {"embedding", "logits"}


def test_what_has_no_loss_per_sample_stays_as_it_is_and_is_named():
    recipe = make_recipe(criterion=("rkd,kd,dkd",), method="mag", sample_weight="entropy")
    terms = terms_of(recipe)
    assert terms.describe_weights("mag") == "samples are weighted in the loss of kd, dkd, the codes, not of rkd"
    whole = objective(criterion=("rkd,kd,dkd",), method="mag")
    assert {name for name, one in whole.objective.criteria.items() if isinstance(one, Weighted)} == {"kd", "dkd"}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"criterion": ("rkd",), "method": "none"},
            "none of task, rkd has a loss per sample. Add one of kd",
        ),
        ({"teacher": None}, "sample_weight='entropy': there is no teacher"),
        ({"peer": "test_vit"}, "there is no teacher. Leave --sample-weight out, or name one with --teacher"),
        ({"sample_weight": "none", "sample_weight_temperature": 2.0}, "or give --sample-weight entropy"),
        ({"sample_weight": "variance"}, "unknown sample_weight 'variance'"),
        ({"sample_weight_temperature": 0.0}, "sample_weight_temperature=0.0: expected a positive number"),
        ({"code_reverse_weight": 0.5}, "it is for bdd, .* or give --code-divergence bdd"),
    ],
)
def test_what_cannot_be_weighted_is_refused(options, said):
    with pytest.raises(ValueError, match=said):
        terms_of(make_recipe(**{"sample_weight": "entropy", **options}))


def test_a_teacher_of_other_classes_has_no_weights_for_the_codes():
    other = Pair(PAIR.student, Shapes(CLASSES + 1, 14, ()))
    with pytest.raises(ValueError, match="the weighting of samples by the teacher's logits needs the same classes"):
        MAG(other, None, sample_weight=EntropyWeight())
    with pytest.raises(ValueError, match="RKD has no loss per sample"):
        Weighted(built("rkd"), EntropyWeight())
