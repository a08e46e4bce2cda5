"""Every criterion against a reference of plain loops in float64, and what all of them promise."""

import copy
import functools
import math
import subprocess
import sys
from pathlib import Path

import cases_logits
import cases_maps
import cases_relational
import pytest
import timm
import torch
from cases import BATCH, CLASSES, PAIR, Case, batch, features, loop_ce, loop_kl, loop_pool, of_parts, parts, rows, wave
from torch import Tensor, nn

from mgd_timm import models  # noqa: F401  # registers cifar_*
from mgd_timm.criteria import AT, CRD, CRITERIA, KD, Criterion, CrossEntropy, FitNet, Objective, kl_divergence
from mgd_timm.criteria.at import attention_transfer
from mgd_timm.criteria.fitnet import HintAdapter
from mgd_timm.distiller import MutualLearning, Teacher
from mgd_timm.features import Batch, Features, FeatureTap, Pair, Shapes
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
    criterion(student, teacher, batch()).backward()
    for part, tensor in parts(student).items():
        size = 0.0 if tensor.grad is None else tensor.grad.abs().max().item()
        assert math.isfinite(size), part
        assert size > 1e-8 if dependent[part] else size == 0, (part, size)
    for name, p in trained(criterion).items():
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name
        assert p.ndim == 1 or p.grad.abs().max() > 1e-8, name


@every
def test_reference(name):
    criterion, (student, teacher) = built(name), both(name)
    loss = value(criterion, student, teacher)
    torch.manual_seed(5)
    expected = CASES[name].reference(copy.deepcopy(criterion), student, teacher, batch())
    assert loss.item() == pytest.approx(expected, rel=1e-9, abs=1e-10)


@every
def test_gradients_reach_what_the_loss_depends_on_and_every_weight(name):
    classifier = CASES[name].pair.teacher_classifier
    before = copy.deepcopy(classifier.state_dict())
    check_gradients(built(name), both(name, grad=True)[0], both(name)[1])
    assert classifier.weight.grad is None
    assert all(torch.equal(value, before[key]) for key, value in classifier.state_dict().items())


@every
def test_features_are_left_as_they_are(name):
    """They belong to the networks, and to the other criteria of an objective."""
    criterion, (student, teacher) = built(name), both(name, grad=True)
    shown = [*parts(student).values(), *parts(teacher).values()]
    before = [tensor.detach().clone() for tensor in shown]
    criterion(student, teacher, batch()).backward()
    assert all(map(torch.equal, shown, before))


@every
def test_needs_are_what_is_read_of_the_teacher(name):
    criterion, (student, teacher) = built(name), both(name)
    other = features(CASES[name].pair.teacher, 3)
    loss = value(criterion, student, teacher)
    for need, part in {"logits": "logits", "embedding": "embedding", "maps": "maps", "cams": "cam"}.items():
        changed = value(criterion, student, teacher._replace(**{part: getattr(other, part)}))
        assert torch.equal(changed, loss) is (need not in criterion.needs), need


@every
def test_needs_and_student_needs_are_what_is_read_of_the_student(name):
    """Logits need not be declared: every network shows them."""
    criterion, (student, teacher) = built(name), both(name)
    read = {part.split()[0] for part, found in depends(criterion, student, teacher).items() if found}
    declared = criterion.needs | criterion.student_needs
    assert declared <= read <= declared | {"logits"}
    assert read == declared or name == "ce"  # the one that needs no teacher
    images = batch()._replace(images=torch.ones(BATCH, 3, 8, 8))
    assert torch.equal(value(criterion, student, teacher, images), value(criterion, student, teacher))


def half(shapes: Shapes, seed: int, dtype: torch.dtype, gain: float = 1.0, grad: bool = False) -> Features:
    drawn = parts(features(shapes, seed, torch.float32))
    return of_parts({part: (gain * v).to(dtype).requires_grad_(grad) for part, v in drawn.items()})


@every
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("gain", [1, 300])
def test_half_precision_is_finite_and_widened(name, dtype, gain):
    """Loss and gradients; those of a sum over elements with its weight, as they would not fit into float16
    otherwise."""
    pair, criterion = CASES[name].pair, built(name).float()
    student, teacher = half(pair.student, 1, dtype, gain, grad=True), half(pair.teacher, 2, dtype, gain)
    torch.manual_seed(5)
    with torch.autocast("cpu", dtype):
        loss = criterion(student, teacher, batch())
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    assert loss >= 0 or CASES[name].negative
    (loss * criterion.weight if name == "masked_generative" else loss).backward()
    found = [*parts(student).values(), *trained(criterion).values()]
    assert all(v.grad.isfinite().all() for v in found if v.grad is not None)


