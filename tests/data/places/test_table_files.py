"""Tables: parquet, arrow, feather, csv and jsonl; the image column, the label column, and the paths in them."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.feather
import pytest
from image_files import read
from places import cells, found, hub_table, jsonl, picture, put, refused, table, tree

TWO = {"cat": 2, "dog": 2}


def write_file(path: Path, rows: pa.Table) -> None:
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, rows.schema) as writer:
        writer.write_table(rows)


def write_stream(path: Path, rows: pa.Table) -> None:
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, rows.schema) as writer:
        writer.write_table(rows)


def write_feather(compression: str) -> Callable[[Path, pa.Table], None]:
    return lambda path, rows: pyarrow.feather.write_feather(rows, path, compression=compression)


@pytest.mark.parametrize(
    ("ending", "write"),
    [
        ("arrow", write_file),
        ("ARROW", write_stream),
        ("feather", write_feather("lz4")),
        ("feather", write_feather("zstd")),
        ("feather", write_feather("uncompressed")),
        ("parquet", lambda path, rows: pa.parquet.write_table(rows, path, compression="zstd")),
    ],
    ids=["file", "stream", "lz4", "zstd", "plain", "parquet"],
)
@pytest.mark.parametrize("images", ["struct", "bytes", "path"])
def test_tables_of_every_format(tmp_path: Path, ending: str, write: Callable[..., None], images: str) -> None:
    for i in range(4):
        put(tmp_path / f"pictures/{i}.png")
    cell = {"struct": lambda _: cells(1)[0], "bytes": lambda _: picture(), "path": lambda i: f"pictures/{i}.png"}[
        images
    ]
    rows = pa.table({"image": [cell(i) for i in range(4)], "label": ["cat", "dog"] * 2})
    write(tmp_path / f"train.{ending}", rows)
    seen = found(tmp_path)
    assert (seen.train, seen.eval) == (TWO, None)
    assert (seen.all["image_column"], seen.all["label_column"]) == ("image", "label")
    assert read(tmp_path).train.labels.tolist() == [0, 1] * 2


CSV = "image,label\n{}/0.png,cat\n{}/1.png,dog\n{}/2.png,cat\n{}/3.png,dog\n"


@pytest.mark.parametrize("place", ["pictures", "./pictures", "train", "{root}/pictures", "../{name}/pictures"])
@pytest.mark.parametrize("change", ["", "bom", "windows", "quotes", "mac"])
def test_csv_files(tmp_path: Path, place: str, change: str) -> None:
    root = tmp_path / "d"
    place = place.format(root=root, name=root.name)
    for i in range(4):
        put(root / place / f"{i}.png")
    text = CSV.replace("{}", place)
    text = {"quotes": text.replace("cat", '"cat"'), "mac": text.replace("\n", "\r")}.get(change, text)
    content = text.replace("\n", "\r\n" if change == "windows" else "\n").encode(
        "utf-8-sig" if change == "bom" else "utf-8"
    )
    put(root / "train.csv", content)
    seen = found(root)
    assert seen.train == TWO
    assert len(read(root).train.ids) == 4
    assert seen.count == (place not in ("train",) and 1)  # pictures/ lies beside the splits


def test_csv_with_quoted_commas_and_lines(tmp_path: Path) -> None:
    for i in range(4):
        put(tmp_path / f"a,b/{i}.png")
    put(
        tmp_path / "train.csv",
        'label,image\n"a, b","a,b/0.png"\n"say ""x""","a,b/1.png"\n"a, b","a,b/2.png"\n"two\nlines","a,b/3.png"\n',
    )
    assert found(tmp_path).train == {"a, b": 2, 'say "x"': 1, "two\nlines": 1}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("image,label\n0.png,cat\n1.png\n", ["row 2", "1 field"]),
        ("0.png,cat\n1.png,dog\n0.png,cat\n1.png,dog\n", ["header", "0.png"]),
        ("image,label,label\n0.png,cat,1\n1.png,dog,0\n", ["'label'", "twice"]),
        ("image;label\n0.png;cat\n1.png;dog\n", ["image;label", "comma"]),
        ("image\tlabel\n0.png\tcat\n1.png\tdog\n", ["comma"]),
        ("image,label\n0.png,\n1.png,dog\n", ["row 0", "empty"]),
        ("image,label\n0.png,0\n1.png,1\n0.png,-1\n", ["row 2", "-1"]),
        ("image,label\n0.png,0\n1.png,1\n0.png,nan\n", ["row 2", "no label"]),
        ("image,label\n0.png,1\n1.png,2\n0.png,1\n", ["--first-label 1"]),
        ("image,label\n9.png,cat\n1.png,dog\n", ["9.png", "no such file"]),
        ("image,label\n", ["no images"]),
        ("", ["train.csv"]),
        ("image,name\n0.png,99999999999999999999\n1.png,1\n", ["label column"]),
        ("image,label\n0.png,caf\udce9\n1.png,dog\n", ["train.csv", "utf-8"]),
        ("id,label\n00a1,cat\n00a2,dog\n", ["no image column", "--input-key"]),
        ("image,label\n,cat\n1.png,dog\n", ["train image 0"]),
    ],
)
def test_csv_files_that_are_refused(tmp_path: Path, text: str, words: list[str]) -> None:
    tree(tmp_path, {"train": 2})
    put(tmp_path / "train.csv", text.encode(errors="surrogateescape"))
    refused(tmp_path, *words)


