"""Two students beside a teacher: a real run, continued and on two processes, and the losses against each one's own."""

import json
import shutil

import pytest
import timm
import torch
from cases import CLASSES, PAIR, batch, features
from forked import Ranks
from small import ONE_IMAGE, digest

import mgd_timm
from mgd_timm import models  # noqa: F401  # registers cifar_*
from mgd_timm.cli.main import main
from mgd_timm.criteria import CRITERIA, Objective
from mgd_timm.distiller import Distiller, MutualLearning, TaughtPeers
from mgd_timm.features import Batch, FeatureTap, Pair
from mgd_timm.granularity import MAG, GranularityHeads

TERMS = ("task", "kd", "dml", "abstract", "detailed")


@pytest.fixture(scope="module")
def taps():
    found = []
    for seed, name in enumerate(("cifar_resnet8x05", "cifar_wrn_16_1")):
        torch.manual_seed(seed)
        found.append(FeatureTap(timm.create_model(name, num_classes=CLASSES), input_size=(3, 16, 16)))
    return found


def shown() -> Batch:
    return batch()._replace(images=torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)))


def test_each_student_has_the_losses_of_a_distiller_and_of_mutual_learning(taps):
    shapes = [tap.shapes(16) for tap in taps]
    teacher = features(PAIR.teacher, 2, torch.float32)
    heads = GranularityHeads(PAIR.teacher.embed_dim, CLASSES).requires_grad_(False)
    teacher = teacher._replace(codes=heads.encode(teacher.embedding))
    taught = [
        MAG(pair, Objective(**{name: (1.0, CRITERIA[name](pair)) for name in ("ce", "kd")}))
        for pair in (Pair(one, PAIR.teacher) for one in shapes)
    ]
    between = [Objective(dml=(0.5, CRITERIA["dml"](Pair(*pair)))) for pair in (shapes, shapes[::-1])]
    together = TaughtPeers(*taps, *taught, *between).eval()
    terms, logits = together(shown(), teacher)
    expected: dict[str, torch.Tensor] = {}
    for prefix, tap, objective in zip(("", "peer_"), taps, taught, strict=True):
        found, own = Distiller(tap, objective)(shown(), teacher)
        expected |= {f"{prefix}{name}": term for name, term in found.items()}
        assert torch.equal(logits, own) is not bool(prefix)
    expected |= MutualLearning(*taps, *between)(shown())[0]
    assert set(terms) == set(expected)
    for name, term in terms.items():
        torch.testing.assert_close(term, expected[name], msg=name)
    sides = ({"student", "objective"}, {"peer", "peer_objective"})
    for own, prefix in zip(sides, (False, True), strict=True):
        together.zero_grad()
        sum(term for name, term in terms.items() if name.startswith("peer_") is prefix).backward(retain_graph=True)
        given = {name.split(".")[0] for name, weight in together.named_parameters() if weight.grad is not None}
        assert given == own


def rows_of(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: row[name] for name in ("epoch", "updates", "lr", "train", "sample_weights", "eval")} for row in rows]


@pytest.fixture(scope="module")
def words(small_data):
    words = ["distill", "--data-dir", str(small_data), "--teacher", "embedded", "--peer", "cifar_resnet8"]
    words += ["--student", "cifar_resnet8x05", "--method", "mag", "--sample-weight", "entropy", "--epochs", "1"]
    words += ["--code-divergence", "bdd", "--heads-epochs", "1", "--heads-augmentations", "1", "--batch-size", "32"]
    return [*words, "--global-batch-size", "64", "--checkpoint-interval", "1", "--checkpoint-hist", "9"]


@pytest.fixture(scope="module")
def whole(words, tmp_path_factory):
    folder = tmp_path_factory.mktemp("peers") / "run"
    assert main([*words, "--output", str(folder)]) == 0
    return folder


@pytest.mark.slow
def test_both_students_are_trained_evaluated_and_exported_without_a_trace(whole):
    rows, summary = rows_of(whole), json.loads((whole / "summary.json").read_text())
    assert set(rows[-1]["train"]) == {f"{role}{name}" for name in TERMS for role in ("", "peer_")} | {"top1"}
    weights = rows[-1]["sample_weights"]
    assert 0 < weights["mean"] < 1
    assert 0 < weights["std"] < 0.5
    students = ("export", "cifar_resnet8x05", summary), ("export_peer", "cifar_resnet8", summary["peer"])
    for place, name, own in students:
        model = timm.create_model(f"local-dir:{whole / place}", pretrained=True)
        assert model.pretrained_cfg["architecture"] == name
        assert set(model.state_dict()) == set(timm.create_model(name, num_classes=10, in_chans=3).state_dict())
        assert mgd_timm.evaluate(str(whole / place))["top1"] == pytest.approx(own["top1"])


@pytest.mark.slow
def test_a_run_goes_on_from_any_checkpoint_to_the_same_bits(whole, words, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "run")
    for checkpoint in (folder / "checkpoints").iterdir():
        if int(checkpoint.name) > 3:
            shutil.rmtree(checkpoint)
    assert main([*words, "--output", str(folder), "--resume"]) == 0
    for place in ("export", "export_peer"):
        assert digest(folder / place / "model.safetensors") == digest(whole / place / "model.safetensors")
    assert rows_of(folder) == rows_of(whole)


@pytest.mark.slow
def test_two_processes_train_as_one(whole, words, tmp_path):
    ranks = Ranks([*words, "--output", str(tmp_path / "run")], tmp_path / "log", processes=2)
    assert ranks.wait(120) == [0, 0], ranks.said()
    for found, expected in zip(rows_of(tmp_path / "run"), rows_of(whole), strict=True):
        for part in ("train", "sample_weights", "eval"):
            for name, value in found[part].items():
                assert value == pytest.approx(expected[part][name], rel=1e-3, abs=ONE_IMAGE if "top" in name else 1e-5)
