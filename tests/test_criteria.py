"""Every criterion against a reference of plain loops in float64, and what all of them promise."""

import copy
import math

import cases_logits
import cases_maps
import cases_relational
import pytest
import torch
from cases import BATCH, CLASSES, PAIR, Case, batch, features, loop_ce, loop_kl, loop_pool, wave
from torch import Tensor, nn

from mgd_timm.criteria import AT, CRITERIA, KD, Criterion, CrossEntropy, FitNet, Objective, kl_divergence
from mgd_timm.criteria.at import attention_transfer
from mgd_timm.criteria.fitnet import HintAdapter
from mgd_timm.features import Batch, Features, Pair, Shapes
from mgd_timm.granularity import MAG, MAS, GranularityHeads


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
        total += sum((max(0.0, (v - mean) / scale) - y[b][c][i][j]) ** 2 for v, (b, i, j) in zip(values, places, strict=True))
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


def trained(criterion: Criterion) -> list[nn.Parameter]:
    return [p for p in criterion.parameters() if p.requires_grad]


@every
def test_reference(name):
    criterion, (student, teacher) = built(name), both(name)
    loss = value(criterion, student, teacher)
    torch.manual_seed(5)
    expected = CASES[name].reference(copy.deepcopy(criterion), student, teacher, batch())
    assert loss.item() == pytest.approx(expected, rel=1e-9, abs=1e-10)


@every
def test_gradients_reach_the_student_and_every_parameter(name):
    criterion, (student, teacher) = built(name), both(name, grad=True)
    criterion(student, teacher, batch()).backward()
    parts = (student.logits, student.embedding, *student.maps, *([student.cam] if student.cam is not None else []))
    grads = [v.grad for v in parts if v.grad is not None]
    assert any(g.abs().sum() > 0 for g in grads)
    assert all(g.isfinite().all() for g in grads)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained(criterion))
    assert CASES[name].pair.teacher_classifier.weight.grad is None


@every
def test_needs_are_what_is_read_of_the_teacher(name):
    criterion, (student, teacher) = built(name), both(name)
    other = features(CASES[name].pair.teacher, 3)
    loss = value(criterion, student, teacher)
    for need, part in {"logits": "logits", "embedding": "embedding", "maps": "maps", "cams": "cam"}.items():
        changed = value(criterion, student, teacher._replace(**{part: getattr(other, part)}))
        assert torch.equal(changed, loss) is (need not in criterion.needs), need


@every
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("gain", [1, 300])
def test_half_precision_is_finite_and_widened(name, dtype, gain):
    criterion = built(name).float()

    def half(shapes: Shapes, seed: int) -> Features:
        wide = features(shapes, seed, torch.float32)
        maps = tuple((gain * m).to(dtype).requires_grad_(True) for m in wide.maps)
        cam = (gain * wide.cam).to(dtype).requires_grad_(True) if wide.cam is not None else None
        logits, embedding = ((gain * v).to(dtype).requires_grad_(True) for v in (wide.logits, wide.embedding))
        return Features(logits, embedding, maps, cam=cam)

    student, teacher = half(CASES[name].pair.student, 1), half(CASES[name].pair.teacher, 2)
    with torch.autocast("cpu", dtype):
        loss = criterion(student, teacher, batch())
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    assert loss >= 0 or CASES[name].negative
    if gain == 1:  # in fp16 a loss scale must be found for larger ones
        loss.backward()
        found = [v.grad for v in (student.logits, student.embedding, *student.maps, student.cam) if v is not None]
        assert all(g.isfinite().all() for g in found if g is not None)


@every
def test_the_order_of_the_batch_matters_only_where_the_paper_says_so(name):
    criterion, (student, teacher), order = built(name), both(name), torch.tensor([2, 0, 3, 1])

    def shuffled(f: Features) -> Features:
        cam = f.cam[order] if f.cam is not None else None
        return Features(f.logits[order], f.embedding[order], tuple(m[order] for m in f.maps), cam=cam)

    if CASES[name].draws:
        return  # its random numbers belong to places in the batch
    mixed = Batch(*(part[order] for part in batch()))
    one, two = value(criterion, shuffled(student), shuffled(teacher), mixed), value(criterion, student, teacher)
    assert torch.allclose(one, two, rtol=1e-9) is not CASES[name].ordered


