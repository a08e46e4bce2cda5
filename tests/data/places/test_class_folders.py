"""Classes: the folders below a split, whatever their name; compared by name between splits."""

import os
import unicodedata
from pathlib import Path

import pytest
from image_files import read
from places import arrays, found, put, refused, table, tree

NAMES = [
    *(".net", "__background__", "[v2]", "{a}", "a,b", "with space", "🐱", "0", "007", "7", "1e3", "None", "nan"),
    *(
        "trailing ",
        "trailing.",
        " leading",
        "%s",
        "a::b",
        "*",
        "?",
        "#1",
        "~",
        "-x",
        "--json",
        "quo'te",
        'dou"ble',
        "\\",
    ),
    *("new\nline", "tab\t", "ё", "Straße", "CON", "data", "images.png", "x.parquet"),
]


def both(root: Path, names: tuple[str, ...], others: tuple[str, ...] | None = None) -> Path:
    tree(root, {f"train/{name}": 2 for name in names})
    return tree(root, {f"test/{name}": 1 for name in (names if others is None else others)})


def test_names_of_every_kind(tmp_path: Path) -> None:
    seen = found(both(tmp_path, tuple(NAMES)))
    assert seen.train == dict.fromkeys(NAMES, 2)
    assert seen.eval == dict.fromkeys(NAMES, 1)
    assert seen.all["classes"] == sorted(NAMES)
    assert seen.count == 0


def test_names_of_every_kind_without_splits(tmp_path: Path) -> None:
    seen = found(tree(tmp_path, dict.fromkeys(NAMES, 2)))
    assert (seen.train, seen.eval, seen.count) == (dict.fromkeys(NAMES, 2), None, 0)


@pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC"), ("NFD", "NFD")])
def test_one_unicode_form_between_splits(tmp_path: Path, forms: tuple[str, str]) -> None:
    train, test = (unicodedata.normalize(form, "café") for form in forms)
    seen = found(both(tmp_path, (train, "bar"), (test,)))
    assert (seen.train, seen.eval) == ({"bar": 2, "café": 2}, {"café": 1})


def test_two_unicode_forms_in_one_split_are_refused(tmp_path: Path) -> None:
    forms = [unicodedata.normalize(form, "café") for form in ("NFC", "NFD")]
    refused(tree(tmp_path, {f"train/{name}": 2 for name in (*forms, "bar")}), "café", "Unicode")


