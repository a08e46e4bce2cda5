"""Every criterion against a reference of plain loops in float64, and what all of them promise."""

import math

import pytest
import torch
from torch import Tensor, nn

from mgd_timm.criteria import AT, CRITERIA, KD, CrossEntropy, FitNet, Objective, kl_divergence
from mgd_timm.criteria.at import attention_transfer
from mgd_timm.criteria.fitnet import HintAdapter
from mgd_timm.features import Batch, Features, Pair, Shapes

BATCH, CLASSES = 4, 6
PAIR = Pair(
    student=Shapes(CLASSES, 10, ((4, 8, 8), (6, 4, 4))),
    teacher=Shapes(CLASSES, 14, ((5, 4, 4), (7, 4, 4))),
    num_samples=16,
    labels=torch.arange(16) % CLASSES,
    teacher_classifier=nn.Linear(14, CLASSES).requires_grad_(False),
)


def wave(shape: tuple[int, ...], a: float, b: float, gain: float = 1.0) -> Tensor:
    """The generator of the golden values: gain * sin(a n + b)."""
    return gain * torch.sin(a * torch.arange(math.prod(shape), dtype=torch.float64) + b).reshape(shape)


def features(shapes: Shapes, seed: int, dtype: torch.dtype = torch.float64, grad: bool = False) -> Features:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(BATCH, *shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_(grad)

    return Features(draw(shapes.num_classes), draw(shapes.embed_dim), tuple(draw(*m) for m in shapes.maps))


def batch(labels: Tensor | None = None) -> Batch:
    ids = torch.arange(BATCH)
    return Batch(torch.zeros(BATCH, 3, 8, 8), ids % CLASSES if labels is None else labels, ids)


# References: plain Python numbers, none of the package's code.


def log_softmax(row: list[float]) -> list[float]:
    top = max(row)
    norm = top + math.log(sum(math.exp(v - top) for v in row))
    return [v - norm for v in row]


def loop_kl(student: Tensor, teacher: Tensor, temperature: float) -> float:
    total = 0.0
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
        log_s, log_t = log_softmax([v / temperature for v in s]), log_softmax([v / temperature for v in t])
        total += sum(math.exp(q) * (q - p) for p, q in zip(log_s, log_t, strict=True))
    return total * temperature**2 / len(student)


def loop_ce(logits: Tensor, target: Tensor) -> float:
    """Cross-entropy with a distribution per sample."""
    rows = zip(logits.tolist(), target.tolist(), strict=True)
    return -sum(y * p for row, weights in rows for y, p in zip(weights, log_softmax(row), strict=True)) / len(logits)


def loop_pool(image: list[list[float]], size: int) -> list[list[float]]:
    """Average over the cells of a size x size grid; the side is a multiple of it."""
    step = len(image) // size
    cells = range(step)
    return [
        [sum(image[i * step + u][j * step + v] for u in cells for v in cells) / step**2 for j in range(size)] for i in range(size)
    ]


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


REFERENCES = {
    "ce": lambda c, s, t: loop_ce(s.logits, torch.eye(CLASSES, dtype=torch.float64)[batch().labels]),
    "kd": lambda c, s, t: loop_kl(s.logits, t.logits, 4.0),
    "fitnet": loop_fitnet,
    "at": lambda c, s, t: sum(loop_at(*maps) for maps in zip(s.maps, t.maps, strict=True)),
}

every = pytest.mark.parametrize("name", CRITERIA)


@every
def test_reference(name):
    torch.manual_seed(0)
    criterion = CRITERIA[name](PAIR).double()
    student, teacher = features(PAIR.student, 1), features(PAIR.teacher, 2)
    assert criterion(student, teacher, batch()).item() == pytest.approx(REFERENCES[name](criterion, student, teacher), abs=1e-10)


@every
def test_gradients_reach_the_student_and_every_parameter(name):
    torch.manual_seed(0)
    criterion = CRITERIA[name](PAIR).double()
    student, teacher = features(PAIR.student, 1, grad=True), features(PAIR.teacher, 2)
    criterion(student, teacher, batch()).backward()
    grads = [v.grad for v in (student.logits, student.embedding, *student.maps) if v.grad is not None]
    assert any(g.abs().sum() > 0 for g in grads)
    assert all(g.isfinite().all() for g in grads)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in criterion.parameters())
    assert PAIR.teacher_classifier.weight.grad is None


