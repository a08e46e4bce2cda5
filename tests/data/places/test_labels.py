"""Labels of tables: names, numbers, bools, categoricals and distributions; matched by name between files and splits."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.feather
import pytest
from places import cells, found, hub_table, jsonl, refused, table, tree


def categorical(words: list[str], order: list[str]) -> pa.DictionaryArray:
    return pa.DictionaryArray.from_arrays(pa.array([order.index(w) for w in words], pa.int8()), pa.array(order))


@pytest.mark.parametrize(
    ("labels", "train"),
    [
        (["dog", "cat", "dog", "ant"], {"ant": 1, "cat": 1, "dog": 2}),
        ([True, False, True, True], {"False": 1, "True": 3}),
        (categorical(["dog", "cat", "dog", "ant"], ["dog", "unused", "cat", "ant"]), {"ant": 1, "cat": 1, "dog": 2}),
        (pa.array([0, 1, 1, 2], pa.uint8()), {"0": 1, "1": 2, "2": 1}),
        ([0.0, 1.0, 1.0, 2.0], {"0": 1, "1": 2, "2": 1}),
        (["1", "01", "1", "001"], {"001": 1, "01": 1, "1": 2}),
        (["cafe\u0301", "caf\u00e9", "bar", "bar"], {"bar": 2, "caf\u00e9": 2}),
        ([[0.9, 0.1], [0.2, 0.8], [0.0, 1.0], [1.0, 0.0]], {"0": 2, "1": 2}),
        (["-1", "1", "-1", "1"], {"-1": 2, "1": 2}),
    ],
    ids=["words", "bools", "categories", "uint8", "floats", "padded", "unicode", "distributions", "signs"],
)
def test_labels_of_every_kind(tmp_path: Path, labels: Any, train: dict[str, int]) -> None:
    table(tmp_path / "train.parquet", labels)
    seen = found(tmp_path)
    assert seen.train == train
    assert seen.all["classes"] == sorted(train)


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ([1, 2, 3, 1], ["1 to 3", "--first-label 1"]),
        ([5, 6, 7, 5], ["--first-label 5"]),
        ([0, 1, 3, 1], ["class '2'"]),
        ([0, 1, -1, 1], ["row 2", "-1"]),
        ([0, 1, 900, 1], ["900"]),
        ([0, 1, None, 1], ["row 2", "no label"]),
        (["cat", None, "dog", "cat"], ["row 1", "no label"]),
        (["cat", "  ", "dog", "cat"], ["row 1", "empty"]),
        (np.array([0, 1, np.nan, 1]), ["row 2", "no label"]),
        (np.array([0, 1, np.inf, 1]), ["row 2"]),
        ([0.5, 1.5, 0.5, 1.0], ["row 0", "0.5"]),
        ([[1, 0, 1], [0, 1, 0], [1, 1, 1], [0, 0, 1]], ["several labels"]),
        ([[0.5, 0.5], [1.0], [0.5, 0.5], [1.0]], ["distributions"]),
        ([[0.5, None], [0.5, 0.5], [0.5, 0.5], [1.0, 0.0]], ["distributions"]),
        ([["cat"], ["dog"], ["cat"], ["dog"]], ["label"]),
        ([{"a": 1}, {"a": 2}, {"a": 1}, {"a": 2}], ["label", "--target-key"]),
        (pa.array([0, 1, 0, 1], pa.timestamp("s")), ["timestamp", "--target-key"]),
        (pa.nulls(4), ["row 0", "no label"]),
        (["cat", "cat ", "dog", "cat"], ["'cat '", "spaces"]),
        (["cat"] * 4, ["only one class", "cat"]),
        ([0] * 4, ["only one class"]),
    ],
)
def test_labels_that_are_refused(tmp_path: Path, labels: Any, words: list[str]) -> None:
    table(tmp_path / "train.parquet", labels)
    refused(tmp_path, *words)


def test_labels_from_one_are_shifted_only_if_asked(tmp_path: Path) -> None:
    table(tmp_path / "train.parquet", [1, 2, 3, 1])
    table(tmp_path / "test.parquet", [3, 3])
    refused(tmp_path, "--first-label 1")
    seen = found(tmp_path, first_label=1)
    assert (seen.train, seen.eval) == ({"1": 2, "2": 1, "3": 1}, {"3": 2})
    table(tmp_path / "test.parquet", [0, 3])
    refused(tmp_path, "label 0", "test", first_label=1)
    tree(tmp_path / "names", {"train/cat": 2, "train/dog": 2})  # names have no first number
    table(tmp_path / "names/test.parquet", [1, 2])
    seen = found(tmp_path / "names", first_label=1)
    assert seen.eval == {"cat": 1, "dog": 1}
    assert "1 = cat, 2 = dog" in seen.words


@pytest.mark.parametrize("hidden", [-1, 7])
def test_an_evaluation_split_with_strange_labels_is_refused(tmp_path: Path, hidden: int) -> None:
    table(tmp_path / "train.parquet", [0, 1, 2, 1])
    table(tmp_path / "test.parquet", [0, hidden])
    refused(tmp_path, "test", str(hidden))


def test_an_evaluation_split_of_few_classes(tmp_path: Path) -> None:
    table(tmp_path / "train.parquet", list(range(10)) * 2)
    table(tmp_path / "test.parquet", [9, 9])
    seen = found(tmp_path)
    assert seen.eval == {"9": 2}
    assert seen.all["eval"]["per_class"]["0"] == 0


def test_hidden_labels_of_named_classes_are_refused(tmp_path: Path) -> None:
    for split, names in (("a", ["ant", "bee"]), ("b", ["bee", "ant"])):
        hub_table(tmp_path / f"d/train-{split}.parquet", names, [0, 1, 0, 1])
    hub_table(tmp_path / "d/train-c.parquet", ["ant", "bee"], [0, -1])
    refused(tmp_path / "d", "-1")
    hub_table(tmp_path / "e/train.parquet", ["ant", "bee"], [0, 1, 0, 1])
    hub_table(tmp_path / "e/test.parquet", ["bee", "ant"], [-1, -1])
    refused(tmp_path / "e", "test", "-1")


def test_named_classes_in_another_order(tmp_path: Path) -> None:
    hub_table(tmp_path / "train-0.parquet", ["ant", "bee", "cat"], [0, 1, 2])
    hub_table(tmp_path / "train-1.parquet", ["cat", "ant", "bee"], [0, 0, 1])
    hub_table(tmp_path / "test.parquet", ["bee", "cat"], [0, 0, 1])
    seen = found(tmp_path)
    assert (seen.train, seen.eval) == ({"ant": 2, "bee": 1, "cat": 3}, {"bee": 2, "cat": 1})


def test_named_classes_that_the_training_split_has_not(tmp_path: Path) -> None:
    hub_table(tmp_path / "train.parquet", ["ant", "bee"], [0, 1, 0])
    hub_table(tmp_path / "test.parquet", ["ant", "beee"], [0, 0])
    assert found(tmp_path).eval == {"ant": 2}  # a name without images is no class of the split
    hub_table(tmp_path / "test.parquet", ["ant", "beee"], [0, 1])
    refused(tmp_path, "test", "'beee'", "did you mean bee")


def test_a_named_class_without_images_is_refused(tmp_path: Path) -> None:
    hub_table(tmp_path / "train.parquet", ["ant", "bee", "cat"], [0, 2, 0])
    refused(tmp_path, "'bee'", "no image")


def test_categories_in_another_order(tmp_path: Path) -> None:
    table(tmp_path / "train-0.parquet", categorical(["dog", "cat", "dog"], ["dog", "cat"]))
    table(tmp_path / "train-1.parquet", categorical(["dog", "cat", "emu"], ["emu", "cat", "dog"]))
    table(tmp_path / "test.parquet", categorical(["emu", "emu"], ["emu"]))
    seen = found(tmp_path)
    assert (seen.train, seen.eval) == ({"cat": 2, "dog": 3, "emu": 1}, {"emu": 2})
    assert seen.all["classes"] == ["cat", "dog", "emu"]


def test_categories_that_are_numbers_are_names(tmp_path: Path) -> None:
    labels = pa.array([10, 2, 10, 5]).dictionary_encode()
    pyarrow.feather.write_feather(pa.table({"image": cells(4), "label": labels}), tmp_path / "train.feather")
    assert found(tmp_path).all["train"]["per_class"] == {"10": 2, "2": 1, "5": 1}


def test_words_in_several_files(tmp_path: Path) -> None:
    table(tmp_path / "train-0.parquet", ["cat", "emu"])
    table(tmp_path / "train-1.parquet", ["dog", "cat"])
    assert found(tmp_path).train == {"cat": 2, "dog": 1, "emu": 1}


@pytest.mark.parametrize("other", [["0", "1"], [True, False], [[0.5, 0.5], [0.9, 0.1]]])
def test_files_with_labels_of_other_kinds_are_refused(tmp_path: Path, other: list[Any]) -> None:
    table(tmp_path / "train-0.parquet", [0, 1])
    table(tmp_path / "train-1.parquet", other)
    refused(tmp_path, "train", "label")


def test_numbers_and_words_between_splits(tmp_path: Path) -> None:
    table(tmp_path / "a/train.parquet", ["1", "2"] * 2)
    table(tmp_path / "a/test.parquet", [2, 2, 1])
    assert found(tmp_path / "a").eval == {"1": 1, "2": 2}
    table(tmp_path / "b/train.parquet", ["01", "02"] * 2)
    table(tmp_path / "b/test.parquet", [1, 1])
    refused(tmp_path / "b", "test", "01")
    table(tmp_path / "c/train.parquet", [0, 1, 2])
    table(tmp_path / "c/test.parquet", ["1", "1", "2"])
    assert found(tmp_path / "c").eval == {"1": 2, "2": 1}
    table(tmp_path / "d/train.parquet", ["cat", "dog"])
    table(tmp_path / "d/test.parquet", [0, 1, 1])
    assert found(tmp_path / "d").eval == {"cat": 1, "dog": 2}
    assert "0 = cat, 1 = dog" in found(tmp_path / "d").words
    table(tmp_path / "e/train.parquet", [0, 1])
    table(tmp_path / "e/test.parquet", ["cat", "dog"])
    refused(tmp_path / "e", "'cat'", "test")
    table(tmp_path / "f/train.parquet", [True, False])
    table(tmp_path / "f/test.parquet", [0, 1, 1])
    assert "0 = False, 1 = True" in found(tmp_path / "f").words


def test_distributions_and_ids_between_splits(tmp_path: Path) -> None:
    table(tmp_path / "train.parquet", [[0.9, 0.1, 0.0], [0.0, 0.2, 0.8], [0.1, 0.9, 0.0]])
    table(tmp_path / "test.parquet", [2, 2, 0])
    assert found(tmp_path).eval == {"0": 1, "2": 2}
    table(tmp_path / "test.parquet", [[0.5, 0.5, 0.0, 0.0]])
    refused(tmp_path, "test")


def test_json_labels(tmp_path: Path) -> None:
    tree(tmp_path, {"train": 4})
    for labels, train in (
        ([0, 1, 1, 0], {"0": 2, "1": 2}),
        (["b", "a", "b", "b"], {"a": 1, "b": 3}),
        ([True, False, True, True], {"False": 1, "True": 3}),
    ):
        jsonl(tmp_path / "train.jsonl", [{"image": f"{i}.png", "label": label} for i, label in enumerate(labels)])
        assert found(tmp_path).train == train


def test_empty_files_of_a_split_do_not_matter(tmp_path: Path) -> None:
    table(tmp_path / "train-0.parquet", pa.array([], pa.string()), pa.array([], pa.struct({"bytes": pa.binary()})))
    table(tmp_path / "train-1.parquet", ["cat", "dog"], cells(2))
    assert found(tmp_path).train == {"cat": 1, "dog": 1}
    table(tmp_path / "b/train.parquet", pa.array([], pa.string()), pa.array([], pa.struct({"bytes": pa.binary()})))
    refused(tmp_path / "b", "no images")
