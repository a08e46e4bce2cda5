"""A classifier alone on a frozen backbone: nothing else moves, and it learns other classes of real images."""

import copy
import importlib.util
import json
import signal
import sys
from pathlib import Path

import datasets
import pytest
import timm
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from small import ONE_IMAGE, digest, end_at
from torch import nn

import mgd_timm
from mgd_timm.cli.main import main
from mgd_timm.data.dataset import load_images
from mgd_timm.features import FeatureTap
from mgd_timm.models.load import load_model
from mgd_timm.pipeline.run_folder import read_recipe
from mgd_timm.recipe.data import EMBEDDED, Data
from mgd_timm.recipe.recipe import make_recipe
from mgd_timm.training.evaluation import evaluate_taps

pytestmark = pytest.mark.slow

WEIGHTS = EMBEDDED / "teacher" / "model.safetensors"
KINDS = {"upper": (0, 2, 4, 6), "trouser": (1,), "dress": (3,), "shoe": (5, 7, 9), "bag": (8,)}


@pytest.fixture(scope="module")
def recipe_file():
    """recipes/transfer.py as a module."""
    path = Path(__file__).parents[2] / "recipes" / "transfer.py"
    spec = importlib.util.spec_from_file_location("transfer", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def kinds(small_data, tmp_path_factory):
    """The small data set under five other labels; 40 % of it is one of them."""
    folder = tmp_path_factory.mktemp("kinds") / "data"
    folder.mkdir()
    kind_of = {label: kind for kind, labels in enumerate(KINDS.values()) for label in labels}
    for split in ("train", "test"):
        table = datasets.Dataset.from_parquet(
            str(small_data / f"{split}.parquet"), cache_dir=str(folder.parent / "cache")
        )
        labels = [kind_of[label] for label in table["label"]]
        table = table.remove_columns("label").add_column("kind", labels)
        table.cast_column("kind", datasets.ClassLabel(names=list(KINDS))).to_parquet(folder / f"{split}.parquet")
    return folder


@pytest.fixture
def transfer(recipe_file, monkeypatch, capsys):
    """Call recipes/transfer.py; gives exit code, stdout and stderr."""

    def call(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["transfer.py", *map(str, words)])
        try:
            code = recipe_file.main()
        except SystemExit as end:
            code = int(end.code or 0)
        out = capsys.readouterr()
        return code, out.out, out.err

    return call


def moved(after: dict[str, torch.Tensor]) -> set[str]:
    """Names of the embedded teacher's tensors that are not bitwise these."""
    before = load_file(WEIGHTS)
    assert set(before) == set(after)
    return {
        name for name in before if before[name].shape != after[name].shape or not torch.equal(before[name], after[name])
    }


def test_transfer_to_other_classes(transfer, kinds, tmp_path):
    words = ["--student", "embedded", "--data-dir", kinds, "--epochs", 4, "--output", tmp_path / "run"]
    code, out, errors = transfer(*words)
    assert code == 0, errors
    assert "top-1" in out
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["top1"] > 70  # 40 by naming the largest class
    recipe = read_recipe(tmp_path / "run")
    assert (recipe.train_only, recipe.adapt_batchnorm, recipe.teacher) == ("classifier", False, None)
    assert (recipe.optim.lr, recipe.optim.decay_milestones, recipe.data.batch_size) == (0.02, (2, 2), 64)
    assert moved(load_file(tmp_path / "run" / "export" / "model.safetensors")) == {"fc.weight", "fc.bias"}
    loaded = timm.create_model(f"local-dir:{tmp_path / 'run' / 'export'}", pretrained=True)
    assert loaded.num_classes == 5
    assert (
        loaded.pretrained_cfg["mean"] == load_model("embedded").pretrained_cfg["mean"]
    )  # what the backbone was trained with
    assert loaded.pretrained_cfg["label_names"] == list(KINDS)
    assert mgd_timm.evaluate(str(tmp_path / "run"))["top1"] == pytest.approx(summary["top1"], abs=ONE_IMAGE)
    # The student may be this run: its classifier is drawn anew, so the same comes out to the bit.
    assert transfer(*words[2:], "--student", tmp_path / "run", "--output", tmp_path / "again")[0] == 0
    assert len({digest(tmp_path / name / "export" / "model.safetensors") for name in ("run", "again")}) == 1
    assert "exists: choose another --output" in transfer(*words)[2]
    assert transfer(*words, "--resume")[0] == 0


def test_adapted_batchnorm_moves_its_statistics_and_nothing_else(transfer, kinds, tmp_path):
    words = [
        "--student",
        "embedded",
        "--data-dir",
        kinds,
        "--epochs",
        2,
        "--adapt-batchnorm",
        "--output",
        tmp_path / "run",
    ]
    code, _, errors = transfer(*words)
    assert code == 0, errors
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    expected = {name for name in load_file(WEIGHTS) if name.rpartition(".")[2] in statistics}
    assert moved(load_file(tmp_path / "run" / "export" / "model.safetensors")) == expected | {"fc.weight", "fc.bias"}


@pytest.mark.parametrize(
    "options",
    [
        {"opt": "adamw", "lr": 0.01, "weight_decay": 0.5},
        {"opt": "lamb", "lr": 0.01, "weight_decay": 0.5, "filter_bias_and_bn": True, "clip_grad": 1.0},
        {"model_ema": True, "model_ema_decay": 0.5, "amp": True, "channels_last": True, "grad_accum_steps": 2},
    ],
)
def test_train_moves_the_classifier_alone(small_data, tmp_path, options):
    model = load_model("embedded")
    nn.init.zeros_(model.fc.weight)
    out = mgd_timm.train(
        model, str(small_data), output=tmp_path / "run", train_only="classifier", epochs=2, hflip=0.0, pad=0, **options
    )
    state = {name: tensor.contiguous() for name, tensor in out.state_dict().items()}
    assert moved(state) == {"fc.weight", "fc.bias"}
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["top1"] > 60
    for network in (model, out):  # thawed, the moving average as well
        assert all(parameter.requires_grad for parameter in network.parameters())


def test_killed_run_goes_on_to_the_same_bits(small_data, tmp_path, capsys):
    words = ["train", "--model", "cifar_resnet20", "--initial-checkpoint", str(WEIGHTS), "--train-only", "classifier"]
    words += ["--adapt-batchnorm", "--data-dir", str(small_data), "--epochs", "3", "--batch-size", "32"]
    words += ["--checkpoint-interval", "1", "--model-ema", "--model-ema-decay", "0.9"]
    assert main([*words, "--output", str(tmp_path / "whole")]) == 0
    assert "random weights" not in capsys.readouterr().out
    code, errors = end_at(
        8, tmp_path / "run" / "checkpoints", signal.SIGKILL, *words, "--output", str(tmp_path / "run")
    )
    assert code == -signal.SIGKILL, errors
    assert main([*words, "--output", str(tmp_path / "run"), "--resume"]) == 0
    assert "resumed after update" in capsys.readouterr().out
    assert len({digest(tmp_path / name / "export" / "model.safetensors") for name in ("whole", "run")}) == 1
    assert main([*words[:-5], "--output", str(tmp_path / "run"), "--resume", "--no-adapt-batchnorm"]) == 1
    assert "adapt_batchnorm: True -> False" in capsys.readouterr().err


def frozen(name: str, side: int, **options) -> FeatureTap:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, **options)
    tap = FeatureTap(model, input_size=(3, side, side))
    tap.freeze_backbone()
    return tap.train()


