"""recipes/imagenet.py: published pairs, their batch and schedule under other means, and a real run of one."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import timm
import yaml
from small import environment, write_pictures

import mgd_timm.models  # noqa: F401  # registers cifar_*
from mgd_timm.export.timm_folder import export_model
from mgd_timm.models.pretrained_cfg import describe_weights
from mgd_timm.recipe.options import as_dict
from mgd_timm.recipe.recipe import make_recipe

RECIPE = Path(__file__).parents[2] / "recipes" / "imagenet.py"


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    spec = importlib.util.spec_from_file_location("recipes_imagenet", RECIPE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_pairs_are_of_networks_with_weights_and_make_recipes(recipe: ModuleType) -> None:
    assert list(recipe.PAIRS) == ["resnet34-resnet18", "resnet50-mobilenet", "regnety_160-deit_tiny", "patient"]
    for name, pair in recipe.PAIRS.items():
        assert timm.is_model_pretrained(pair.teacher)
        assert timm.is_model(pair.student)
        for processes in (1, 8):
            found = make_recipe(**recipe.options_of({"pair": name}, processes))
            assert (found.teacher, found.student) == ((pair.teacher,), pair.student)
            assert found.optim.global_batch_size == pair.batch
            assert found.data.batch_size == min(256, pair.batch // processes)
            assert found.optim.lr == pair.options["lr"]


def test_the_rate_follows_the_batch_and_the_schedule_its_length(recipe: ModuleType) -> None:
    found = recipe.options_of({"batch_size": 64, "epochs": 10}, 2)
    assert (found["batch_size"], found["global_batch_size"], found["lr"], found["decay_epochs"]) == (64, 256, 0.1, 3.0)
    found = recipe.options_of({"batch_size": 64, "grad_accum_steps": 1, "lr": 0.3}, 2)
    assert (found["global_batch_size"], found["lr"]) == (128, 0.3)
    assert recipe.options_of({"batch_size": 64, "grad_accum_steps": 1}, 2)["lr"] == pytest.approx(0.05)
    assert recipe.options_of({"global_batch_size": 512}, 2)["lr"] == pytest.approx(0.2)
    found = recipe.options_of(
        {"pair": "regnety_160-deit_tiny", "epochs": 20, "mixup": 0.0, "student": "vit_small_patch16_224"}, 8
    )
    assert (found["warmup_epochs"], found["mixup"], found["cutmix"], found["student"]) == (
        2,
        0.0,
        1.0,
        "vit_small_patch16_224",
    )
    assert (found["batch_size"], found["global_batch_size"], found["lr"]) == (128, 1024, 1e-3)
    own = {"pair": "regnety_160-deit_tiny", "student": "deit_tiny_patch16_224"}
    assert (recipe.options_of(own, 1)["drop_path"], "drop_path" in found) == (0.1, False)
    with pytest.raises(
        ValueError, match=r"unknown pair 'resnet34': did you mean resnet34-resnet18\?.*All pairs: .*patient"
    ):
        recipe.options_of({"pair": "resnet34"}, 1)


def test_a_run_is_continued_with_its_own_batch_on_any_number_of_processes(recipe: ModuleType, tmp_path: Path) -> None:
    given = {"grad_accum_steps": 2, "batch_size": 8, "output": str(tmp_path), "resume": True}
    first = recipe.options_of(recipe.with_batch_of_run(given), 4)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(as_dict(make_recipe(**first))))
    again = recipe.options_of(recipe.with_batch_of_run(given), 2)
    assert again["global_batch_size"] == first["global_batch_size"] == 64
    assert again["lr"] == first["lr"]


def test_the_list_shows_pairs_and_what_differs(recipe: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert recipe.main(["--list"]) == 0
    said = capsys.readouterr().out
    assert said.count("\n  from: ") == said.count("\n  differs: ") == len(recipe.PAIRS)
    assert "--mixup 0.8 --cutmix 1.0" in said
    assert "--filter-bias-and-bn --sched" in said


@pytest.mark.slow
def test_a_pair_runs_with_all_its_augmentation(tmp_path: Path) -> None:
    """DeiT's, with small networks, on pictures of three classes."""
    pictures = write_pictures(tmp_path / "pictures", 24, 100)
    teacher = timm.create_model("cifar_resnet8x4", num_classes=3)
    describe_weights(
        teacher,
        input_size=(3, 32, 32),
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
        class_names=("a", "b", "c"),
        license="other",
        tag="x",
    )
    export_model(teacher, tmp_path / "teacher", provenance={})
    words = ["--pair", "regnety_160-deit_tiny", "--teacher", str(tmp_path / "teacher"), "--student", "cifar_resnet8x05"]
    words += ["--data-dir", str(pictures), "--img-size", "32", "--epochs", "1", "--workers", "1"]
    words += ["--heads-epochs", "1", "--batch-size", "8", "--grad-accum-steps", "1", "--output", str(tmp_path / "run")]
    command = [sys.executable, str(RECIPE), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment(), check=False)
    assert done.returncode == 0, done.stderr
    assert "regnety_160-deit_tiny: 8 images per update, 1 epochs of adamw" in done.stdout
    assert set(json.loads((tmp_path / "run" / "metrics.jsonl").read_text())["train"]) == {
        "task",
        "kd",
        "abstract",
        "detailed",
        "top1",
    }
    kept = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())
    assert (kept["data"]["aug_repeats"], kept["data"]["mixup"], kept["data"]["reprob"], kept["data"]["aa"]) == (
        3,
        0.8,
        0.25,
        "rand-m9-mstd0.5-inc1",
    )
