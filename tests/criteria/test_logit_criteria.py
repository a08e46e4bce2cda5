"""What is particular to the criteria that compare logits, or classify with the teacher."""

import copy
import math
from typing import get_args

import pytest
import torch
from cases import BATCH, CLASSES, PAIR, batch, features, loop_kl, wave
from cases_logits import loop_dist, loop_dkd
from torch import Tensor

import mgd_timm.models  # noqa: F401 - registers cifar_*
from mgd_timm.criteria import (
    AT,
    CATKD,
    DIST,
    DKD,
    DML,
    KD,
    OFA,
    SRRL,
    CrossEntropy,
    FitNet,
    Objective,
    Standardised,
    standardise,
)
from mgd_timm.criteria.dist import pearson_distance, relation_distance
from mgd_timm.criteria.dkd import decoupled_divergence, target_classes
from mgd_timm.criteria.kd import soft_divergence
from mgd_timm.features import Features, Pair, Shapes
from mgd_timm.granularity import MAG, MAS, GranularityHeads
from mgd_timm.recipe.granularity import Divergence, Granularity

Z_S, Z_T = wave((4, 10), 0.7, 0.1, 3), wave((4, 10), 0.9, 0.3, 3)


TARGETS = torch.tensor([1, 3, 5, 7])


TEN = Shapes(10, 1, ())


OTHER = PAIR._replace(teacher=PAIR.teacher._replace(num_classes=9))


ONE_CLASS = PAIR._replace(student=PAIR.student._replace(num_classes=1), teacher=PAIR.teacher._replace(num_classes=1))


def only(logits: Tensor) -> Features:
    return Features(logits, torch.zeros(len(logits), 1, dtype=logits.dtype))


def soft(ids: Tensor, classes: int) -> Tensor:
    """Labels as mixup gives them, the first image's share the larger one."""
    target = torch.eye(classes, dtype=torch.float64)[ids]
    return 0.7 * target + 0.3 * target.flip(0)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_directions_of_the_divergence_against_loops(temperature):
    forward, reverse = loop_kl(Z_S, Z_T, temperature), loop_kl(Z_T, Z_S, temperature)
    assert forward != pytest.approx(reverse)
    for divergence, value in {"forward": forward, "reverse": reverse, "balanced": (forward + reverse) / 2}.items():
        assert soft_divergence(Z_S, Z_T, temperature, divergence).mean().item() == pytest.approx(value, abs=1e-12)
        criterion = KD(Pair(TEN, TEN), temperature=temperature, divergence=divergence)
        assert criterion(only(Z_S), only(Z_T), batch(TARGETS)).item() == pytest.approx(value, abs=1e-12)
    same = KD(Pair(TEN, TEN), temperature=temperature)(only(Z_S), only(Z_T), batch(TARGETS))
    assert same.item() == pytest.approx(forward, abs=1e-12)


@pytest.mark.parametrize("divergence", get_args(Divergence))
def test_every_direction_has_a_gradient_that_is_finite_where_probabilities_vanish(divergence):
    logits = torch.tensor([[1e4, -1e4, 0.0]], requires_grad=True)
    assert soft_divergence(logits, logits.detach(), 2.0, divergence).item() == 0
    loss = soft_divergence(logits, logits.detach().flip(1), 2.0, divergence).mean()
    loss.backward()
    assert loss.isfinite()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize(("alpha", "beta", "temperature"), [(1.0, 8.0, 4.0), (0.0, 1.0, 1.0), (2.5, 0.0, 2.0)])
def test_dkd_against_loops(alpha, beta, temperature):
    value = loop_dkd(Z_S, Z_T, TARGETS.tolist(), alpha, beta, temperature)
    assert decoupled_divergence(Z_S, Z_T, TARGETS, alpha, beta, temperature).mean().item() == pytest.approx(
        value, abs=1e-11
    )
    criterion = DKD(Pair(TEN, TEN), alpha=alpha, beta=beta, temperature=temperature)
    assert criterion(only(Z_S), only(Z_T), batch(TARGETS)).item() == pytest.approx(value, abs=1e-11)


