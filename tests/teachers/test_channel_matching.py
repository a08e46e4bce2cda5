"""Channel matching: a known shuffle of channels is found, wider teachers are averaged, and runs keep what was found."""

import copy
import itertools
import math

import pytest
import timm
import torch
from accelerate import Accelerator
from cases import batch, features, loop_pool
from forked import Ranks
from safetensors.torch import load_file
from torch import nn

from mgd_timm.criteria import AFDS, AT, KDSVD, NST, SP, FitNet
from mgd_timm.data.dataset import load_images
from mgd_timm.distiller import Teacher
from mgd_timm.features import FeatureTap, Pair, Shapes
from mgd_timm.granularity import GranularityHeads
from mgd_timm.pipeline.checks import check_recipe
from mgd_timm.pipeline.plan import context_of, terms_of
from mgd_timm.recipe.recipe import make_recipe
from mgd_timm.teachers.channel_matching import (
    ChannelMatching,
    assign_channels,
    correlate,
    match_channels,
    match_shapes,
)

STUDENT = "cifar_resnet8x05"


def loop_correlation(one: list[float], two: list[float]) -> float:
    mean_one, mean_two = sum(one) / len(one), sum(two) / len(two)
    product = sum((p - mean_one) * (q - mean_two) for p, q in zip(one, two, strict=True))
    squares = sum((p - mean_one) ** 2 for p in one) * sum((q - mean_two) ** 2 for q in two)
    return product / math.sqrt(squares) if squares > 1e-20 else 0.0


def random_correlation(students: int, teachers: int, seed: int = 0) -> torch.Tensor:
    return 2 * torch.rand(students, teachers, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) - 1


def test_correlations_against_loops():
    generator = torch.Generator().manual_seed(0)
    one, two = (torch.randn(7, width, generator=generator) for width in (3, 4))
    one[:, 1], two[:, 0] = 0.7, -one[:, 0]  # a constant channel, and the opposite of one
    found = correlate(one, two)
    assert found.dtype == torch.float64
    for i, j in itertools.product(range(3), range(4)):
        expected = loop_correlation(one[:, i].tolist(), two[:, j].tolist())
        assert found[i, j].item() == pytest.approx(expected, abs=1e-12)


def test_equal_widths_get_the_best_of_all_permutations():
    correlation = random_correlation(5, 5)
    found = assign_channels(correlation)
    best = max(sum(correlation[i, j].item() for i, j in enumerate(p)) for p in itertools.permutations(range(5)))
    assert (found * correlation).sum().item() == pytest.approx(best)
    assert found.sum(0).tolist() == found.sum(1).tolist() == [1.0] * 5


@pytest.mark.parametrize("seed", range(5))
def test_a_wider_teachers_channels_are_averaged(seed):
    """Each of its channels goes to one of the student's, and each of the student's gets one or more: those that the
    one-to-one assignment leaves go to their best."""
    correlation = random_correlation(3, 8, seed)
    found = assign_channels(correlation)
    torch.testing.assert_close(found.sum(1), torch.ones(3, dtype=torch.float64))
    assert (found > 0).sum(0).tolist() == [1] * 8
    for row in found:
        assert row[row > 0].tolist() == pytest.approx([1 / (row > 0).sum().item()] * int((row > 0).sum()))
    own = max(itertools.permutations(range(8), 3), key=lambda p: sum(correlation[i, j].item() for i, j in enumerate(p)))
    for j in range(8):
        expected = own.index(j) if j in own else correlation[:, j].argmax().item()
        assert found[:, j].argmax().item() == expected


