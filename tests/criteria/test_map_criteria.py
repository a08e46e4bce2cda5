"""The criteria that compare maps: golden values, what each of them ignores, and what is refused."""

import copy

import pytest
import torch
from cases import PAIR, batch, features, wave
from torch import Tensor

from mgd_timm.criteria import AB, AFD, AFDS, AT, FSP, FT, KDSVD, NST, VID, Criterion, FitNet, MaskedGenerative, ReviewKD
from mgd_timm.criteria.ab import activation_boundary
from mgd_timm.criteria.afd import attended_difference
from mgd_timm.criteria.afds import attentive_difference
from mgd_timm.criteria.at import attention_transfer
from mgd_timm.criteria.fsp import flow
from mgd_timm.criteria.ft import factor_transfer
from mgd_timm.criteria.masked_generative import masked
from mgd_timm.criteria.reviewkd import hierarchical_context
from mgd_timm.criteria.vid import variational_loss
from mgd_timm.features import Features, Pair, Shapes

# Appendix A of the specification; the student's first.
S1, S2 = wave((4, 6, 8, 8), 0.23, 0.1), wave((4, 8, 4, 4), 0.29, 0.2)
T1, T2 = wave((4, 6, 4, 4), 0.19, 0.4), wave((4, 8, 4, 4), 0.17, 0.3)
METHODS = [VID, AB, FT, FSP, AFDS, AFD, ReviewKD, MaskedGenerative]
every = pytest.mark.parametrize("method", METHODS)


def shown(*maps: Tensor) -> Features:
    return Features(torch.zeros(4, 10, dtype=torch.float64), torch.zeros(4, 1, dtype=torch.float64), maps)


def pair_of(student: Features, teacher: Features) -> Pair:
    sizes = [Shapes(10, 1, tuple(tuple(m.shape[1:]) for m in f.maps)) for f in (student, teacher)]
    return Pair(*sizes)


def value(criterion: Criterion, student: Features, teacher: Features) -> float:
    return criterion(student, teacher, batch()).item()


def test_golden_values_of_ft_and_vid():
    assert factor_transfer(S1, T1).item() == pytest.approx(0.1259373117, abs=1e-8)
    student, teacher = shown(S1), shown(T1)
    criterion = VID(pair_of(student, teacher)).double()
    with torch.no_grad():
        for index, speed in ((0, 0.3), (2, 0.4), (4, 0.5)):
            criterion.conditionals[0].mean[index].weight.copy_(wave((6, 6, 1, 1), speed, 0.1))
    assert value(criterion, student, teacher) == pytest.approx(0.8504030338, abs=1e-6)  # rho starts in float32
    with torch.no_grad():
        criterion.conditionals[0].rho.fill_(4.993229183240239)
    assert value(criterion, student, teacher) == pytest.approx(0.8504030338, abs=1e-8)


def test_golden_values_of_ab_and_fsp():
    one, other = wave((4, 6, 4, 4), 0.23, 0.1, 2), wave((4, 6, 4, 4), 0.19, 0.4, 2)
    student, teacher = shown(one, S2), shown(other, T2)
    criterion = AB(pair_of(student, teacher))
    assert not list(criterion.parameters())  # equal shapes need no connector
    assert value(criterion, student, teacher) == pytest.approx(0.3808020216 + 0.5803174785, abs=1e-8)
    assert activation_boundary(S2, T2, 1.0).item() * 3 / 1000 == pytest.approx(0.5803174785, abs=1e-8)
    ours = S1, S2, wave((4, 5, 4, 4), 0.31, 0.2)
    theirs = wave((4, 6, 8, 8), 0.19, 0.1), wave((4, 8, 4, 4), 0.17, 0.2), wave((4, 5, 4, 4), 0.37, 0.2)
    for i, golden in enumerate((0.0098364009, 0.1835589165)):
        assert (flow(*ours[i : i + 2]) - flow(*theirs[i : i + 2])).pow(2).mean().item() == pytest.approx(
            golden, abs=1e-8
        )
    student, teacher = shown(*ours), shown(*theirs)
    criterion = FSP(pair_of(student, teacher))
    assert not list(criterion.parameters())
    assert value(criterion, student, teacher) == pytest.approx(0.0098364009 + 0.1835589165, abs=1e-8)


