"""What cannot be exported or evaluated is said before anything is written, with the way out."""

import shutil

import pytest
import timm
import torch

import mgd_timm
from mgd_timm.cli.main import main
from mgd_timm.export.formats import check_libraries, parse_formats
from mgd_timm.export.load_file import load_file
from mgd_timm.export.write_files import check_fits_onnx


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--to", "onnx,int9"], "unknown format 'int9': did you mean int8"),
        (["--to", "tflite"], "unknown format 'tflite': known: executorch, int8, onnx"),
        (["--to", ","], "--to ',': expected one or more of timm, onnx"),
        (["--to", "onnx", "--max-drop", "101"], "--max-drop 101.0: expected points of top-1 from 0 to 100"),
        (["--to", "onnx", "--max-drop", "-1"], "--max-drop -1.0: expected points of top-1 from 0 to 100"),
        (["--to", "onnx", "--max-drop", "nan"], "--max-drop: 'nan': expected a number"),
        (["--formats", "onnx"], "give --to instead"),
        (["--to", "onnx", "--mean", "0.5"], "files are exported for images as the run showed them"),
        (["--to", "onnx", "--batch-size", "8"], "only training takes it"),
        (["--to", "onnx", "--data-dir", "no/such/place"], "no/such/place"),
        (["--to", "onnx", "--eval-split", "nowhere"], "nowhere"),
    ],
)
def test_wrong_words_are_refused(words, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    try:
        code = main(["export", "embedded", "out", *words])
    except SystemExit as end:
        code = end.code
    assert code in (1, 2)
    errors = capsys.readouterr().err
    assert said in errors
    assert "Traceback" not in errors
    assert not list(tmp_path.iterdir())


def test_formats_are_read_from_words_and_lists():
    assert parse_formats(" onnx, timm,onnx") == ("onnx", "timm")
    assert parse_formats(["pt2"]) == ("pt2",)
    with pytest.raises(ValueError, match=r"x\.pte needs no_such_library: pip install 'mgd-timm\[executorch\]'"):
        check_libraries(["torch", "no_such_library"], "executorch", "x.pte")


def test_an_existing_place_is_refused(tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    assert main(["export", "embedded", str(tmp_path / "file"), "--to", "onnx"]) == 1
    assert "exists: choose another folder" in capsys.readouterr().err
    assert main(["export", "embedded", str(tmp_path / "file" / "below"), "--to", "pt2"]) == 1
    assert "which is a file: choose another folder" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"


def test_data_without_evaluation_images_are_refused(small_data, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    shutil.copy(small_data / "train.parquet", data)
    with pytest.raises(ValueError, match="no split to evaluate on: name one with --eval-split, or hold one out"):
        mgd_timm.export_formats("embedded", tmp_path / "out", "pt2", str(data))
    with pytest.raises(ValueError, match="is in the data folder"):
        mgd_timm.export_formats("embedded", data / "train" / "out", "pt2", str(data), val_split=0.2)
    model = timm.create_model("test_resnet", num_classes=2, in_chans=1)
    with pytest.raises(ValueError, match=r"takes 1 channels|has 2 classes"):
        mgd_timm.export_formats(model, tmp_path / "out", "pt2", str(small_data))
    assert not (tmp_path / "out").exists()


def test_weights_that_an_onnx_file_cannot_hold_are_refused():
    with torch.device("meta"):
        model = timm.create_model("vit_huge_patch14_224", num_classes=10)
    with pytest.raises(ValueError, match=r"vit_huge_patch14_224 has 2\.5 GB of weights, and an ONNX file holds 2 GB"):
        check_fits_onnx(model)


def onnx_file(path, inputs, outputs):
    """A file that means pixels away, of the given shapes."""
    import onnx
    from onnx import TensorProto, helper

    entry, answer = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in (("x", inputs), ("y", outputs))
    )
    axes = helper.make_tensor("axes", TensorProto.INT64, [2], [2, 3])
    node = helper.make_node("ReduceMean", ["x", "axes"], ["y"], keepdims=0)
    graph = helper.make_graph([node], "mean", [entry], [answer], [axes])
    opset = [helper.make_opsetid("", 20)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=10), path)
    return path


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of onnx's own code
def test_files_that_are_no_classifiers_are_refused(tmp_path, small_data):
    (tmp_path / "text.onnx").write_text("no")
    for name, said in (("text.onnx", "cannot be read as onnx"), ("none.onnx", "there is no such file")):
        with pytest.raises(ValueError, match=said):
            load_file(tmp_path / name)
    for name in ("text.pt2", "text.xml"):
        (tmp_path / name).write_text("no")
        with pytest.raises(ValueError, match=r"cannot be read as"):
            load_file(tmp_path / name)
    with pytest.raises(ValueError, match="takes exactly 1 images at a time: export it with a dynamic batch"):
        load_file(onnx_file(tmp_path / "one.onnx", [1, 3, 28, 28], [1, 3]))
    with pytest.raises(ValueError, match=r"takes \[\?, 3, \?, \?\] and returns .* of which the batch alone is dynamic"):
        load_file(onnx_file(tmp_path / "any.onnx", ["n", 3, "h", "w"], ["n", 3]))
    fine = onnx_file(tmp_path / "fine.onnx", ["n", 3, 28, 28], ["n", 3])
    assert torch.equal(load_file(fine)(torch.ones(2, 3, 28, 28)), torch.ones(2, 3))
    with pytest.raises(ValueError, match="the model has 3 classes, the data has 10"):
        mgd_timm.evaluate(fine, str(small_data))
    ten = onnx_file(tmp_path / "ten.onnx", ["n", 10, 28, 28], ["n", 10])
    with pytest.raises(ValueError, match="takes 10 channels, the images have 3"):
        mgd_timm.evaluate(ten, str(small_data), in_chans=3)
    with pytest.raises(ValueError, match="is an exported file: give the run"):
        mgd_timm.export_formats(fine, tmp_path / "out")
