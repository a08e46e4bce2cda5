"""Values of the divergence, cross-entropy, FitNet and the weighted sum."""

import pytest
import torch
from cases import CLASSES, PAIR, batch, features, loop_ce, loop_kl, wave
from every_criterion import FEWER
from torch import Tensor, nn

from mgd_timm import models  # noqa: F401  # registers cifar_*
from mgd_timm.criteria import AT, KD, CrossEntropy, FitNet, Objective, kl_divergence
from mgd_timm.criteria.at import attention_transfer
from mgd_timm.criteria.fitnet import HintAdapter
from mgd_timm.features import Features, Pair, Shapes

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