def test_golden_value_of_afds():
    student, teacher = shown(S2), shown(T2)
    criterion = AFDS(pair_of(student, teacher)).double()
    with torch.no_grad():
        for index, speed in ((1, 0.3), (3, 0.4)):
            criterion.attentions[0][index].weight.copy_(wave((8, 8, 1, 1), speed, 0.1))
    assert value(criterion, student, teacher) == pytest.approx(0.1259852274, abs=1e-8)


def test_vid_learns_how_sure_it_can_be():
    rho, gap = torch.zeros(6, dtype=torch.float64, requires_grad=True), 0.3
    optimizer = torch.optim.SGD([rho], lr=3.0)
    for _ in range(3000):
        optimizer.zero_grad()
        variational_loss(T1, T1 + gap, rho).backward()
        optimizer.step()
    variance = torch.nn.functional.softplus(rho) + 1e-5
    torch.testing.assert_close(variance, torch.full_like(variance, gap**2), rtol=1e-3, atol=0)  # the likeliest variance
    for start in (0.5, 5.0, 50.0):
        part = VID(PAIR, variance=start).conditionals[0]
        assert part.rho.shape == (5,)
        torch.testing.assert_close(torch.nn.functional.softplus(part.rho) + 1e-5, torch.full((5,), start))
    assert VID(PAIR).conditionals[0].rho[0].item() == pytest.approx(4.99322918)


def test_ab_teaches_nothing_but_which_neurons_are_active():
    expected = activation_boundary(S2, T2, 1.0)
    assert torch.equal(activation_boundary(S2, 100 * T2, 1.0), expected)
    ours = S2.clone().requires_grad_(True)
    activation_boundary(ours, T2, 0.5).backward()
    assert ours.grad is not None
    beyond = (S2 * T2.sign() >= 0.5) & (T2 != 0)
    assert beyond.any()
    assert torch.equal(ours.grad == 0, beyond)
    margins = [activation_boundary(S2, T2, m).item() for m in (0.5, 1.0, 2.0)]
    assert margins == sorted(margins)
    torch.testing.assert_close(activation_boundary(S2.repeat(3, 1, 1, 1), T2.repeat(3, 1, 1, 1), 1.0), expected)


def test_ft_ignores_sign_scale_and_order_of_channels():
    expected = factor_transfer(S1, T1)
    scale = torch.tensor([1.0, -2.0, 3.0, 0.5], dtype=torch.float64)[:, None, None, None]
    torch.testing.assert_close(factor_transfer(S1[:, [3, 1, 0, 2, 5, 4]], scale * T1), expected)
    torch.testing.assert_close(factor_transfer(T1, S1), expected)


def test_ft_fits_its_paraphraser_and_then_freezes_it():
    torch.manual_seed(0)
    criterion = FT(PAIR, k=0.75).double()
    student, teacher = features(PAIR.student, 1), features(PAIR.teacher, 2)
    paraphraser = criterion.paraphraser
    assert criterion.paraphraser.encoder(teacher.maps[-1]).shape == (4, 5, 4, 4)
    assert not any(p.requires_grad for p in paraphraser.parameters())
    fitted = criterion.fitting()
    assert all(p.requires_grad for p in fitted.parameters())
    fitted.train()
    optimizer = torch.optim.SGD(fitted.parameters(), lr=0.3, momentum=0.9)
    losses = []
    for _ in range(30):
        terms, logits = fitted(batch(), teacher)
        assert torch.equal(logits, teacher.logits)
        optimizer.zero_grad()
        terms["reconstruction"].backward()
        assert all(p.grad is not None for p in fitted.parameters())
        optimizer.step()
        losses.append(terms["reconstruction"].item())
    assert losses[-1] < losses[0]
    assert losses[0] == pytest.approx(
        teacher.maps[-1].pow(2).mean().item(), rel=0.2
    )  # a mean over elements, of small outputs
    criterion.train()
    assert not any(p.requires_grad for p in paraphraser.parameters())
    assert criterion.translator.training
    assert not paraphraser.training
    before = copy.deepcopy(paraphraser.state_dict())
    optimizer = torch.optim.SGD(criterion.parameters(), lr=0.1, weight_decay=0.1)
    optimizer.zero_grad()
    criterion(student, teacher, batch()).backward()
    optimizer.step()
    assert all(torch.equal(before[name], v) for name, v in paraphraser.state_dict().items())
    again = FT(PAIR, k=0.75).double()
    again.load_state_dict(criterion.state_dict())
    assert value(again, student, teacher) == value(criterion, student, teacher)