def test_csv_numbers_stay_what_they_are(tmp_path: Path) -> None:
    tree(tmp_path, {"train": 4})
    for labels, train in (
        (["007", "7", "007", "8"], {"007": 2, "7": 1, "8": 1}),
        (["0", "1", "2", "1"], {"0": 1, "1": 2, "2": 1}),
        (["0.0", "1.0", "1.0", "1.0"], {"0": 1, "1": 3}),
        (["true", "false", "true", "true"], {"true": 3, "false": 1}),
    ):
        put(tmp_path / "train.csv", "image,label\n" + "".join(f"{i}.png,{label}\n" for i, label in enumerate(labels)))
        assert found(tmp_path).train == train


def test_a_table_beside_a_folder_of_its_images(tmp_path: Path) -> None:
    tree(tmp_path, {"Train": 3, "test": 2})  # as Kaggle has it; one image is in no row
    put(tmp_path / "train.csv", "file,category\n0.png,cat\n1.png,dog\n0.png,cat\n")
    seen = found(tmp_path)
    assert (seen.train, seen.eval) == ({"cat": 2, "dog": 1}, None)
    assert "no table" in seen.why("Train/2.png")
    assert (seen.all["image_column"], seen.all["label_column"], seen.count) == ("file", "category", 3)


def test_unused_images_are_counted_wherever_the_data_lie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree(tmp_path / "d", {"train": 3})
    put(tmp_path / "d/train.csv", f"image,label\n{tmp_path}/d/train/0.png,cat\ntrain/1.png,dog\n")
    monkeypatch.chdir(tmp_path)
    assert set(found(Path("d")).ignored) == {"train/2.png"}


@pytest.mark.parametrize("place", ["", "images/"])
def test_metadata_inside_the_split_folders(tmp_path: Path, place: str) -> None:
    for split in ("train", "validation"):
        tree(tmp_path, {f"{split}/{place}": 4})
        rows = "".join(f"{place}{i}.png,{'cat' if i % 2 else 'dog'}\n" for i in range(4))
        put(tmp_path / split / "metadata.csv", f"file_name,label\n{rows}")
    seen = found(tmp_path)
    assert (seen.train, seen.eval, seen.count) == (TWO, TWO, 0)


def test_metadata_beside_images_without_splits(tmp_path: Path) -> None:
    tree(tmp_path, {".": 4})
    jsonl(tmp_path / "metadata.jsonl", [{"file_name": f"{i}.png", "label": i % 2} for i in range(3)])
    seen = found(tmp_path)
    assert (seen.train, set(seen.ignored)) == ({"0": 2, "1": 1}, {"3.png"})


def test_a_table_beside_class_folders_is_left_out_unless_asked_for(tmp_path: Path) -> None:
    tree(tmp_path, {"train/cat": 2, "train/dog": 2})
    put(tmp_path / "train/notes.csv", "image,sex\ncat/0.png,f\ncat/1.png,m\ndog/0.png,f\n")
    seen = found(tmp_path)
    assert seen.train == TWO
    assert "--target-key" in seen.why("train/notes.csv")
    assert found(tmp_path, target_key="sex").train == {"f": 2, "m": 1}


def test_jsonl_files_that_are_refused(tmp_path: Path) -> None:
    tree(tmp_path, {"train": 2})
    for text, words in (
        ('{"image": "0.png", "label": "cat"}\n[1, 2]\n', ["train.jsonl", "line 2"]),
        ('{"image": "0.png", "label": "cat"}\n{"image": "1.png"}\n', ["row 1", "no label"]),
        ('{"image": "0.png", "label": "cat"}\n{"image": "1.png", "label": 1}\n', ["train.jsonl"]),
        ('{"image": "0.png", "label": "cat"}\n{"image"\n', ["train.jsonl", "line 2"]),
    ):
        put(tmp_path / "train.jsonl", text)
        refused(tmp_path, *words)