@every
def test_sgd_lowers_the_loss(name):
    criterion, (student, teacher) = built(name), both(name, grad=True)
    parts = [student.logits, student.embedding, *student.maps, *([student.cam] if student.cam is not None else [])]
    optimizer = torch.optim.SGD([*parts, *trained(criterion)], lr=CASES[name].rate)
    first = value(criterion, student, teacher).item()
    for step in range(20):
        torch.manual_seed(step)
        loss = criterion(student, teacher, batch())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert value(criterion, student, teacher).item() < first


@every
def test_state_dict_round_trip(name):
    student, teacher = both(name)
    one = built(name)
    one(student, teacher, batch())
    two = built(name, seed=1)
    two.load_state_dict(one.state_dict())
    assert torch.equal(value(one.eval(), student, teacher), value(two.eval(), student, teacher))


@every
def test_it_is_zero_where_the_maths_says_so(name):
    zero = CASES[name].zero
    if zero is None:
        return
    pair = CASES[name].pair
    pair = pair._replace(teacher=pair.student._replace(num_classes=pair.teacher.num_classes))
    if pair.teacher_classifier is not None:
        pair = pair._replace(teacher_classifier=nn.Linear(pair.teacher.embed_dim, CLASSES).double().requires_grad_(False))
    criterion = built(name, pair)
    student, teacher = zero(criterion, features(pair.student, 1))
    assert criterion(student, teacher, batch()).item() == pytest.approx(0, abs=1e-15)


# What networks show: CNN to CNN of other channels and sizes, tokens of a ViT (square maps of one size) on either side.
CNN = Shapes(CLASSES, 10, ((4, 8, 8), (6, 4, 4), (8, 2, 2)), cam=(2, 2))
WIDE = Shapes(CLASSES, 12, ((8, 8, 8), (12, 4, 4), (16, 2, 2)), cam=(2, 2))
LARGE = Shapes(CLASSES, 12, ((8, 15, 15), (12, 8, 8), (16, 4, 4)), cam=(4, 4))
VIT = Shapes(CLASSES, 12, ((12, 6, 6), (12, 6, 6), (12, 6, 6)))


@every
@pytest.mark.parametrize(
    "kinds", [(CNN, WIDE), (CNN, LARGE), (CNN, CNN), (CNN, VIT), (VIT, CNN)], ids=["cc", "cl", "same", "cv", "vc"]
)
def test_any_pair_or_a_reason(name, kinds):
    """A pair is bridged, with gradients everywhere, or refused at construction with the way out."""
    student, teacher = kinds
    classifier = nn.Linear(teacher.embed_dim, CLASSES).requires_grad_(False)
    pair = Pair(student, teacher, 16, torch.arange(16) % CLASSES, classifier)
    if "cams" in CRITERIA[name].needs and VIT in kinds:
        with pytest.raises(ValueError, match="class activation maps"):
            CRITERIA[name](pair)
        return
    criterion = built(name, pair)
    shown = features(student, 1, grad=True)
    loss = criterion(shown, features(teacher, 2), batch())
    assert loss.isfinite()
    loss.backward()
    assert all(p.grad is not None for p in trained(criterion))


@every
@pytest.mark.parametrize("method", [MAG, MAS])
def test_it_composes_with_mag_and_mas(name, method):
    pair, (student, teacher) = CASES[name].pair, both(name, grad=True)
    torch.manual_seed(0)
    terms = {"task": (1.0, CrossEntropy(pair)), "kd": (1.0, KD(pair))}
    whole = method(pair, Objective(**terms, **({} if name in ("ce", "kd") else {name: (2.0, CRITERIA[name](pair))}))).double()
    heads = GranularityHeads(pair.teacher.embed_dim, CLASSES).double()
    codes = {n: c.detach() for n, c in heads.encode(teacher.embedding).items()}
    views = {n: v.detach() for n, v in heads.decode(codes).items()}
    found = whole(student, teacher._replace(codes=codes, views=views), batch())
    assert set(found) == {"task", "kd", *([] if name == "ce" else [name]), "abstract", "detailed"}
    sum(found.values()).backward()
    assert all(p.grad is not None for p in whole.parameters() if p.requires_grad)
    if "logits" in CRITERIA[name].needs and method is MAS:
        stable = teacher._replace(logits=torch.stack([teacher.logits, *views.values()]).mean(0))
        weight, term = (1.0 if name == "kd" else 2.0), whole.objective.criteria[name]
        torch.manual_seed(0)
        torch.testing.assert_close(found[name], weight * term(student, stable, batch()))


