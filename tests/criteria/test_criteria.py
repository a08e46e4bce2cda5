"""Every criterion against a reference of plain loops in float64, and what all of them promise."""

import copy

import pytest
import torch
from cases import BATCH, CLASSES, batch, features, of_parts, parts, rows
from every_criterion import CASES, both, built, check_gradients, depends, every, trained, value
from torch import Tensor, nn

from mgd_timm import models  # noqa: F401  # registers cifar_*
from mgd_timm.criteria import CRD, CRITERIA, Criterion, CrossEntropy
from mgd_timm.features import Batch, Features, Shapes


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
    assert read == declared or not CRITERIA[name].needs  # those that need no teacher
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
    """DIST: 1e-8 in the denominator. OFA: the teacher's entropy is left. CRD: every negative costs something.
    SelfKD: its heads learn the labels too."""
    assert {name for name in CRITERIA if CASES[name].zero is None} == {"dist", "ofa", "crd", "selfkd"}


@pytest.mark.parametrize("name", [name for name in CRITERIA if CASES[name].zero is not None])
def test_it_is_zero_where_the_maths_says_so(name):
    pair = CASES[name].pair
    pair = pair._replace(teacher=pair.student._replace(num_classes=pair.teacher.num_classes))
    pair = pair._replace(teacher_classifier=nn.Linear(pair.teacher.embed_dim, CLASSES).double().requires_grad_(False))
    criterion = built(name, pair)
    student, teacher = CASES[name].zero(criterion, features(pair.student, 1))
    assert criterion(student, teacher, batch()).item() == pytest.approx(0, abs=1e-12)


def test_every_criterion_states_its_weight_and_needs():
    for criterion in CRITERIA.values():
        assert criterion.weight > 0
        assert criterion.needs <= {"logits", "embedding", "maps", "cams"}
        assert "Reference:" in criterion.__doc__ or criterion is CrossEntropy
    assert set(CASES) == set(CRITERIA)