def test_fsp_is_bilinear_and_ignores_the_order_of_places():
    expected = flow(T1, T2)
    assert expected.shape == (4, 8, 6)
    torch.testing.assert_close(flow(2 * T1, -3 * T2), -6 * expected)
    order = torch.tensor([5, 2, 0, 9, 1, 3, 4, 15, 6, 7, 8, 10, 14, 11, 12, 13])
    one, other = (m.flatten(2)[:, :, order].unflatten(2, (4, 4)) for m in (T1, T2))
    torch.testing.assert_close(flow(one, other), expected)
    pooled = flow(S1, T2)  # the larger is pooled, whichever it is
    torch.testing.assert_close(pooled, flow(torch.nn.functional.avg_pool2d(S1, 2), T2))
    torch.testing.assert_close(flow(T2, S1), pooled.mT)


def test_afds_ignores_the_scale_of_a_channel_and_weighs_by_attention():
    weights = torch.ones(4, 8, dtype=torch.float64)
    expected = attentive_difference(S2, T2, weights)
    scale = torch.linspace(1, 3, 8, dtype=torch.float64)[:, None, None]
    torch.testing.assert_close(attentive_difference(scale * S2, 5 * T2, 7 * weights), expected, rtol=1e-5, atol=0)
    assert attentive_difference(-S2, T2, weights) != expected
    alone = [attentive_difference(S2, T2, torch.eye(8, dtype=torch.float64)[[i] * 4]) for i in range(8)]
    torch.testing.assert_close(torch.stack(alone).mean(), expected)


def test_afd_attends_over_the_students_maps_of_any_number():
    maps = [wave((4, c, s, s), 0.1 * c, 0.2) for c, s in ((3, 8), (5, 4), (6, 4), (7, 2))]
    for ours, theirs in ((maps[:1], maps), (maps, maps[2:3]), (maps[:3], maps[1:])):
        student, teacher = shown(*ours), shown(*theirs)
        criterion = AFD(pair_of(student, teacher), dim=4).double()
        attention = criterion.attention(ours, theirs)
        assert attention.shape == (4, len(theirs), len(ours))
        torch.testing.assert_close(attention.sum(2), torch.ones_like(attention[..., 0]))
        assert value(criterion, student, teacher) > 0
    ours, theirs = maps[:3], maps[1:]
    expected = attended_difference(ours, theirs, attention)
    torch.testing.assert_close(
        attended_difference([-2 * m.flip(1) for m in ours], [3 * m for m in theirs], attention), expected
    )
    order = [2, 0, 1]
    torch.testing.assert_close(attended_difference([ours[i] for i in order], theirs, attention[:, :, order]), expected)
    alike = torch.zeros_like(attention)
    alike[:, 0, 1] = alike[:, 1, 2] = 1  # the teacher's first two are the student's last two
    assert attended_difference(ours, theirs[:2], alike[:, :2]).item() == pytest.approx(0, abs=1e-12)