NO_MAPS = PAIR._replace(teacher=PAIR.teacher._replace(maps=()))
FEWER = PAIR._replace(teacher=PAIR.teacher._replace(maps=PAIR.teacher.maps[:1]))
OTHER_CLASSES = PAIR._replace(teacher=PAIR.teacher._replace(num_classes=9))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: AT(NO_MAPS), r"student shows 2 .*teacher 0 .*maps='last'"),
        (lambda: AT(FEWER), r"student shows 2 .*teacher 1 .*maps='last'"),
        (lambda: FitNet(NO_MAPS), r"student shows 2 .*teacher 0 .*maps='last'"),
        (lambda: FitNet(FEWER), r"student shows 2 .*teacher 1 .*maps='last'"),
        (lambda: FitNet(PAIR, hint=2), "hint=2: 2 maps are tapped, choose 0 to 1"),
        (lambda: FitNet(PAIR, hint=-1), "choose 0 to 1"),
        (lambda: KD(OTHER_CLASSES), "student has 6 classes, the teacher 9.*mgd-timm train"),
        (lambda: KD(PAIR, temperature=0), "temperature=0: expected a positive"),
        (lambda: KD(PAIR, temperature=float("nan")), "temperature=nan"),
        (lambda: CrossEntropy(PAIR, smoothing=1.0), "0 <= smoothing < 1"),
        (lambda: CrossEntropy(PAIR, smoothing=-0.1), "0 <= smoothing < 1"),
        (lambda: Objective(), "no term"),
        (lambda: Objective(task=(-1.0, CrossEntropy(PAIR))), "weight of 'task' is -1.0"),
        (lambda: Objective(task=(float("nan"), CrossEntropy(PAIR))), "weight of 'task' is nan"),
        (lambda: Objective(task=(float("inf"), CrossEntropy(PAIR))), "weight of 'task' is inf"),
    ],
)
def test_what_cannot_work_is_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


# Golden values of the specification, appendix A.

Z_S, Z_T = wave((4, 10), 0.7, 0.1, 3), wave((4, 10), 0.9, 0.3, 3)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-8), (torch.float32, 1e-4)])
def test_golden_values(dtype, tolerance):
    def close(loss: Tensor, value: float) -> None:
        assert loss.dtype == dtype
        assert loss.item() == pytest.approx(value, abs=tolerance)

    z_s, z_t, labels = Z_S.to(dtype), Z_T.to(dtype), torch.tensor([1, 3, 5, 7])
    close(kl_divergence(z_s, z_t, 4.0), 3.8114623348)
    close(kl_divergence(z_s, z_t, 1.0), 2.3216683293)
    shapes = Shapes(10, 1, ())
    both = [Features(z, torch.zeros(4, 1, dtype=dtype)) for z in (z_s, z_t)]
    close(KD(Pair(shapes, shapes))(*both, batch(labels)), 3.8114623348)
    close(CrossEntropy(Pair(shapes, shapes))(*both, batch(labels)), 3.4197477752)
    s1, s2 = wave((4, 6, 8, 8), 0.23, 0.1).to(dtype), wave((4, 8, 4, 4), 0.29, 0.2).to(dtype)
    t1, t2 = wave((4, 6, 4, 4), 0.19, 0.4).to(dtype), wave((4, 8, 4, 4), 0.17, 0.3).to(dtype)
    close(attention_transfer(s1, t1), 0.0206435434)
    close(attention_transfer(s2, t2), 0.0002640528)
    close(attention_transfer(t1, s1), 0.0206435434)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 4.0, 8.0, 20.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_divergence_from_itself_is_exactly_zero(temperature, dtype):
    logits = (10 * Z_S).to(dtype)
    assert kl_divergence(logits, logits, temperature).item() == 0


@pytest.mark.parametrize("temperature", [1.0, 8.0])
def test_divergence_against_loops_and_its_invariances(temperature):
    loss = kl_divergence(Z_S, Z_T, temperature)
    assert loss.item() == pytest.approx(loop_kl(Z_S, Z_T, temperature), abs=1e-12)
    shift = wave((4, 1), 0.3, 0.2, 50)
    torch.testing.assert_close(kl_divergence(Z_S + shift, Z_T - 2 * shift, temperature), loss)
    torch.testing.assert_close(kl_divergence(Z_S.repeat(3, 1), Z_T.repeat(3, 1), temperature), loss)  # a mean over the batch
    torch.testing.assert_close(kl_divergence(Z_S[:, [3, 1, 0, 2]], Z_T[:, [3, 1, 0, 2]], temperature) >= 0, torch.tensor(True))


