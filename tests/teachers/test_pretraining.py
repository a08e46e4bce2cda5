"""What is fitted before a run, and two students that teach each other: real runs on real images."""

import json
import re
import shutil
import signal

import pytest
import timm
import torch
from forked import Ranks
from report import read_metrics
from safetensors.torch import load_file
from small import call, digest, end_at

import mgd_timm
from mgd_timm import models  # noqa: F401  # registers cifar_*
from mgd_timm.cli.main import main
from mgd_timm.data.dataset import load_images
from mgd_timm.features import FeatureTap
from mgd_timm.models.fold_batchnorm import fold_batchnorm
from mgd_timm.models.load import load_model
from mgd_timm.pipeline.run import run
from mgd_timm.pipeline.run_folder import read_recipe
from mgd_timm.recipe.data import Data
from mgd_timm.recipe.recipe import make_recipe

pytestmark = pytest.mark.slow

SHORT = {
    "epochs": 1,
    "fitting_epochs": 2,
    "heads_epochs": 1,
    "heads_augmentations": 1,
    "batch_size": 32,
    "student": "cifar_resnet8x05",
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MGD_TIMM_CACHE", str(tmp_path / "cache"))


def weights(folder):
    return load_file(folder / "export" / "model.safetensors")


def test_factor_transfer_from_a_teacher_without_logits(small_data, tmp_path):
    options = {"method": "none", "criterion": ("ft",), "kd_weight": 0.0, "teacher_classes": ("none",)}
    recipe = make_recipe(**SHORT, **options, data_dir=str(small_data), output=str(tmp_path / "run"))
    summary = run(recipe, quiet=True).summary
    assert "teacher_top1" not in summary
    assert set(summary["fitted"]) == {"ft"}


@pytest.mark.parametrize("name", ["ab", "fsp", "ft"])
def test_a_stage_lowers_its_loss_is_kept_and_found_again(name, small_data, tmp_path, capsys):
    epochs = 6 if name == "ft" else 2  # its rate is small

    def go(place, **options):
        recipe = make_recipe(
            **{
                **SHORT,
                "data_dir": str(small_data),
                "output": str(tmp_path / place),
                "method": "none",
                "fitting_epochs": epochs,
                **options,
            }
        )
        return run(recipe, quiet=True).summary

    first = go("one", criterion=(name,))
    assert f"{name}: fitted before the run, {epochs} epochs; last loss" in capsys.readouterr().out
    losses = [
        sum(row["train"][key] for key in first["fitted"][name])
        for row in read_metrics(tmp_path / "one" / "fitting" / name)
    ]
    assert len(losses) == epochs
    assert losses[-1] < losses[0]
    again = go("two", criterion=(name,))
    assert f"{name}: fitted before the run, from the cache" in capsys.readouterr().out
    assert again["fitted"] == first["fitted"]
    assert all(
        torch.equal(a, b)
        for a, b in zip(weights(tmp_path / "one").values(), weights(tmp_path / "two").values(), strict=True)
    )
    other = go("three", criterion=(name,), fitting_lr=0.003)
    assert other["fitted"] != first["fitted"]
    go("bare", criterion=("kd:0",), kd_weight=None, task_weight=1.0)
    bare, staged = weights(tmp_path / "bare"), weights(tmp_path / "one")
    assert any(not torch.equal(bare[key], staged[key]) for key in bare)


def test_ab_is_refused_where_there_are_no_maps_before_activation(small_data, tmp_path):
    with pytest.raises(ValueError, match=r"cannot return its maps before their activation.*cifar_"):
        mgd_timm.distill(
            student="resnet10t",
            data=str(small_data),
            criterion="ab",
            output=tmp_path / "run",
            method="none",
            **{name: value for name, value in SHORT.items() if name != "student"},
        )
    assert not (tmp_path / "run").exists()


def test_stages_compose_with_mas_and_with_each_other(small_data, tmp_path):
    """The classifier, which no stage reaches, is trained by the run alone."""
    student = timm.create_model("cifar_resnet8x05", num_classes=10, in_chans=3)
    out = mgd_timm.distill(
        load_model("embedded"),
        student,
        str(small_data),
        output=tmp_path / "run",
        method="mas",
        criterion="ab,ft,at:1000",
        **{name: value for name, value in SHORT.items() if name != "student"},
    )
    assert all(p.requires_grad for p in out.parameters())
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert set(summary["fitted"]) == {"ab", "ft"}
    stages = {row["stage"] for row in read_metrics(tmp_path / "run")}
    assert stages == {"distil"}
    (row,) = read_metrics(tmp_path / "run")
    assert set(row["train"]) == {"task", "kd", "ft", "at", "abstract", "detailed", "top1"}


@pytest.mark.parametrize("method", ["none", "mag"])
def test_two_students_teach_each_other(method, small_data, tmp_path, capsys):
    recipe = make_recipe(
        **{**SHORT, "epochs": 2},
        peer="cifar_wrn_16_1",
        data_dir=str(small_data),
        output=str(tmp_path / "run"),
        method=method,
    )
    assert (recipe.teacher, recipe.criterion) == (None, ("dml",))
    result = run(recipe, quiet=True)
    assert "peer cifar_wrn_16_1: 175,066 parameters" in capsys.readouterr().out
    rows = read_metrics(tmp_path / "run")
    names = ["task", "dml", *(["abstract", "detailed"] if method == "mag" else [])]
    assert set(rows[-1]["train"]) == {f"{role}{name}" for name in names for role in ("", "peer_")} | {"top1"}
    assert "peer_top1" in result.summary["last"]
    for place, name in (("export", "cifar_resnet8x05"), ("export_peer", "cifar_wrn_16_1")):
        loaded = timm.create_model(f"local-dir:{tmp_path / 'run' / place}", pretrained=True)
        assert loaded.pretrained_cfg["architecture"] == name
        found = mgd_timm.evaluate(str(tmp_path / "run" / place))["top1"]
        own = result.summary if place == "export" else result.summary["peer"]
        assert found == pytest.approx(own["top1"])
        said = json.loads((tmp_path / "run" / place / "recipe.json").read_text())["metrics"]
        assert (said["top1"], said["parameters"]) == (own["top1"], sum(p.numel() for p in loaded.parameters()))


def test_what_decides_a_stage_is_in_its_digest(small_data, tmp_path, capsys):
    """Every option that changes the fitted weights fits anew; one that does not finds them again."""
    common = {**SHORT, "fitting_epochs": 1, "data_dir": str(small_data), "method": "none", "criterion": ("ab",)}

    def fitted_anew(number, **options):
        run(make_recipe(**{**common, "output": str(tmp_path / str(number)), **options}), quiet=True)
        return "from the cache" not in capsys.readouterr().out

    assert fitted_anew(0)
    same = [
        {"log_interval": 7},
        {"criterion_options": ("ab.margin=1",)},
        {"epochs": 2},
        {"sched": "poly", "task_weight": 2.0},
    ]
    assert not any(fitted_anew(f"same{i}", **options) for i, options in enumerate(same))
    other = [
        {"criterion_options": ("ab.margin=2",)},
        {"filter_bias_and_bn": True},
        {"maps": "2"},
        {"clip_grad": 1.0},
        {"seed": 3},
    ]
    assert all(fitted_anew(f"other{i}", **options) for i, options in enumerate(other))


def test_a_run_that_is_killed_in_a_stage_and_after_it_goes_on_to_the_same_weights(small_data, tmp_path):
    """Real processes; a weight warms up, and CRD's memory belongs to the state."""
    flags = [
        "distill",
        "--data-dir",
        str(small_data),
        "--student",
        "cifar_resnet8x05",
        "--batch-size",
        "16",
        "--epochs",
        "3",
    ]
    flags += [
        "--method",
        "none",
        "--criterion",
        "ab,crd:0.8:2,sskd",
        "--fitting-epochs",
        "3",
        "--checkpoint-interval",
        "3",
    ]
    whole = call(*flags, "--output", str(tmp_path / "whole"))
    assert whole.returncode == 0, whole.stderr
    shutil.rmtree(tmp_path / "cache" / "ab")
    flags += ["--output", str(tmp_path / "run")]
    end_at(6, tmp_path / "run" / "fitting" / "ab" / "checkpoints", signal.SIGKILL, *flags)
    assert not (tmp_path / "run" / "checkpoints").exists()
    end_at(24, tmp_path / "run" / "checkpoints", signal.SIGKILL, *flags, "--resume")
    done = call(*flags, "--resume")
    assert done.returncode == 0, done.stderr
    assert "distil: resumed after update" in done.stdout
    one, two = (digest(tmp_path / name / "export" / "model.safetensors") for name in ("whole", "run"))
    assert one == two


def test_two_runs_at_once_fit_the_same_heads_once(small_data, tmp_path):
    """Real processes: one run of one process, one of two."""
    flags = ["distill", "--data-dir", str(small_data), "--student", "cifar_resnet8x05", "--global-batch-size", "64"]
    flags += ["--batch-size", "32", "--epochs", "1", "--seed", "3", "--heads-epochs", "16"]
    flags += ["--heads-augmentations", "1"]
    cache = {"MGD_TIMM_CACHE": str(tmp_path / "cache")}
    runs = [
        Ranks(
            [*flags, "--output", str(tmp_path / str(number))],
            tmp_path / f"log{number}",
            processes=number,
            environment=cache,
        )
        for number in (1, 2)
    ]
    for number, ranks in enumerate(runs, 1):
        assert ranks.wait(120) == [0] * number, ranks.said()
    said = [ranks.said() for ranks in runs]
    waited = [
        re.search(r"fitted heads \(.*\): another run .* writes it; waiting for it to end", text) is not None
        for text in said
    ]
    found = ["loaded from the cache" in text for text in said]
    assert sorted(found) == [False, True]
    assert all(found[number] for number in (0, 1) if waited[number])  # one that was started late need not wait
    assert re.findall("top-1: teacher.*", said[0])[0] == re.findall("top-1: teacher.*", said[1])[0]


def test_what_one_process_has_fitted_several_take_with_its_losses(small_data, tmp_path):
    flags = ["distill", "--data-dir", str(small_data), "--student", "cifar_resnet8x05", "--global-batch-size", "64"]
    flags += [
        "--batch-size",
        "32",
        "--epochs",
        "1",
        "--method",
        "none",
        "--fit-teacher-head",
        "probe",
        "--fitting-epochs",
        "1",
    ]
    said = []
    for number in (1, 2):
        words = [*flags, "--output", str(tmp_path / str(number))]
        ranks = Ranks(
            words, tmp_path / f"log{number}", processes=number, environment={"MGD_TIMM_CACHE": str(tmp_path / "cache")}
        )
        assert ranks.wait(120) == [0] * number, "".join(ranks.said(rank) for rank in range(number))
        said.append(re.search(r"probe, (.*); last loss of the labels (.*)", ranks.said()).groups())
    assert [how for how, _ in said] == ["1 epoch", "from the cache"]
    assert said[0][1] == said[1][1]


def test_memories_know_the_classes_of_training_images_alone(small_data):
    images = load_images(Data(data_dir=str(small_data), val_split=0.25), seed=3)
    labels = images.trained_labels()
    assert (labels >= 0).sum() == len(images.train.ids) == 240
    assert torch.equal(labels[images.train.ids], images.train.labels)
    assert (labels[images.val.ids] == -1).all()


def test_a_stage_sees_maps_of_a_teacher_whose_folding_was_checked_on_them():
    """A WRN's first BatchNorm alone reads its stem: folded, the stem's map would be another one, which the run may not
    look at."""
    model = timm.create_model("cifar_wrn_16_2", num_classes=10)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_mean)
            torch.nn.init.uniform_(module.running_var, 0.5, 2)
    size = (3, 32, 32)
    images = torch.randn(2, *size, generator=torch.Generator().manual_seed(0))
    for preact, cam in ((False, True), (True, False)):
        tap = FeatureTap(model, "all", input_size=size, preact=preact, cam=cam).eval()
        twin = fold_batchnorm(tap)
        assert twin is not None
        one, two = tap(images), twin(images)
        for a, b in zip(one.maps, two.maps, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
        if cam:
            torch.testing.assert_close(one.cam, two.cam, rtol=1e-3, atol=1e-4)


def test_a_configuration_that_was_printed_runs_with_a_peer(small_data, tmp_path, capsys):
    words = [
        "distill",
        "--peer",
        "cifar_resnet8x05",
        "--student",
        "cifar_resnet8x05",
        "--epochs",
        "1",
        "--data-dir",
        str(small_data),
    ]
    with pytest.raises(SystemExit):
        main(
            [
                *words,
                "--output",
                str(tmp_path / "run"),
                "--criterion-options",
                "dml.element_mean=true",
                "--print_config",
            ]
        )
    (tmp_path / "peer.yaml").write_text(capsys.readouterr().out)
    assert main(["distill", "--config", str(tmp_path / "peer.yaml")]) == 0
    recipe = read_recipe(tmp_path / "run")
    assert (recipe.teacher, recipe.criterion, recipe.method) == (None, ("dml",), "none")
    assert recipe.criterion_options == ("dml.element_mean=true",)
