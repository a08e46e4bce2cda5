"""A teacher trained for its student: the loss against loops, what gets gradients, refusals, and whole runs."""

import json
import shutil
from pathlib import Path

import pytest
import timm
import torch
from cases import BATCH, CLASSES, batch, features, loop_ce, loop_kl
from forked import Ranks, command_line
from safetensors.torch import load_file
from small import SHORT, digest
from torch import nn

from mgd_timm.criteria import CrossEntropy
from mgd_timm.features import Batch, FeatureTap, Pair, Shapes
from mgd_timm.models.tail import GenericTail, Tail
from mgd_timm.pipeline.checks import check_recipe
from mgd_timm.pipeline.plan import terms_of
from mgd_timm.recipe.recipe import make_recipe
from mgd_timm.teachers.student_friendly import Branch, StudentFriendly, build_branches

SHAPES = Shapes(CLASSES, 10, ((4, 8, 8), (6, 4, 4), (7, 2, 2)))
SIZE = (3, 32, 32)
ALONE = {"teacher": None, "method": "none"}


def task(shapes: Shapes, **options) -> CrossEntropy:
    return CrossEntropy(Pair(shapes, shapes), **options)


@pytest.mark.parametrize("divergence", ["reverse", "forward"])
def test_terms_against_loops(divergence):
    torch.manual_seed(0)
    branches = [Branch(one, (3, 4, 4), GenericTail(((3, 4, 4), (5, 2, 2)), CLASSES)) for one in SHAPES.maps[:2]]
    options = {"weights": (0.5, 3.0, 2.0), "temperature": 2.0, "divergence": divergence}
    objective = StudentFriendly(task(SHAPES, smoothing=0.1), branches, **options).double().eval()
    seen = features(SHAPES, 1)
    terms = objective(seen, seen, batch())
    labels = 0.9 * nn.functional.one_hot(batch().labels, CLASSES) + 0.1 / CLASSES
    logits = [branch(one) for branch, one in zip(branches, seen.maps, strict=False)]
    pairs = [(seen.logits, one) if divergence == "reverse" else (one, seen.logits) for one in logits]
    assert {name: term.item() for name, term in terms.items()} == pytest.approx(
        {
            "task": 0.5 * loop_ce(seen.logits, labels),
            "branch_kl": 3.0 * sum(loop_kl(*pair, 2.0) for pair in pairs) / 2,
            "branch_ce": 2.0 * sum(loop_ce(one, labels) for one in logits) / 2,
        }
    )


def connected(student: str, **options) -> tuple[FeatureTap, list[Branch], str]:
    torch.manual_seed(0)
    teacher = FeatureTap(timm.create_model("test_resnet", num_classes=5), "stages", input_size=SIZE)
    branches, note = build_branches(
        teacher, student, lambda: timm.create_model(student, num_classes=5, **options), SIZE
    )
    return teacher, branches, note


@pytest.mark.parametrize(
    ("student", "kind", "note"),
    [
        ("cifar_resnet8", Tail, "2 branches into cifar_resnet8, with its own blocks (exact)"),
        ("test_vit", GenericTail, "3 branches into test_vit, with a generic tail in place of its blocks"),
    ],
)
def test_branch_losses_reach_the_teachers_first_layer_and_every_weight_of_the_branches(student, kind, note):
    teacher, branches, said = connected(student, **({"img_size": 32} if kind is GenericTail else {}))
    assert said.startswith(note)
    assert all(type(branch.tail) is kind for branch in branches)
    objective = StudentFriendly(task(teacher.shapes(32)), branches)
    shown = Batch(torch.randn(BATCH, *SIZE), torch.arange(BATCH), torch.arange(BATCH))
    for term, reaches_classifier in (("branch_ce", False), ("branch_kl", True)):
        teacher.zero_grad()
        objective.zero_grad()
        seen = teacher(shown.images)
        objective(seen, seen, shown)[term].backward()
        assert teacher.model.conv1[0].weight.grad.abs().max() > 0
        assert (teacher.classifier.weight.grad is not None) is reaches_classifier
        assert all(weight.grad is not None for weight in objective.branches.parameters())


def test_a_network_with_one_map_is_refused():
    with pytest.raises(ValueError, match=r"for_student='test_vit': .* 1 in common, .*--img-size"):
        connected("test_vit", img_size=32, depth=1)


