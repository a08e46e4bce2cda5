"""What a report measures, against independent float64 computations."""

import math
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

import mgd_timm.models  # noqa: F401 - registers cifar_*
from mgd_timm.recipe.recipe import make_recipe
from mgd_timm.report.calibration import measure_calibration
from mgd_timm.report.charts import Line, line_chart, ticks
from mgd_timm.report.cka import cka_table, linear_cka
from mgd_timm.report.costs import measure_costs
from mgd_timm.report.findings import agreement, class_accuracy, divergence, gains, learnt_images, teaching_run
from mgd_timm.report.gradcam import grad_cam
from mgd_timm.report.markup import large, number, with_spread
from mgd_timm.report.measure import Predictions
from mgd_timm.report.runs import Run, baseline, group_runs

GENERATOR = torch.Generator().manual_seed(0)


def drawn(*size: int) -> torch.Tensor:
    return torch.randn(*size, generator=GENERATOR, dtype=torch.float64)


def predictions(classes: list[int], labels: list[int], scale: float = 1.0) -> Predictions:
    return Predictions(scale * torch.eye(3)[classes], torch.tensor(labels))


def test_the_calibration_error_is_that_of_bins_counted_by_hand() -> None:
    logits, labels = 2 * drawn(500, 4), torch.randint(0, 4, (500,), generator=GENERATOR)
    expected, found = 0.0, measure_calibration(logits, labels)
    rows = [(float(row.exp().max() / row.exp().sum()), int(row.argmax())) for row in logits]
    for index in range(15):
        held = [
            (sure, found == int(label))
            for (sure, found), label in zip(rows, labels, strict=True)
            if index / 15 < sure <= (index + 1) / 15
        ]
        if held:
            share, accuracy = len(held) / 500, sum(right for _, right in held) / len(held)
            confidence = sum(sure for sure, _ in held) / len(held)
            expected += share * abs(accuracy - confidence)
            assert (found.share[index], found.accuracy[index]) == pytest.approx((share, accuracy))
            assert found.confidence[index] == pytest.approx(confidence)
    assert found.error == pytest.approx(expected, abs=1e-12)
    assert sum(found.share) == pytest.approx(1)


def test_a_sure_network_that_is_right_is_calibrated_and_one_that_is_wrong_is_not() -> None:
    logits = 1e4 * torch.eye(3)
    assert measure_calibration(logits, torch.arange(3)).error == 0
    assert measure_calibration(logits, torch.tensor([1, 2, 0])).error == 1


def test_cka_is_that_of_centred_kernels() -> None:
    x, y = drawn(40, 7), drawn(40, 11)
    centre = torch.eye(40, dtype=torch.float64) - 1 / 40
    k, m = centre @ (x @ x.T) @ centre, centre @ (y @ y.T) @ centre
    expected = (k * m).sum() / ((k * k).sum() * (m * m).sum()).sqrt()
    assert linear_cka(x, y) == pytest.approx(float(expected), rel=1e-10)
    assert cka_table([x, y], [x])[1][0] == pytest.approx(float(expected), rel=1e-10)


def test_cka_does_not_see_rotation_scale_and_shift() -> None:
    x, y = drawn(40, 7), drawn(40, 5)
    rotation = torch.linalg.qr(drawn(7, 7)).Q
    assert linear_cka(x, x) == pytest.approx(1)
    assert linear_cka(3 * x @ rotation + 2, x) == pytest.approx(1)
    assert linear_cka(3 * x @ rotation + 2, y) == pytest.approx(linear_cka(x, y))
    assert linear_cka(x * torch.arange(1, 8), y) != pytest.approx(linear_cka(x, y), rel=1e-3)
    assert math.isnan(linear_cka(torch.ones(40, 2), y))


def test_grad_cam_of_a_pooled_linear_classifier_is_the_classifier_at_each_position() -> None:
    model = timm.create_model("cifar_resnet8x05", num_classes=5).double().eval()
    images, classes = drawn(3, 3, 32, 32), torch.tensor([4, 0, 2])
    final = model.forward_features(images)
    expected = torch.einsum("bchw,bc->bhw", final, model.fc.weight[classes]).relu() / (8 * 8)
    found = grad_cam(model, images, classes)
    assert found is not None
    torch.testing.assert_close(found, expected.detach())
    doubled = grad_cam(model, images, classes, lambda logits, embedding: 2 * model.fc(embedding))
    torch.testing.assert_close(doubled, 2 * expected.detach())


def test_grad_cam_of_tokens_needs_a_score_that_depends_on_them() -> None:
    small = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2, "num_classes": 5}
    images, classes = drawn(2, 3, 32, 32), torch.tensor([1, 3])
    pooled = timm.create_model("vit_tiny_patch16_224", global_pool="avg", fc_norm=False, **small).double().eval()
    tokens = pooled.forward_features(images)[:, 1:].unflatten(1, (4, 4))
    expected = torch.einsum("bhwc,bc->bhw", tokens, pooled.head.weight[classes]).relu() / 16
    torch.testing.assert_close(grad_cam(pooled, images, classes), expected.detach())
    by_class_token = timm.create_model("vit_tiny_patch16_224", **small).double().eval()
    assert grad_cam(by_class_token, images, classes) is None


def test_costs_are_those_of_the_layers() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.Flatten(), nn.Linear(4 * 8 * 8, 5)).train()
    found = measure_costs(model, (3, 8, 8))
    weights = 4 * 3 * 9 + 256 * 5 + 5
    assert (found.parameters, found.size) == (weights, 4 * weights)
    assert found.macs == 4 * 3 * 9 * 64 + 256 * 5
    assert set(found.latency) == {1, 64}
    assert all(milliseconds > 0 for milliseconds in found.latency.values())
    assert model.training


