"""Criteria that read the classifier or class activation maps, and OFA: SRRL, OFA-KD, CAT-KD."""

import pytest
import timm
import torch
from cases import BATCH, CLASSES, PAIR, batch, features, loop_kl, wave
from cases_logits import loop_catkd, loop_enhanced
from torch import Tensor, nn

import mgd_timm.models  # noqa: F401 - registers cifar_*
from mgd_timm.criteria import (
    CATKD,
    KD,
    OFA,
    SRRL,
    Objective,
)
from mgd_timm.criteria.catkd import class_attention
from mgd_timm.criteria.ofa import TokenBranch, enhanced_divergence
from mgd_timm.features import FeatureTap, Pair
from mgd_timm.granularity import MAS, GranularityHeads

Z_S, Z_T = wave((4, 10), 0.7, 0.1, 3), wave((4, 10), 0.9, 0.3, 3)


TARGETS = torch.tensor([1, 3, 5, 7])


def test_srrl_keeps_a_frozen_copy_of_the_teachers_classifier_in_eval_mode():
    classifier = nn.Sequential(nn.Dropout(0.5), nn.Linear(14, CLASSES)).bfloat16()
    criterion = SRRL(PAIR._replace(teacher_classifier=classifier))
    assert classifier.training
    assert {p.dtype for p in criterion.parameters()} == {torch.float32}
    criterion.double().train()
    assert criterion.training
    assert criterion.connector.training
    assert not any(module.training for module in criterion.classifier.modules())
    assert not any(p.requires_grad for p in criterion.classifier.parameters())
    assert all(p.requires_grad and p.dtype == torch.bfloat16 for p in classifier.parameters())
    student, teacher = features(PAIR.student, 1), features(PAIR.teacher, 2)
    assert torch.equal(criterion(student, teacher, batch()), criterion(student, teacher, batch()))  # no dropout
    with torch.no_grad():
        classifier[1].weight.zero_()
    assert criterion.classifier[1].weight.abs().sum() > 0


def test_srrl_weighs_its_parts_and_needs_no_common_classes():
    student, teacher = features(PAIR.student, 1), features(PAIR.teacher, 2)
    parts = []
    for alpha, beta in ((1.0, 0.0), (0.0, 1.0), (2.0, 3.0)):
        torch.manual_seed(0)
        parts.append(SRRL(PAIR, alpha=alpha, beta=beta).double()(student, teacher, batch()))
    torch.testing.assert_close(2 * parts[0] + 3 * parts[1], parts[2])
    nine = PAIR._replace(teacher=PAIR.teacher._replace(num_classes=9), teacher_classifier=nn.Linear(14, 9))
    assert SRRL(nine).double()(student, features(nine.teacher, 2), batch()).isfinite()


def test_srrl_aims_at_the_teachers_own_logits_under_mas():
    """The mean of logits and views is none that the classifier could give of any one embedding."""
    student, teacher = features(PAIR.student, 1), features(PAIR.teacher, 2)
    criterion = SRRL(PAIR).double()
    whole = MAS(PAIR, Objective(kd=(1.0, KD(PAIR)), srrl=(1.0, criterion))).double()
    codes = (heads := GranularityHeads(PAIR.teacher.embed_dim, CLASSES).double()).encode(teacher.embedding)
    found = whole(student, teacher._replace(codes=codes, views=heads.decode(codes)), batch())
    torch.testing.assert_close(found["srrl"], criterion(student, teacher, batch()))
    with torch.no_grad():
        teacher = teacher._replace(embedding=criterion.connector(student.embedding))
    assert criterion(student, teacher, batch()).item() == pytest.approx(0, abs=1e-12)


def test_srrl_without_relu_reaches_negative_values():
    embedding = features(PAIR.student, 1).embedding
    ranges = [SRRL(PAIR, relu=relu).double().connector(embedding).min().item() for relu in (True, False)]
    assert ranges[0] == 0
    assert ranges[1] < 0


@pytest.mark.parametrize(("eps", "temperature"), [(1.0, 1.0), (1.5, 1.0), (2.0, 4.0)])
def test_enhanced_divergence_against_loops(eps, temperature):
    value = loop_enhanced(Z_S.tolist(), Z_T, TARGETS.tolist(), eps, temperature)
    assert enhanced_divergence(Z_S, Z_T, TARGETS, eps, temperature).mean().item() == pytest.approx(value, abs=1e-11)


def test_enhanced_divergence_at_one_is_cross_entropy_with_the_teacher():
    entropy = -(torch.softmax(Z_T, 1) * torch.log_softmax(Z_T, 1)).sum(1).mean().item()
    assert enhanced_divergence(Z_S, Z_T, TARGETS, 1.0, 1.0).mean().item() == pytest.approx(
        loop_kl(Z_S, Z_T, 1.0) + entropy, abs=1e-11
    )


