"""Tars: class folders in a tar, a tar for each class, and webdataset shards; by the same rules as folders."""

import io
import os
import tarfile
from pathlib import Path

import pytest
from image_files import read
from places import found, picture, put, refused, tar, tree

TWO = {"cat": 2, "dog": 2}


def classes(names: tuple[str, ...] = ("cat", "dog"), count: int = 2, above: str = "") -> dict[str, None]:
    return {f"{above}{name}/{i}.png": None for name in names for i in range(count)}


def web(labels: list[object], kind: str = "cls", image: str = "png", start: int = 0) -> dict[str, str | None]:
    """Members of a webdataset shard."""
    return {
        f"{start + i:04}.{end}": content
        for i, label in enumerate(labels)
        for end, content in ((image, None), (kind, str(label)))
    }


@pytest.mark.parametrize("above", ["", "./", "train/", "data/train/", "imagenet/"])
def test_class_folders_in_a_tar(tmp_path: Path, above: str) -> None:
    tar(tmp_path / "train.tar", classes(above=above))
    tar(tmp_path / "val.tar", classes(("dog",), above=above))
    seen = found(tmp_path)
    assert (seen.train, seen.eval, seen.count) == (TWO, {"dog": 2}, 0)
    assert len(read(tmp_path).train.ids) == 4


@pytest.mark.parametrize(
    "names", [("bus", "train"), ("bus", "train", "test"), (".net", "[v2]", "a,b", "café", "with space", "0", "007")]
)
def test_classes_of_any_name_in_a_tar(tmp_path: Path, names: tuple[str, ...]) -> None:
    tar(tmp_path / "train.tar", classes(names))
    assert found(tmp_path).train == dict.fromkeys(names, 2)


def test_names_that_are_not_utf8_in_a_tar(tmp_path: Path) -> None:
    names = (os.fsdecode(b"caf\xe9"), "bar")
    tar(tmp_path / "train.tar", classes(names))
    assert found(tmp_path).train == dict.fromkeys(names, 2)
    assert len(read(tmp_path).train.ids) == 4


def test_classes_in_several_tars(tmp_path: Path) -> None:
    tar(tmp_path / "train-0.tar", classes(("cat",), above="train/"))
    tar(tmp_path / "train-1.tar", {f"train/dog/{breed}/{i}.png": None for breed in ("old", "young") for i in range(2)})
    assert found(tmp_path).train == {"cat": 2, "dog": 4}


def test_a_tar_for_each_class(tmp_path: Path) -> None:
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            tar(tmp_path / f"a/{split}/{name}.tar", {f"{i}.png": None for i in range(2)})
            tar(tmp_path / f"b/{split}/{name}.tar", {f"{name}/{i}.png": None for i in range(2)})
            tar(tmp_path / f"c/{split}/{name}.tar", {f"images/{i}.png": None for i in range(2)})
    for place in "abc":
        seen = found(tmp_path / place)
        assert (seen.train, seen.eval) == (TWO, TWO)
    tar(tmp_path / "c/train/emu.tar", {"0.png": None})
    refused(tmp_path / "c", "emu.tar", "images")


def test_tars_in_a_tar(tmp_path: Path) -> None:
    inner = {
        name: tar(tmp_path / f"{name}.tar", {"0.png": None, "1.png": None}).read_bytes() for name in ("cat", "dog")
    }
    tar(tmp_path / "d/train.tar", {f"{name}.tar": content for name, content in inner.items()})
    assert found(tmp_path / "d").train == TWO
    assert len(read(tmp_path / "d").train.ids) == 4


@pytest.mark.parametrize("name", ["data.tar", "train.tar", "images.tar"])
@pytest.mark.parametrize("above", ["", "cifar/"])
def test_splits_in_a_tar_are_refused(tmp_path: Path, name: str, above: str) -> None:
    tar(tmp_path / name, {f"{above}{s}/{c}/{i}.png": None for s in ("train", "test") for c in TWO for i in range(2)})
    refused(tmp_path, name, "train", "test", "unpack")


