"""The order of teachers in sequence: the residual of a linear map, the backward choice, the command."""

import json
import re

import numpy as np
import pytest
import torch
from small import write_small

from mgd_timm.cli.main import main
from mgd_timm.pipeline.order import backward_order, order_teachers, ridge_residual


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_residual_is_that_of_ridge_regression():
    """Against least squares on rows that the penalty is appended to, in numpy."""
    x, y, ridge = random(60, 5) * torch.arange(1, 6) + 3, random(60, 4, seed=1) - 7, 0.3
    y = y + x[:, :4]
    (fit_x, new_x), (fit_y, new_y) = ((one.numpy()[0::2], one.numpy()[1::2]) for one in (x, y))
    mean_x, mean_y = fit_x.mean(0), fit_y.mean(0)
    penalty = np.sqrt(ridge * ((fit_x - mean_x) ** 2).sum() / 5) * np.eye(5)
    rows = np.concatenate([fit_x - mean_x, penalty])
    weights = np.linalg.lstsq(rows, np.concatenate([fit_y - mean_y, np.zeros((5, 4))]), rcond=None)[0]
    error = new_y - mean_y - (new_x - mean_x) @ weights
    expected = (error**2).sum() / ((new_y - new_y.mean(0)) ** 2).sum()
    assert ridge_residual(x, y, ridge) == pytest.approx(expected, rel=1e-9)


def test_a_linear_function_leaves_nothing_and_noise_leaves_all():
    x = random(200, 6)
    linear = x @ random(6, 9, seed=1) + random(9, seed=2)
    assert ridge_residual(x, linear, 1e-9) < 1e-9
    assert ridge_residual(x, random(200, 9, seed=3)) > 0.9
    turn = torch.linalg.qr(random(9, 9, seed=4))[0]
    noisy = linear + random(200, 9, seed=5)
    assert ridge_residual(5 * x + 2, 3 * noisy @ turn - 1) == pytest.approx(ridge_residual(x, noisy), rel=1e-9)


def test_a_constant_embedding_is_refused():
    with pytest.raises(ValueError, match="the same for all images"):
        ridge_residual(random(20, 3), torch.ones(20, 2))


@pytest.mark.parametrize(
    ("residuals", "expected"),
    [
        ({"s": [0.9, 0.8, 0.7], "a": [0, 0.2, 0.5], "b": [0.3, 0, 0.4], "c": [0.1, 0.1, 0]}, ["a", "b", "c"]),
        ({"s": [0.9, 0.1, 0.7], "a": [0, 0.2, 0.5], "b": [0.3, 0, 0.4], "c": [0.1, 0.1, 0]}, ["b", "c"]),
        ({"s": [0.9, 0.8, 0.3], "a": [0, 0.2, 0.5], "b": [0.3, 0, 0.4], "c": [0.1, 0.1, 0]}, ["c"]),
        ({"s": [0.9, 0.8, 0.7], "a": [0, 0.2, 0.3], "b": [0.3, 0, 0.4], "c": [0.1, 0.1, 0]}, ["b", "a", "c"]),
    ],
)
def test_the_order_is_chosen_from_its_end(residuals, expected):
    table = {name: dict(zip("abc", row, strict=True)) for name, row in residuals.items()}
    assert backward_order(table, "s", ["a", "b", "c"], "c") == expected


@pytest.mark.slow
def test_the_command_prints_a_table_or_json(tmp_path, capsys):
    data = write_small(tmp_path / "data", train=80, test=40)
    words = ["--data-dir", str(data), "--mean", "0.3", "0.3", "0.3", "--std", "0.3", "0.3", "0.3"]
    teacher = tmp_path / "teacher"
    train = ["train", "--model", "cifar_resnet8x05", "--epochs", "1", *words, "--output", str(teacher)]
    assert main(train) == 0
    given = ["order", "--teacher", "embedded", "--teacher", str(teacher), "--student", "cifar_resnet8", *words]
    capsys.readouterr()
    assert main([*given, "--images", "60", "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["teachers"][-1] == "embedded"  # the strongest
    assert found["images"] == 60
    assert set(found["teachers"]) | set(found["left_out"]) == {"embedded", str(teacher)}
    assert [step["to"] for step in found["steps"]] == found["teachers"]
    for step in found["steps"]:
        assert step["residual"] == found["residuals"][step["from"]][step["to"]]
    assert main([*given, "--images", "60"]) == 0
    out = capsys.readouterr().out
    assert "A heuristic, on 60 images. To use it: --teacher " in out
    assert re.search(rf"-> embedded +{found['steps'][-1]['residual']:.3f} ", out)
    of_run = ["order", "--teacher", "embedded", "--teacher", str(teacher), "--student", str(teacher / "export"), *words]
    assert main([*of_run, "--images", "60", "--json"]) == 0
    steps = json.loads(capsys.readouterr().out.splitlines()[-1])["residuals"]
    assert steps[str(teacher / "export")]["embedded"] == steps[str(teacher)]["embedded"]  # a student may be a run
    assert main([*given, "--images", "3"]) == 1
    assert "images=3: expected 16 or more training images" in capsys.readouterr().err


def test_one_teacher_has_no_order():
    with pytest.raises(ValueError, match="expected two or more teachers"):
        order_teachers(["embedded"], "cifar_resnet8")
    with pytest.raises(ValueError, match="of different names"):
        order_teachers(["embedded", "embedded"], "cifar_resnet8")


@pytest.mark.parametrize("ridge", [0.0, -1.0, float("nan"), float("inf")])
def test_a_ridge_that_is_not_positive_is_refused(ridge):
    with pytest.raises(ValueError, match=f"ridge={ridge}: expected a positive number"):
        order_teachers(["embedded", "runs/other"], "cifar_resnet8", ridge=ridge)