@every
@pytest.mark.parametrize("count", [1, 2])
def test_small_batches(name, count):
    """An epoch's last one may be of any size. Where BatchNorm has samples alone, one of them has no variance, and it
    says so."""
    criterion = built(name)
    student, teacher = (rows(shown, slice(count)) for shown in both(name))
    student = of_parts({part: tensor.requires_grad_(True) for part, tensor in parts(student).items()})
    shown = Batch(*(part[:count] for part in batch()))
    if count == 1 and name in {"srrl", "afd", "reviewkd"}:
        with pytest.raises(ValueError, match="more than 1 value per channel when training"):
            criterion(student, teacher, shown)
        assert "BatchNorm" in criterion.__doc__
        criterion.eval()
    loss = criterion(student, teacher, shown)
    assert loss.isfinite()
    loss.backward()
    found = [*parts(student).values(), *trained(criterion).values()]
    assert all(v.grad.isfinite().all() for v in found if v.grad is not None)


def drawn_alike(name: str, criterion: Criterion, order: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is drawn for a sample goes with it to its new place, in the next forward pass."""
    if name == "crd":
        drawn = criterion.draw(torch.arange(16))
        monkeypatch.setattr(CRD, "draw", lambda self, sample_ids: drawn[sample_ids])
    elif name == "masked_generative":
        drawn = torch.rand(BATCH, CASES[name].pair.teacher.maps[-1][0], 1, 1)
        monkeypatch.setattr(torch, "rand", lambda size, **_: drawn[order].reshape(size))
    else:
        assert not CASES[name].draws


@every
def test_the_order_of_the_batch_matters_only_where_the_paper_says_so(name, monkeypatch):
    criterion, (student, teacher) = built(name), both(name)
    losses = []
    for order in (torch.arange(BATCH), torch.tensor([3, 2, 0, 1])):
        with monkeypatch.context() as patched:
            torch.manual_seed(3)
            drawn_alike(name, criterion, order, patched)
            mixed = Batch(*(part[order] for part in batch()))
            losses.append(value(criterion, rows(student, order), rows(teacher, order), mixed))
    assert torch.allclose(*losses, rtol=1e-9) is not CASES[name].ordered


@every
def test_sgd_lowers_the_loss(name):
    criterion, (student, teacher) = built(name), both(name, grad=True)
    optimizer = torch.optim.SGD([*parts(student).values(), *trained(criterion).values()], lr=CASES[name].rate)
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


def test_a_zero_is_missing_only_where_the_maths_has_none():
    """DIST: 1e-8 in the denominator. OFA: the teacher's entropy is left. CRD: every negative costs something."""
    assert {name for name in CRITERIA if CASES[name].zero is None} == {"dist", "ofa", "crd"}


@pytest.mark.parametrize("name", [name for name in CRITERIA if CASES[name].zero is not None])
def test_it_is_zero_where_the_maths_says_so(name):
    pair = CASES[name].pair
    pair = pair._replace(teacher=pair.student._replace(num_classes=pair.teacher.num_classes))
    pair = pair._replace(teacher_classifier=nn.Linear(pair.teacher.embed_dim, CLASSES).double().requires_grad_(False))
    criterion = built(name, pair)
    student, teacher = CASES[name].zero(criterion, features(pair.student, 1))
    assert criterion(student, teacher, batch()).item() == pytest.approx(0, abs=1e-12)


# What networks show: CNN to CNN of other channels and sizes, tokens of a ViT (square maps of one size) on either side,
# and small images, of which the last maps are one position, or one row against one column.
CNN = Shapes(CLASSES, 10, ((4, 8, 8), (6, 4, 4), (8, 2, 2)), cam=(2, 2))
WIDE = Shapes(CLASSES, 12, ((8, 8, 8), (12, 4, 4), (16, 2, 2)), cam=(2, 2))
LARGE = Shapes(CLASSES, 12, ((8, 15, 15), (12, 8, 8), (16, 4, 4)), cam=(4, 4))
VIT = Shapes(CLASSES, 12, ((12, 6, 6), (12, 6, 6), (12, 6, 6)))
TINY = Shapes(CLASSES, 10, ((4, 4, 4), (6, 2, 2), (8, 1, 1)), cam=(1, 1))
TINY_WIDE = Shapes(CLASSES, 12, ((8, 4, 4), (12, 2, 2), (16, 1, 1)), cam=(1, 1))
ROW = Shapes(CLASSES, 10, ((4, 2, 8), (6, 1, 4), (8, 1, 2)), cam=(1, 2))
COLUMN = Shapes(CLASSES, 12, ((8, 8, 2), (12, 4, 1), (16, 2, 1)), cam=(2, 1))
KINDS = {
    "cc": (CNN, WIDE),
    "cl": (CNN, LARGE),
    "same": (CNN, CNN),
    "cv": (CNN, VIT),
    "vc": (VIT, CNN),
    "tiny": (TINY, TINY_WIDE),
    "tiny student": (TINY, WIDE),
    "tiny teacher": (CNN, TINY_WIDE),
    "crossed": (ROW, COLUMN),
}
# What is left of one position when its size is divided out is 1, whatever the networks see.
REFUSED = {
    **{("catkd", kind): "class activation maps of both .*cam=True" for kind in ("cv", "vc")},
    **{
        (name, kind): r"one position .*--img-size.*--maps"
        for name in ("at", "nst", "ft", "afd", "afds")
        for kind in ("tiny", "tiny student", "tiny teacher", "crossed")
    },
}


def pair_of(kind: str) -> Pair:
    student, teacher = KINDS[kind]
    classifier = nn.Linear(teacher.embed_dim, CLASSES).double().requires_grad_(False)
    return Pair(student, teacher, 16, torch.arange(16) % CLASSES, classifier)


@functools.cache
def usually_read(name: str) -> set[str]:
    """The parts of the student's features that the loss depends on where nothing is special."""
    pair = pair_of("cc")
    dependent = depends(built(name, pair), features(pair.student, 1), features(pair.teacher, 2))
    return {part for part, found in dependent.items() if found}


@pytest.mark.parametrize(("name", "kind"), [(n, k) for k in KINDS for n in CRITERIA if (n, k) not in REFUSED])
def test_any_pair_is_bridged(name, kind):
    """With gradients everywhere: of the same parts of the student's features, whatever their sizes."""
    pair = pair_of(kind)
    shown = features(pair.student, 1, grad=True)
    check_gradients(built(name, pair), shown, features(pair.teacher, 2))
    taught = {part for part, tensor in parts(shown).items() if tensor.grad is not None and tensor.grad.any()}
    assert taught
    assert taught == usually_read(name) & set(parts(shown))


@pytest.mark.parametrize(("name", "kind"), REFUSED)
def test_or_a_pair_is_refused_with_the_way_out(name, kind):
    with pytest.raises(ValueError, match=REFUSED[name, kind]):
        CRITERIA[name](pair_of(kind))


# A teacher's features carry no gradient: that is their owner's part of the contract, not each criterion's.


@pytest.fixture(scope="module")
def networks():
    """Two that have whatever a criterion reads, at 16 pixels."""
    found = []
    for seed, name in enumerate(("cifar_resnet8x05", "cifar_wrn_16_1")):
        torch.manual_seed(seed)
        network = timm.create_model(name, num_classes=CLASSES)
        found.append(FeatureTap(network, (1, 2, 3), input_size=(3, 16, 16), cam=True))
    return found


def pictures() -> Batch:
    return batch()._replace(images=torch.randn(BATCH, 3, 16, 16, generator=torch.Generator().manual_seed(0)))


def test_what_a_teacher_shows_has_no_graph(networks):
    tap = copy.deepcopy(networks[1])
    teacher = Teacher(tap, GranularityHeads(tap.embed_dim, CLASSES)).train()
    teacher.requires_grad_(True)  # against better knowledge
    shown = teacher(pictures().images.requires_grad_(True))
    everything = [*parts(shown).values(), *shown.codes.values(), *shown.views.values()]
    assert len(everything) == 2 + 3 + 1 + 2 + 2
    assert not any(tensor.requires_grad or tensor.grad_fn is not None for tensor in everything)


@every
def test_a_student_does_not_train_its_peer(name, networks):
    taps = copy.deepcopy(networks)
    shapes = [tap.shapes(16) for tap in taps]
    labels = torch.arange(16) % CLASSES
    pairs = [Pair(*shapes[::step], 16, labels, tap.classifier) for step, tap in zip((1, -1), taps[::-1], strict=True)]
    objectives = [Objective(**{name: (1.0, CRITERIA[name](pair))}) for pair in pairs]
    if name == "dml":
        objectives = [MAG(pair, objective) for pair, objective in zip(pairs, objectives, strict=True)]
    together = MutualLearning(*taps, *objectives)
    terms, _ = together(pictures())
    sides = ({"student", "objective"}, {"peer", "peer_objective"})
    for own, prefix in zip(sides, ("", "peer_"), strict=True):
        together.zero_grad()
        sum(term for key, term in terms.items() if key.startswith("peer_") == bool(prefix)).backward()
        for key, p in together.named_parameters():
            assert key.split(".")[0] in own or p.grad is None, key
        backbone = together.peer if prefix else together.student
        assert any(p.grad is not None and p.grad.any() for p in backbone.parameters())


@pytest.mark.slow
def test_every_criterion_compiles_as_one_graph():
    """Dynamo cannot trace the type checks of the tests, so in a process without them."""
    script = Path(__file__).parents[1] / "helpers" / "compiled_criteria.py"
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [*CRITERIA, "standardised"]


@every
@pytest.mark.parametrize("method", [MAG, MAS])
def test_it_composes_with_mag_and_mas(name, method):
    pair, (student, teacher) = CASES[name].pair, both(name, grad=True)
    torch.manual_seed(0)
    terms = {"task": (1.0, CrossEntropy(pair)), "kd": (1.0, KD(pair))}
    whole = method(
        pair, Objective(**terms, **({} if name in ("ce", "kd") else {name: (2.0, CRITERIA[name](pair))}))
    ).double()
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


@every
def test_what_a_pair_lacks_is_refused_at_construction(name):
    """Each part that a criterion reads, taken from its pair in turn; relations of embeddings alone go with any pair."""
    pair, kind = CASES[name].pair, CRITERIA[name]
    student, teacher = pair.student, pair.teacher
    lacking = []
    if "maps" in kind.needs:
        lacking += [pair._replace(teacher=teacher._replace(maps=())), pair._replace(student=student._replace(maps=()))]
    if "maps" in kind.student_needs:
        lacking += [pair._replace(student=student._replace(maps=()))]
    if "cams" in kind.needs:
        lacking += [
            pair._replace(teacher=teacher._replace(cam=None)),
            pair._replace(student=student._replace(cam=None)),
        ]
    if kind.needs & {"logits", "cams"}:
        lacking += [pair._replace(teacher=teacher._replace(num_classes=9))]
    if name == "crd":
        lacking += [pair._replace(labels=None), pair._replace(num_samples=0)]
    if name == "srrl":
        lacking += [pair._replace(teacher_classifier=None)]
    assert lacking or name in ("ce", "cc", "rkd", "pkt")
    for other in lacking:
        with pytest.raises(ValueError, match=r".{40,}"):  # more than a word
            CRITERIA[name](other)


@every
def test_features_of_other_shapes_raise(name):
    if name == "ce":
        pytest.skip("the teacher is not read")
    criterion, (student, teacher) = built(name), both(name)
    fewer = Features(
        teacher.logits[:3],
        teacher.embedding[:3],
        tuple(m[:3] for m in teacher.maps),
        cam=teacher.cam[:3] if teacher.cam is not None else None,
    )
    with pytest.raises((ValueError, RuntimeError, TypeError, UserWarning)):  # torch warns before it fails
        criterion(student, fewer, batch())
    if CRITERIA[name].needs & {"maps"} and name not in (
        "sp",
        "masked_generative",
        "ft",
    ):  # these read the deepest map alone
        with pytest.raises((ValueError, RuntimeError, TypeError, IndexError)):
            criterion(student, teacher._replace(maps=teacher.maps[:1]), batch())


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: AT(NO_MAPS), r"student has 2 .*teacher 0 .*maps='last'"),
        (lambda: AT(FEWER), r"student has 2 .*teacher 1 .*maps='last'"),
        (lambda: FitNet(NO_MAPS), r"student has 2 .*teacher 0 .*maps='last'"),
        (lambda: FitNet(FEWER), r"student has 2 .*teacher 1 .*maps='last'"),
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
    torch.testing.assert_close(
        kl_divergence(Z_S.repeat(3, 1), Z_T.repeat(3, 1), temperature), loss
    )  # a mean over the batch
    torch.testing.assert_close(
        kl_divergence(Z_S[:, [3, 1, 0, 2]], Z_T[:, [3, 1, 0, 2]], temperature) >= 0, torch.tensor(True)
    )


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