@every
def test_needs_are_what_is_read_of_the_teacher(name):
    torch.manual_seed(0)
    criterion = CRITERIA[name](PAIR).double()
    student, teacher = features(PAIR.student, 1), features(PAIR.teacher, 2)
    other = features(PAIR.teacher, 3)
    loss = criterion(student, teacher, batch())
    for part in ("logits", "embedding", "maps"):
        changed = criterion(student, teacher._replace(**{part: getattr(other, part)}), batch())
        assert torch.equal(changed, loss) is (part not in criterion.needs)


@every
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("gain", [1, 300])
def test_half_precision_is_finite_and_widened(name, dtype, gain):
    torch.manual_seed(0)
    criterion = CRITERIA[name](PAIR)

    def half(shapes: Shapes, seed: int) -> Features:
        wide = features(shapes, seed, torch.float32)
        return Features(
            (gain * wide.logits).to(dtype), (gain * wide.embedding).to(dtype), tuple((gain * m).to(dtype) for m in wide.maps)
        )

    with torch.autocast("cpu", dtype):
        loss = criterion(half(PAIR.student, 1), half(PAIR.teacher, 2), batch())
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    assert loss >= 0


@every
def test_the_order_of_the_batch_does_not_matter(name):
    torch.manual_seed(0)
    criterion = CRITERIA[name](PAIR).double()
    student, teacher, order = features(PAIR.student, 1), features(PAIR.teacher, 2), torch.tensor([2, 0, 3, 1])

    def shuffled(f: Features) -> Features:
        return Features(f.logits[order], f.embedding[order], tuple(m[order] for m in f.maps))

    mixed = Batch(*(part[order] for part in batch()))
    torch.testing.assert_close(criterion(shuffled(student), shuffled(teacher), mixed), criterion(student, teacher, batch()))


@every
def test_sgd_lowers_the_loss(name):
    torch.manual_seed(0)
    criterion = CRITERIA[name](PAIR).double()
    student, teacher = features(PAIR.student, 1, grad=True), features(PAIR.teacher, 2)
    optimizer = torch.optim.SGD([student.logits, student.embedding, *student.maps, *criterion.parameters()], lr=0.1)
    losses = []
    for _ in range(21):
        loss = criterion(student, teacher, batch())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@every
def test_state_dict_round_trip(name):
    student, teacher = features(PAIR.student, 1), features(PAIR.teacher, 2)
    torch.manual_seed(0)
    one = CRITERIA[name](PAIR).double()
    one(student, teacher, batch())
    torch.manual_seed(1)
    two = CRITERIA[name](PAIR).double()
    two.load_state_dict(one.state_dict())
    assert torch.equal(one.eval()(student, teacher, batch()), two.eval()(student, teacher, batch()))


@every
def test_it_is_zero_where_the_maths_says_so(name):
    torch.manual_seed(0)
    pair = PAIR._replace(student=PAIR.teacher)
    criterion = CRITERIA[name](pair).double()
    student = features(pair.student, 1)
    teacher = student
    if name == "ce":
        student = student._replace(logits=1e4 * torch.eye(CLASSES, dtype=torch.float64)[batch().labels])
    elif name == "fitnet":
        teacher = student._replace(maps=tuple(criterion.adapter(m) if i else m for i, m in enumerate(student.maps)))
    elif name == "at":
        teacher = student._replace(maps=tuple(-3 * m for m in student.maps))  # neither sign nor scale is attention
    assert criterion(student, teacher, batch()).item() == pytest.approx(0, abs=1e-20)


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
        assert criterion.needs <= {"logits", "embedding", "maps"}
        assert "Reference:" in criterion.__doc__ or criterion is CrossEntropy
    assert set(REFERENCES) == set(CRITERIA)
