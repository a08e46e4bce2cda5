"""SSKD against its equations in float64: values, gradients, which rows are kept, and what rotations see."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from cases import BATCH, CLASSES, PAIR, batch, features, parts
from cases_logits import loop_sskd
from torch import Tensor

from mgd_timm import models  # noqa: F401  # registers cifar_*
from mgd_timm.criteria import KD, CrossEntropy, Objective
from mgd_timm.criteria.sskd import SSKD, RotationHead, find_sources, select_rows
from mgd_timm.distiller import Distiller, LiveTeachers, Teacher
from mgd_timm.features import Batch, Features, FeatureTap, Pair, extract_with_rotations
from mgd_timm.features.rotations import rotate


def built(**options):
    torch.manual_seed(0)
    return SSKD(PAIR, **options).double()


def test_a_share_is_counted_as_the_official_code_counts_it():
    scores, targets = torch.tensor([[1.0, 0.0]]).repeat(100, 1), torch.ones(100, dtype=torch.int64)
    for share in torch.arange(0, 101).double() / 100:
        assert select_rows(scores, targets, float(share)).sum() == int(100 * float(share))


def test_rows_are_kept_by_the_rank_of_the_right_answer():
    """Ranks 0, 2, 1, 3, 0, 1: both right rows, then those of rank 1, the first of them first."""
    scores = torch.tensor([[4, 1, 2, 3], [9, 5, 8, 1], [5, 6, 1, 0], [3, 2, 1, 0], [0, 0, 7, 1], [1, 8, 9, 0]])
    targets = torch.tensor([0, 1, 0, 3, 2, 1])
    expected = {0.0: [0, 4], 0.25: [0, 2, 4], 0.5: [0, 2, 4, 5], 0.75: [0, 1, 2, 4, 5], 1.0: [0, 1, 2, 3, 4, 5]}
    for share, rows in expected.items():
        assert select_rows(scores.float(), targets, share).nonzero()[:, 0].tolist() == rows


def test_rotations_of_an_image_follow_one_another():
    images = torch.arange(96.0).reshape(2, 3, 4, 4)
    turned = rotate(images)
    assert len(turned) == 6
    for number, image in enumerate(images):
        for quarters in (1, 2, 3):
            image = image.flip(2).transpose(1, 2)  # a quarter turn against the clock
            assert torch.equal(turned[3 * number + quarters - 1], image)
    assert find_sources(torch.zeros(6, 2)).tolist() == [0, 0, 0, 1, 1, 1]


def plain_sskd(head_s, head_t, student, teacher, labels, shares):
    """Both parts from the equations: cosines one by one, rows chosen by sorting, and PyTorch's own divergence."""

    def cosines(head: RotationHead, shown: Features) -> Tensor:
        images, turned = head.layers(shown.embedding), head.layers(shown.rotated.embedding)
        return F.cosine_similarity(turned[:, None], images[None], dim=2)

    def divergence(one: Tensor, two: Tensor, answers: list[int], temperature: float, share: float) -> Tensor:
        order = [row.argsort(descending=True).tolist().index(y) for row, y in zip(two, answers, strict=True)]
        wrong = sorted((i for i, rank in enumerate(order) if rank), key=lambda i: order[i])
        kept = [i for i, rank in enumerate(order) if not rank] + wrong[: int(len(wrong) * share)]
        log, target = (one / temperature).log_softmax(1)[kept], (two / temperature).softmax(1)[kept]
        return temperature**2 * F.kl_div(log, target, reduction="batchmean")

    classes, sources = ([y for y in numbers for _ in range(3)] for numbers in (labels, range(len(labels))))
    logits = divergence(student.rotated.logits, teacher.rotated.logits, classes, 4.0, shares[0])
    one, two = cosines(head_s, student), cosines(head_t, teacher).detach()
    return {"rotated": 2.7 * logits, "similarity": 10 * divergence(one, two, sources, 0.5, shares[1])}


@pytest.mark.parametrize("shares", [(1.0, 0.75), (0.4, 0.3), (0.75, 1.0), (0.0, 0.0)])
def test_values_and_gradients_are_those_of_the_equations(shares):
    criterion = built(rotated_kept=shares[0], similarity_kept=shares[1])
    student, teacher = features(PAIR.student, 1, grad=True), features(PAIR.teacher, 2)
    labels = batch().labels.tolist()
    found = criterion.parts(student, teacher, batch())
    expected = plain_sskd(criterion.student_head, criterion.teacher_head, student, teacher, labels, shares)
    assert sum(found.values()).item() == pytest.approx(loop_sskd(criterion, student, teacher, batch(), shares), 1e-12)
    leaves = [*parts(student).values(), *criterion.student_head.parameters()]
    for name, part in expected.items():
        one, two = (torch.autograd.grad(loss, leaves, allow_unused=True) for loss in (found[name], part))
        torch.testing.assert_close(found[name], part, rtol=1e-12, atol=1e-14)
        for mine, theirs in zip(one, two, strict=True):
            zero = torch.zeros(())
            torch.testing.assert_close(*(zero if g is None else g for g in (mine, theirs)), rtol=1e-11, atol=1e-14)
    assert not any(p.grad is not None or p.requires_grad for p in criterion.teacher_head.parameters())


