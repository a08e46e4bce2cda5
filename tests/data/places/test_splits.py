"""Splits: the top-level folders train, val and test and their synonyms, and files named by such a word."""

from pathlib import Path

import pytest
from places import arrays, found, put, refused, table, tar, tree

TWO = {"cat": 2, "dog": 2}


def split(root: Path, *names: str) -> Path:
    for name in names:
        tree(root, {f"{name}/cat": 2, f"{name}/dog": 2})
    return root


@pytest.mark.parametrize("train", ["train", "Train", "TRAIN", "training", "Training"])
@pytest.mark.parametrize("test", ["test", "Testing", "EVAL", "val", "Valid", "validation", "dev"])
def test_words_of_splits_in_any_case(tmp_path: Path, train: str, test: str) -> None:
    seen = found(split(tmp_path, train, test))
    assert (seen.train, seen.eval, seen.count) == (TWO, TWO, 0)
    assert (seen.all["train"]["split"], seen.all["eval"]["split"]) == (train.lower(), test.lower())


@pytest.mark.parametrize("name", ["tests", "trainset", "evaluation", "holdout", "test2", "my_test"])
def test_other_words_are_no_splits(tmp_path: Path, name: str) -> None:
    seen = found(split(tmp_path, "train", name))
    assert (seen.train, seen.eval) == (TWO, None)
    assert "beside the splits" in seen.why(f"{name}/")


@pytest.mark.parametrize(
    "name", ["train.parquet", "train-0.parquet", "train_x.parquet", "TRAIN.parquet", "training.v2.parquet"]
)
def test_files_whose_names_begin_with_a_split(tmp_path: Path, name: str) -> None:
    table(tmp_path / name, ["cat", "dog"] * 2)
    table(tmp_path / "test.parquet", ["cat", "dog"])
    seen = found(tmp_path)
    assert (seen.train, seen.eval, seen.count) == (TWO, {"cat": 1, "dog": 1}, 0)


@pytest.mark.parametrize("name", ["trainer.parquet", "mytrain.parquet", "train0.parquet", "train (1).parquet"])
def test_files_whose_names_only_look_like_a_split(tmp_path: Path, name: str) -> None:
    table(tmp_path / "train.parquet", ["cat", "dog"] * 2)
    table(tmp_path / name, ["emu", "fox"])
    seen = found(tmp_path)
    assert (seen.train, seen.eval) == (TWO, None)
    assert "does not begin with a split" in seen.why(name)


@pytest.mark.parametrize("names", [("mytrain", "mytest"), ("trainA", "testA"), ("pictures-train-0", "pictures-val-0")])
def test_files_of_several_splits_by_a_word_inside_are_not_mixed(tmp_path: Path, names: tuple[str, str]) -> None:
    for name in names:
        table(tmp_path / f"{name}.parquet", ["cat", "dog"] * 2)
    refused(tmp_path, "split", "--train-split", "train, val or test")


def test_a_file_of_any_name_alone_is_training_data(tmp_path: Path) -> None:
    table(tmp_path / "pictures.parquet", ["cat", "dog"] * 2)
    assert found(tmp_path).train == TWO


def test_a_test_file_alone_is_refused(tmp_path: Path) -> None:
    table(tmp_path / "test.parquet", ["cat", "dog"] * 2)
    table(tmp_path / "trainer.parquet", ["cat", "dog"] * 2)
    refused(tmp_path, "'train'", "test", "--train-split")


def test_nothing_deeper_decides(tmp_path: Path) -> None:
    tree(tmp_path, {f"{c}/{s}": 2 for c in ("cat", "dog") for s in ("train", "test")})
    seen = found(tmp_path)
    assert (seen.train, seen.eval) == ({"cat": 4, "dog": 4}, None)
    assert "cat/test" in seen.words
    assert "belong to the class of the folder above" in seen.words


@pytest.mark.parametrize("word", ["train", "val", "test", "eval", "dev", "Test", "validation"])
def test_a_class_named_as_a_split(tmp_path: Path, word: str) -> None:
    names = ("bus", "car", word)
    seen = found(tree(tmp_path / "a", {f"{s}/{c}": 2 for s in ("train", "test") for c in names}))
    assert seen.train == seen.eval == dict.fromkeys(names, 2)
    seen = found(tree(tmp_path / "b", dict.fromkeys(names, 2)))
    assert (seen.train, seen.eval) == (dict.fromkeys(names, 2), None)


