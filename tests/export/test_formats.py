"""Exports to ONNX, int8, torch.export and OpenVINO: the student's predictions, measured, or not left in the folder."""

import importlib.util
import io
import json
import shutil
import zipfile
from pathlib import Path

import pytest
import timm
import torch
from small import write_small

import mgd_timm
from mgd_timm.cli.main import main
from mgd_timm.data.dataset import load_images
from mgd_timm.export.formats import FORMATS
from mgd_timm.export.load_file import load_file
from mgd_timm.models.load import load_model
from mgd_timm.models.pretrained_cfg import read_defaults
from mgd_timm.recipe.data import Data

BOUNDS = {
    "onnx/model.onnx": 1e-4,
    "onnx/model_fp16.onnx": 0.05,
    "onnx/model_int8.onnx": 2.0,
    "pt2/model.pt2": 1e-4,
    "openvino/openvino_model.xml": 0.5,  # its CPU plugin may compute in bfloat16
}
"""Bound of the difference between logits, which reach about 20."""
# With one extra alone (`make extras`), its formats. The others are tested where all extras are installed.
INSTALLED = [
    name
    for name in ("timm", "onnx", "int8", "pt2", "openvino")
    if all(importlib.util.find_spec(library) for library in FORMATS[name].libraries)
]
FILES = {file: bound for file, bound in BOUNDS.items() if any(file in FORMATS[name].files for name in INSTALLED)}
needs_onnx = pytest.mark.skipif("onnx" not in INSTALLED, reason="needs the extra onnx")
needs_int8 = pytest.mark.skipif("int8" not in INSTALLED, reason="needs the extra int8")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of onnxruntime's, NNCF's and OpenVINO's own code
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_small(tmp_path_factory.mktemp("formats"), train=320, test=400)


@pytest.fixture(scope="module")
def exported(data, tmp_path_factory):
    """The embedded teacher's files, with the formats.json beside them."""
    folder = tmp_path_factory.mktemp("exported") / "out"
    words = ["--to", ",".join(INSTALLED), "--data-dir", str(data), "--license", "mit", "--tag", "mine"]
    assert main(["export", "embedded", str(folder), *words]) == 0
    return folder


def test_every_file_gives_the_students_logits_at_any_batch(exported, data):
    model = load_model(str(exported)).eval()
    source = load_images(Data(data_dir=str(data)), 0, read_defaults(model.pretrained_cfg), log=lambda _: None).test
    parts = [source.ids[:1], source.ids[1:4], source.ids[4:30]]
    batches = [batch.images for batch in source.batches(parts, 0, torch.device("cpu"))]
    for name, bound in FILES.items():
        file = load_file(exported / name)
        assert (file.num_classes, file.pretrained_cfg["input_size"]) == (10, (3, 28, 28))
        for images in batches:
            with torch.no_grad():
                expected = model(images)
            torch.testing.assert_close(
                file(images), expected, atol=bound, rtol=0, msg=lambda text, n=name: f"{n}: {text}"
            )


def test_the_table_says_what_was_measured(exported, data):
    table = json.loads((exported / "formats.json").read_text())
    assert (table["images"], table["data"], table["max_drop"]) == (400, data.name, 1.0)
    rows = {row["file"]: row for row in table["files"]}
    assert set(rows) == {"PyTorch", *FILES}
    assert rows["PyTorch"]["top1"] == pytest.approx(mgd_timm.evaluate(exported, str(data))["top1"])
    for name in FILES:
        row, path = rows[name], exported / name
        assert row["kept"]
        assert row["drop"] == pytest.approx(rows["PyTorch"]["top1"] - row["top1"])
        assert 100 - row["agreement"] >= abs(row["drop"])
        assert row["megabytes"] >= path.stat().st_size / 1e6
        assert set(row["latency"]) == {"1", "64"}
    assert rows["pt2/model.pt2"]["agreement"] == 100
    assert json.loads((exported / "config.json").read_text())["pretrained_cfg"]["tag"] == "mine"


@needs_int8
def test_int8_is_small_and_agrees(exported):
    rows = {row["file"]: row for row in json.loads((exported / "formats.json").read_text())["files"]}
    assert rows["onnx/model.onnx"]["agreement"] == 100
    assert rows["onnx/model_int8.onnx"]["agreement"] >= 98
    assert rows["onnx/model_int8.onnx"]["quantised_by"] == "onnxruntime, static"
    assert rows["onnx/model_int8.onnx"]["megabytes"] < rows["onnx/model.onnx"]["megabytes"] / 2


def test_evaluate_takes_files(exported, data, tmp_path, capsys):
    rows = {row["file"]: row for row in json.loads((exported / "formats.json").read_text())["files"]}
    for name in FILES:
        assert main(["evaluate", str(exported / name), "--data-dir", str(data)]) == 0
        assert json.loads(capsys.readouterr().out.splitlines()[-1])["top1"] == pytest.approx(rows[name]["top1"])
    with pytest.raises(ValueError, match=r"takes images of 28x28 pixels, the data's are 32x32: leave --img-size out"):
        mgd_timm.evaluate(exported / "pt2" / "model.pt2", str(data), img_size=32)
    # The run's recipe is in the folder above the file's.
    recipe = json.loads((exported / "recipe.json").read_text())
    recipe["recipe"] = {"student": "cifar_resnet20", "teacher": None, "data": {"data_dir": "photos"}}
    moved = shutil.copytree(exported, tmp_path / "moved")
    (moved / "recipe.json").write_text(json.dumps(recipe))
    with pytest.raises(ValueError, match=r"local data \(photos\).* give --data-dir FOLDER"):
        mgd_timm.evaluate(moved / "pt2" / "model.pt2")