def test_other_files_in_a_tar_are_counted(tmp_path: Path) -> None:
    others = {
        "cat/notes.json": ".json",
        "cat/._0.png": "macOS",
        "cat/.DS_Store": "hidden",
        "cat/readme": "no ending",
        "cat/x.heic": ".heic",
        "cat/x.svg": ".svg",
        "__MACOSX/cat/._0.png": "program left behind",
        "cat/.ipynb_checkpoints/0-checkpoint.png": "program left behind",
    }
    tar(tmp_path / "train.tar", classes() | dict.fromkeys(others, "{}"))
    seen = found(tmp_path)
    assert (seen.train, seen.count) == (TWO, len(others))
    reasons = " ".join(seen.ignored.values())
    for why in others.values():
        assert why in reasons


def test_a_class_of_a_tar_that_loses_all_its_images_is_refused(tmp_path: Path) -> None:
    tar(tmp_path / "train.tar", classes() | {"emu/0.heic": None, "emu/1.heic": None})
    refused(tmp_path, "train.tar", "emu", ".heic")


def test_links_in_a_tar(tmp_path: Path) -> None:
    tree(tmp_path / "s", {"cat": 2, "dog": 1})
    (tmp_path / "s/dog/1.png").hardlink_to(tmp_path / "s/cat/0.png")
    (tmp_path / "s/dog/2.png").symlink_to("../cat/0.png")
    (tmp_path / "d").mkdir()
    with tarfile.open(tmp_path / "d/train.tar", "w") as file:
        for path in sorted((tmp_path / "s").rglob("*.png")):
            file.add(path, arcname=str(path.relative_to(tmp_path / "s")))
    seen = found(tmp_path / "d")
    assert (seen.train, seen.count) == (TWO, 1)
    assert "link" in next(iter(seen.ignored.values()))
    assert len(read(tmp_path / "d").train.ids) == 4


def test_a_member_that_was_replaced(tmp_path: Path) -> None:
    tar(tmp_path / "train.tar", classes())
    with tarfile.open(tmp_path / "train.tar", "a") as file:
        content = picture()
        member = tarfile.TarInfo("cat/0.png")
        member.size = len(content)
        file.addfile(member, io.BytesIO(content))
    seen = found(tmp_path)
    assert (seen.train, seen.count) == (TWO, 1)
    assert "replaced" in next(iter(seen.ignored.values()))


def test_tars_that_are_refused(tmp_path: Path) -> None:
    whole = tar(tmp_path / "whole.tar", classes()).read_bytes()
    for content in (
        b"",
        b"junk" * 500,
        *(whole[:size] for size in (1500, 2048, 2700, 3072, 3300, 4096)),
        whole + whole,
    ):
        put(tmp_path / "d/train.tar", content)
        refused(tmp_path / "d", "train.tar")
    with tarfile.open(tmp_path / "d/train.tar", "w:gz") as file:
        file.add(tmp_path / "whole.tar", arcname="cat/0.png")
    refused(tmp_path / "d", "train.tar", "without compression")
    tar(tmp_path / "d/train.tar", {"readme.txt": ""})
    refused(tmp_path / "d", "train.tar", "no image")
    tar(tmp_path / "d/train.tar", {"0.png": None, "1.png": None})
    refused(tmp_path / "d", "train.tar", "0.png", "no class folder")
    tar(tmp_path / "d/train.tar", classes())
    refused(tmp_path / "d", "--target-key", target_key="label")


# -- webdataset


@pytest.mark.parametrize(
    ("kind", "labels", "train"),
    [
        ("cls", [0, 1, 1, 0], {"0": 2, "1": 2}),
        ("cls", ["0\n", "1\n", "1\n", "0\n"], {"0": 2, "1": 2}),
        ("cls", ["cat", "dog", "cat", "emu"], {"cat": 2, "dog": 1, "emu": 1}),
        ("CLS", [0, 1, 1, 0], {"0": 2, "1": 2}),
        ("txt", ["cat", "dog", "cat", "dog"], TWO),
        ("json", ['{"label": 0}', '{"label": 1}', '{"label": 1}', '{"label": 1}'], {"0": 1, "1": 3}),
        ("json", ['{"label": "cat"}', '{"label": "dog"}'] * 2, TWO),
    ],
)
def test_labels_of_shards(tmp_path: Path, kind: str, labels: list[object], train: dict[str, int]) -> None:
    tar(tmp_path / "train-0000.tar", web(labels, kind))
    tar(tmp_path / "test-0000.tar", web(labels[:1], kind))
    seen = found(tmp_path)
    assert (seen.train, seen.count) == (train, 0)
    assert sum(seen.eval.values()) == 1