def test_a_name_that_is_not_utf8(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9")
    seen = found(both(tmp_path, (name, "bar")))
    assert (seen.train, seen.eval) == ({name: 2, "bar": 2}, {name: 1, "bar": 1})


def test_upper_and_lower_case_are_two_classes(tmp_path: Path) -> None:
    assert found(both(tmp_path, ("Cat", "cat"))).train == {"Cat": 2, "cat": 2}


def test_the_upper_folder_is_the_class(tmp_path: Path) -> None:
    seen = found(
        tree(tmp_path, {"train/cat/persian": 2, "train/cat": 1, "train/dog/small/old": 3, "train/dog/persian": 1})
    )
    assert (seen.train, seen.count) == ({"cat": 3, "dog": 4}, 0)
    assert "train/cat/persian" in seen.words


def test_only_one_class_is_refused(tmp_path: Path) -> None:
    refused(tree(tmp_path / "a", {"train/cat": 3}), "only one class", "cat")
    wrapped = tree(tmp_path / "b", {"train/images/cat": 3, "train/images/dog": 3})
    refused(wrapped, "train/images", "cat, dog", f"--data-dir {wrapped / 'train/images'}")
    # with another format to evaluate on, whose numbers would meet the one name
    refused(arrays(tree(tmp_path / "c", {"train/cat": 3}), "test", [0, 0]), "only one class", "cat")


def test_an_evaluation_split_may_lack_classes(tmp_path: Path) -> None:
    seen = found(both(tmp_path, ("ant", "bee", "cat"), ("cat", "ant")))
    assert seen.eval == {"ant": 1, "cat": 1}
    assert seen.all["eval"]["per_class"]["bee"] == 0
    lines: list[str] = []
    read(tmp_path, log=lines.append)
    assert "none of class bee" in "\n".join(lines)


def test_an_empty_evaluation_class_is_said(tmp_path: Path) -> None:
    (both(tmp_path, ("ant", "bee"), ("ant",)) / "test/bee").mkdir()
    seen = found(tmp_path)
    assert seen.eval == {"ant": 1}
    assert "without images" in seen.why("test/bee/")


def test_an_unknown_evaluation_class_is_refused(tmp_path: Path) -> None:
    refused(both(tmp_path, ("tabby", "dog"), ("taby", "dog")), "test", "'taby'", "did you mean tabby")
    refused(both(tmp_path / "b", ("cat", "dog"), ("unknown",)), "test", "'unknown'")


@pytest.mark.parametrize("leave", ["", "notes.txt", "0.heic", "picture", "list.csv"])
def test_a_training_class_without_images_is_refused(tmp_path: Path, leave: str) -> None:
    tree(tmp_path, {"train/cat": 2, "train/dog": 2, "train/emu": 0})
    if leave:
        put(tmp_path / "train/emu" / leave)
    refused(tmp_path, "train/emu", "without images", *([leave] if leave in ("0.heic", "picture") else []))


def test_a_class_folder_that_leads_nowhere_is_refused(tmp_path: Path) -> None:
    tree(tmp_path, {"train/cat": 2, "train/dog": 2})
    (tmp_path / "train/emu").symlink_to("/mnt/nowhere/emu")
    refused(tmp_path, "train/emu", "link that leads nowhere")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_class_folder_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    tree(tmp_path, {"train/cat": 2, "train/dog": 2, "train/emu": 2})
    (tmp_path / "train/emu").chmod(0)
    refused(tmp_path, "train/emu", "permission")


def test_links_to_folders_are_followed(tmp_path: Path) -> None:
    tree(tmp_path, {"store/cat": 2, "store/dog": 3})
    (tmp_path / "d/train").mkdir(parents=True)
    for name in ("cat", "dog"):
        (tmp_path / f"d/train/{name}").symlink_to(tmp_path / f"store/{name}")
    (tmp_path / "d/test").symlink_to("train")
    seen = found(tmp_path / "d")
    assert (seen.train, seen.eval, seen.all["duplicates"]) == ({"cat": 2, "dog": 3}, {"cat": 2, "dog": 3}, 5)


@pytest.mark.parametrize("place", ["loop", "train/loop", "train/cat/loop", "train/cat/deep/loop"])
@pytest.mark.parametrize("target", [".", ".."])
def test_loops_of_folders_are_left_out(tmp_path: Path, place: str, target: str) -> None:
    tree(tmp_path / "d", {"train/cat/deep": 2, "train/dog": 2})
    (tmp_path / "d" / place).symlink_to(target)
    seen = found(tmp_path / "d")
    assert (seen.train, seen.count) == ({"cat": 2, "dog": 2}, 1)


@pytest.mark.parametrize("target", [".", ".."])
def test_loops_without_splits_are_left_out(tmp_path: Path, target: str) -> None:
    tree(tmp_path / "d", {"cat": 2, "dog": 2})
    (tmp_path / "d/loop").symlink_to(target)
    seen = found(tmp_path / "d")
    assert (seen.train, seen.count) == ({"cat": 2, "dog": 2}, 1)


def test_folders_that_programs_leave_behind(tmp_path: Path) -> None:
    left = [".git", ".ipynb_checkpoints", "__MACOSX", "@eaDir", ".Trash-1000", "__pycache__"]
    tree(
        tmp_path,
        {"train/cat": 2, "train/dog": 2}
        | {f"train/{name}": 1 for name in left}
        | {f"train/cat/{name}": 1 for name in left},
    )
    seen = found(tmp_path)
    assert (seen.train, seen.count) == ({"cat": 2, "dog": 2}, 2 * len(left))
    seen = found(tree(tmp_path / "alone", {"cat": 2, "dog": 2} | dict.fromkeys(left, 1)))
    assert (seen.train, seen.count) == ({"cat": 2, "dog": 2}, len(left))


def test_folders_without_images_beside_classes(tmp_path: Path) -> None:
    tree(tmp_path, {"cat": 2, "dog": 2})
    put(tmp_path / "runs/one/summary.json", "{}")
    put(tmp_path / ".vscode/settings.json", "{}")
    seen = found(tmp_path)
    assert (seen.train, set(seen.ignored)) == ({"cat": 2, "dog": 2}, {"runs/", ".vscode/"})


def test_numbers_meet_names_that_are_numbers_by_name(tmp_path: Path) -> None:
    tree(tmp_path, {f"train/{i}": 1 for i in range(12)})
    arrays(tmp_path, "test", [10, 2, 2, 11])
    assert found(tmp_path).eval == {"10": 1, "2": 2, "11": 1}


def test_numbers_meet_other_names_in_an_order_that_is_said(tmp_path: Path) -> None:
    tree(tmp_path, {"train/cat": 2, "train/dog": 2})
    arrays(tmp_path, "test", [1, 1, 0])
    seen = found(tmp_path)
    assert seen.eval == {"cat": 1, "dog": 2}
    assert "0 = cat, 1 = dog" in seen.words
    arrays(tmp_path, "test", [1, 2, 0])
    refused(tmp_path, "test", "label 2", "cat, dog")


def test_names_do_not_meet_training_numbers(tmp_path: Path) -> None:
    arrays(tmp_path, "train", [0, 1, 0, 1])
    tree(tmp_path, {"test/cat": 2, "test/dog": 2})
    refused(tmp_path, "'cat'", "test")


def test_padded_numbers_are_names(tmp_path: Path) -> None:
    tree(tmp_path, {f"train/{name}": 2 for name in ("01", "02", "03")})
    arrays(tmp_path, "test", [1, 2, 1])  # 1 is 01, and not the second class
    refused(tmp_path, "01", "test")


def test_names_of_a_table_meet_folders(tmp_path: Path) -> None:
    tree(tmp_path, {"train/cat": 2, "train/dog": 2})
    table(tmp_path / "test.parquet", ["dog", "dog", "cat"])
    assert found(tmp_path).eval == {"cat": 1, "dog": 2}