def test_divergence_of_extreme_logits_is_finite():
    one = torch.tensor([[1e4, -1e4, 0.0]], requires_grad=True)
    loss = kl_divergence(one, one.detach().flip(1), 1.0)
    loss.backward()
    assert loss.isfinite()
    assert one.grad.isfinite().all()


def test_divergence_of_half_precision_is_the_one_of_its_values():
    z_s, z_t = Z_S.bfloat16(), Z_T.bfloat16()
    loss = kl_divergence(z_s, z_t, 8.0)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(loop_kl(z_s, z_t, 8.0), rel=1e-4)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("soft", [False, True])
def test_cross_entropy_of_soft_labels_and_smoothing(smoothing, soft):
    logits = Z_S[:, :CLASSES].contiguous()
    ids = torch.tensor([1, 3, 5, 0])
    target = torch.eye(CLASSES, dtype=torch.float64)[ids]
    if soft:  # as mixup gives them
        target = 0.7 * target + 0.3 * target.flip(0)
    student = Features(logits, torch.zeros(4, 1, dtype=torch.float64))
    loss = CrossEntropy(PAIR, smoothing=smoothing)(student, student, batch(target if soft else ids))
    assert loss.item() == pytest.approx(loop_ce(logits, (1 - smoothing) * target + smoothing / CLASSES), abs=1e-12)


@pytest.mark.parametrize(
    ("side_s", "side_t", "conv", "kernel"),
    [
        ((8, 8), (8, 8), nn.Conv2d, (1, 1)),
        ((16, 16), (8, 8), nn.Conv2d, (3, 3)),
        ((8, 8), (16, 16), nn.ConvTranspose2d, (4, 4)),
        ((10, 9), (8, 8), nn.Conv2d, (3, 2)),
        ((20, 20), (8, 8), nn.Conv2d, (1, 1)),
        ((3, 3), (8, 8), nn.Conv2d, (1, 1)),
        ((1, 1), (7, 7), nn.Conv2d, (1, 1)),
        ((14, 4), (7, 7), nn.Conv2d, (1, 1)),
    ],
)
def test_fitnet_adapts_any_size(side_s, side_t, conv, kernel):
    adapter = HintAdapter((4, *side_s), (5, *side_t))
    assert type(adapter.conv) is conv
    assert adapter.conv.kernel_size == kernel
    out = adapter(wave((2, 4, *side_s), 0.3, 0.1).float())
    assert out.shape == (2, 5, *side_t)
    out.sum().backward()
    assert all(p.grad is not None for p in adapter.parameters())


def test_fitnet_without_relu_reaches_negative_values():
    student, teacher = features(PAIR.student, 1), features(PAIR.teacher, 2)
    ranges = [FitNet(PAIR, relu=relu).double().adapter(student.maps[1]).min().item() for relu in (True, False)]
    assert ranges[0] == 0
    assert ranges[1] < 0
    assert FitNet(PAIR, hint=0).double()(student, teacher, batch()).isfinite()
    one = PAIR._replace(student=PAIR.student._replace(maps=PAIR.student.maps[:1]), teacher=FEWER.teacher)
    assert FitNet(one).hint == 0


def test_objective_weighs_names_and_drops():
    torch.manual_seed(0)
    student, teacher = features(PAIR.student, 1), features(PAIR.teacher, 2)
    task, kd, at = CrossEntropy(PAIR), KD(PAIR), AT(PAIR)
    objective = Objective(task=(0.2, task), soft=(0.8, kd), attention=(1000, at), hint=(0.0, FitNet(PAIR)))
    terms = objective(student, teacher, batch())
    assert list(terms) == ["task", "soft", "attention"]
    for name, weight, criterion in (("task", 0.2, task), ("soft", 0.8, kd), ("attention", 1000, at)):
        torch.testing.assert_close(terms[name], weight * criterion(student, teacher, batch()))
    assert not list(objective.parameters())  # the hint's adapter is gone
    assert objective.weights == {"task": 0.2, "soft": 0.8, "attention": 1000.0, "hint": 0.0}
    assert objective.needs == {"logits", "maps"}
    assert Objective(task=(1.0, task), kd=(0, kd)).needs == frozenset()


def test_every_criterion_states_its_weight_and_needs():
    for criterion in CRITERIA.values():
        assert criterion.weight > 0
        assert criterion.needs <= {"logits", "embedding", "maps", "cams"}
        assert "Reference:" in criterion.__doc__ or criterion is CrossEntropy
    assert set(CASES) == set(CRITERIA)