@pytest.mark.parametrize(
    ("name", "side", "options", "classifiers"),
    [
        ("cifar_resnet8", 28, {}, ("fc",)),
        ("test_vit", 32, {"img_size": 32}, ("head",)),
        ("deit_tiny_distilled_patch16_224", 32, {"img_size": 32}, ("head", "head_dist")),  # a tuple
        ("mobilenetv3_small_050", 32, {"drop_rate": 0.5}, ("classifier",)),
        ("repvit_m0_9", 32, {"distillation": True}, ("head.head", "head.head_dist")),  # BatchNorm and linear
        ("resnetv2_18", 32, {}, ("head.fc",)),  # a 1x1 convolution
    ],
)
def test_any_classifier_learns_alone(name, side, options, classifiers):
    """Its gradient is that of the whole network in eval mode, where autograd sees every layer."""
    tap = frozen(name, side, **options)
    whole = copy.deepcopy(tap.model).requires_grad_(True).eval()
    backbone = {key: value.clone() for key, value in tap.model.state_dict().items() if not key.startswith(classifiers)}
    images, labels = torch.randn(6, 3, side, side), torch.arange(6) % 5
    loss = nn.functional.cross_entropy(tap(images).logits, labels)
    loss.backward()
    graded = {key: p.grad for key, p in tap.model.named_parameters() if p.grad is not None}
    trained = {key for key, p in tap.model.named_parameters() if p.requires_grad}
    assert set(graded) == trained == {key for key, _ in whole.named_parameters() if key.startswith(classifiers)}
    for module in (module for key, module in whole.named_modules() if key.startswith(classifiers)):
        module.train()  # a classifier's own BatchNorm is trained with it
    nn.functional.cross_entropy(FeatureTap(whole, input_size=(3, side, side))(images).logits, labels).backward()
    for key, parameter in whole.named_parameters():
        assert parameter.grad is not None
        if key in graded:
            torch.testing.assert_close(graded[key], parameter.grad, atol=1e-6, rtol=1e-4)
    assert all(torch.equal(tap.model.state_dict()[key], value) for key, value in backbone.items())


