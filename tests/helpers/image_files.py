"""Images and data sets in files of every format, and what a source gives of them."""

import io
import json
import shutil
import tarfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from mgd_timm.data.dataset import Images, load_images
from mgd_timm.data.sources import SmallImageSource, Source
from mgd_timm.features import Batch, Defaults
from mgd_timm.recipe.data import Data

CPU = torch.device("cpu")
Cell = bytes | dict[str, Any]


def noise(seed: int, height: int = 12, width: int = 10) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def encoded(image: np.ndarray | Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(buffer, kind, **options)
    return buffer.getvalue()


def parquet(path: Path, **columns: Any) -> None:
    """A plain file, without the metadata of `datasets`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)


def samples(count: int, first: int = 0, **size: int) -> list[Cell]:
    return [{"bytes": encoded(noise(first + i, **size)), "path": f"{first + i}.png"} for i in range(count)]


def folder(root: Path, images: Mapping[str, Sequence[np.ndarray | bytes]], ending: str = "png") -> Path:
    """An image folder; bytes are written as they are."""
    for place, contents in images.items():
        (root / place).mkdir(parents=True)
        for i, content in enumerate(contents):
            (root / place / f"{i}.{ending}").write_bytes(content if isinstance(content, bytes) else encoded(content))
    return root


def read(
    place: Path,
    seed: int = 0,
    defaults: Defaults | None = None,
    log: Callable[[str], None] = lambda _: None,
    **data: Any,
) -> Images:
    return load_images(Data(data_dir=str(place), **data), seed, defaults, log=log)


def collect(source: Source | None, sizes: int = 4, epoch: int = 0, ids: torch.Tensor | None = None) -> Batch:
    assert source is not None
    parts = list(source.batches(list((source.ids if ids is None else ids).split(sizes)), epoch, CPU))
    return Batch(*(torch.cat(values) for values in zip(*parts, strict=True)))


def pixels(source: Source | None) -> torch.Tensor:
    """Small images as they are, uint8 [n, c, h, w]."""
    assert isinstance(source, SmallImageSource)
    return source.images


def stacked(images: Sequence[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def class_folders(source: Path, target: Path) -> None:
    for split in ("train", "test"):
        with tarfile.open(target / f"{split}.tar", "w") as tar:
            for path in reversed(files(source / split)):  # any order
                tar.add(path, arcname=str(path.relative_to(source)))


def class_tars(source: Path, target: Path) -> None:
    for split in ("train", "test"):
        (target / split).mkdir()
        for folder in sorted((source / split).iterdir()):
            with tarfile.open(target / split / f"{folder.name}.tar", "w") as tar:
                for path in files(folder):
                    tar.add(path, arcname=path.name)


def tars_in_a_tar(source: Path, target: Path) -> None:
    inner = target / "inner"
    inner.mkdir()
    class_tars(source, inner)
    for split in ("train", "test"):
        with tarfile.open(target / f"{split}.tar", "w") as tar:
            for path in files(inner / split):
                tar.add(path, arcname=path.name)
    shutil.rmtree(inner)


def shards(source: Path, target: Path, kind: str = "cls") -> None:
    for split in ("train", "test"):
        every = files(source / split)
        for shard in range(2):
            with tarfile.open(target / f"{split}-{shard:04d}.tar", "w") as tar:
                for number, path in list(enumerate(every))[shard * len(every) // 2 : (shard + 1) * len(every) // 2]:
                    label = "abc".index(path.parent.name)
                    text = {
                        "cls": str(label),
                        "json": json.dumps({"label": label, "x": [1]}, indent=1),
                        "txt": path.parent.name,
                    }
                    add(tar, f"{number:05d}{path.suffix}", path.read_bytes())
                    add(tar, f"{number:05d}.{kind}", text[kind].encode())
