"""Parquet and arrow files: columns and labels are found, and what is wrong is named."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from image_files import collect, encoded, noise, parquet, pixels, read, samples, stacked

from mgd_timm.data.decode import DataError
from mgd_timm.data.readers import rows as reader_rows


def test_hub_parquet_with_two_label_columns(tmp_path: Path) -> None:
    import datasets

    features = datasets.Features(
        img=datasets.Image(),
        fine_label=datasets.ClassLabel(names=["apple", "bee", "cup"]),
        coarse_label=datasets.ClassLabel(names=["alive", "thing"]),
    )
    for split, count in (("train", 6), ("test", 3)):
        columns = {
            "img": samples(count),
            "fine_label": [i % 3 for i in range(count)],
            "coarse_label": [i % 2 for i in range(count)],
        }
        datasets.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / f"{split}-00000-of-00001.parquet")
    data = read(tmp_path)
    assert data.class_names == ("apple", "bee", "cup")
    assert data.train.labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert torch.equal(pixels(data.train), stacked([noise(i) for i in range(6)]))
    assert data.test is data.evaluation
    assert read(tmp_path, target_key="coarse_label").class_names == ("alive", "thing")
    for path in tmp_path.glob("*.parquet"):
        pq.write_table(pq.read_table(path).drop_columns("fine_label"), path)  # leaves its description
    assert read(tmp_path).class_names == ("alive", "thing")


def test_of_several_columns_with_class_names_the_finest_is_taken_and_logged(tmp_path: Path) -> None:
    import datasets

    names = {"genus": ["ape", "bee"], "species": ["apple", "bee", "cup"]}
    features = datasets.Features(
        img=datasets.Image(), **{name: datasets.ClassLabel(names=known) for name, known in names.items()}
    )
    columns = {"img": samples(6), "genus": [0, 1] * 3, "species": [0, 1, 2] * 2}
    datasets.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "train.parquet")
    said: list[str] = []
    assert read(tmp_path, log=said.append).class_names == ("apple", "bee", "cup")
    assert "label column: species of genus (2 classes), species (3 classes); choose another with --target-key" in said


@pytest.mark.parametrize("binary", [False, True])
def test_parquet_without_metadata(tmp_path: Path, binary: bool) -> None:
    images: list[Any] = [encoded(noise(i)) for i in range(6)] if binary else samples(6)
    parquet(tmp_path / "train.parquet", picture=images, label=[0, 1, 2, 0, 1, 2])
    parquet(tmp_path / "validation.parquet", picture=images[:2], label=[1, 0])  # without the highest class
    data = read(tmp_path)
    assert data.class_names == ("0", "1", "2")
    assert torch.equal(pixels(data.train), stacked([noise(i) for i in range(6)]))
    assert data.test is not None
    assert data.test.labels.tolist() == [1, 0]


def test_arrow_files(tmp_path: Path) -> None:
    table = pa.table({"image": samples(4), "label": [0, 1, 1, 0]})
    with pa.ipc.new_stream(str(tmp_path / "train.arrow"), table.schema) as writer:
        writer.write_table(table)
    data = read(tmp_path)
    assert data.test is None
    assert data.evaluation is None
    assert data.train.labels.tolist() == [0, 1, 1, 0]
    assert torch.equal(pixels(data.train), stacked([noise(i) for i in range(4)]))


def test_soft_labels(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    soft = rng.dirichlet([1, 1, 1], 6).astype(np.float32)
    parquet(tmp_path / "train.parquet", image=samples(6), label=soft.tolist())
    parquet(tmp_path / "test.parquet", image=samples(2), label=soft[:2].tolist())
    data = read(tmp_path, val_split=0.4)
    assert data.num_classes == 3
    assert data.val is not None
    both = torch.cat([data.train.ids, data.val.ids])
    assert both.sort().values.tolist() == list(range(6))
    np.testing.assert_allclose(
        torch.cat([collect(data.train).labels, collect(data.val).labels])[both.argsort()].numpy(), soft
    )
    assert collect(data.test).labels.tolist() == soft[:2].tolist()
    parquet(tmp_path / "test.parquet", image=samples(2), label=[[0.5, 0.5], [1.0, 0.0]])
    with pytest.raises(
        DataError,
        match="split 'test' has distributions over 2 classes, the training split has 3: expected as many",
    ):
        read(tmp_path)


@pytest.mark.parametrize("hashed", [1 << 30, 1000])
def test_the_digest_tells_data_sets_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hashed: int) -> None:
    monkeypatch.setattr(reader_rows, "HASHED", hashed)
    plain, labels = [encoded(noise(i)) for i in range(8)], [0, 1] * 4
    longer = [*plain[:7], plain[7] + b"\0"]
    variants = {
        "one": (plain, labels),
        "same": (plain, labels),
        "labels": (plain, labels[::-1]),
        "longer": (longer, labels),
    }
    digests = {}
    for name, (images, label) in variants.items():
        parquet(tmp_path / name / "train.parquet", image=images, label=label)
        digests[name] = read(tmp_path / name).train.digest
    assert digests["one"] == digests["same"]
    assert len(set(digests.values())) == 3


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"label": [0, 1]}, "no image column among label: expected one; name it with --input-key"),
        (
            {"picture": samples(2), "other": samples(2), "label": [0, 1]},
            "2 image columns, picture, other, among picture, other, label: exp",
        ),
        (
            {"image": samples(2)},
            "no label column among image: expected one of class names, class ids or distributions; name it with --targ",
        ),
        (
            {"image": samples(4), "kind": [0, 1, 0, 1], "colour": ["red", "red", "blue", "blue"]},
            "2 columns that may be labels, kind, colour, among image, kind, colour: expected one",
        ),
        (
            {"image": samples(3), "label": [0, 2, 2]},
            r"split 'train' has no image of class '1' \(1\): add images, or remove the class",
        ),
        (
            {"image": samples(2), "label": [0, 0]},
            "split 'train' has only one class, '0': expected two or more",
        ),
        ({"image": samples(2), "label": [[1.0], [1.0]]}, "split 'train' has only one class, '0'"),
        (
            {"image": samples(3), "label": [0, -1, 1]},
            r"column 'label' of split 'train': row 1 has the label -1, expected class ids from",
        ),
        (
            {"image": samples(3), "label": [0, None, 1]},
            "column 'label' of split 'train': row 1 has no label: take the row out, or choose another column",
        ),
        (
            {"image": samples(2), "label": [[0.5, 0.5], [0.5, 0.6]]},
            "expected distributions over classes: equal lengths, each value 0 or more, with the sum 1",
        ),
        ({"image": samples(2), "label": [[1.5, -0.5], [0.5, 0.5]]}, "expected distributions"),
        (
            {"image": samples(2), "label": [[0.5, 0.5], [1.0]]},
            "lists of 1, 2 values: expected distributions over classes: equal lengths",
        ),
        (
            {"image": [*samples(1), {"bytes": None, "path": None}], "label": [0, 1]},
            "train image 1: the row has neither bytes nor a",
        ),
        (
            {"image": [encoded(noise(0)), None], "label": [0, 1]},
            "train image 1: the row has neither bytes nor a path: take it out",
        ),
        (
            {"image": [*samples(1), {"bytes": None, "path": "/no.png"}], "label": [0, 1]},
            r"train image 1 \(/no.png\): no such file in .*: put it back, write paths relative",
        ),
        (
            {"image": [*samples(1), *samples(1, height=13)], "label": [0, 1]},
            r"train image 1 \(0.png\) has 13x10 pixels, the first image 12x10: give --img-size to "
            r"resize all to one size",
        ),
        (
            {"image": pa.array([], pa.binary()), "label": pa.array([], pa.int64())},
            "split 'train' has no images|cannot be read",
        ),
    ],
)
def test_tables_that_cannot_be_used(columns: dict[str, Any], message: str, tmp_path: Path) -> None:
    parquet(tmp_path / "train.parquet", **columns)
    with pytest.raises(DataError, match=message):
        read(tmp_path)


def test_labels_beyond_the_classes(tmp_path: Path) -> None:
    parquet(tmp_path / "train.parquet", image=samples(4), label=[0, 1, 0, 1])
    parquet(tmp_path / "test.parquet", image=samples(2), label=[0, 2])
    with pytest.raises(DataError, match=r"split 'test' has the class '2', which the training split has not: .*0, 1"):
        read(tmp_path)


def test_named_classes_without_images_or_with_other_names(tmp_path: Path) -> None:
    import datasets

    def write(place: str, names: list[str], label: list[int]) -> None:
        features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=names))
        (tmp_path / place).parent.mkdir(exist_ok=True)
        datasets.Dataset.from_dict({"image": samples(len(label)), "label": label}, features=features).to_parquet(
            tmp_path / place
        )

    write("empty/train.parquet", ["cat", "dog", "emu"], [0, 1])
    with pytest.raises(
        DataError, match=r"split 'train' has no image of class 'emu' \(2\): add images, or remove the class from the"
    ):
        read(tmp_path / "empty")
    write("hidden/train.parquet", ["cat", "dog"], [0, 1])
    write("hidden/test.parquet", ["cat", "dog"], [-1, -1])
    with pytest.raises(
        DataError, match=r"split 'test': row 0 has the label -1.* A split with hidden labels cannot be used: choose ano"
    ):
        read(tmp_path / "hidden")
