"""Shards: a missing one is refused, and two data sets are not mixed."""

from pathlib import Path

import pyarrow as pa
import pytest
from places import found, jsonl, put, refused, table, tar, tree


def shard(path: Path, number: int = 0) -> Path:
    match path.suffix:
        case ".tar":
            return tar(
                path,
                {f"{number}{i}{end}": content for i in range(2) for end, content in ((".png", None), (".cls", f"{i}"))},
            )
        case ".jsonl":
            put(path.parent / f"pictures/{number}.png")
            return jsonl(path, [{"image": f"pictures/{number}.png", "label": label} for label in ("a", "b")])
        case ".parquet":
            return table(path, ["a", "b"])
        case _:
            rows = pa.parquet.read_table(table(path.with_suffix(".parquet"), ["a", "b"]))
            path.with_suffix(".parquet").unlink()
            with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, rows.schema) as writer:
                writer.write_table(rows)
            return path


@pytest.mark.parametrize("ending", [".parquet", ".arrow", ".tar", ".jsonl"])
@pytest.mark.parametrize("place", ["train-{:05}-of-00003", "train/data-{:05}-of-00003", "train-{:05}-of-00003-0a1b2c"])
def test_a_missing_shard_is_refused(tmp_path: Path, ending: str, place: str) -> None:
    for number in range(3):
        shard(tmp_path / (place.format(number) + ending), number)
    assert sum(found(tmp_path).train.values()) == 6
    for number in range(3):
        path = tmp_path / (place.format(number) + ending)
        content = path.read_bytes()
        path.unlink()
        refused(tmp_path, place.format(number).partition("-0a")[0], "missing", "of 3")
        put(path, content)
    assert sum(found(tmp_path).train.values()) == 6


def test_a_missing_evaluation_shard_is_refused(tmp_path: Path) -> None:
    shard(tmp_path / "train-00000-of-00001.parquet")
    shard(tmp_path / "test-00001-of-00002.parquet")
    refused(tmp_path, "test-00000-of-00002.parquet", "missing")


def test_shards_that_count_from_one(tmp_path: Path) -> None:
    for number in (1, 2):
        shard(tmp_path / f"train-{number}-of-2.parquet")
    assert found(tmp_path).train == {"a": 2, "b": 2}


def test_a_shard_that_is_not_complete_yet_is_missing(tmp_path: Path) -> None:
    shard(tmp_path / "train-00000-of-00002.parquet")
    put(tmp_path / "train-00001-of-00002.parquet.part", "")
    refused(tmp_path, "train-00001-of-00002.parquet", "missing")


@pytest.mark.parametrize("ending", [".parquet", ".tar"])
def test_two_data_sets_in_one_folder_are_refused(tmp_path: Path, ending: str) -> None:
    shard(tmp_path / f"train-00000-of-00001{ending}")
    for number in range(2):
        shard(tmp_path / f"train-{number:05}-of-00002{ending}", number)
    refused(tmp_path, "of-00001", "of-00002")


def test_shards_and_a_whole_file_are_refused(tmp_path: Path) -> None:
    for number in range(2):
        shard(tmp_path / f"train-{number:05}-of-00002.parquet")
    shard(tmp_path / "train.parquet")
    refused(tmp_path, "train.parquet", "of-00002")


def test_plain_numbers_are_only_names(tmp_path: Path) -> None:
    for number in (0, 2):
        shard(tmp_path / f"train-{number:04}.tar", number)
    assert found(tmp_path).train == {"0": 2, "1": 2}


def test_a_data_set_saved_by_datasets(tmp_path: Path) -> None:
    import datasets
    from places import cells

    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["cat", "ant"]))
    parts = {
        split: datasets.Dataset.from_dict({"image": cells(len(labels)), "label": labels}, features=features)
        for split, labels in (("train", [0, 1, 0, 1]), ("test", [1, 1]))
    }
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "d"), num_shards={"train": 2, "test": 1})
    seen = found(tmp_path / "d")
    assert (seen.train, seen.eval, seen.all["classes"]) == ({"cat": 2, "ant": 2}, {"ant": 2}, ["cat", "ant"])
    parts["train"].save_to_disk(str(tmp_path / "one"))
    assert found(tmp_path / "one").train == {"cat": 2, "ant": 2}


def test_class_folders_and_shards_are_refused(tmp_path: Path) -> None:
    tree(tmp_path, {"train/cat": 2, "train/dog": 2})
    shard(tmp_path / "train/data-00000-of-00001.parquet")
    refused(tmp_path, "train/cat", "data-00000-of-00001.parquet")