@pytest.fixture(scope="module")
def context(small_data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("matching")
    recipe = make_recipe(data_dir=str(small_data), output=str(folder), validation_batch_size=64)
    accelerator = Accelerator(cpu=True)
    return context_of(recipe, load_images(recipe.data, recipe.seed), accelerator, quiet=True)


def shuffled(model: nn.Module, order: torch.Tensor) -> nn.Module:
    """A copy whose first stage's channels are in another order, and which computes the same logits."""
    other = copy.deepcopy(model)
    back = torch.argsort(order)
    with torch.no_grad():
        for block in other.layer1:
            block.conv1.weight.copy_(block.conv1.weight[:, order])
            block.conv2.weight.copy_(block.conv2.weight[order])
            for part in ("weight", "bias", "running_mean", "running_var"):
                getattr(block.bn2, part).copy_(getattr(block.bn2, part)[order])
        other.conv1.weight.copy_(other.conv1.weight[order])
        for part in ("weight", "bias", "running_mean", "running_var"):
            getattr(other.bn1, part).copy_(getattr(other.bn1, part)[order])
        first = other.layer2[0]
        first.conv1.weight.copy_(first.conv1.weight[:, order])
        first.downsample[0].weight.copy_(first.downsample[0].weight[:, order])
    assert torch.equal(back[order], torch.arange(len(order)))
    return other


def tapped(model: nn.Module, context) -> FeatureTap:
    return FeatureTap(model.eval(), (1, 2, 3), input_size=context.images.input_size)


def test_a_known_shuffle_is_found_exactly(context, capsys):
    """The teacher is the student with its channels in another order: its maps become the student's own."""
    torch.manual_seed(0)
    student = timm.create_model(STUDENT, num_classes=10)
    order = torch.randperm(student.layer1[0].conv2.weight.shape[0], generator=torch.Generator().manual_seed(1))
    teacher = Teacher(tapped(shuffled(student, order), context))
    tap = tapped(student, context)
    images = next(context.images.train.batches([context.images.train.ids[:4]], 0, torch.device("cpu"))).images
    with torch.no_grad():
        ours, before = tap(images), teacher(images)
    assert not torch.allclose(before.maps[0], ours.maps[0])
    matched = match_channels(teacher, tap, 200, context)
    after = matched(images)
    assert "mean correlation: 1.00, 1.00, 1.00" in capsys.readouterr().out
    assert torch.equal(matched.channels.matrices()[0].argmax(1), torch.argsort(order))
    for one, other in zip(after.maps, ours.maps, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(after.logits, before.logits, rtol=0, atol=0)
    torch.testing.assert_close(after.embedding, before.embedding, rtol=0, atol=0)
    with_heads = matched.with_heads(GranularityHeads(teacher.tap.embed_dim, 10))(images)
    assert torch.equal(with_heads.maps[0], after.maps[0])
    assert with_heads.codes


def test_which_losses_see_the_order():
    """Those that the docs name, where channels are equal: a loss of sums over channels does not."""
    pair = Pair(shapes(6, 6), shapes(6, 6))
    ours, theirs = features(pair.student, 1), features(pair.teacher, 2)
    mixed = theirs._replace(maps=tuple(one[:, [3, 1, 0, 2, 5, 4]] for one in theirs.maps))
    plain = {"at": AT, "sp": SP, "nst": NST, "kdsvd": KDSVD, "afds": AFDS}
    criteria = {**{name: kind(pair).double() for name, kind in plain.items()}, "fitnet": FitNet(pair, adapter=False)}
    seen = {
        name: not torch.allclose(criterion(ours, theirs, batch()), criterion(ours, mixed, batch()))
        for name, criterion in criteria.items()
    }
    assert seen == {"at": False, "sp": False, "nst": False, "kdsvd": True, "afds": True, "fitnet": True}
    with pytest.raises(ValueError, match=r"adapter=False .* has 6 channels, the teacher's 9.*--match-channels 1000"):
        FitNet(Pair(shapes(6, 6), shapes(9, 9)), adapter=False)


def test_without_an_adapter_fitnet_is_the_mean_square_of_pooled_maps():
    pair = Pair(shapes(3), Shapes(10, 8, ((3, 2, 2),)))
    ours, theirs = features(pair.student, 1), features(pair.teacher, 2)
    squares = [
        (value - other) ** 2
        for sample, target in zip(ours.maps[0].tolist(), theirs.maps[0].tolist(), strict=True)
        for channel, expected in zip(sample, target, strict=True)
        for row, wanted in zip(loop_pool(channel, 2), expected, strict=True)
        for value, other in zip(row, wanted, strict=True)
    ]
    criterion = FitNet(pair, adapter=False)
    assert criterion(ours, theirs, batch()).item() == pytest.approx(sum(squares) / len(squares))
    assert not list(criterion.parameters())


def shapes(*channels: int) -> Shapes:
    return Shapes(10, 8, tuple((count, 4, 4) for count in channels))


def test_shapes_are_the_students_in_channels_alone():
    teacher = Shapes(10, 8, ((16, 8, 8), (32, 2, 2)))
    assert match_shapes(shapes(8, 32), teacher).maps == ((8, 8, 8), (32, 2, 2))
    assert [tuple(m.shape) for m in ChannelMatching(shapes(8, 32), teacher).matrices()] == [(8, 16), (32, 32)]
    with pytest.raises(ValueError, match=r"one to one: the student has 1 .* the teacher 2 .*--maps stages"):
        match_shapes(shapes(8), teacher)
    with pytest.raises(ValueError, match=r"student's maps have \[32, 32\] channels, and the teacher's \[16, 32\]"):
        match_shapes(shapes(32, 32), teacher)


def check(**options) -> None:
    recipe = make_recipe(**options)
    check_recipe(recipe, terms_of(recipe))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"criterion": "kd"}, r"none of task, kd reads the teacher's maps.*--criterion afds"),
        ({"criterion": "ft"}, r"match_channels with ft, fitted on the teacher's maps before the run"),
        ({"criterion": "ab,at"}, r"match_channels with ab, fitted"),
        ({"criterion": "at", "match_channels": 1}, r"match_channels=1: expected 2 or more \(--match-channels\)"),
        ({"criterion": "selfkd"}, r"match_channels=50: there is no teacher. Leave --match-channels out"),
        (
            {"criterion": "at", "streaming": True, "heads_protocol": "live"},
            r"leave --streaming or --match-channels out",
        ),
    ],
)
def test_what_cannot_work_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        check(**{"match_channels": 50, **options})


@pytest.mark.slow
def test_one_process_and_two_find_the_same(small_data, tmp_path):
    """Each with a cache of its own; the embedded teacher is wider than the student."""
    words = ["distill", "--student", STUDENT, "--data-dir", str(small_data), "--method", "none", "--epochs", "1"]
    words += ["--criterion", "fitnet:1,afds:1", "--criterion-options", "fitnet.adapter=false", "--match-channels", "99"]
    found = []
    for processes in (1, 2):
        output = ["--batch-size", str(32 // processes), "--output", str(tmp_path / str(processes))]
        cache = {"MGD_TIMM_CACHE": str(tmp_path / f"cache{processes}")}
        run = Ranks([*words, *output], tmp_path / "log", processes=processes, environment=cache)
        assert run.wait(200) == [0] * processes, run.said()
        assert "maps matched on 99 images; mean correlation: " in run.said()
        (matching,) = (tmp_path / f"cache{processes}" / "channels").rglob("channels.safetensors")
        found.append(load_file(matching))
    one, two = found
    assert {name: matrix.shape for name, matrix in one.items()} == {n: m.shape for n, m in two.items()}
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert any(matrix.shape[0] < matrix.shape[1] for matrix in one.values())
