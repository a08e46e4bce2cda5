"""What a card says, of exports that no run has written: hostile names, paths, licences, results, base models."""

import html
import json
import re
from pathlib import Path

import pytest
import timm
import torch
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from pages import call

import mgd_timm
from mgd_timm.export.timm_folder import export_model
from mgd_timm.hub.markdown import NONE
from mgd_timm.hub.metadata import base_model, hub_dataset
from mgd_timm.hub.upload import check_repo_id
from mgd_timm.models.pretrained_cfg import describe_weights
from mgd_timm.recipe.options import as_dict
from mgd_timm.recipe.recipe import config_values, flatten, make_recipe
from mgd_timm.report.costs import count_work
from mgd_timm.storage.digests import sha256

NAMES = (
    "<script>alert(1)</script>",
    "a | b | c",
    "`rm -rf`",
    "[click](https://example.com)",
    "# heading\n---\nlicense: gpl",
    "*bold* _it_ ~~no~~ ![x](y)",
    "Größe 猫 \u202eabc",
    "$x^2$ & &amp; <!-- -->",
)
SECRET = "/home/ada/secret"
METRICS = {"last": {"top1": 61.25, "top5": 93.125, "n": 800.0}, "top1": 61.25, "teacher_top1": 70.5, "updates": 90}


def exported(folder: Path, names=NAMES, architecture="test_vit", license="mit", channels=3, **options) -> Path:
    """An export of random weights, which tells of a run that never was."""
    torch.manual_seed(0)
    size = {"img_size": 64} if "vit" in architecture else {}
    model = timm.create_model(architecture, num_classes=len(names), in_chans=channels, **size)
    half = (0.5,) * channels
    about = {"mean": half, "std": half, "license": license, "tag": "test", "class_names": tuple(names)}
    describe_weights(model, input_size=(channels, 64, 64), **about)
    recipe = as_dict(make_recipe(student=architecture, **options))
    return export_model(model, folder, provenance={"recipe": recipe, "metrics": METRICS, "evaluation_split": "test"})


def card_of(folder: Path, tmp_path: Path, **options) -> ModelCard:
    mgd_timm.publish(folder, "ada/mine", folder=tmp_path / "published", **options)
    return ModelCard.load(tmp_path / "published" / "README.md")


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """A card of hostile names, with the folder of it."""
    folder = tmp_path_factory.mktemp("hostile")
    options = {"teacher": (f"{SECRET}/teacher|<b>",), "output": f"{SECRET}/runs/mine", "data_dir": f"{SECRET}/фото|`x`"}
    exported(folder / "export", **options)
    return card_of(folder / "export", folder), folder / "published"


def test_names_are_shown_as_they_are_and_change_nothing_of_the_page(hostile):
    card, _ = hostile
    page = MarkdownIt("commonmark").enable("table").render(card.text)
    for tag in ("<script", "<!--", "<em>bold", "<img", 'example.com"', "<b>"):
        assert tag not in page
    assert re.findall(r"<h2>(.*?)</h2>", page) == [
        *("Model details", "Results", "Usage", "Training", "Limits", "Provenance", "Citation")
    ]
    for body in re.findall(r"<table>.*?</table>", page, re.DOTALL):
        widths = {len(re.findall(r"<t[hd]\b", row)) for row in body.split("<tr>")[1:]}
        assert len(widths) == 1
    shown = html.unescape(re.sub(r"</?(p|code|strong)>", "", page))
    for name in NAMES:
        assert " ".join(name.replace("\u202e", " ").split()) in shown
    assert card.data.license == "mit"


def test_no_path_of_the_machine_is_published(hostile):
    card, folder = hostile
    for path in folder.iterdir():
        assert SECRET.encode() not in path.read_bytes(), path
        assert str(folder.parent).encode() not in path.read_bytes(), path
    assert "фото" in card.text
    assert json.loads((folder / "recipe.json").read_text())["recipe"]["output"] == "mine"


