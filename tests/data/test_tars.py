"""Tar files hold the images and labels of the folder that they were made of, and what is wrong with them is named."""

import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from image_files import add, class_folders, class_tars, files, shards, tars_in_a_tar
from PIL import Image
from small import write_pictures

from mgd_timm.data.dataset import Images, load_images
from mgd_timm.data.decode import DataError
from mgd_timm.data.readers import tar_index
from mgd_timm.data.sources import LargeImageSource
from mgd_timm.features import Batch
from mgd_timm.recipe.data import Data
from mgd_timm.storage.cache import cache_folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """PNGs in three classes, some of them as JPEG."""
    folder = write_pictures(tmp_path_factory.mktemp("pictures"), 12, 100)
    for path in sorted(folder.rglob("*.png"))[::2]:
        Image.open(path).save(path.with_suffix(".JPEG"))
        path.unlink()
    return folder


def read(place: Path, log: Callable[[str], None] = lambda _: None, **data: object) -> Images:
    return load_images(Data(data_dir=str(place), workers=0, img_size=32, **data), 1, log=log)  # type: ignore[arg-type]


def shown(images: Images) -> list[Batch]:
    assert images.test is not None
    return [batch for part in (images.train, images.test) for batch in part.batches([part.ids], 2, torch.device("cpu"))]


def same(one: Images, two: Images) -> None:
    for a, b in zip(shown(one), shown(two), strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.labels, b.labels)


@pytest.mark.parametrize("made", [class_folders, class_tars, tars_in_a_tar])
def test_tars_of_classes_are_the_folder(made, pictures: Path, tmp_path: Path) -> None:
    made(pictures, tmp_path)
    found = read(tmp_path)
    assert found.class_names == ("a", "b", "c")
    same(found, read(pictures))


@pytest.mark.parametrize(("kind", "names"), [("cls", "012"), ("json", "012"), ("txt", "abc")])
def test_webdataset_shards_are_the_folder(kind: str, names: str, pictures: Path, tmp_path: Path) -> None:
    shards(pictures, tmp_path, kind)
    found = read(tmp_path)
    assert found.class_names == tuple(names)
    same(found, read(pictures))


def test_a_split_to_evaluate_on_may_have_fewer_images_than_classes(pictures: Path, tmp_path: Path) -> None:
    shards(pictures, tmp_path, "cls")
    for path in tmp_path.glob("test*.tar"):
        path.unlink()
    with tarfile.open(tmp_path / "test.tar", "w") as tar:
        for name, content in {"1.png": files(pictures / "test" / "c")[0].read_bytes(), "1.cls": b"2"}.items():
            add(tar, name, content)
    found = read(tmp_path)
    assert found.test is not None
    assert found.test.labels.tolist() == [2]


@pytest.fixture
def folder_of_tars(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A train and a test tar, with an empty cache."""
    monkeypatch.setenv("MGD_TIMM_CACHE", str(tmp_path / "cache"))
    (tmp_path / "tars").mkdir()
    class_folders(pictures, tmp_path / "tars")
    return tmp_path / "tars"


def test_a_corrupt_index_is_named_and_created_again(folder_of_tars: Path) -> None:
    first = read(folder_of_tars)
    for path in (cache_folder() / "tars").rglob("index.safetensors"):
        content = bytearray(path.read_bytes())
        content[-3] ^= 1  # of an offset, a size or a name
        path.write_bytes(content)
    said: list[str] = []
    again = read(folder_of_tars, said.append)
    assert sum("index.safetensors does not match its sha256" in line for line in said) == 2
    same(again, first)
    assert again.train.digest == first.train.digest


def test_an_index_is_created_once_and_again_for_another_file(
    pictures: Path, folder_of_tars: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = read(folder_of_tars)
    assert len(list((cache_folder() / "tars").iterdir())) == 2
    with monkeypatch.context() as context:
        context.setattr(tar_index, "_create", None)
        assert read(folder_of_tars).train.digest == first.train.digest
    moved = tmp_path / "moved"
    shutil.copytree(folder_of_tars, moved)
    assert read(moved).train.digest == first.train.digest
    with tarfile.open(moved / "train.tar", "a") as tar:
        tar.add(files(pictures / "train")[0], arcname="train/a/again.png")
    again = read(moved)
    assert again.num_samples == first.num_samples + 1
    assert again.train.digest != first.train.digest


def test_errors_name_the_tar_and_the_way_out(pictures: Path, tmp_path: Path) -> None:
    def refused(said: str, **data: object) -> None:
        with pytest.raises(DataError, match=said):
            read(tmp_path, **data)

    class_folders(pictures, tmp_path)
    whole = (tmp_path / "train.tar").read_bytes()
    (tmp_path / "train.tar").write_bytes(whole[:-40_000])
    refused(r"train\.tar: cannot be read as a tar \(unexpected end of data\)")
    with tarfile.open(tmp_path / "train.tar", "w:gz") as tar:
        tar.add(files(pictures)[0], arcname="a/1.png")
    refused("a compressed one cannot be read from the middle")
    with tarfile.open(tmp_path / "train.tar", "w") as tar:
        add(tar, "1.png", b"")
    refused(r"1\.png is in no class folder and has no label file \(\.cls, \.json or \.txt\)")
    with tarfile.open(tmp_path / "train.tar", "w") as tar:
        for name, content in {"1.png": b"x", "1.cls": b"0", "2.png": b"x"}.items():
            add(tar, name, content)
    refused(r"2\.png has no label file")
    with tarfile.open(tmp_path / "train.tar", "w") as tar:
        add(tar, "1.png", b"x")
        add(tar, "1.json", b'{"name": 3}')
    refused("no label under 'label': name it with --target-key")
    with tarfile.open(tmp_path / "train.tar", "w") as tar:
        add(tar, "1.png", b"x")
        add(tar, "1.json", b"{")
    refused(r"train\.tar: 1\.json is not JSON")
    with tarfile.open(tmp_path / "train.tar", "w") as tar:
        add(tar, "notes.txt", b"x")
    refused("no image in it")


def test_a_corrupt_image_in_a_tar_is_named_with_its_place(pictures: Path, tmp_path: Path) -> None:
    class_folders(pictures, tmp_path)
    path = files(pictures / "train" / "b")[1]
    content = (tmp_path / "train.tar").read_bytes()
    start = content.index(path.read_bytes())
    (tmp_path / "train.tar").write_bytes(content[:start] + b"\0" * 64 + content[start + 64 :])
    found = read(tmp_path)
    assert isinstance(found.train, LargeImageSource)
    with pytest.raises(DataError, match=rf"train image \d+ \(.*train\.tar: train/b/{path.name}\): not an image"):
        shown(found)
