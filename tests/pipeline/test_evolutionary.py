"""A teacher that trains along: who learns from what, what is refused, and a real run, continued, on two processes."""

import json
import shutil

import pytest
import timm
import torch
from cases import CLASSES, batch
from forked import Ranks
from small import ONE_IMAGE, digest

import mgd_timm
from mgd_timm import models  # noqa: F401  # registers cifar_*
from mgd_timm.cli.main import main
from mgd_timm.criteria import CRITERIA, Objective
from mgd_timm.distiller import EvolutionaryLearning
from mgd_timm.features import Batch, FeatureTap, Pair
from mgd_timm.pipeline.checks import check_recipe
from mgd_timm.pipeline.plan import terms_of
from mgd_timm.recipe.recipe import make_recipe
from mgd_timm.training.optimizer import build_optimizer, build_schedule

OF_STUDENT = {"task", "ekd_logits", "ekd_guided", "ekd_features", "ekd_labels"}
OF_TEACHER = {"peer_task", "peer_ekd"}


@pytest.fixture
def together():
    torch.manual_seed(0)
    student, teacher = (
        FeatureTap(timm.create_model(name, num_classes=CLASSES), "stages", input_size=(3, 16, 16))
        for name in ("cifar_resnet8x05", "cifar_wrn_16_1")
    )
    pair = Pair(student.shapes(16), teacher.shapes(16))
    objective = Objective(task=(0.5, CRITERIA["ce"](pair)), ekd=(2.0, CRITERIA["ekd"](pair)))
    return EvolutionaryLearning(student, teacher, objective, Objective(task=(0.5, CRITERIA["ce"](pair))))


def shown() -> Batch:
    return batch()._replace(images=torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)))


def owner(name: str) -> str:
    """Whose a parameter is: the student's, or the teacher's with its guided modules."""
    return "teacher" if name.startswith("peer.") or ".teacher_guides." in name else "student"


def test_no_gradient_of_a_network_reaches_the_other(together):
    terms, logits = together(shown())
    assert set(terms) == OF_STUDENT | OF_TEACHER
    assert torch.equal(logits, together.student(shown().images).logits)
    for names, side in ((OF_STUDENT, "student"), (OF_TEACHER, "teacher")):
        together.zero_grad()
        sum(terms[name] for name in names).backward(retain_graph=True)
        taught = {name for name, weight in together.named_parameters() if weight.grad is not None}
        assert taught == {name for name, _ in together.named_parameters() if owner(name) == side}


def test_the_teacher_learns_its_labels_whatever_the_student(together):
    """Its gradient is that of cross-entropy alone: of its own logits, and of its guided modules'."""
    terms, _ = together(shown())
    sum(terms.values()).backward()
    found = {name: weight.grad.clone() for name, weight in together.peer.named_parameters()}
    together.zero_grad()
    features = together.peer(shown().images)
    guided = zip(together.objective.criteria["ekd"].teacher_guides, features.maps, strict=True)
    losses = [torch.nn.functional.cross_entropy(guide(m)[1], shown().labels) for guide, m in guided]
    (0.5 * torch.nn.functional.cross_entropy(features.logits, shown().labels) + 2.0 * sum(losses)).backward()
    for name, weight in together.peer.named_parameters():
        torch.testing.assert_close(found[name], weight.grad, msg=name)


def test_the_teacher_has_a_learning_rate_of_its_own(together):
    together.peer.lr_scale = 0.1
    optim = make_recipe(epochs=2, lr=0.5, sched="cosine").optim
    optimizer = build_optimizer(together, optim)
    schedule = build_schedule(optimizer, optim, updates_per_epoch=4)
    names = {id(weight): name for name, weight in together.named_parameters()}
    for update, expected in ((0, 0.5), (4, 0.25)):
        schedule.step_update(update)
        rates = {names[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]}
        assert set(rates) == set(names.values())
        for name, rate in rates.items():
            assert rate == pytest.approx(expected * (0.1 if owner(name) == "teacher" else 1)), name
        assert optimizer.param_groups[0]["lr"] == pytest.approx(expected)