@pytest.mark.parametrize(
    ("kind", "labels", "words"),
    [
        ("cls", [1, 2, 3, 1], ["--first-label 1"]),
        ("cls", [0, 1, -1, 0], ["-1"]),
        ("cls", [0, 1, 900, 0], ["900"]),
        ("cls", [0, 2, 2, 0], ["'1'"]),
        ("cls", [0, "", 1, 0], ["0001"]),
        ("txt", ["a cat", "a dog", "the cat", "the dog"], ["txt", "label"]),
        ("json", ['{"name": "a"}', '{"name": "b"}'] * 2, ["--target-key", "label"]),
        ("json", ['{"label": [0]}', '{"label": [1]}'] * 2, ["label"]),
        ("json", ['{"label"', '{"label": 1}'] * 2, ["0000.json", "JSON"]),
    ],
)
def test_labels_of_shards_that_are_refused(tmp_path: Path, kind: str, labels: list[object], words: list[str]) -> None:
    tar(tmp_path / "train.tar", web(labels, kind))
    refused(tmp_path, "train", *words)


def test_shards_use_the_keys_that_are_named(tmp_path: Path) -> None:
    tar(tmp_path / "train.tar", web(['{"a": 0, "b": "x"}', '{"a": 1, "b": "y"}', '{"a": 1, "b": "x"}'], "json"))
    assert found(tmp_path, target_key="a").train == {"0": 1, "1": 2}
    assert found(tmp_path, target_key="b").train == {"x": 2, "y": 1}
    members = web([0, 1, 1, 0], image="jpg") | {f"{i:04}.{end}": None for i in range(4) for end in ("seg.png", "png")}
    tar(tmp_path / "d/train.tar", members)
    refused(tmp_path / "d", "0000.jpg", "key", "--input-key jpg")
    seen = found(tmp_path / "d", input_key="jpg")
    assert (seen.train, seen.count) == ({"0": 2, "1": 2}, 8)
    assert found(tmp_path / "d", input_key="seg.png").train == {"0": 2, "1": 2}
    refused(tmp_path / "d", "webp", "jpg", input_key="webp")


def test_keys_end_at_the_first_dot(tmp_path: Path) -> None:
    tar(
        tmp_path / "train.tar",
        {f"img.{i}.{end}": content for i in range(4) for end, content in (("png", None), ("cls", f"{i % 2}"))},
    )
    refused(tmp_path, "img.0.", "first dot")
    folders = {
        f"{c}/img.{i}.{end}": content for c in TWO for i in range(2) for end, content in (("png", None), ("cls", "0"))
    }
    tar(tmp_path / "d/train.tar", folders)
    refused(tmp_path / "d", "first dot")


def test_an_image_without_a_label_is_refused(tmp_path: Path) -> None:
    tar(tmp_path / "train.tar", web([0, 1, 0]) | {"0009.png": None})
    refused(tmp_path, "0009.png", "no label file")


def test_captions_beside_class_folders_are_not_labels(tmp_path: Path) -> None:
    notes = {f"{c}/{i}.{end}": "a picture" for c in TWO for i in range(2) for end in ("txt", "json")}
    tar(tmp_path / "train.tar", classes() | {k: v if k.endswith("txt") else "{}" for k, v in notes.items()})
    seen = found(tmp_path)
    assert (seen.train, seen.count) == (TWO, 8)


def test_shards_of_numbers_meet_names(tmp_path: Path) -> None:
    tar(tmp_path / "train.tar", web([0, 1, 2, 1]))
    tar(tmp_path / "test.tar", web([2]))
    assert found(tmp_path).eval == {"2": 1}
    tar(tmp_path / "test.tar", web(["cat"]))
    refused(tmp_path, "test", "'cat'")
    tar(tmp_path / "d/train.tar", web(["cat", "dog"] * 2))
    tar(tmp_path / "d/test.tar", web([1]))
    seen = found(tmp_path / "d")
    assert seen.eval == {"dog": 1}
    assert "0 = cat, 1 = dog" in seen.words


def test_shards_from_one_if_asked(tmp_path: Path) -> None:
    tar(tmp_path / "train.tar", web([1, 2, 3, 1]))
    tar(tmp_path / "test.tar", web([3]))
    seen = found(tmp_path, first_label=1)
    assert (seen.train, seen.eval) == ({"1": 2, "2": 1, "3": 1}, {"3": 1})