def test_a_frozen_tap_stays_frozen_when_copied_evaluated_and_probed(small_data):
    tap = FeatureTap(load_model("embedded"), input_size=(3, 28, 28))
    tap.freeze_backbone(adapt_batchnorm=True)
    norms = {name for name, module in tap.model.named_modules() if isinstance(module, nn.BatchNorm2d)}
    images = load_images(Data(data_dir=str(small_data)), 0)
    assert images.test is not None
    for each in (tap, copy.deepcopy(tap)):
        each.train()
        for _ in range(2):
            assert {name for name, module in each.model.named_modules() if module.training} == norms | {"fc"}
            evaluate_taps({"student": each}, images.test, Accelerator(), 64)
            each.shapes(28)
            assert each.training
        assert not any(module.training for module in each.eval().modules())
        assert [name for name, p in each.model.named_parameters() if p.requires_grad] == ["fc.weight", "fc.bias"]
    tap.thaw()
    assert all(module.training for module in tap.train().modules())
    assert all(parameter.requires_grad for parameter in tap.parameters())
    assert tap(torch.randn(2, 3, 28, 28)).embedding.requires_grad


def test_presets_are_those_of_the_protocol(recipe_file, transfer, kinds, tmp_path):
    assert recipe_file.milestones(50) == (20, 25)
    assert recipe_file.milestones(100) == (40, 50)
    assert recipe_file.milestones(1) == (1, 1)  # not before the first update
    rates = {
        "cifar_resnet8x4": 0.02,
        "cifar_mobilenetv2": 0.01,
        "mobilenetv2_100": 0.01,
        "cifar_shufflev1": 0.01,
        "": 0.02,
    }
    assert {name: recipe_file.base_lr(name) for name in rates} == rates
    words = [
        "--student",
        "embedded",
        "--data-dir",
        kinds,
        "--preset",
        "tiny-imagenet",
        "--epochs",
        1,
        "--output",
        tmp_path / "run",
    ]
    assert transfer(*words)[0] == 0
    recipe = read_recipe(tmp_path / "run")
    assert (recipe.optim.lr, recipe.data.batch_size, recipe.data.hflip) == (0.04, 128, 0.0)
    assert (recipe.data.img_size, recipe.data.pad, recipe.optim.weight_decay) == (32, 4, 5e-4)


def test_wrong_calls_are_refused_before_anything_is_written(transfer, kinds, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    for words, expected in (
        (["--student", "empty", "--data-dir", kinds], "empty: no export in it (config.json and model.safetensors)"),
        (["--student", "nowhere", "--data-dir", kinds], "unknown model 'nowhere'"),
        (["--student", "embedded", "--data-dir", "nowhere"], "nowhere: no such folder"),
        (["--student", "embedded", "--data-dir", kinds, "--epochs", 0], "epochs=0"),
        (["--student", "embedded", "--data-dir", kinds, "--lr", -1], "lr=-1.0: expected a positive number"),
    ):
        code, _, errors = transfer(*words)
        assert code == 1
        assert f"transfer: error: {expected}" in errors
    assert transfer("--student", "embedded")[0] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "train_only='classifier' with the teacher 'embedded'"),
        ({"teacher": None, "drop": 0.1}, "drop=0.1: a frozen backbone .* has no dropout"),
        ({"teacher": None, "drop_path": 0.1}, "drop_path=0.1: a frozen backbone"),
        (
            {"teacher": None, "adapt_batchnorm": True, "train_only": "all"},
            "adapt_batchnorm: .* Give --train-only classifier",
        ),
        ({"teacher": None, "train_only": "clasifier"}, "unknown train_only 'clasifier': did you mean classifier"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make_recipe(**{"train_only": "classifier", **options})


def test_networks_that_cannot_do_it_are_refused(small_data, tmp_path, capsys):
    options = {"output": tmp_path / "run", "train_only": "classifier", "img_size": 32}
    with pytest.raises(ValueError, match="test_vit has no BatchNorm whose statistics could be updated"):
        mgd_timm.train("test_vit", str(small_data), adapt_batchnorm=True, **options)
    model = load_model("embedded")
    model.reset_classifier(0)
    with pytest.raises(
        ValueError,
        match=r"cifar_resnet20 has no classifier \(num_classes=0\), and only a teacher may lack one\. "
        r"Build it with num_classes=C",
    ):
        mgd_timm.train(model, str(small_data), **options)
    assert not (tmp_path / "run").exists()
    mgd_timm.train("cifar_resnet8x05", str(small_data), epochs=1, **options)
    assert "warning: the frozen backbone has random weights" in capsys.readouterr().out