def test_the_students_head_learns_from_the_similarities_alone():
    criterion = built()
    found = criterion.parts(features(PAIR.student, 1, grad=True), features(PAIR.teacher, 2), batch())
    head = list(criterion.student_head.parameters())
    assert all(
        grad is None for grad in torch.autograd.grad(found["rotated"], head, allow_unused=True, retain_graph=True)
    )
    assert all(grad.any() for grad in torch.autograd.grad(found["similarity"], head) if grad.ndim > 1)


def test_where_no_row_is_kept_the_loss_is_zero():
    teacher = features(PAIR.teacher, 2)
    wrong = F.one_hot((batch().labels.repeat_interleave(3) + 1) % CLASSES, CLASSES).double()
    teacher = teacher._replace(rotated=teacher.rotated._replace(logits=wrong))
    student = features(PAIR.student, 1, grad=True)
    found = built(rotated_kept=0.0).parts(student, teacher, batch())["rotated"]
    found.backward()
    assert found == 0
    assert not student.rotated.logits.grad.any()


@pytest.fixture(scope="module")
def networks() -> list[FeatureTap]:
    """A student and a teacher with BatchNorm, at 16 pixels."""
    found = []
    for seed, name in enumerate(("cifar_resnet8x05", "cifar_wrn_16_1")):
        torch.manual_seed(seed)
        found.append(FeatureTap(timm.create_model(name, num_classes=CLASSES), input_size=(3, 16, 16)))
    return found


def pictures(count: int = BATCH) -> Batch:
    images = torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    return Batch(images, torch.arange(count) % CLASSES, torch.arange(count))


def test_both_see_the_same_rotations_and_other_criteria_see_none(networks):
    student, shown = copy.deepcopy(networks[0]), pictures()
    teacher, seen = Teacher(networks[1]), []
    pair = Pair(student.shapes(16), networks[1].shapes(16))
    terms = {"task": (0.1, CrossEntropy(pair)), "kd": (0.9, KD(pair))}
    distiller = Distiller(student, Objective(**terms, sskd=(2.0, SSKD(pair)))).train()
    before = copy.deepcopy(student)
    for tap in (student, teacher.tap):
        tap.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    target = LiveTeachers(teacher, rotate=True)(shown)
    found, logits = distiller(shown, target)
    assert torch.equal(*seen)
    assert torch.equal(seen[0][:BATCH], shown.images)
    assert len(seen[0]) == 4 * BATCH
    assert list(found) == ["task", "kd", "sskd_rotated", "sskd_similarity"]
    together = before(seen[0])  # BatchNorm of a student takes its statistics over all of them
    assert torch.equal(logits, together.logits[:BATCH])
    own = Features(together.logits[:BATCH], together.embedding[:BATCH])
    torch.testing.assert_close(Objective(**terms)(own, target, shown)["kd"], found["kd"])
    torch.testing.assert_close(target.rotated.logits, teacher(rotate(shown.images)).logits)
    assert not Distiller(student, Objective(**terms, sskd=(0.0, SSKD(pair)))).rotate


def test_the_teachers_head_learns_to_find_the_source(networks):
    """The loss is the cross-entropy of the cosines."""
    torch.manual_seed(0)
    shown = pictures(8)
    target = extract_with_rotations(Teacher(networks[1]), shown.images)
    head = RotationHead(networks[1].embed_dim)
    losses, logits = head(shown, target)
    turned, images = head.layers(target.rotated.embedding), head.layers(target.embedding)
    cosines = F.cosine_similarity(turned[:, None], images[None], dim=2)
    torch.testing.assert_close(losses["source"], F.cross_entropy(cosines, torch.arange(8).repeat_interleave(3)))
    assert torch.equal(logits, target.logits)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.05, momentum=0.9)
    for _ in range(60):
        optimizer.zero_grad()
        loss = head(shown, target)[0]["source"]
        loss.backward()
        optimizer.step()
    assert loss < losses["source"] - 0.05
