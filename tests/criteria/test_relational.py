"""Golden values and invariances of the criteria that compare the samples of a batch or its channels, and what they
refuse."""

import itertools

import pytest
import torch
from cases import BATCH, PAIR, batch, features, wave
from torch import Tensor

from mgd_timm.criteria import CC, KDSVD, NST, PKT, RKD, SP
from mgd_timm.criteria.cc import correlation_congruence
from mgd_timm.criteria.crd import contrast
from mgd_timm.criteria.kdsvd import right_vectors, vector_relations
from mgd_timm.criteria.nst import neuron_selectivity
from mgd_timm.criteria.pkt import probabilistic_transfer
from mgd_timm.criteria.sp import similarity_preserving
from mgd_timm.features import Features, Pair, Shapes

S1, S2 = wave((4, 6, 8, 8), 0.23, 0.1), wave((4, 8, 4, 4), 0.29, 0.2)
T1, T2 = wave((4, 6, 4, 4), 0.19, 0.4), wave((4, 8, 4, 4), 0.17, 0.3)
VECTORS = wave((6, 12), 0.41, 0.1), wave((6, 12), 0.53, 0.7), wave((6, 20), 0.53, 0.7)


def shown(embedding: Tensor, *maps: Tensor) -> Features:
    return Features(embedding[:, :1], embedding, maps)


def rkd(student: Tensor, teacher: Tensor, **weights: float) -> Tensor:
    return RKD(PAIR, **weights)(shown(student), shown(teacher), batch())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-8), (torch.float32, 1e-4)])
def test_golden_values(dtype, tolerance):
    def close(loss: Tensor, value: float) -> None:
        assert loss.dtype == dtype
        assert loss.item() == pytest.approx(value, abs=tolerance)

    s1, s2, t1, t2, fs, ft, wider = (v.to(dtype) for v in (S1, S2, T1, T2, *VECTORS))
    close(similarity_preserving(s2, t2), 0.4548832562)
    close(neuron_selectivity(s1, t1), 1.4271927033)
    close(neuron_selectivity(s2, t2), 0.2735788510)
    close(correlation_congruence(fs, ft), 8.4612150632)
    close(rkd(fs, ft), 20.3727341908)
    close(rkd(fs, wider), 10.0131150303)
    close(probabilistic_transfer(fs, ft), 0.0773078333)
    close(probabilistic_transfer(fs, wider), 0.0682788444)
    scores = (wave((4, 17), 0.3, 0.1).to(dtype) + 1.5) / 100
    close(contrast(scores[:, 0], scores[:, 1:], 100), 4.2605409178)


def test_golden_value_of_singular_vectors_up_to_their_signs():
    """The published number is informative: it depends on what a library makes of signs and of vectors of singular value
    0.

    These maps are sine waves of rank 2, and 4 vectors are candidates. From the two that are determined, one choice of
    signs gives the number but for 6e-5; to its last digit it took candidates that another number of threads replaces.
    """
    teacher = wave((4, 6, 8, 8), 1.57, 0.1), wave((4, 8, 4, 4), 2.71, 0.2)
    student = wave((4, 6, 8, 8), 1.23, 0.1), wave((4, 8, 4, 4), 2.29, 0.2)
    sides = []
    for maps, count in ((student, 4), (teacher, 1)):
        sides.append([right_vectors(m, count)[0] for m in maps])
    ranks = [
        right_vectors(m, 4)[1] > 1e-9 for m in student
    ]  # sine waves: the third vector and the fourth are arbitrary
    assert [rank.sum(1).tolist() for rank in ranks] == [[2] * 4, [2] * 4]
    near = []
    for s, t, real in zip(*sides, ranks, strict=True):
        cosines = (s.mT @ t)[:, :, 0]
        best = torch.where(real, cosines.abs(), -1).argmax(1)
        near.append(torch.stack([v[:, k] * c[k].sign() for v, k, c in zip(s, best, cosines, strict=True)])[:, :, None])
    per_sample = []
    for sign in (1, -1):
        one, two = vector_relations(near[1], sign * near[0]), vector_relations(sides[1][1], sign * sides[1][0])
        per_sample.append((one - two).square().sum((1, 2, 3)) / 4)
    values = [
        sum(per_sample[k][i].item() for i, k in enumerate(signs)) for signs in itertools.product((0, 1), repeat=4)
    ]
    assert min(abs(value - 0.1217953313) for value in values) < 1e-4


