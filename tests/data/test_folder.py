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
def test_a_linked_folder_is_not_left_out_silently(link: str, streaming: bool, tmp_path: Path) -> None:
    """`datasets` follows links to images, and none to folders: two classes of three would be trained on."""
    made = folder(tmp_path / "made", {f"train/{name}": [noise(0), noise(1)] for name in ("cat", "dog", "emu")})
    (tmp_path / "away").mkdir()
    (made / link).rename(tmp_path / "away" / "the images")
    (made / link).symlink_to(tmp_path / "away" / "the images")
    with pytest.raises(DataError, match=rf"made/{link}: a link to a folder\. .* \(cp -rs '.*away/the images' \.\.\.\)"):
        read(made, streaming=streaming)


def test_folders_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "nothing" / ".git").mkdir(parents=True)
    with pytest.raises(
        DataError, match="nothing: no images and no tar, parquet, arrow or npy files in it; expected a folder with"
    ):
        read(tmp_path / "nothing")
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "cat.txt").write_text("cat")
    with pytest.raises(DataError, match="text: no images and no tar, parquet, arrow or npy files in it"):
        read(tmp_path / "text")
    gap = folder(
        tmp_path / "gap", {"train/cat": [noise(0)], "train/dog": [], "train/emu": [noise(1)], "train/.hidden": []}
    )
    with pytest.raises(
        DataError, match=r"gap/train/dog: a class folder without images. Add images of the class or remove the folder"
    ):
        read(gap)
    (gap / "train/dog").rmdir()
    assert read(gap).class_names == ("cat", "emu")
    with pytest.raises(
        DataError,
        match=r"no label column among image: .* put the images into one folder per class, with two classes or more",
    ):
        read(folder(tmp_path / "one", {"train/cat": [noise(0), noise(1)]}))
    (gap / "test" / "cat" / "more").mkdir(parents=True)
    (gap / "test" / "cat" / "more" / "9.png").write_bytes((gap / "train" / "cat" / "0.png").read_bytes())
    with pytest.raises(
        DataError, match=r"gap/test/cat/more/9\.png and .*gap/train/(cat|emu)/.*\.png are at different depths, so"
    ):
        read(gap)
    (tmp_path / "corrupt").mkdir()
    (tmp_path / "corrupt" / "train.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match="corrupt: cannot be read: ArrowInvalid: Parquet file size is 7 bytes"):
        read(tmp_path / "corrupt")