def test_the_metadata_has_what_the_hub_reads(hostile):
    data = hostile[0].data
    assert (data.library_name, data.pipeline_tag, data.datasets) == ("timm", "image-classification", None)
    assert data.base_model is None
    tags = {"image-classification", "timm", "mgd-timm", "distillation", "knowledge-distillation", "mas", "kd"}
    assert tags <= set(data.tags)
    results = [(one.metric_type, one.metric_name, one.metric_value, one.dataset_split) for one in data.eval_results]
    assert results == [
        ("accuracy", "Top-1 accuracy (%)", 61.25, "test"),
        ("accuracy", "Top-5 accuracy (%)", 93.125, "test"),
    ]
    again = ModelCard(str(hostile[0]))
    assert again.data.to_dict() == data.to_dict()


def test_a_recipe_yaml_is_a_config_of_the_same_run(hostile, capsys):
    path = hostile[1] / "recipe.yaml"
    assert call(["distill", "--config", str(path), "--print_config"]) == 0
    assert "method: mas" in capsys.readouterr().out
    values = yaml.safe_load(path.read_text())
    origin = json.loads((hostile[1] / "recipe.json").read_text())
    again, before = make_recipe(**values), make_recipe(**flatten(origin["recipe"]))
    assert as_dict(again, digest_only=True) == as_dict(before, digest_only=True)
    alone = make_recipe(teacher=None, method="none", student="resnet10t", student_pretrained=True, dataset="ada/photos")
    found = config_values(alone)
    assert (found["model"], found["pretrained"], found["dataset"]) == ("resnet10t", True, "ada/photos")
    assert not {"student", "teacher", "kd_temperature"} & set(found)
    followed = make_recipe(teacher_trajectory="runs/teacher", data_dir="photos")
    again = make_recipe(**config_values(followed))
    assert (again.teacher_trajectory, again.teacher) == ("runs/teacher", followed.teacher)
    assert config_values(again) == config_values(followed)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"teacher_trajectory": "runs/teacher"}, "by snapshots of the teacher's own training"),
        ({"criterion": ("kd", "dml"), "teacher": "embedded", "peer": "cifar_resnet8"}, "with a second network"),
        ({"sample_weight": "entropy"}, "with samples weighted by the teacher's certainty"),
        ({"code_divergence": "bdd"}, "with the bdd divergence of the codes"),
        ({"criterion": "fitnet", "criterion_options": ("fitnet.adapter=false",), "match_channels": 100}, "re-ordered"),
        ({"teacher": ("a", "b"), "teachers_as": "sequence", "teacher_epochs": (3, 6)}, "9: 3 + 6, one number per"),
        ({"teacher": None, "method": "none", "for_student": "cifar_resnet8"}, "to be a teacher for cifar"),
    ],
)
def test_a_card_says_how_the_student_was_taught(tmp_path, options, expected):
    card = card_of(exported(tmp_path / "export", names=("cat", "dog"), **options), tmp_path)
    assert expected in card.text.replace("\\", "")


def test_a_card_without_images_or_with_few_classes(tmp_path):
    folder = exported(tmp_path / "export", names=("cat", "dog"), teacher=None, method="none")
    card = card_of(folder, tmp_path)
    assert [one.metric_value for one in card.data.eval_results] == [61.25]  # of two classes top-5 says nothing
    assert not {"distillation", "kd"} & set(card.data.tags)
    assert call(["train", "--config", str(tmp_path / "published" / "recipe.yaml"), "--print_config"]) == 0
    recipe = json.loads((folder / "recipe.json").read_text())
    (folder / "recipe.json").write_text(json.dumps({"model_sha256": recipe["model_sha256"]}))
    card = card_of(folder, tmp_path)
    assert card.data.eval_results is None
    assert "accuracy is not known" in card.text
    assert "## Training" not in card.text