def test_dkd_is_kd_where_the_parts_are_weighted_as_the_paper_finds_them():
    """KL = TCKD + (1 - p_t(y)) NCKD for a sample."""
    for i in range(len(Z_S)):
        s, t, y = Z_S[i : i + 1], Z_T[i : i + 1], TARGETS[i : i + 1]
        rest = 1 - torch.softmax(t / 4, 1)[0, y[0]].item()
        assert decoupled_divergence(s, t, y, 1.0, rest, 4.0).mean().item() == pytest.approx(
            loop_kl(s, t, 4.0), abs=1e-12
        )


def test_dkd_does_not_know_offsets_nor_the_order_of_classes():
    loss = decoupled_divergence(Z_S, Z_T, TARGETS, 1.0, 8.0, 4.0).mean()
    shift, order = wave((4, 1), 0.3, 0.2, 50), torch.randperm(10, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(decoupled_divergence(Z_S + shift, Z_T - shift, TARGETS, 1.0, 8.0, 4.0).mean(), loss)
    torch.testing.assert_close(
        decoupled_divergence(Z_S[:, order], Z_T[:, order], order.argsort()[TARGETS], 1.0, 8.0, 4.0).mean(), loss
    )


def test_soft_labels_count_as_their_likeliest_class():
    for ids in (TARGETS, TARGETS.int()):
        assert torch.equal(target_classes(ids), TARGETS)
    assert torch.equal(target_classes(soft(TARGETS, 10)), TARGETS)
    assert torch.equal(target_classes(torch.full((2, 4), 0.25)), torch.tensor([0, 0]))
    for criterion in (DKD(Pair(TEN, TEN)), OFA(PAIR).double()):
        wide = isinstance(criterion, DKD)
        student, teacher = (only(Z_S), only(Z_T)) if wide else (features(PAIR.student, 1), features(PAIR.teacher, 2))
        ids = TARGETS if wide else TARGETS % CLASSES
        labels = soft(ids, 10 if wide else CLASSES)
        torch.testing.assert_close(criterion(student, teacher, batch(labels)), criterion(student, teacher, batch(ids)))


def of_classes(count: int) -> Pair:
    return PAIR._replace(
        student=PAIR.student._replace(num_classes=count), teacher=PAIR.teacher._replace(num_classes=count)
    )


TWO = of_classes(2)


BUILT = {
    "kd": KD,
    "reverse": lambda pair: KD(pair, divergence="reverse"),
    "dkd": DKD,
    "dist": DIST,
    "ofa": OFA,
    "dml": DML,
}


logit_criteria = pytest.mark.parametrize("build", BUILT.values(), ids=BUILT)


@logit_criteria
@pytest.mark.parametrize(("classes", "standardised"), [(2, False), (3, False), (3, True)])
@pytest.mark.parametrize("kind", ["drawn", "constant", "large"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_few_classes_and_odd_logits_are_finite_and_teach(build, classes, standardised, kind, dtype):
    torch.manual_seed(0)
    pair = of_classes(classes)
    criterion = Standardised(build(pair)) if standardised else build(pair)
    student, teacher = features(pair.student, 1, torch.float32), features(pair.teacher, 2, torch.float32)
    logits = {"drawn": student.logits, "constant": torch.full((BATCH, classes), 1.5), "large": 1e4 * student.logits}[
        kind
    ]
    logits = logits.to(dtype).requires_grad_(True)
    shown = student._replace(logits=logits)
    shown.maps[0].requires_grad_(True)
    loss = criterion(
        shown,
        teacher._replace(logits=(logits.detach().flip(0) if kind == "large" else teacher.logits)),
        batch(TARGETS % 2),
    )
    loss.backward()
    assert loss.isfinite()
    assert logits.grad.isfinite().all()
    if kind == "drawn":
        assert (logits.grad.abs().amax(1) > 1e-4).all()  # every sample's
    if isinstance(build, type) and issubclass(build, OFA):
        assert shown.maps[0].grad.isfinite().all()
        assert shown.maps[0].grad.abs().max() > 0
    assert all(p.grad.isfinite().all() for p in criterion.parameters())


def test_dkd_of_two_classes_is_its_target_part():
    two_s, two_t, ids = Z_S[:, :2], Z_T[:, :2], TARGETS % 2
    loss = decoupled_divergence(two_s, two_t, ids, 1.0, 8.0, 4.0).mean()
    assert loss.item() == pytest.approx(loop_kl(two_s, two_t, 4.0), abs=1e-12)


@pytest.mark.parametrize(("beta", "gamma", "temperature"), [(1.0, 1.0, 1.0), (2.0, 0.0, 4.0), (0.0, 0.5, 2.0)])
def test_dist_against_loops(beta, gamma, temperature):
    value = loop_dist(Z_S, Z_T, beta, gamma, temperature)
    criterion = DIST(Pair(TEN, TEN), beta=beta, gamma=gamma, temperature=temperature)
    assert criterion(only(Z_S), only(Z_T), batch(TARGETS)).item() == pytest.approx(value, abs=1e-11)


def test_dist_knows_relations_alone():
    torch.testing.assert_close(
        pearson_distance(Z_S, 3 * Z_S + 2), torch.tensor(0.0, dtype=torch.float64), atol=1e-8, rtol=0
    )
    torch.testing.assert_close(pearson_distance(Z_S, -Z_S), torch.tensor(2.0, dtype=torch.float64), atol=1e-8, rtol=0)
    assert relation_distance(Z_S, Z_S, 1.0, 1.0, 4.0).item() == pytest.approx(0, abs=1e-4)
    loss = relation_distance(Z_S, Z_T, 1.0, 1.0, 1.0)
    shift, order = wave((4, 1), 0.3, 0.2, 50), torch.randperm(10, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(relation_distance(Z_S + shift, Z_T, 1.0, 1.0, 1.0), loss)
    torch.testing.assert_close(relation_distance(Z_S[:, order], Z_T[:, order], 1.0, 1.0, 1.0), loss)
    torch.testing.assert_close(
        relation_distance(Z_S.repeat(3, 1), Z_T.repeat(3, 1), 1.0, 1.0, 1.0), loss, atol=1e-6, rtol=0
    )


@pytest.mark.parametrize("part", [{"beta": 0.0}, {"gamma": 0.0}])
def test_each_part_of_dist_and_dkd_alone_teaches_three_classes(part):
    pair = of_classes(3)
    for criterion in (DIST(pair, **part), DKD(pair, **{"alpha" if name == "gamma" else name: 0.0 for name in part})):
        student = features(pair.student, 1, grad=True)
        criterion(student, features(pair.teacher, 2), batch(TARGETS % 3)).backward()
        assert student.logits.grad.abs().max() > 1e-4


def test_the_balance_divergence_against_loops():
    criterion = KD(Pair(TEN, TEN), divergence="bdd", reverse_weight=0.3, reverse_temperature=2.0)
    expected = loop_kl(Z_S, Z_T, 4.0) + 0.3 * loop_kl(Z_T, Z_S, 2.0)
    assert criterion(only(Z_S), only(Z_T), batch(TARGETS)).item() == pytest.approx(expected, abs=1e-12)
    default = KD(Pair(TEN, TEN), divergence="bdd")(only(Z_S), only(Z_T), batch(TARGETS))
    assert default.item() == pytest.approx(loop_kl(Z_S, Z_T, 4.0) + loop_kl(Z_T, Z_S, 4.0), abs=1e-12)
    half = [only(shown.bfloat16()) for shown in (Z_S, Z_T)]
    assert criterion(*half, batch(TARGETS)).dtype == torch.float32
    assert criterion(*half, batch(TARGETS)).item() == pytest.approx(expected, rel=0.05)


def test_the_balance_divergence_without_its_reverse_is_kd_and_is_symmetric_in_roles_with_temperatures():
    found = []
    for options in ({"divergence": "bdd", "reverse_weight": 0.0, "reverse_temperature": 2.0}, {}):
        student = only(Z_S.clone().requires_grad_(True))
        loss = KD(Pair(TEN, TEN), **options)(student, only(Z_T), batch(TARGETS))
        loss.backward()
        found.append((loss, student.logits.grad))
    assert all(map(torch.equal, *found))
    one = soft_divergence(Z_S, Z_T, 2.0, "bdd", reverse_temperature=3.0)
    torch.testing.assert_close(one, soft_divergence(Z_T, Z_S, 3.0, "bdd", reverse_temperature=2.0))
    assert not torch.allclose(one, soft_divergence(Z_T, Z_S, 2.0, "bdd", reverse_temperature=3.0))


def test_codes_learn_by_the_divergence_of_their_granularity():
    levels = Granularity("a", 6, 2.0, 0.5, "bdd", 0.3), Granularity("b", 10, 8.0, 1.0, "reverse")
    mag = MAG(Pair(TEN, TEN), None, levels)
    codes = [{"a": shown[:, :6], "b": shown} for shown in (Z_S, Z_T)]
    student, teacher = (only(shown)._replace(codes=code) for shown, code in zip((Z_S, Z_T), codes, strict=True))
    terms = mag(student, teacher, batch(TARGETS))
    bdd = loop_kl(Z_S[:, :6], Z_T[:, :6], 2.0) + 0.3 * loop_kl(Z_T[:, :6], Z_S[:, :6], 2.0)
    assert terms["a"].item() == pytest.approx(0.5 * bdd, abs=1e-12)
    assert terms["b"].item() == pytest.approx(loop_kl(Z_T, Z_S, 8.0), abs=1e-12)
    with pytest.raises(ValueError, match="reverse_weight with divergence='reverse': it is for divergence=bdd only"):
        Granularity("b", 10, 8.0, 1.0, "reverse", 0.5)


def test_mutual_learning_golden_values():
    both = only(Z_S), only(Z_T.clone().requires_grad_(True))
    assert DML(Pair(TEN, TEN))(*both, batch(TARGETS)).item() == pytest.approx(2.3216683293, abs=1e-8)
    assert DML(Pair(TEN, TEN), element_mean=True)(*both, batch(TARGETS)).item() == pytest.approx(0.2321668329, abs=1e-8)
    assert not DML(Pair(TEN, TEN))(*both, batch(TARGETS)).requires_grad  # the other student's logits are a constant
    assert DML.peers
    assert not any(kind.peers for kind in (KD, DKD, DIST, OFA, SRRL, CATKD))


def test_standardise_against_loops():
    for row, found in zip(Z_S.tolist(), standardise(Z_S).tolist(), strict=True):
        mean = sum(row) / len(row)
        std = math.sqrt(sum((v - mean) ** 2 for v in row) / (len(row) - 1))
        assert found == pytest.approx([(v - mean) / (std + 1e-7) for v in row], abs=1e-12)


@logit_criteria
def test_standardised_criteria_do_not_know_scale_nor_offset(build):
    torch.manual_seed(0)
    plain = build(PAIR).double()
    criterion = Standardised(copy.deepcopy(plain))
    student, teacher = features(PAIR.student, 1), features(PAIR.teacher, 2)

    def scaled(shown: Features, a: float, b: float) -> Features:
        scale, shift = wave((BATCH, 1), a, 0.1).abs() + 0.5, wave((BATCH, 1), b, 0.2, 20)
        return shown._replace(logits=scale * shown.logits + shift)

    loss = criterion(student, teacher, batch())
    torch.testing.assert_close(
        criterion(scaled(student, 0.3, 0.7), scaled(teacher, 1.3, 0.4), batch()), loss, atol=1e-5, rtol=1e-6
    )
    by_hand = [shown._replace(logits=standardise(shown.logits)) for shown in (student, teacher)]
    expected = plain(*by_hand, batch())
    same = not isinstance(plain, OFA)  # which compares logits of its own making too
    assert torch.allclose(loss, expected) is same
    for what in (
        "weight",
        "needs",
        "relational",
        "preact",
        "fits",
        "peers",
        "student_needs",
        "synchronised",
        "num_classes",
    ):
        assert getattr(criterion, what) == getattr(plain, what)
    assert criterion.fitting() is None
    assert criterion.remark() is None


def test_logits_of_a_criterions_own_making_are_standardised_too():
    torch.manual_seed(0)
    student, teacher = features(PAIR.student, 1), features(PAIR.teacher, 2)
    for criterion, same in ((OFA(PAIR).double(), False), (Standardised(OFA(PAIR).double()), True)):
        classifier = getattr(criterion, "criterion", criterion).branches[0][-1].requires_grad_(False)
        classifier.weight.mul_(30)  # so narrow a branch starts with logits whose spread counts as none
        loss = criterion(student, teacher, batch())
        for p in classifier.parameters():
            p.mul_(3)
        assert torch.allclose(criterion(student, teacher, batch()), loss, rtol=1e-5) is same


def test_standardised_terms_compose_with_mas():
    student, teacher = features(PAIR.student, 1), features(PAIR.teacher, 2)
    criterion = Standardised(KD(PAIR, temperature=2.0))
    whole = MAS(PAIR, Objective(task=(1.0, CrossEntropy(PAIR)), kd=(9.0, criterion))).double()
    heads = GranularityHeads(PAIR.teacher.embed_dim, CLASSES).double()
    codes = heads.encode(teacher.embedding)
    views = heads.decode(codes)
    found = whole(student, teacher._replace(codes=codes, views=views), batch())
    stable = torch.stack([teacher.logits, *views.values()]).mean(0)
    value = loop_kl(standardise(student.logits), standardise(stable), 2.0)
    assert found["kd"].item() == pytest.approx(9 * value, abs=1e-10)


ROW_AND_COLUMN = PAIR._replace(student=PAIR.student._replace(cam=(4, 1)), teacher=PAIR.teacher._replace(cam=(1, 4)))


CAMLESS = PAIR._replace(student=PAIR.student._replace(cam=None), teacher=PAIR.teacher._replace(cam=None))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        *(
            (lambda kind=kind: kind(OTHER), "student has 6 classes, the teacher 9.*mgd-timm train")
            for kind in BUILT.values()
        ),
        (lambda: CATKD(OTHER), "student has 6 classes, the teacher 9.*mgd-timm train"),
        *((lambda kind=kind: kind(ONE_CLASS), "2 classes or more") for kind in BUILT.values()),
        (lambda: DKD(PAIR, alpha=-1.0), "alpha=-1.0, beta=8.0: expected finite numbers, 0 or more"),
        (lambda: DKD(PAIR, alpha=0, beta=0), "not all 0"),
        (lambda: KD(PAIR, divergence="bdd", reverse_weight=-1.0), "reverse_weight=-1.0: expected a finite number"),
        (lambda: KD(PAIR, divergence="bdd", reverse_temperature=0.0), "temperature=0.0: expected a positive"),
        (lambda: KD(PAIR, reverse_temperature=2.0), "reverse_temperature with divergence='forward': .* choose bdd"),
        (lambda: DKD(PAIR, beta=float("inf")), "beta=inf"),
        (lambda: DKD(PAIR, temperature=0), "temperature=0: expected a positive"),
        (lambda: DIST(PAIR, beta=0, gamma=0), "not all 0"),
        (lambda: DIST(PAIR, gamma=float("nan")), "gamma=nan"),
        (lambda: DIST(TWO, gamma=0.0), "gamma=0 with 2 classes: .* set gamma above 0"),
        (lambda: DKD(TWO, alpha=0.0), "alpha=0 with 2 classes: .* raise alpha"),
        *(
            (
                lambda kind=kind: Standardised(kind(TWO)),
                "of 2 classes, standardised, teaches nothing: .* 3 classes or more",
            )
            for kind in BUILT.values()
        ),
        (
            lambda: CATKD(PAIR, resolution=1, normalise=True),
            r"normalise=True: .*\(4, 4\) .*\(2, 2\) .*--img-size.*normalise=False",
        ),
        (
            lambda: CATKD(ROW_AND_COLUMN, normalise=True),
            r"\(4, 1\) .*\(1, 4\) positions are pooled to one position \(resolution=2\)",
        ),
        (lambda: DIST(PAIR, temperature=-1), "temperature=-1: expected a positive"),
        (
            lambda: SRRL(PAIR._replace(teacher_classifier=None)),
            "no single module that maps its embedding to logits: choose one",
        ),
        (lambda: SRRL(PAIR._replace(teacher_classifier=None)), "A peer's classifier is not trained yet"),
        (lambda: SRRL(PAIR, alpha=0, beta=0), "not all 0"),
        (lambda: SRRL(PAIR, beta=-0.1), "beta=-0.1"),
        (
            lambda: OFA(PAIR._replace(student=PAIR.student._replace(maps=()))),
            "needs maps of the student, and there are none.*maps='stages'",
        ),
        (lambda: OFA(PAIR, eps=0.5), "eps=0.5: expected a number of 1 or more, or 3 such numbers"),
        (lambda: OFA(PAIR, eps=(1.0, 1.0)), r"eps=\(1.0, 1.0\): .* 3 such numbers"),
        (lambda: OFA(PAIR, eps=float("nan")), "eps=nan"),
        (lambda: OFA(PAIR, branch_weight=0), "branch_weight=0: expected a positive"),
        (lambda: OFA(PAIR, temperature=0), "temperature=0: expected a positive"),
        (
            lambda: CATKD(CAMLESS),
            "class activation maps of both networks .missing: student and teacher.: .*cam=True.*a resnet",
        ),
        (
            lambda: CATKD(PAIR._replace(teacher=CAMLESS.teacher)),
            "class activation maps of both networks .missing: teacher.",
        ),
        (lambda: CATKD(PAIR, resolution=0), "resolution=0: expected 1 or more"),
        (lambda: Standardised(AT(PAIR)), "AT reads no logits of the teacher"),
        (lambda: Standardised(FitNet(PAIR)), "FitNet reads no logits of the teacher"),
        (lambda: Standardised(SRRL(PAIR)), "SRRL reads no logits of the teacher"),
        (lambda: Standardised(CrossEntropy(PAIR)), "CrossEntropy reads no logits of the teacher"),
        (lambda: Standardised(Standardised(KD(PAIR))), "standardised already"),
        (lambda: Objective(**{"a.b": (1.0, KD(PAIR))}), r"terms 'a\.b': .*no dot"),
        (
            lambda: Objective(task=(1.0, CrossEntropy(PAIR)), keys=(1.0, KD(PAIR))),
            "terms 'task', 'keys': .*attribute of nn.ModuleDict",
        ),
        (lambda: Standardised(Standardised(OFA(PAIR)).criterion), "OFA's logits are standardised already"),
    ],
)
def test_what_cannot_work_is_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_an_unknown_divergence_is_refused():
    with pytest.raises(
        Exception, match="divergence"
    ):  # by the type checker of the tests, before the criterion's own ValueError
        KD(PAIR, divergence="sideways")