def test_gradients_are_clipped_per_network(together):
    groups = [[id(weight) for weight in group] for group in together.clip_groups()]
    for group, side in zip(groups, ("student", "teacher"), strict=True):
        assert sorted(group) == sorted(id(p) for name, p in together.named_parameters() if owner(name) == side)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "mag"}, "method='mag' with criterion 'ekd': the heads of MAG and MAS are fitted on a frozen"),
        ({"criterion": ("dml,ekd",)}, "criterion 'ekd' with dml, by which the two networks teach each other"),
        ({"task_weight": 0.0}, "task_weight=0 with criterion 'ekd', whose teacher learns its logits"),
        ({"criterion": ("dml",), "model_ema": True}, "model_ema=True: it averages one student, and with peer='cifar_"),
    ],
)
def test_what_does_not_go_with_it_is_refused(options, message):
    recipe = make_recipe(**{"peer": "cifar_resnet8", "criterion": ("ekd",), **options})
    with pytest.raises(ValueError, match=message):
        check_recipe(recipe, terms_of(recipe))


def rows_of(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: row[name] for name in ("epoch", "updates", "lr", "train", "eval")} for row in rows]


@pytest.fixture(scope="module")
def words(small_data):
    words = ["distill", "--data-dir", str(small_data), "--peer", "cifar_resnet8", "--peer-lr-scale", "0.5"]
    words += ["--student", "cifar_resnet8x05", "--criterion", "ekd,at:100", "--model-ema", "--model-ema-decay", "0.5"]
    words += ["--epochs", "1", "--batch-size", "32", "--global-batch-size", "64"]
    return [*words, "--checkpoint-interval", "1", "--checkpoint-hist", "9"]


@pytest.fixture(scope="module")
def whole(words, tmp_path_factory):
    folder = tmp_path_factory.mktemp("evolutionary") / "run"
    assert main([*words, "--output", str(folder)]) == 0
    return folder


@pytest.mark.slow
def test_both_are_evaluated_and_exported_without_a_trace(whole):
    rows, summary = rows_of(whole), json.loads((whole / "summary.json").read_text())
    assert set(rows[-1]["train"]) == OF_STUDENT | OF_TEACHER | {"at", "top1"}
    assert {"top1", "raw_top1", "peer_top1"} <= set(rows[-1]["eval"])  # the average is the student's alone
    for place, name, own in (
        ("export", "cifar_resnet8x05", summary),
        ("export_peer", "cifar_resnet8", summary["peer"]),
    ):
        model = timm.create_model(f"local-dir:{whole / place}", pretrained=True)
        assert set(model.state_dict()) == set(timm.create_model(name, num_classes=10).state_dict())
        assert mgd_timm.evaluate(str(whole / place))["top1"] == pytest.approx(own["top1"])


@pytest.mark.slow
def test_a_run_goes_on_to_the_same_bits(whole, words, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "run")
    for checkpoint in (folder / "checkpoints").iterdir():
        if int(checkpoint.name) > 3:
            shutil.rmtree(checkpoint)
    assert main([*words, "--output", str(folder), "--resume"]) == 0
    for place in ("export", "export_peer"):
        assert digest(folder / place / "model.safetensors") == digest(whole / place / "model.safetensors")
    assert rows_of(folder) == rows_of(whole)


@pytest.mark.slow
def test_a_peer_starts_from_given_weights(whole, words, tmp_path):
    weights = whole / "export_peer" / "model.safetensors"
    given = ["--peer-checkpoint", str(weights), "--lr", "1e-9", "--output", str(tmp_path / "run")]
    assert main([*words, *given]) == 0
    before, after = (
        timm.create_model(f"local-dir:{f / 'export_peer'}", pretrained=True) for f in (whole, tmp_path / "run")
    )
    for one, other in zip(before.parameters(), after.parameters(), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.slow
def test_two_processes_train_as_one(whole, words, tmp_path):
    ranks = Ranks([*words, "--output", str(tmp_path / "run")], tmp_path / "log", processes=2)
    assert ranks.wait(120) == [0, 0], ranks.said()
    for found, expected in zip(rows_of(tmp_path / "run"), rows_of(whole), strict=True):
        for part in ("train", "eval"):
            for name, value in found[part].items():
                assert value == pytest.approx(expected[part][name], rel=1e-3, abs=ONE_IMAGE if "top" in name else 1e-5)