@pytest.mark.parametrize("sizes", [(6, 6, 3), (3, 9, 8), (8, 3, 8)], ids=["channels", "positions", "unequal"])
def test_neuron_selectivity_is_the_same_by_channels_and_by_positions(sizes):
    c_s, c_t, side = sizes
    student, teacher = wave((2, c_s, side, side), 0.23, 0.1), wave((2, c_t, side, side), 0.19, 0.4)
    a, b = (torch.nn.functional.normalize(m.flatten(2), dim=2) for m in (student, teacher))
    kernels = [torch.einsum("bin,bjn->bij", x, y).pow(2).mean() for x, y in ((a, a), (b, b), (a, b))]
    torch.testing.assert_close(neuron_selectivity(student, teacher), kernels[0] + kernels[1] - 2 * kernels[2])


def test_what_leaves_a_loss_as_it_is():
    fs, ft, _ = VECTORS
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    torch.testing.assert_close(
        similarity_preserving(3 * S2, T2[:, [7, 6, 5, 4, 3, 2, 1, 0]]), similarity_preserving(S2, T2)
    )
    torch.testing.assert_close(neuron_selectivity(S1[:, order], 2 * T1[:, order.flip(0)]), neuron_selectivity(S1, T1))
    torch.testing.assert_close(neuron_selectivity(-S1, T1), neuron_selectivity(S1, T1))
    torch.testing.assert_close(rkd(3 * fs + 100, ft[:, torch.randperm(12)]), rkd(fs, ft))
    torch.testing.assert_close(rkd(fs[order], ft[order]), rkd(fs, ft))
    torch.testing.assert_close(
        probabilistic_transfer(3 * fs, ft.flip(1)), probabilistic_transfer(fs, ft), rtol=1e-5, atol=0
    )
    torch.testing.assert_close(correlation_congruence(fs + 1, ft + 1), correlation_congruence(fs, ft))
    torch.testing.assert_close(correlation_congruence(fs.flip(0), ft.flip(0)), correlation_congruence(fs, ft))


def test_relations_of_large_similar_embeddings_survive_float32():
    """Embeddings after a ReLU share a large mean: without centring, its square would drown their differences."""
    fs, ft, _ = VECTORS
    exact = rkd(fs + 1000, ft)
    assert rkd((fs + 1000).float(), ft.float()).item() == pytest.approx(exact.item(), rel=1e-3)


@pytest.mark.parametrize("method", [SP, CC, RKD, PKT])
def test_equal_samples_dead_ones_and_a_single_one_give_finite_gradients(method):
    criterion = method(PAIR)
    for rows in ([0, 0, 1, 2], [0, 0, 0, 0], [0]):
        student, teacher = features(PAIR.student, 1, torch.float32), features(PAIR.teacher, 2, torch.float32)
        for dead in (1.0, 0.0):
            embedding = (student.embedding[rows] * dead).requires_grad_(True)
            maps = tuple((m[rows] * dead).requires_grad_(True) for m in student.maps)
            other = Features(teacher.logits[rows], teacher.embedding[rows], tuple(m[rows] for m in teacher.maps))
            loss = criterion(Features(student.logits[rows], embedding, maps), other, batch())
            loss.backward()
            assert loss.isfinite()
            found = [v.grad for v in (embedding, *maps) if v.grad is not None]
            assert found
            assert all(g.isfinite().all() for g in found)


@pytest.mark.parametrize("shape", [(2, 5, 3, 3), (2, 9, 2, 3), (2, 6, 2, 3)], ids=["tall", "wide", "square"])
def test_gradient_of_right_vectors_is_the_library_s_where_that_is_finite(shape):
    maps = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    weight = wave((2, shape[1], shape[1]), 0.7, 0.2)

    def projector(vectors: Tensor) -> Tensor:  # of a sum without sign
        return (vectors @ vectors.mT * weight).sum()

    found = torch.autograd.grad(projector(right_vectors(maps, 2)[0]), maps)[0]
    vh = torch.linalg.svd(maps.flatten(2).mT, full_matrices=False).Vh
    torch.testing.assert_close(found, torch.autograd.grad(projector(vh[:, :2].mT), maps)[0])


@pytest.mark.parametrize("kind", ["dead channels", "equal channels", "all dead", "one position"])
def test_gradient_of_right_vectors_is_finite_where_singular_values_agree(kind):
    maps = torch.randn(3, 6, 4, 4, generator=torch.Generator().manual_seed(0)).relu()
    if kind == "dead channels":
        maps[:, 2:] = 0
    elif kind == "equal channels":
        maps = torch.eye(6).repeat(3, 1, 1)[:, :, :, None].contiguous()  # all singular values are 1
    elif kind == "all dead":
        maps = torch.zeros_like(maps)
    else:
        maps[:, :, 1:], maps[:, :, :, 1:] = 0, 0
    maps.requires_grad_(True)
    (right_vectors(maps, 4)[0] * wave((3, 6, 4), 0.7, 0.2).float()).sum().backward()
    assert maps.grad.isfinite().all()
    if kind in ("dead channels", "one position"):
        assert maps.grad.abs().sum() > 0


