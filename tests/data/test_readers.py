"""A reader of another format is a class that implements `Rows` and one line in `FORMATS`."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from image_files import collect, encoded, noise, pixels, read, stacked

from mgd_timm.data.decode import LazyImage, decode, open_image
from mgd_timm.data.readers import open as reader_choice
from mgd_timm.data.readers.scan import Ignored
from mgd_timm.data.readers.splits import LocalSplit
from mgd_timm.recipe.data import Data


@dataclass(frozen=True)
class Records:
    """Encoded images in one file, with their sizes beside it: what a reader of LMDB or the like would be."""

    split: str
    images: list[bytes]
    labels: np.ndarray
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.images)

    def name(self, row: int) -> str:
        return f"{self.split} record {row}"

    def pixels(self, row: int, in_chans: int) -> np.ndarray:
        return decode(self.images[row], in_chans, self.name(row))

    def image(self, row: int, in_chans: int) -> LazyImage:
        return open_image(self.images[row], in_chans, self.name(row))

    def digest(self) -> str:
        return hashlib.sha256(b"".join(self.images) + self.labels.tobytes()).hexdigest()


def read_files(
    split: LocalSplit, data: Data, ignored: Ignored, class_names: tuple[str, ...] | None, log: Callable[[str], None]
) -> Records:
    path = split.root / split.files[0]
    content, sizes = path.read_bytes(), np.loadtxt(path.with_suffix(".sizes"), dtype=np.int64)
    ends = sizes.cumsum().tolist()
    images = [content[end - size : end] for size, end in zip(sizes.tolist(), ends, strict=True)]
    return Records(split.name, images, np.arange(len(images)) % 2, class_names or ("even", "odd"))


def write(folder: Path, side: int) -> None:
    images = [encoded(noise(i, side, side)) for i in range(6)]
    for split in ("train", "test"):
        (folder / f"{split}.records").write_bytes(b"".join(images))
        np.savetxt(folder / f"{split}.sizes", [len(image) for image in images], fmt="%d")


@pytest.mark.parametrize("side", [12, 100])
def test_a_reader_of_another_format_is_one_class_and_one_line(
    side: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(reader_choice.FORMATS, ".records", read_files)
    write(tmp_path, side)
    found = read(tmp_path, workers=2, mean=(0.0,) * 3, std=(1.0,) * 3, img_size=side, crop_pct=1.0, max_bad=1)
    assert found.class_names == ("even", "odd")
    assert found.train.labels.tolist() == [0, 1] * 3
    expected = stacked([noise(i, side, side) for i in range(6)])
    assert torch.equal((collect(found.test).images * 255).round().byte(), expected)
    if side == 12:
        assert torch.equal(pixels(found.train), expected)
