"""What is fitted before a run, and two students that teach each other: real runs on real images."""

import json

import pytest
import timm
import torch
from safetensors.torch import load_file

import mgd_timm
from mgd_timm import models  # noqa: F401  # registers cifar_*
from mgd_timm.build import load_model
from mgd_timm.data import load_images
from mgd_timm.recipe import Data, make_recipe
from mgd_timm.report import read_metrics
from mgd_timm.run import run

SHORT = {"epochs": 1, "fitting_epochs": 2, "heads_epochs": 1, "heads_views": 1, "batch_size": 32, "student": "cifar_resnet8x05"}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MGD_TIMM_CACHE", str(tmp_path / "cache"))


def weights(folder):
    return load_file(folder / "export" / "model.safetensors")


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
    losses = [sum(row["train"][key] for key in first["fitted"][name]) for row in read_metrics(tmp_path / "one" / "fitting" / name)]
    assert len(losses) == epochs
    assert losses[-1] < losses[0]
    again = go("two", criterion=(name,))
    assert f"{name}: fitted before the run, from the cache" in capsys.readouterr().out
    assert again["fitted"] == first["fitted"]
    assert all(
        torch.equal(a, b) for a, b in zip(weights(tmp_path / "one").values(), weights(tmp_path / "two").values(), strict=True)
    )
    other = go("three", criterion=(name,), fitting_lr=0.003)
    assert other["fitted"] != first["fitted"]
    go("bare", criterion=("kd:0",), kd_weight=None, task_weight=1.0)
    bare, staged = weights(tmp_path / "bare"), weights(tmp_path / "one")
    assert any(not torch.equal(bare[key], staged[key]) for key in bare)


def test_ab_is_refused_where_there_are_no_maps_before_activation(small_data, tmp_path):
    with pytest.raises(ValueError, match=r"does not show its maps before their activation.*cifar_"):
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
        **{**SHORT, "epochs": 2}, peer="cifar_wrn_16_1", data_dir=str(small_data), output=str(tmp_path / "run"), method=method
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
        assert found == pytest.approx(result.summary["last"]["top1" if place == "export" else "peer_top1"])


def test_memories_know_the_classes_of_training_images_alone(small_data):
    images = load_images(Data(data_dir=str(small_data), val_split=0.25), seed=3)
    labels = images.trained_labels()
    assert (labels >= 0).sum() == len(images.train.ids) == 240
    assert torch.equal(labels[images.train.ids], images.train.labels)
    assert (labels[images.val.ids] == -1).all()