def test_files_name_no_path_of_this_machine(exported):
    here = str(Path(timm.__file__).parents[1]).encode()
    for name in FILES:
        assert here not in (exported / name).read_bytes(), name
    assert all(here not in path.read_bytes() for path in exported.rglob("*.bin"))


def test_a_file_is_read_from_its_own_folder(exported, monkeypatch):
    monkeypatch.chdir(exported / "pt2")
    assert (
        load_file("model.pt2").pretrained_cfg["mean"]
        == load_file(exported / "pt2" / "model.pt2").pretrained_cfg["mean"]
    )


def test_code_in_a_program_is_not_run(exported, tmp_path):
    class Payload:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    with zipfile.ZipFile(exported / "pt2" / "model.pt2") as old, zipfile.ZipFile(tmp_path / "x.pt2", "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if "sample_inputs" in name:
                torch.save(Payload(), buffer := io.BytesIO())
                content = buffer.getvalue()
            new.writestr(name, content)
    with pytest.raises(ValueError, match=r"x.pt2 cannot be read as pt2 .*sample_inputs/model.pt in it may run code"):
        load_file(tmp_path / "x.pt2")
    assert not (tmp_path / "ran").exists()


@pytest.mark.skipif("openvino" not in INSTALLED, reason="needs the extra openvino")
def test_changed_weights_of_openvino_and_missing_files_are_found(exported, tmp_path):
    folder = shutil.copytree(exported, tmp_path / "out")
    weights = folder / "openvino" / "openvino_model.bin"

    def formats() -> bool | None:
        checks = {check.name: check.passed for check in mgd_timm.verify(str(folder))}
        return checks["exported files are those of formats.json"]

    assert formats()
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    assert formats() is False
    shutil.copy(exported / "openvino" / "openvino_model.bin", weights)
    (folder / "pt2" / "model.pt2").unlink()
    assert formats() is False


@needs_onnx
def test_a_file_away_from_its_folder_says_what_it_takes(exported, tmp_path):
    import onnx

    alone = load_file(shutil.copy(exported / "onnx" / "model.onnx", tmp_path / "alone.onnx"))
    beside = load_file(exported / "onnx" / "model.onnx")
    for name in ("mean", "std", "label_names", "architecture"):
        assert alone.pretrained_cfg[name] == beside.pretrained_cfg[name]
    model = onnx.load(tmp_path / "alone.onnx")
    model.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    cast = onnx.helper.make_node("Cast", ["pixel_values"], ["wide"], to=onnx.TensorProto.FLOAT)
    for node in model.graph.node:
        node.input[:] = ["wide" if name == "pixel_values" else name for name in node.input]
    model.graph.node.insert(0, cast)
    onnx.save(model, tmp_path / "half.onnx")
    with pytest.raises(ValueError, match=r"its input is tensor\(float16\), and images are tensor\(float\)"):
        load_file(tmp_path / "half.onnx")


@needs_onnx
def test_files_describe_themselves(exported):
    import onnx

    model = onnx.load(exported / "onnx" / "model.onnx")
    known = {entry.key: json.loads(entry.value) for entry in model.metadata_props}
    config = json.loads((exported / "config.json").read_text())
    assert known["label_names"] == config["label_names"]
    assert (known["mean"], known["std"]) == (config["pretrained_cfg"]["mean"], config["pretrained_cfg"]["std"])
    assert [model.graph.input[0].name, model.graph.output[0].name] == ["pixel_values", "logits"]
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    half = onnx.load(exported / "onnx" / "model_fp16.onnx")
    assert half.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT


@pytest.fixture
def outliers():
    """The embedded teacher, with one channel of each block 100,000 times larger, which the next weights undo: the same
    function, but 8 bits do not hold that channel and the others."""
    model = load_model("embedded").eval()
    images = torch.randn(8, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model(images)
        for layer in (model.layer1, model.layer2, model.layer3):
            for block in layer:
                block.bn1.weight[0] *= 1e5
                block.bn1.bias[0] *= 1e5
                block.conv2.weight[:, 0] /= 1e5
        torch.testing.assert_close(model(images), before, atol=1e-4, rtol=0)
    return model


@needs_int8
def test_what_loses_more_than_the_gate_is_not_left_in_the_folder(outliers, tmp_path):
    data = write_small(tmp_path / "data", train=60, test=100)
    logged = []
    with pytest.raises(mgd_timm.AccuracyDropError, match=r"model_int8\.onnx loses .* points.*--max-drop") as error:
        mgd_timm.export_formats(outliers, tmp_path / "out", "int8", str(data), log=logged.append)
    text = "\n".join(logged)
    assert "int8: calibrated on 60 training images, all that there are (300 are advised)" in text
    assert "quantising it with NNCF" in text
    assert "LEFT OUT" in text
    assert [row.kept for row in error.value.results] == [True, False]
    left = sorted(path.name for path in (tmp_path / "out").rglob("*"))
    assert left == ["config.json", "formats.json", "recipe.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "out"]