def test_hierarchical_context_of_a_constant_gap_is_its_square():
    for m in (wave((4, 3, s, s), 0.1, 0.2) for s in (1, 2, 4, 7, 8)):
        assert hierarchical_context(m, m + 0.5).item() == pytest.approx(0.25)
    checkers = (torch.arange(64) % 2).double().reshape(1, 1, 8, 8) - 0.5  # gone at every smaller side
    assert hierarchical_context(checkers, 0 * checkers).item() == pytest.approx(0.25 / (1 + 0.5 + 0.25 + 0.125))


def test_reviewkd_passes_on_what_deeper_levels_saw():
    criterion, student, teacher = ReviewKD(PAIR).double(), features(PAIR.student, 1), features(PAIR.teacher, 2)
    assert [f.leave[0].in_channels for f in criterion.fusions] == [10] * 3  # the student's embedding, below 512
    assert [f.attention is None for f in criterion.fusions] == [True, False, False]
    assert ReviewKD(PAIR, width=3).fusions[0].leave[0].in_channels == 3
    student.embedding.requires_grad_(True)
    fusion = criterion.fusions
    _, passed = fusion[0](student.embedding[:, :, None, None], None, (1, 1))
    _, passed = fusion[1](student.maps[1], passed, (4, 4))
    shallow, _ = fusion[2](student.maps[0], passed, (4, 4))
    (shallow * teacher.maps[0]).sum().backward()
    assert student.embedding.grad is not None
    assert student.embedding.grad.abs().sum() > 0


@pytest.mark.parametrize("what", ["channels", "positions"])
def test_a_mask_hides_whole_channels_or_whole_positions(what):
    torch.manual_seed(0)
    maps = torch.ones(16, 32, 6, 5)
    hidden = masked(maps, 0.4, what) == 0
    rows = hidden.flatten(2) if what == "channels" else hidden.flatten(2).mT
    assert torch.equal(rows.any(2), rows.all(2))
    assert rows.double().mean().item() == pytest.approx(0.4, abs=0.06)
    assert torch.equal(masked(maps, 0.0, what), maps)
    assert not torch.equal(masked(maps, 0.4, what) == 0, hidden)  # drawn anew


def test_masked_generative_draws_from_the_global_generator():
    student, teacher = features(PAIR.student, 1), features(PAIR.teacher, 2)
    for mask in ("channels", "positions"):
        criterion = MaskedGenerative(PAIR, ratio=0.5, mask=mask).double()
        values = []
        for seed in (1, 2, 1):
            torch.manual_seed(seed)
            values.append(value(criterion, student, teacher))
        assert values[0] == values[2] != values[1]
    bare = MaskedGenerative(PAIR, ratio=0.0).double()
    assert value(bare, student, teacher) == value(bare, student, teacher)


@every
def test_maps_that_are_not_square(method):
    sizes = ((4, 8, 6), (6, 4, 3)), ((5, 6, 6), (7, 3, 5))
    pair = Pair(*(Shapes(6, 10, maps) for maps in sizes))
    criterion = method(pair).double()
    student = features(pair.student, 1, grad=True)
    criterion(student, features(pair.teacher, 2), batch()).backward()
    assert all(p.grad is not None for p in criterion.parameters() if p.requires_grad)


def test_what_each_asks_of_a_run():
    assert AB.preact
    assert (AB.fits, FSP.fits, FT.fits) == ("student", "student", "teacher")
    for method in METHODS:
        assert method in (AB, FSP, FT) or method.fits is None
        assert method is FT or method(PAIR).fitting() is None
        assert method is AB or not method.preact
        assert not method.relational
        assert not method.peers


NO_MAPS = PAIR._replace(student=PAIR.student._replace(maps=()))
FEWER = PAIR._replace(teacher=PAIR.teacher._replace(maps=PAIR.teacher.maps[:1]))
ONE = FEWER._replace(student=PAIR.student._replace(maps=PAIR.student.maps[:1]))


def dots(student: tuple[int, int, int], teacher: tuple[int, int, int]) -> Pair:
    """Networks that end in these maps."""
    return PAIR._replace(student=Shapes(6, 10, ((4, 8, 8), student)), teacher=Shapes(6, 14, ((5, 4, 4), teacher)))