@pytest.mark.parametrize(
    ("name", "size", "billions"),
    [("resnet18", 224, 1.81), ("cifar_resnet8x4", 32, 0.177), ("cifar_resnet32x4", 32, 1.083)],
)
def test_macs_agree_with_the_published_ones(name: str, size: int, billions: float) -> None:
    found = measure_costs(timm.create_model(name), (3, size, size), batches=())
    assert found.macs / 1e9 == pytest.approx(billions, abs=0.005 if size == 224 else 0.0005)
    assert found.latency == {}


def test_accuracy_and_agreement_count_images() -> None:
    one, other = predictions([0, 1, 2, 0], [0, 1, 1, 1]), predictions([0, 2, 2, 1], [0, 1, 1, 1])
    assert (one.top(1), other.top(1), one.top(5)) == (50, 50, 100)
    by_class = class_accuracy(one, 3).tolist()
    assert by_class[:2] == pytest.approx([100, 100 / 3])
    assert math.isnan(by_class[2])
    assert agreement(one, other) == 50
    p, q = (row.logits.double().softmax(1) for row in (other, one))
    assert divergence(other, one) == pytest.approx(float((p * (p / q).log()).sum(1).mean()))


def test_learnt_images_are_right_with_every_seed_and_wrong_alone_with_every_seed() -> None:
    labels = [0, 1, 2, 0]
    ours = [predictions([0, 1, 2, 0], labels, 9), predictions([0, 1, 2, 1], labels, 9)]
    alone = [predictions([1, 0, 0, 1], labels), predictions([1, 0, 2, 1], labels, 5)]
    assert sorted(learnt_images(ours, alone).tolist()) == [0, 1]
    alone[0].logits[1] = torch.tensor([9.0, 0.0, 0.0])  # the second image gains more
    assert learnt_images(ours, alone).tolist() == [1, 0]
    assert learnt_images(alone, ours).tolist() == []


def test_gains_are_paired_by_seed_where_the_seeds_are_the_same() -> None:
    assert gains({1: 70.0, 2: 80.0}, {2: 75.0, 1: 60.0}) == [10, 5]
    assert gains({1: 70.0, 2: 80.0}, {3: 60.0}) == [15]


def run(name: str, **options: object) -> Run:
    return Run(Path(name), make_recipe(output=name, **options), {}, [], {})


def test_runs_are_named_by_role_and_grouped_by_recipe_without_seed() -> None:
    runs = [
        run("a", seed=2),
        run("b", method="none", criterion=("kd:1", "at:100")),
        run("c", method="none"),
        run("d", seed=1),
        run("e", teacher=None, method="none"),
        run("f", method="mag", criterion=("kd", "sp")),
        run("g", peer="cifar_resnet8x05"),
    ]
    groups = group_runs(runs)
    found = [(group.label, [one.folder.name for one in group.runs]) for group in groups]
    assert found == [
        ("alone", ["e"]),
        ("KD", ["c"]),
        ("MAS", ["d", "a"]),
        ("KD + AT", ["b"]),
        ("MAG + SP", ["f"]),
        ("peer + DML", ["g"]),
    ]
    assert baseline(groups, groups[2], kd=False) is groups[0]
    assert baseline(groups, groups[2], kd=True) is groups[1]
    assert baseline(groups, groups[1], kd=True) is None
    assert teaching_run(runs) is runs[0]
    assert teaching_run(runs[4:5]) is None


def test_groups_of_one_name_are_told_apart_and_students_are_compared_with_their_own_kind() -> None:
    groups = group_runs([run("a"), run("b", epochs=3), run("c", student="resnet18", teacher=None, method="none")])
    assert [group.label for group in groups] == [
        "resnet18, alone",
        "cifar_resnet8x05, MAS (a)",
        "cifar_resnet8x05, MAS (b)",
    ]
    assert baseline(groups, groups[1], kd=False) is None


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (61.2, 74.9), (-3e-4, 2e-3), (5.0, 5.0), (0.0, 0.0), (1e4, 9e6)])
def test_ticks_are_few_and_span_the_range(low: float, high: float) -> None:
    found = ticks(low, high)
    assert found[0] <= low
    assert found[-1] >= high
    assert 2 <= len(found) <= 8


def test_a_chart_leaves_out_what_is_not_finite() -> None:
    chart = line_chart("t", [Line(0, "a", [(1, 2.0), (2, math.nan), (3, 4.0)])], x_label="epoch", y_label="%")
    assert chart.count("<circle") == 2
    assert "nan" not in chart


def test_numbers_are_shown_with_a_spread_where_there_are_several() -> None:
    assert with_spread([1.0, 3.0]) == "2.00 ± 1.41"
    assert with_spread([-1.0], signed=True) == "\N{MINUS SIGN}1.00"
    assert with_spread([]) == number(None) == number(math.nan) == "\N{EN DASH}"
    assert [large(value, ("B", "kB", "MB")) for value in (7, 81_234, 1_500_000, 3e9)] == [
        "7 B",
        "81.2 kB",
        "1.50 MB",
        "3,000 MB",
    ]


@pytest.mark.parametrize(
    ("options", "label"),
    [
        ({"criterion_options": ("kd.divergence=bdd",)}, "KD, bdd divergence"),
        ({"sample_weight": "entropy"}, "KD, samples weighted"),
        ({"method": "mag", "code_divergence": "reverse"}, "MAG, reverse divergence of the codes"),
    ],
)
def test_a_variant_of_kd_is_not_the_baseline(options, label):
    run = Run(Path("run"), make_recipe(**{"method": "none", **options}), {}, [], {})
    assert (run.describe(), run.is_kd) == (label, False)
    assert Run(Path("run"), make_recipe(method="none"), {}, [], {}).is_kd