def test_ofa_weighs_branches_and_takes_an_exponent_for_each():
    student, teacher = features(PAIR.student, 1), features(PAIR.teacher, 2)

    def value(**options) -> Tensor:
        torch.manual_seed(0)
        return OFA(PAIR, **options).double()(student, teacher, batch())

    final = enhanced_divergence(student.logits, teacher.logits, batch().labels, 1.0, 1.0).mean()
    branches = value() - final
    torch.testing.assert_close(value(branch_weight=0.1), final + 0.1 * branches)
    torch.testing.assert_close(value(eps=(1.0, 1.0, 1.0)), value(eps=1.0))
    raised = enhanced_divergence(student.logits, teacher.logits, batch().labels, 1.5, 1.0).mean()
    torch.testing.assert_close(value(eps=(1.0, 1.0, 1.5)), raised + branches)
    assert value(eps=(2.0, 1.0, 1.0)) != value(eps=(1.0, 2.0, 1.0))
    assert value(temperature=4.0) != value()


@pytest.mark.parametrize(
    ("maps", "tokens"),
    [
        (((4, 16, 16), (6, 8, 8), (8, 4, 4), (10, 2, 2)), None),
        (((4, 9, 7), (6, 5, 4), (8, 1, 1)), None),
        (((4, 7, 7),), None),
        (((8, 14, 14), (8, 14, 14)), 49),
        (((8, 16, 28), (8, 16, 28)), 112),
        (((6, 27, 27), (6, 27, 27), (6, 27, 27)), 729),
        (((8, 28, 28), (8, 28, 28)), 49),
        (((8, 6, 6), (8, 6, 6)), 36),
    ],
)
def test_ofa_reads_any_maps(maps, tokens):
    pair = PAIR._replace(student=PAIR.student._replace(maps=maps, cam=None))
    criterion, student = OFA(pair), features(pair.student, 1, torch.float32, grad=True)
    seen = []
    for branch in criterion.branches:
        assert isinstance(branch, TokenBranch) is (tokens is not None)
        if isinstance(branch, TokenBranch):
            branch.blocks.register_forward_hook(lambda module, args, out: seen.append(out.shape[1]))
    criterion(student, features(pair.teacher, 2, torch.float32), batch()).backward()
    assert seen == ([tokens] * len(maps) if tokens else [])
    assert all(p.grad is not None and p.grad.isfinite().all() for p in criterion.parameters())
    assert all(m.grad.abs().sum() > 0 for m in student.maps)
    if tokens:
        assert [len(branch.blocks) for branch in criterion.branches] == [max(i, 1) for i in reversed(range(len(maps)))]


@pytest.mark.parametrize(("normalise", "side"), [(False, 1), (False, 2), (True, 2)])
def test_class_attention_against_loops(normalise, side):
    student, teacher = features(PAIR.student, 1), features(PAIR.teacher, 2)
    criterion = CATKD(PAIR, resolution=side, normalise=normalise)
    value = loop_catkd(student.cam, teacher.cam, side, normalise)
    assert criterion(student, teacher, batch()).item() == pytest.approx(value, abs=1e-12)


def test_class_attention_is_pooled_to_what_both_have_and_normalised_by_map():
    assert CATKD(PAIR, resolution=8).size == (2, 2)
    wide = PAIR._replace(student=PAIR.student._replace(cam=(4, 1)), teacher=PAIR.teacher._replace(cam=(3, 6)))
    assert CATKD(wide, resolution=4).size == (3, 1)
    assert CATKD(wide)(features(wide.student, 1), features(wide.teacher, 2), batch()).isfinite()
    cam = features(PAIR.student, 1).cam
    scale = wave((BATCH, CLASSES, 1, 1), 0.3, 0.1).abs() + 0.1
    torch.testing.assert_close(class_attention(scale * cam, (2, 2), True), class_attention(cam, (2, 2), True))
    still = torch.zeros(1, 2, 2, 2, requires_grad=True)
    class_attention(still, (2, 2), True).sum().backward()
    assert still.grad.isfinite().all()


def test_class_attention_and_srrl_of_real_networks():
    networks = [timm.create_model(name, num_classes=5) for name in ("cifar_resnet8", "cifar_resnet14")]
    taps = [FeatureTap(network, input_size=(3, 32, 32), cam=True) for network in networks]
    shapes = [tap.shapes(32) for tap in taps]
    pair = Pair(*shapes, teacher_classifier=taps[1].classifier)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    shown = batch(torch.tensor([1, 4]))._replace(images=images, sample_ids=torch.arange(2))
    with torch.no_grad():
        teacher = taps[1].eval()(images)
    for criterion in (CATKD(pair), SRRL(pair)):
        taps[0].zero_grad()
        criterion(taps[0](images), teacher, shown).backward()
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in taps[0].parameters())
    connected = SRRL(pair).classifier(teacher.embedding)
    torch.testing.assert_close(connected, teacher.logits)
