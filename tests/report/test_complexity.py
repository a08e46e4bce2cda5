"""Supervision complexity against closed forms and against gradients taken one by one, in float64."""

import pytest
import torch
from torch import nn

from mgd_timm.report.complexity import supervision_complexity, tangent_kernel


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_a_linear_model_has_a_closed_form():
    """K = (X X' + 1) x I for logits W x + b, so each class has a ridge regression of its own."""
    images, targets, ridge = random(7, 2, 3, 3), random(7, 4, seed=1), 0.01
    model = nn.Sequential(nn.Flatten(), nn.Linear(18, 4)).double()
    rows = images.flatten(1)
    gram = rows @ rows.T + 1
    kernel = tangent_kernel(model, images)
    torch.testing.assert_close(kernel, torch.kron(gram, torch.eye(4, dtype=torch.float64)))
    inverse = torch.linalg.inv(gram + ridge * gram.diagonal().mean() * torch.eye(7, dtype=torch.float64))
    expected = sum(float(targets[:, k] @ inverse @ targets[:, k]) for k in range(4))
    found = supervision_complexity(kernel, targets, ridge)
    assert found.value == pytest.approx(expected, rel=1e-9)
    scale = float(gram.diagonal().mean() / targets.square().sum())
    assert found.relative == pytest.approx(expected * scale, rel=1e-9)


def test_the_kernel_is_of_the_gradients_of_each_logit():
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(4)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = nn.Sequential(model, nn.Dropout(0.5), nn.Linear(4, 3)).double().eval()
    norm.running_mean.uniform_(-1, 1)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    images = random(5, 3, 6, 6)
    rows = []
    for logit in model(images).flatten():
        gradients = torch.autograd.grad(logit, list(model.parameters()), retain_graph=True)
        rows.append(torch.cat([gradient.flatten() for gradient in gradients]))
    expected = torch.stack(rows) @ torch.stack(rows).T
    torch.testing.assert_close(tangent_kernel(model, images), expected)
    assert all(value.equal(before[key]) for key, value in model.state_dict().items())


def test_easy_targets_are_below_one_and_hard_ones_above():
    turn = torch.linalg.qr(random(6, 6))[0]
    kernel = turn @ torch.diag(torch.tensor([8.0, 4, 2, 1, 0.5, 0.1], dtype=torch.float64)) @ turn.T
    easy, hard = (supervision_complexity(kernel, turn[:, place].view(3, 2)).relative for place in (0, 5))
    assert easy < 1 < hard
    plain = supervision_complexity(3 * torch.eye(6, dtype=torch.float64), random(3, 2), ridge=0.0)
    assert plain.relative == pytest.approx(1, rel=1e-12)
    scaled = supervision_complexity(5 * kernel, 7 * turn[:, 0].view(3, 2)).relative
    assert scaled == pytest.approx(easy, rel=1e-9)  # of neither scale


def test_gradients_that_take_too_long_are_given_up():
    with pytest.raises(TimeoutError, match="its gradients take more than -1 s"):
        tangent_kernel(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), torch.zeros(1, 1, 2, 2), seconds=-1)