def test_class_folders_alone_are_training_data(tmp_path: Path) -> None:
    seen = found(tree(tmp_path, {"cat": 2, "dog": 2, "bullet_train": 3, "test-tube": 1}))
    assert (seen.train, seen.eval, seen.count) == (TWO | {"bullet_train": 3, "test-tube": 1}, None, 0)


@pytest.mark.parametrize("names", [("train", "test"), ("training", "validation"), ("train", "val", "test")])
def test_split_folders_without_classes_are_refused(tmp_path: Path, names: tuple[str, ...]) -> None:
    refused(tree(tmp_path, dict.fromkeys(names, 3)), "train", names[-1], "class folders")


def test_split_folders_without_classes_beside_other_pictures_are_refused(tmp_path: Path) -> None:
    refused(tree(tmp_path, {"train": 3, "test": 3, "masks": 3}), "train", "class folders")


def test_a_test_folder_without_classes_is_left_out(tmp_path: Path) -> None:
    seen = found(tree(split(tmp_path, "train"), {"test": 3}))
    assert (seen.train, seen.eval, seen.count) == (TWO, None, 3)
    assert "no class folder" in seen.why("test/0.png")


def test_an_empty_test_folder_is_said(tmp_path: Path) -> None:
    (split(tmp_path, "train") / "test").mkdir()
    seen = found(tmp_path)
    assert (seen.eval, seen.count) == (None, 1)
    assert "test/" in seen.ignored


def test_a_test_folder_whose_images_cannot_be_read_is_refused(tmp_path: Path) -> None:
    split(tmp_path, "train")
    for c in ("cat", "dog"):
        put(tmp_path / f"test/{c}/0.heic")
    refused(tmp_path, "test/cat", "heic")


def test_folders_beside_splits_are_left_alone(tmp_path: Path) -> None:
    split(tmp_path, "train", "test")
    tree(tmp_path, {"annotations": 2, "samples/cat": 1})
    put(tmp_path / "runs/one/summary.json", "{}")
    seen = found(tmp_path)
    assert (seen.train, seen.eval, seen.count) == (TWO, TWO, 3)
    assert set(seen.ignored) == {"annotations/", "runs/", "samples/"}


def test_stray_images_do_not_turn_splits_into_classes(tmp_path: Path) -> None:
    split(tmp_path, "train")
    put(tmp_path / "train/cover.png")
    assert (found(tmp_path).train, found(tmp_path).count) == (TWO, 1)
    put(tmp_path / "docs/logo.png")
    refused(tmp_path, "train", "docs")


def test_two_folders_of_one_split(tmp_path: Path) -> None:
    refused(split(tmp_path / "a", "Train", "train"), "Train", "two folders")
    message = refused(split(tmp_path / "b", "train", "training"), "training", "--train-split")
    assert "train and training" in message
    assert found(tmp_path / "b", train_split="training").train == TWO
    refused(split(tmp_path / "c", "train", "test", "eval"), "test", "eval", "--eval-split")
    refused(split(tmp_path / "d", "train", "val", "dev"), "val", "dev", "--eval-split")


def test_a_split_that_is_a_folder_and_a_file_is_refused(tmp_path: Path) -> None:
    split(tmp_path, "train")
    table(tmp_path / "train.parquet", ["cat", "dog"] * 2)
    refused(tmp_path, "train/cat", "train.parquet")


@pytest.mark.parametrize("other", ["train.feather", "train.csv", "train.jsonl", "train.tar"])
def test_a_split_in_two_formats_is_refused(tmp_path: Path, other: str) -> None:
    table(tmp_path / "train.parquet", ["cat", "dog"] * 2)
    put(tmp_path / other, "image,label\n1.png,cat\n")
    refused(tmp_path, "train.parquet", other)


def test_test_is_preferred_and_what_is_not_evaluated_is_said(tmp_path: Path) -> None:
    split(tmp_path, "train", "val", "test")
    tree(tmp_path, {"val/cat": 5})
    seen = found(tmp_path)
    assert seen.eval == TWO
    assert "'val'" in seen.words
    assert "--eval-split val" in seen.words
    assert found(tmp_path, eval_split="val").eval == {"cat": 5, "dog": 2}
    assert found(tmp_path, eval_split="validation").eval == {"cat": 5, "dog": 2}


