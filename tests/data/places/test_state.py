"""State: what an earlier look cached never changes what a later one finds."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from image_files import collect, encoded, noise, pixels, read
from places import arrays, found, put, refused, table, tar, tree

from mgd_timm.data.readers import rows as rows_module

SECOND = (1_000_000_000,) * 2


def write(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    os.utime(path, SECOND)


def raw(seed: int) -> bytes:
    """A picture whose encoded size does not depend on its pixels."""
    return encoded(noise(seed, 8, 8), "BMP")


@pytest.mark.parametrize("way", ["in place", "renamed"])
def test_a_file_replaced_with_the_same_size_and_time(tmp_path: Path, way: str) -> None:
    versions = [
        table(tmp_path / f"{i}.parquet", labels, [raw(i) for i in range(4)]).read_bytes()
        for i, labels in enumerate(([0, 1, 0, 1], [1, 0, 1, 1]))
    ]
    size = max(map(len, versions))
    (tmp_path / "d").mkdir()
    seen = []
    for content in versions:
        assert len(content) == size  # otherwise the case says nothing
        target = tmp_path / "d/train.parquet"
        if way == "renamed":
            write(tmp_path / "new", content)
            (tmp_path / "new").rename(target)
        else:
            write(target, content)
        seen.append(found(tmp_path / "d").train)
    assert seen == [{"0": 2, "1": 2}, {"0": 1, "1": 3}]


def test_a_tar_replaced_with_the_same_size_and_time(tmp_path: Path) -> None:
    seen = []
    for names in (("cat", "dog"), ("cow", "dog")):
        content = tar(
            tmp_path / "new.tar", {f"{name}/{i}.bmp": raw(i) for name in names for i in range(2)}
        ).read_bytes()
        (tmp_path / "d").mkdir(exist_ok=True)
        write(tmp_path / "d/train.tar", content)
        seen.append(found(tmp_path / "d").train)
    assert seen == [{"cat": 2, "dog": 2}, {"cow": 2, "dog": 2}]


@pytest.mark.parametrize("hashed", [1 << 28, 64])
def test_an_image_replaced_with_the_same_size_and_time(
    tmp_path: Path, hashed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mgd_timm.data import corrupt_images, image_cache

    for module in (rows_module, image_cache, corrupt_images):
        monkeypatch.setattr(module, "HASHED", hashed)
    for c in ("cat", "dog"):
        for i in range(3):
            put(tmp_path / f"train/{c}/{i}.bmp", raw(i))
            os.utime(tmp_path / f"train/{c}/{i}.bmp", SECOND)
    first = pixels(read(tmp_path).train).clone()
    write(tmp_path / "train/dog/1.bmp", raw(99))
    second = pixels(read(tmp_path).train)
    assert [bool(torch.equal(a, b)) for a, b in zip(first, second, strict=True)] == [True] * 4 + [False, True]


@pytest.mark.parametrize("hashed", [1 << 28, 64])
def test_a_tar_with_an_image_replaced(tmp_path: Path, hashed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from mgd_timm.data import corrupt_images, image_cache

    for module in (rows_module, image_cache, corrupt_images):
        monkeypatch.setattr(module, "HASHED", hashed)
    seen = []
    for seed in (1, 99):
        (tmp_path / "d").mkdir(exist_ok=True)
        members = {f"{c}/{i}.bmp": raw(seed if (c, i) == ("dog", 1) else i) for c in ("cat", "dog") for i in range(3)}
        write(tmp_path / "d/train.tar", tar(tmp_path / "new.tar", members).read_bytes())
        seen.append(pixels(read(tmp_path / "d").train).clone())
    assert [bool(torch.equal(a, b)) for a, b in zip(*seen, strict=True)] == [True] * 4 + [False, True]


def test_an_array_replaced(tmp_path: Path) -> None:
    seen = []
    for labels in ([0, 1, 0, 1], [1, 1, 0, 1]):
        arrays(tmp_path, "train", labels)
        for path in tmp_path.iterdir():
            os.utime(path, SECOND)
        seen.append(found(tmp_path).train)
    assert seen == [{"0": 2, "1": 2}, {"0": 1, "1": 3}]


@pytest.mark.parametrize("hashed", [1 << 28, 64])
def test_an_image_that_was_repaired_or_broken_in_place(
    tmp_path: Path, hashed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mgd_timm.data import corrupt_images, image_cache

    for module in (rows_module, image_cache, corrupt_images):
        monkeypatch.setattr(module, "HASHED", hashed)
    tree(tmp_path, {"train/cat": 3, "train/dog": 3}, ending="bmp")
    good = raw(7)
    bad = b"\0" * len(good)
    path = put(tmp_path / "train/dog/1.bmp", good)
    for content, count in ((good, 0), (bad, 1), (good, 0)):
        write(path, content)
        assert len(read(tmp_path, max_bad=1).corrupt) == count
    write(path, bad)
    refused(tmp_path, "dog/1.bmp", "--max-bad", ask=read)  # what --max-bad found does not excuse a run without it


def test_what_was_read_with_a_label_column_does_not_change_another(tmp_path: Path) -> None:
    table(tmp_path / "train.parquet", ["cat", "dog"] * 2, sex=["f", "m", "m", "m"])
    assert found(tmp_path, target_key="sex").train == {"f": 1, "m": 3}
    assert found(tmp_path).train == {"cat": 2, "dog": 2}
    assert found(tmp_path, first_label=1).train == {"cat": 2, "dog": 2}


def test_files_that_appear_and_vanish(tmp_path: Path) -> None:
    tree(tmp_path, {"train/cat": 2, "train/dog": 2})
    assert found(tmp_path).train == {"cat": 2, "dog": 2}
    put(tmp_path / "train/cat/new.png")
    assert found(tmp_path).train == {"cat": 3, "dog": 2}
    (tmp_path / "train/cat/0.png").rename(tmp_path / "train/dog/moved.png")
    assert found(tmp_path).train == {"cat": 2, "dog": 3}
    assert len(read(tmp_path).train.ids) == 5


def test_cached_pixels_of_another_size_or_grey(tmp_path: Path) -> None:
    tree(tmp_path, {"train/cat": 2, "train/dog": 2})
    shapes = [pixels(read(tmp_path, **o).train).shape[1:] for o in ({}, {"img_size": 6}, {"in_chans": 1}, {})]
    assert [tuple(shape) for shape in shapes] == [(3, 8, 8), (3, 6, 6), (1, 8, 8), (3, 8, 8)]


# -- streams


def folders(root: Path) -> None:
    tree(root, {"train/cat": 2, "train/dog": 3, "test/cat": 1, "test/dog": 1})


def tables(root: Path) -> None:
    table(root / "train.parquet", ["cat", "dog", "dog", "cat", "dog"])
    table(root / "test.parquet", ["dog", "cat"])


def paths(root: Path) -> None:
    tree(root, {"train": 5, "test": 2})
    for split, labels in (("train", "01101"), ("test", "10")):
        put(root / f"{split}.csv", "image,label\n" + "".join(f"{split}/{i}.png,{c}\n" for i, c in enumerate(labels)))


def shards(root: Path) -> None:
    for split, labels in (("train", "01101"), ("test", "10")):
        members = {f"{i}.{end}": v for i, c in enumerate(labels) for end, v in (("png", None), ("cls", c))}
        tar(root / f"{split}.tar", members)


@pytest.mark.parametrize("build", [folders, tables, paths, shards])
def test_streams_give_the_same_images_and_labels(tmp_path: Path, build: Callable[[Path], None]) -> None:
    build(tmp_path)
    options = {"img_size": 8, "mean": (0.0,) * 3, "std": (1.0,) * 3, "crop_pct": 1.0, "workers": 0}
    plain, stream = read(tmp_path, **options), read(tmp_path, streaming=True, **options)
    assert plain.class_names == stream.class_names
    assert torch.equal(plain.test.labels, stream.test.labels)
    a, b = (collect(images.test) for images in (plain, stream))
    assert torch.equal((a.images * 255).round(), (b.images * 255).round())
    assert torch.equal(a.labels, b.labels)
    labels = collect(stream.train).labels
    assert sorted(labels.tolist()) == sorted(plain.train.labels.tolist())
    described = found(tmp_path, streaming=True).all
    assert described["train"] == plain.description["train"] == stream.description["train"]
    assert described["eval"] == plain.description["eval"] == stream.description["eval"]


def test_streams_are_refused_in_the_same_words(tmp_path: Path) -> None:
    def streamed(root: Path) -> None:
        read(root, streaming=True, num_samples=4)

    tree(tmp_path / "a", {"train/cat": 2, "train/dog": 2})
    put(tmp_path / "a/train/emu/0.heic")
    table(tmp_path / "b/train.parquet", [1, 2, 1, 2])
    table(tmp_path / "c/train-00000-of-00002.parquet", [0, 1])
    tar(tmp_path / "d/train.tar", {f"{s}/{c}/0.png": None for s in ("train", "test") for c in "ab"})
    table(tmp_path / "e/train.parquet", ["a", "b"])
    table(tmp_path / "e/test.parquet", ["c"])
    tree(tmp_path / "f", {"train": 2, "test": 2})
    for place in "abcdef":
        message = refused(tmp_path / place)
        assert refused(tmp_path / place, ask=streamed) == message
    arrays(tmp_path / "g", "train", [0, 1])
    refused(tmp_path / "g", "npy", "--streaming", ask=streamed)