def test_one_row_is_enough_where_positions_are_compared():
    pair = dots((6, 1, 3), (7, 2, 2))
    for method in (AT, NST, FT, AFD, AFDS):
        torch.manual_seed(0)
        student = features(pair.student, 1, grad=True)
        method(pair).double()(student, features(pair.teacher, 2), batch()).backward()
        assert student.maps[-1].grad.abs().max() > 0


@pytest.mark.parametrize("method", [VID, AB, FSP, ReviewKD, MaskedGenerative, FitNet, KDSVD])
def test_one_position_is_enough_for_the_others(method):
    pair = dots((6, 1, 1), (7, 1, 1))
    student = features(pair.student, 1, grad=True)
    torch.manual_seed(0)
    method(pair).double()(student, features(pair.teacher, 2), batch()).backward()
    assert student.maps[-1].grad.abs().max() > 0


def test_afd_of_one_map_is_attention_transfer_from_all():
    maps = [wave((4, c, s, s), 0.1 * c, 0.2) for c, s in ((3, 4), (5, 4), (6, 4))]
    student, teacher = shown(maps[0]), shown(*maps[1:])
    criterion = AFD(pair_of(student, teacher), dim=4).double()
    expected = sum(attention_transfer(maps[0], m) for m in maps[1:])
    torch.testing.assert_close(criterion(student, teacher, batch()), expected)


@every
def test_networks_without_maps_are_refused(method):
    with pytest.raises(ValueError, match=r"student has 0 .*teacher 2 .*maps='"):
        method(NO_MAPS)


@every
def test_unequal_numbers_of_maps(method):
    if method in (FT, AFD, MaskedGenerative):  # the deepest map, or all with all
        assert method(FEWER).double()(features(FEWER.student, 1), features(FEWER.teacher, 2), batch()).isfinite()
        return
    with pytest.raises(ValueError, match=r"student has 2 .*teacher 1 .*maps='last'"):
        method(FEWER)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: VID(PAIR, variance=1e-5), "variance=1e-05: expected a finite number above 1e-05"),
        (lambda: VID(PAIR, variance=float("inf")), "variance=inf"),
        (lambda: AB(PAIR, margin=0.0), "margin=0.0: expected a positive"),
        (lambda: FT(PAIR, k=0.1), "k=0.1: .*1 channel or more of the teacher's 7"),
        (lambda: FT(PAIR, k=float("inf")), "k=inf"),
        (lambda: FSP(ONE), "1 map of each .*2 or more.*maps='stages'"),
        (lambda: AFDS(PAIR, hidden=0.1), "hidden=0.1: .*1 channel or more of the teacher's 5"),
        (lambda: AFD(PAIR, dim=0), "dim=0: expected 1 or more"),
        (
            lambda: AFDS(dots((6, 1, 1), (7, 4, 4))),
            r"AFDS .*\(6, 1, 1\) and the teacher's \(7, 4, 4\) .*--img-size.*--maps",
        ),
        (
            lambda: FT(dots((6, 4, 4), (7, 1, 1))),
            r"FT .*\(6, 4, 4\) and the teacher's \(7, 1, 1\) .*--img-size.*--maps",
        ),
        (
            lambda: AFD(dots((6, 8, 1), (7, 1, 8))),
            r"AFD .*\(6, 8, 1\) and the teacher's \(7, 1, 8\) .*--img-size.*--maps",
        ),
        (
            lambda: AT(dots((6, 1, 1), (7, 1, 1))),
            r"AT .*\(6, 1, 1\) and the teacher's \(7, 1, 1\) .*--img-size.*--maps",
        ),
        (lambda: ReviewKD(PAIR, width=0), "width=0: expected 1 or more"),
        (lambda: MaskedGenerative(PAIR, ratio=1.0), "ratio=1.0: expected 0 <= ratio < 1"),
    ],
)
def test_what_cannot_work_is_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()