def test_splits_of_other_names_are_named_by_the_user(tmp_path: Path) -> None:
    split(tmp_path, "holdout", "photos")
    seen = found(tmp_path, train_split="photos", eval_split="Holdout")
    assert (seen.train, seen.eval, seen.count) == (TWO, TWO, 0)
    refused(tmp_path, "'fotos'", "photos", train_split="photos", eval_split="fotos")


@pytest.mark.parametrize("ending", ["", "-00000-of-00001", "_0", ".v2"])
def test_files_of_other_names_are_named_by_the_user(tmp_path: Path, ending: str) -> None:
    table(tmp_path / f"ours{ending}.parquet", ["cat", "dog"] * 2)
    table(tmp_path / f"theirs{ending}.parquet", ["cat", "dog"])
    seen = found(tmp_path, train_split="ours", eval_split="theirs")
    assert (seen.train, seen.eval) == (TWO, {"cat": 1, "dog": 1})


def test_the_words_of_a_refusal_can_be_followed(tmp_path: Path) -> None:
    for number in range(2):
        table(tmp_path / f"pictures-train-{number}.parquet", ["cat", "dog"])
    table(tmp_path / "pictures-test-0.parquet", ["cat", "dog"])
    refused(tmp_path, "--train-split pictures-train")
    seen = found(tmp_path, train_split="pictures-train", eval_split="pictures-test")
    assert (seen.train, seen.eval) == (TWO, {"cat": 1, "dog": 1})


def test_splits_of_several_formats(tmp_path: Path) -> None:
    split(tmp_path / "a", "train")
    table(tmp_path / "a/test.parquet", ["cat", "dog"])
    split(tmp_path / "b", "test")
    tar(tmp_path / "b/train.tar", {f"{c}/{i}.png": None for c in TWO for i in range(3)})
    assert (found(tmp_path / "a").train, found(tmp_path / "a").eval) == (TWO, {"cat": 1, "dog": 1})
    assert (found(tmp_path / "b").train, found(tmp_path / "b").eval) == ({"cat": 3, "dog": 3}, TWO)


def test_the_folder_to_give_is_named(tmp_path: Path) -> None:
    split(tmp_path / "a/cifar", "train", "test")
    refused(tmp_path / "a", f"--data-dir {tmp_path / 'a/cifar'}")
    table(tmp_path / "b/data/train-00000-of-00001.parquet", ["cat", "dog"])
    refused(tmp_path / "b", f"--data-dir {tmp_path / 'b/data'}")
    tree(tmp_path / "c/images", {"cat": 2, "dog": 2})
    put(tmp_path / "c/README.md", "")
    refused(tmp_path / "c", f"--data-dir {tmp_path / 'c/images'}")
    arrays(tmp_path / "d/arrays", "train", [0, 1, 0, 1])
    refused(tmp_path / "d", f"--data-dir {tmp_path / 'd/arrays'}")


def test_places_that_are_no_data(tmp_path: Path) -> None:
    refused(tmp_path / "none", "no such folder")
    refused(put(tmp_path / "file/train.tar"), "a file")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "no images", "train/cat/1.png")
    refused(tree(tmp_path / "flat", {".": 3}), "class folder")
    refused(tree(tmp_path / "one", {"cat": 3}), "cat", "two")
    refused(tree(tmp_path / "eval", {"test/cat": 1, "test/dog": 1}), "'train'", "test")
    split(tmp_path / "real", "train")
    (tmp_path / "link").symlink_to("real")
    assert found(tmp_path / "link").train == TWO
    (tmp_path / "broken").symlink_to("nowhere")
    refused(tmp_path / "broken", "broken")
    refused(tmp_path / "new\nline", "new\\nline")


def test_a_split_that_leads_nowhere_is_refused(tmp_path: Path) -> None:
    split(tmp_path / "a", "train")
    (tmp_path / "a/test").symlink_to("nowhere")
    refused(tmp_path / "a", "test", "link that leads nowhere")
    table(tmp_path / "b/train.parquet", ["cat", "dog"])
    (tmp_path / "b/test.parquet").symlink_to("nowhere")
    refused(tmp_path / "b", "test.parquet", "link that leads nowhere")


def test_val_split_holds_out_of_each_class(tmp_path: Path) -> None:
    seen = found(tree(tmp_path, {"train/cat": 8, "train/dog": 4, "test/cat": 1}), val_split=0.25)
    assert (seen.train, seen.eval) == ({"cat": 6, "dog": 3}, {"cat": 2, "dog": 1})
    assert (seen.all["train"]["images"], seen.all["eval"]["images"]) == (9, 3)