def test_singular_vectors_bridge_channels_sizes_and_few_positions():
    shapes = Shapes(6, 10, ((4, 8, 8), (6, 3, 5), (8, 1, 2))), Shapes(6, 14, ((5, 4, 4), (6, 7, 7), (9, 2, 1)))
    criterion = KDSVD(Pair(*shapes), vectors=2)
    assert [len(adapter) for adapter in criterion.adapters] == [2, 0, 2]
    student, teacher = features(shapes[0], 1, torch.float32, grad=True), features(shapes[1], 2, torch.float32)
    criterion(student, teacher, batch()).backward()
    assert all(m.grad.isfinite().all() for m in student.maps)
    assert student.maps[0].shape[0] == BATCH


def test_the_teacher_s_sign_does_not_matter_for_maps_of_one_sign():
    """A vector's sign is the decomposition's choice, so we make one: a map and its negative have the same vectors."""
    pair = PAIR._replace(teacher=PAIR.student)
    student, teacher = features(PAIR.student, 1), features(PAIR.student, 2)
    losses = [
        KDSVD(pair)(student, teacher._replace(maps=(teacher.maps[0].abs(), sign * teacher.maps[1].abs())), batch())
        for sign in (1, -1)
    ]
    torch.testing.assert_close(*losses)


def test_weights_of_rkd_add_up():
    fs, ft, _ = VECTORS
    far, wide = rkd(fs, ft, distance_weight=25, angle_weight=0), rkd(fs, ft, distance_weight=0, angle_weight=50)
    torch.testing.assert_close(far + wide, rkd(fs, ft))
    assert far > 0
    assert wide > 0


NO_MAPS = PAIR._replace(teacher=PAIR.teacher._replace(maps=()))
FEWER = PAIR._replace(teacher=PAIR.teacher._replace(maps=PAIR.teacher.maps[:1]))
ONE = FEWER._replace(student=PAIR.student._replace(maps=PAIR.student.maps[:1]))

DOT = Pair(Shapes(6, 10, ((4, 8, 8), (6, 1, 4))), Shapes(6, 14, ((5, 4, 4), (7, 4, 1))))  # a row and a column


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: SP(NO_MAPS), r"student has 2 .*teacher 0 .*maps='last'"),
        (lambda: NST(NO_MAPS), r"student has 2 .*teacher 0 .*maps='last'"),
        (lambda: NST(FEWER), r"student has 2 .*teacher 1 .*maps='last'"),
        (lambda: NST(DOT), r"\(6, 1, 4\) and .*\(7, 4, 1\) have one position .*--img-size.*--maps"),
        (lambda: KDSVD(FEWER), r"student has 2 .*teacher 1 .*maps='last'"),
        (lambda: KDSVD(ONE), r"1 map of each network .*expected 2 or more.*maps='stages'"),
        (lambda: KDSVD(PAIR, vectors=0), "vectors=0: expected 1 to 5"),
        (lambda: KDSVD(PAIR, vectors=6), "vectors=6: expected 1 to 5"),
        (lambda: CC(PAIR, dim=0), "dim=0: expected 1 or more"),
        (lambda: RKD(PAIR, distance_weight=-1.0), "distance_weight=-1.0, angle_weight=50.0: expected finite numbers"),
        (lambda: RKD(PAIR, angle_weight=float("nan")), "angle_weight=nan"),
        (
            lambda: RKD(PAIR, distance_weight=0.0, angle_weight=0.0),
            "distance_weight=0.0, angle_weight=0.0: .*not all 0",
        ),
    ],
)
def test_what_cannot_work_is_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_sp_reads_the_last_maps_and_needs_no_pairing():
    student, teacher = features(PAIR.student, 1), features(FEWER.teacher, 2)
    torch.testing.assert_close(
        SP(FEWER)(student, teacher, batch()), similarity_preserving(student.maps[1], teacher.maps[0])
    )
    assert PKT(PAIR).relational
    assert not NST(PAIR).relational


def test_singular_vectors_of_what_a_map_lacks_are_not_chosen():
    """4 channels, adapted to 7, have a rank of 5 at most: the last candidates would be an arbitrary basis of the
    rest."""
    torch.manual_seed(0)
    pair = Pair(Shapes(6, 10, ((4, 8, 8),) * 2), Shapes(6, 14, ((7, 8, 8),) * 2))
    criterion = KDSVD(pair, vectors=3).double()
    student, teacher = (tuple(torch.randn(4, c, 8, 8).double() for _ in range(2)) for c in (4, 7))

    def loss(noise: float) -> Tensor:
        maps = tuple(m * (1 + noise * torch.randn_like(m)) for m in student)
        return criterion(
            *(Features(torch.zeros(4, 6), torch.zeros(4, 10), shown) for shown in (maps, teacher)), batch()
        )

    torch.testing.assert_close(loss(1e-13), loss(0), rtol=1e-9, atol=0)