def test_formats_beside_the_weights_are_published_with_their_table(tmp_path):
    folder, out = exported(tmp_path / "export"), tmp_path / "published"
    (folder / "onnx").mkdir()
    (folder / "onnx" / "model.onnx").write_bytes(b"onnx")
    (folder / "onnx" / "model.pt").write_bytes(b"pickle")
    (folder / "pt2").mkdir()
    (folder / "pt2" / "model.pt2").write_bytes(b"program")
    (folder / "optimizer.bin").write_bytes(b"pickle")
    measured = {"top1": 61.25, "drop": 0.0, "agreement": 100.0, "megabytes": 1.5, "latency": {"1": 2.5, "64": 60.0}}
    files = {"PyTorch": None} | {name: sha256(folder / name) for name in ("onnx/model.onnx", "pt2/model.pt2")}
    rows = [{"file": name, **measured, "sha256": digest, "quantised_by": None} for name, digest in files.items()]
    (folder / "formats.json").write_text(json.dumps({"data": f"{SECRET}/photos", "images": 800, "files": rows}))
    card = card_of(folder, tmp_path)
    published = {path.relative_to(out).as_posix() for path in out.rglob("*.*")}
    names = {"README.md", "config.json", "model.safetensors", "recipe.json", "recipe.yaml", "formats.json"}
    assert published == {*names, "onnx/model.onnx"}
    assert f"| `onnx/model.onnx` | 61.25 | 0.00 | 100.00 | 1.50 | 2.50 | 60.00 | {NONE} |" in card.text
    assert "pt2" not in card.text
    assert SECRET not in (out / "formats.json").read_text()
    for place in (folder, out):
        assert all(check.passed is not False for check in mgd_timm.verify(place))
        (place / "onnx" / "model.onnx").write_bytes(b"other")
        failed = [check.name for check in mgd_timm.verify(place) if check.passed is False]
        assert "exported files are those of formats.json" in failed


@pytest.mark.parametrize(
    ("written", "given", "expected"),
    [("mit", None, "mit"), ("mit", "Apache-2.0", "apache-2.0"), ("other", "other", "other")],
)
def test_the_licence_is_the_given_one_else_that_of_the_run(tmp_path, written, given, expected):
    folder = exported(tmp_path / "export", license=written)
    assert card_of(folder, tmp_path, license=given).data.license == expected
    config = json.loads((tmp_path / "published" / "config.json").read_text())
    assert config["pretrained_cfg"]["license"] == expected


def test_a_licence_is_named_and_is_an_identifier(tmp_path):
    folder = exported(tmp_path / "export", license="other")
    for given, said in ((None, "names no licence.*--license mit"), ("my own\nlicence: x", "expected an identifier")):
        with pytest.raises(ValueError, match=said):
            card_of(folder, tmp_path, license=given)
        assert not (tmp_path / "published").exists()


def test_the_base_model_is_the_starting_weights_never_the_teacher():
    started = {"student_pretrained": True, "teacher": ("resnet50.a1_in1k",)}
    assert base_model(make_recipe(student="resnet18", **started)) == "timm/resnet18.a1_in1k"
    assert base_model(make_recipe(student="resnet18.fb_swsl_ig1b_ft_in1k", **started)) == (
        "timm/resnet18.fb_swsl_ig1b_ft_in1k"
    )
    assert base_model(make_recipe(student="resnet18", teacher=("resnet50.a1_in1k",))) is None


def test_data_sets_of_the_hub_are_named_and_local_ones_are_not():
    assert hub_dataset(make_recipe()) == "zalando-datasets/fashion_mnist"
    assert hub_dataset(make_recipe(dataset="uoft-cs/cifar100")) == "uoft-cs/cifar100"
    assert hub_dataset(make_recipe(data_dir="photos")) is None


@pytest.mark.parametrize("name", ["mine", "a/b/c", "ada/", "ada/x y", "ada/-x", "ада/x", "https://hf.co/ada/x", "../x"])
def test_names_that_the_hub_does_not_allow_are_refused(name):
    with pytest.raises(ValueError, match="expected user/name"):
        check_repo_id(name)


def test_work_is_counted_as_timm_publishes_it():
    # timm's table: 1.6 M parameters, 0.02 GMACs, 0.9 M activations at 224 x 224.
    work = count_work(timm.create_model("mobilenetv3_small_050").train(), (3, 224, 224))
    assert work.parameters == 1_593_224
    assert (round(work.macs / 1e9, 3), round(work.activations / 1e6, 2)) == (0.024, 0.92)