def check(**options) -> None:
    recipe = make_recipe(**options)
    check_recipe(recipe, terms_of(recipe))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"teacher": "embedded"}, "trained with the labels alone: give it to mgd-timm train"),
        ({"peer": "cifar_resnet8"}, "trained with the labels alone"),
        ({**ALONE, "criterion": "selfkd"}, "trained with the labels alone"),
        ({**ALONE, "for_student": None, "for_student_temperature": 2.0}, "it is for --for-student only"),
        ({**ALONE, "for_student_weights": (1.0, 3.0)}, "expected 3 numbers"),
        ({**ALONE, "for_student_weights": (0.0, 3.0, 1.0)}, r"of the labels \(more than 0\)"),
        ({**ALONE, "for_student_weights": (1.0, -3.0, 1.0)}, r"--for-student-weights"),
        ({**ALONE, "train_only": "classifier"}, "trains the backbone"),
        ({**ALONE, "qat": True}, "--qat is for students"),
        ({**ALONE, "for_student": "resnet10"}, "unknown model 'resnet10': did you mean"),
    ],
)
def test_what_cannot_work_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        check(**{"for_student": "cifar_resnet8x05", **options})


def test_fsdp_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="for_student with FSDP"):
        check(**ALONE, for_student="cifar_resnet8x05")


def words(data: Path, output: Path, *more: str) -> list[str]:
    common = ["train", "--model", "cifar_resnet8x05", "--data-dir", str(data), "--batch-size", "32"]
    return [*common, "--drop", "0.2", "--output", str(output), "--epochs", "1", *more]


def losses(output: Path) -> list[dict]:
    return [json.loads(line)["train"] for line in (output / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def plain(small_data, tmp_path_factory):
    output = tmp_path_factory.mktemp("plain") / "run"
    assert command_line(*words(small_data, output)) == 0
    return output


@pytest.fixture(scope="module")
def tuned(plain, small_data, tmp_path_factory):
    """The plain run's model, fine-tuned for a student."""
    output = tmp_path_factory.mktemp("tuned") / "run"
    assert command_line(*words(small_data, output, *tuning(plain))) == 0
    return output


def tuning(plain: Path) -> list[str]:
    start = ["--initial-checkpoint", str(plain / "export" / "model.safetensors")]
    return [*start, "--for-student", "cifar_resnet8", "--epochs", "2"]


@pytest.mark.slow
def test_without_weights_it_is_plain_training_bit_for_bit(plain, small_data, tmp_path):
    output = tmp_path / "run"
    more = ["--for-student", "cifar_resnet8", "--for-student-weights", "1", "0", "0"]
    assert command_line(*words(small_data, output, *more)) == 0
    assert digest(output / "export" / "model.safetensors") == digest(plain / "export" / "model.safetensors")
    assert losses(output) == losses(plain)


@pytest.mark.slow
def test_the_teacher_is_exported_alone_and_teaches(tuned, small_data, tmp_path):
    assert set(losses(tuned)[-1]) == {"task", "branch_kl", "branch_ce", "top1"}
    assert losses(tuned)[-1]["branch_ce"] < losses(tuned)[0]["branch_ce"]
    exported = load_file(tuned / "export" / "model.safetensors")
    assert exported.keys() == timm.create_model("cifar_resnet8x05", num_classes=10).state_dict().keys()
    distil = ["distill", "--teacher", str(tuned), "--data-dir", str(small_data), "--method", "none", *SHORT]
    assert command_line(*distil, "--output", str(tmp_path / "run")) == 0


@pytest.mark.slow
def test_a_resumed_run_goes_on_to_the_same_bits(tuned, plain, small_data, tmp_path):
    output = tmp_path / "run"
    shutil.copytree(tuned, output)
    *_, last = sorted(path for path in (output / "checkpoints").iterdir() if path.name.isdecimal())
    shutil.rmtree(last)
    shutil.rmtree(output / "export")
    assert command_line(*words(small_data, output, *tuning(plain)), "--resume") == 0
    assert digest(output / "export" / "model.safetensors") == digest(tuned / "export" / "model.safetensors")
    assert losses(output) == losses(tuned)


@pytest.mark.slow
def test_two_processes_learn_the_same(tuned, plain, small_data, tmp_path):
    more = [*tuning(plain), "--batch-size", "16"]
    run = Ranks(words(small_data, tmp_path / "run", *more), tmp_path / "log", processes=2)
    assert run.wait(120) == [0, 0], run.said()
    assert "for_student: 2 branches into cifar_resnet8, with its own blocks (exact)" in run.said()
    for one, two in zip(losses(tuned), losses(tmp_path / "run"), strict=True):
        assert two["branch_kl"] == pytest.approx(one["branch_kl"], rel=0.05)
        assert two["branch_ce"] == pytest.approx(one["branch_ce"], rel=0.02)