@pytest.mark.parametrize("ending", ["parquet", "arrow", "feather", "csv", "jsonl"])
@pytest.mark.parametrize("content", [b"", b"junk\x00\xff" * 9, b"PAR1"])
def test_files_that_are_no_tables_are_refused(tmp_path: Path, ending: str, content: bytes) -> None:
    put(tmp_path / f"train.{ending}", content)
    refused(tmp_path, "train")


def test_truncated_tables_are_refused(tmp_path: Path) -> None:
    whole = table(tmp_path / "train.parquet", ["cat", "dog"] * 4).read_bytes()
    for size in (len(whole) // 2, len(whole) - 5):
        put(tmp_path / "train.parquet", whole[:size])
        refused(tmp_path, "train.parquet")
    put(tmp_path / "train.parquet", whole[:200] + bytes(200) + whole[400:])
    refused(tmp_path, "train")


# -- the image column


def test_the_image_column(tmp_path: Path) -> None:
    labels = ["cat", "dog"] * 2
    table(tmp_path / "a/train.parquet", labels, thumbnail=cells(4))
    assert found(tmp_path / "a").all["image_column"] == "image"
    assert found(tmp_path / "a", input_key="thumbnail").all["image_column"] == "thumbnail"
    table(tmp_path / "b/train.parquet", labels, ["0", "1", "2", "3"], img=cells(4))
    refused(tmp_path / "b", "'image'", "img", "--input-key")
    assert found(tmp_path / "b", input_key="img").train == TWO
    pa.parquet.write_table(
        pa.table({"left": cells(4), "right": cells(4), "label": labels}), put(tmp_path / "c/train.parquet")
    )
    refused(tmp_path / "c", "left, right", "--input-key")
    pa.parquet.write_table(pa.table({"img": cells(4), "label": labels}), put(tmp_path / "d/train.parquet"))
    assert found(tmp_path / "d").all["image_column"] == "img"
    refused(tmp_path / "d", "'pic'", "img", input_key="pic")
    refused(tmp_path / "d", "label", "images", input_key="label")


def test_strings_and_binaries_of_every_type(tmp_path: Path) -> None:
    for i, (text, binary) in enumerate(((pa.large_string(), pa.large_binary()), (pa.string_view(), pa.binary_view()))):
        columns = {
            "image": pa.array([picture() for _ in range(4)], binary),
            "label": pa.array(["cat", "dog"] * 2, text),
        }
        write_file(put(tmp_path / f"{i}/train.arrow"), pa.table(columns))
        assert found(tmp_path / f"{i}").train == TWO
        for number in range(4):
            put(tmp_path / f"{i}p/{number}.png")
        columns["image"] = pa.array([f"{number}.png" for number in range(4)], text)
        write_file(put(tmp_path / f"{i}p/train.arrow"), pa.table(columns))
        assert found(tmp_path / f"{i}p").train == TWO
    for number in range(4):
        put(tmp_path / f"c/{number}.png")
    frame = pd.DataFrame(
        {"image": pd.Categorical([f"{n}.png" for n in range(4)]), "label": pd.Categorical(["cat", "dog"] * 2)}
    )
    frame.to_parquet(tmp_path / "c/train.parquet")
    assert found(tmp_path / "c").train == TWO


# -- the label column


@pytest.mark.parametrize("name", ["label", "labels", "target", "class", "fine_label", "Label", "Class", "TARGET"])
def test_label_columns_by_name(tmp_path: Path, name: str) -> None:
    table(tmp_path / "train.parquet", ["cat", "dog"] * 2, label=name, kind=["a", "b", "c", "c"], id=[0, 1, 2, 3])
    assert (found(tmp_path).all["label_column"], found(tmp_path).train) == (name, TWO)


def test_names_before_types(tmp_path: Path) -> None:
    hub_table(tmp_path / "a/train.parquet", ["cat", "dog"], [0, 1, 1, 0])
    assert found(tmp_path / "a").train == TWO
    table(
        tmp_path / "b/train.parquet",
        ["0", "1"] * 2,
        label="fine_label",
        coarse_label=[0, 0, 1, 1],
        target=["x", "y", "y", "y"],
    )
    assert found(tmp_path / "b").train == {"x": 1, "y": 3}
    table(tmp_path / "c/train.parquet", [0, 1] * 2, label="fine_label", coarse_label=[0, 0, 1, 1])
    assert found(tmp_path / "c").all["label_column"] == "fine_label"


NEVER = {
    "index": [0, 1, 0, 1],
    "id": [0, 1, 1, 0],
    "image_id": ["a", "b", "a", "b"],
    "patientId": [0, 1, 1, 0],
    "fold": [0, 1, 0, 1],
    "kfold": ["a", "b", "a", "b"],
    "split": ["train", "train", "test", "test"],
    "is_valid": [True, False, True, False],
    "is_test": [0, 1, 0, 1],
    "timestamp": [0, 1, 0, 1],
    "date": ["2024-01-01", "2024-01-02"] * 2,
    "taken": ["2024-01-01T10:00", "2024-01-02T11:00"] * 2,
    "seen": pa.array([0, 1, 0, 1], pa.timestamp("s")),
    "bbox": [[0.5, 0.5]] * 4,
    "box": [[0, 1, 2, 3]] * 4,
    "xmin": [0, 1, 0, 1],
    "x": [0, 1, 0, 1],
    "width": [0, 1, 0, 1],
    "Unnamed: 0": [0, 1, 0, 1],
    "__index_level_0__": [0, 1, 0, 1],
    "row": [0, 1, 2, 3],
    "serial": [0, 1, 2, 3],
    "word": ["a", "b", "c", "d"],
    "gap": [3, 7, 3, 7],
    "embedding": [[0.5, -3.0], [1.0, 2.0]] * 2,
    "score": [0.5, 0.7, 0.5, 0.1],
    "constant": [0, 0, 0, 0],
    "md5": ["0af", "0ab", "0af", "0ab"],
    "url": ["http://a", "http://b"] * 2,
    "tags": [["a", "b"], ["c"]] * 2,
    "number": [0, 1, 0, 1],
    "lat": [0, 1, 0, 1],
}


@pytest.mark.parametrize("name", NEVER)
def test_what_is_never_guessed(tmp_path: Path, name: str) -> None:
    table(tmp_path / "a/train.parquet", **{name: NEVER[name]})
    refused(tmp_path / "a", name, "--target-key")
    table(tmp_path / "b/train.parquet", ["cat", "dog"] * 2, label="kind", **{name: NEVER[name]})
    seen = found(tmp_path / "b")
    assert (seen.train, seen.all["label_column"]) == (TWO, "kind")
    assert "'kind'" in seen.words or "kind, the only one" in seen.words


def test_several_candidates_are_refused(tmp_path: Path) -> None:
    table(tmp_path / "train.parquet", ["cat", "dog"] * 2, label="kind", sex=["f", "f", "m", "m"])
    refused(tmp_path, "kind, sex", "--target-key")
    assert found(tmp_path, target_key="sex").train == {"f": 2, "m": 2}
    refused(tmp_path, "'kin'", "did you mean kind", target_key="kin")
    refused(tmp_path, "image", "--target-key", target_key="image")


@pytest.mark.parametrize("name", ["kind", "category", "breed"])
def test_the_evaluation_split_uses_the_training_column(tmp_path: Path, name: str) -> None:
    table(tmp_path / "train.parquet", ["cat", "dog"] * 3, label=name)
    table(tmp_path / "test.parquet", ["cat", "dog"], label=name)  # as many values as rows
    assert found(tmp_path).eval == {"cat": 1, "dog": 1}
    table(tmp_path / "test.parquet", ["dog", "dog"], label=name, sex=["f", "m"])
    assert found(tmp_path).eval == {"dog": 2}


def test_an_evaluation_split_with_another_column_is_refused(tmp_path: Path) -> None:
    table(tmp_path / "train.parquet", [0, 1] * 2, fine_label=[0, 1] * 2)
    table(tmp_path / "test.parquet", [0, 1] * 2, label="fine_label")
    refused(tmp_path, "test", "'label'", "fine_label")


def test_an_evaluation_split_without_labels_is_refused(tmp_path: Path) -> None:
    table(tmp_path / "train.parquet", ["cat", "dog"] * 2)
    table(tmp_path / "test.parquet", None, cells(3), id=[7, 8, 9])
    refused(tmp_path, "test", "label", "--eval-split")


def test_files_of_a_split_with_other_columns_are_refused(tmp_path: Path) -> None:
    table(tmp_path / "train-0.parquet", ["cat", "dog"])
    table(tmp_path / "train-1.parquet", ["cat", "dog"], label="labels")
    refused(tmp_path, "train", "'label'")


def test_labels_of_a_frame(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    frame = pd.DataFrame(
        {"image": [picture() for _ in range(4)], "label": np.array([1, 0, 1, 0], dtype=np.int8)}, index=[5, 6, 7, 8]
    )
    frame.to_parquet(tmp_path / "a/train.parquet")
    assert found(tmp_path / "a").train == {"0": 2, "1": 2}
    (tmp_path / "b").mkdir()
    frame.reset_index().to_feather(tmp_path / "b/train.feather")
    assert found(tmp_path / "b").train == {"0": 2, "1": 2}
