"""What an export tells of its run: no path of the machine, and the digest of the weights that were written."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import mgd_timm
from mgd_timm.cli.main import main
from mgd_timm.models.load import load_model
from mgd_timm.recipe.options import as_dict, plain_architecture, plain_model_name
from mgd_timm.recipe.recipe import flatten, make_recipe, without_paths


def test_an_exported_recipe_holds_no_path():
    recipe = make_recipe(
        student="cifar_resnet8x05",
        teacher=("/home/ada/runs/first", "local-dir:/home/ada/second", "hf-hub:ada/third"),
        teacher_classes=("/home/ada/classes.txt",),
        student_checkpoint="/home/ada/student.safetensors",
        output="/home/ada/runs/mine",
        data_dir="/home/ada/photos",
    )
    shared = without_paths(as_dict(recipe))
    assert "/home" not in json.dumps(shared)
    assert shared["teacher"] == ["first", "second", "hf-hub:ada/third"]
    assert (shared["data"]["data_dir"], shared["teacher_classes"]) == ("photos", ["classes.txt"])
    make_recipe(**flatten(shared))
    local = without_paths(as_dict(make_recipe(dataset="/home/ada/photos", teacher_store="/home/ada/store")))
    assert (local["data"]["dataset"], local["data"]["data_dir"], local["teacher_store"]) == (
        "embedded",
        "photos",
        "store",
    )
    hub = as_dict(make_recipe(dataset="uoft-cs/cifar100"))
    assert without_paths(hub)["data"] == hub["data"]


@pytest.mark.parametrize(
    ("given", "model", "architecture"),
    [
        ("timm/resnet18.a1_in1k", "resnet18.a1_in1k", "resnet18.a1_in1k"),
        ("hf_hub:timm/resnet18.a1_in1k", "hf-hub:timm/resnet18.a1_in1k", "resnet18.a1_in1k"),
        ("hf-hub:timm/resnet18", "hf-hub:timm/resnet18", "resnet18"),
        ("hf-hub:ada/mine", "hf-hub:ada/mine", "hf-hub:ada/mine"),
        ("runs/timm/x", "runs/timm/x", "runs/timm/x"),
    ],
)
def test_names_of_models_as_they_are_pasted(given, model, architecture, tmp_path, monkeypatch):
    assert (plain_model_name(given), plain_architecture(given)) == (model, architecture)
    recipe = make_recipe(student=given, teacher=(given,))
    assert (recipe.student, recipe.teacher) == (architecture, (model,))
    assert make_recipe(student="resnet18", peer=given).peer == architecture
    if given.startswith("timm/"):
        monkeypatch.chdir(tmp_path)
        Path(given).mkdir(parents=True)  # a folder of that name is meant
        assert plain_model_name(given) == given


@pytest.fixture(scope="module")
def run(small_data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("origin") / "run"
    mgd_timm.train("timm/cifar_resnet8x05", str(small_data), output=folder, epochs=1)
    return folder


@pytest.fixture
def moved(run, tmp_path):
    return shutil.copytree(run / "export", tmp_path / "moved")


@pytest.mark.slow
def test_an_export_away_from_its_run_is_told_where_the_data_are(run, moved, small_data, capsys):
    text = (moved / "recipe.json").read_text()
    assert str(small_data.parent) not in text
    assert str(run.parent) not in text
    assert json.loads(text)["recipe"]["data"]["data_dir"] == small_data.name
    expected = mgd_timm.evaluate(run)
    assert mgd_timm.evaluate(run / "export") == expected  # beside recipe.yaml, which has the path
    with pytest.raises(ValueError, match=rf"local data \({small_data.name}\).* give --data-dir FOLDER"):
        mgd_timm.evaluate(moved)
    assert mgd_timm.evaluate(moved, str(small_data)) == expected
    assert mgd_timm.evaluate(moved, data_dir=str(small_data)) == expected
    assert "the data has changed" not in capsys.readouterr().out
    shared = json.loads(text)
    (moved / "recipe.json").write_text(json.dumps({**shared, "data_sha256": "0" * 64}))
    mgd_timm.evaluate(moved, str(small_data))
    assert "the data has changed since the run: its training images" in capsys.readouterr().out


@pytest.mark.slow
def test_weights_that_are_not_those_that_were_exported_are_refused_unless_asked(moved, small_data, tmp_path, capsys):
    weights = load_file(moved / "model.safetensors")
    weights["fc.bias"][0] += 1
    save_file(weights, moved / "model.safetensors", metadata={"format": "pt"})
    said = r"model\.safetensors is not the file that was exported.*or give --no-verify"
    for attempt in (
        lambda: load_model(str(moved)),
        lambda: mgd_timm.evaluate(moved, str(small_data)),
        lambda: mgd_timm.distill(str(moved), data=str(small_data), output=tmp_path / "run", method="none"),
    ):
        with pytest.raises(ValueError, match=said):
            attempt()
    assert not (tmp_path / "run").exists()
    evaluate, export = (
        ["evaluate", str(moved), "--data-dir", str(small_data)],
        ["export", str(moved), str(tmp_path / "out")],
    )
    for words in (evaluate, export):
        assert main(words) == 1
        assert "--no-verify" in capsys.readouterr().err
        assert main([*words, "--no-verify"]) == 0
    assert torch.equal(load_model(str(tmp_path / "out")).fc.bias, weights["fc.bias"])  # it has a digest of its own
    options = {"data": str(small_data), "method": "none", "epochs": 1, "verify": False}
    mgd_timm.distill(str(moved), "cifar_resnet8x05", output=tmp_path / "run", **options)
    assert (tmp_path / "run" / "export").is_dir()


def test_a_recipe_that_cannot_be_read_is_named(moved):
    for text in ("{", b"\xff"):
        (moved / "recipe.json").write_bytes(text.encode() if isinstance(text, str) else text)
        with pytest.raises(ValueError, match=r"recipe\.json: not JSON .*--no-verify"):
            load_model(str(moved))
        load_model(str(moved), verify=False)
    (moved / "recipe.json").write_text("[]")  # of another program
    load_model(str(moved))
