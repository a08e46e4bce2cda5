"""Image folders: the same digest wherever they lie, and no class is left out without a word."""

import os
import shutil
from pathlib import Path

import pytest
from image_files import encoded, folder, noise, read

from mgd_timm.data.decode import DataError


def test_the_digest_knows_files_by_class_name_and_content(small: Path, tmp_path: Path) -> None:
    before = read(small).train.digest
    moved = tmp_path / "else" / "where"
    shutil.copytree(small, moved)
    for file in moved.rglob("*.png"):
        os.utime(file, (1, 1))
    assert read(moved).train.digest == before
    (moved / "train/cat/0.png").rename(moved / "train/cat/00.png")
    renamed = read(moved).train.digest
    (moved / "train/cat/1.png").write_bytes(encoded(noise(99)))
    assert len({before, renamed, read(moved).train.digest}) == 3


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("link", ["train/dog", "train"])
def test_linked_folders_are_read(link: str, streaming: bool, tmp_path: Path) -> None:
    made = folder(tmp_path / "made", {f"train/{name}": [noise(0), noise(1)] for name in ("cat", "dog", "emu")})
    (tmp_path / "away").mkdir()
    (made / link).rename(tmp_path / "away" / "the images")
    (made / link).symlink_to(tmp_path / "away" / "the images")
    assert read(made, streaming=streaming).class_names == ("cat", "dog", "emu")


def test_folders_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "nothing" / ".git").mkdir(parents=True)
    with pytest.raises(DataError, match=r"nothing: no images and no tables, tars or arrays in it.* expected a folder"):
        read(tmp_path / "nothing")
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "cat.txt").write_text("cat")
    with pytest.raises(DataError, match=r"text: no images .* \(1 left out: cat.txt: not an image \(.txt\)\)"):
        read(tmp_path / "text")
    gap = folder(
        tmp_path / "gap", {"train/cat": [noise(0)], "train/dog": [], "train/emu": [noise(1)], "train/.hidden": []}
    )
    with pytest.raises(
        DataError,
        match=r"gap/train/dog: a class folder without images. Add images of the class or move",
    ):
        read(gap)
    (gap / "train/dog").rmdir()
    assert read(gap).class_names == ("cat", "emu")
    with pytest.raises(DataError, match=r"split 'train' has only one class, 'cat': expected two or more"):
        read(folder(tmp_path / "one", {"train/cat": [noise(0), noise(1)]}))
    (tmp_path / "corrupt").mkdir()
    (tmp_path / "corrupt" / "train.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match=r"train.parquet: cannot be read as a parquet file .*: write it again"):
        read(tmp_path / "corrupt")
