"""Places of data as people have them: trees of small pictures, tables and tars, and what a run would make of them."""

import itertools
import json
import re
import tarfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from image_files import add, encoded, noise

import mgd_timm
from mgd_timm.data.decode import DataError

_number = itertools.count()
FOREIGN = re.compile(
    r"datasets\.|fsspec|pyarrow|arrow(invalid|typeerror|exception|notimplemented)|traceback|<class", re.I
)
"""Words of libraries, which no message to a user holds."""
LOSES_FILES = re.compile(r"\b(delete|rm|erase)\b|\bremove (it|the folder|the file|one of them)\b", re.I)
"""Advice after which a user may lose files."""


def picture(height: int = 8, width: int = 8, kind: str = "PNG", **options: Any) -> bytes:
    """An encoded picture that no other call returns."""
    return encoded(noise(next(_number), height, width), kind, **options)


def tree(root: Path, folders: Mapping[str, int], ending: str = "png", size: tuple[int, int] = (8, 8)) -> Path:
    """Folders with a number of pictures in each."""
    for place, count in folders.items():
        (root / place).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            (root / place / f"{i}.{ending}").write_bytes(picture(*size))
    return root


def put(path: Path, content: bytes | str | None = None) -> Path:
    """Write a file, by default a picture, and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = picture() if content is None else content
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def cells(count: int) -> list[dict[str, Any]]:
    """An image column of parquet."""
    return [{"bytes": picture(), "path": f"{i}.png"} for i in range(count)]


def table(path: Path, labels: Any = None, images: Any = None, label: str = "label", **columns: Any) -> Path:
    """A parquet file: images, labels (None for no such column) and other columns."""
    count = len(labels) if labels is not None else len(next(iter(columns.values())))
    values: dict[str, Any] = {"image": cells(count) if images is None else images}
    if labels is not None:
        values[label] = labels
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(values | columns), path)
    return path


def hub_table(path: Path, names: Sequence[str], labels: Sequence[int], **more: Any) -> Path:
    """A parquet file as `datasets` writes it, with class names."""
    import datasets

    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=list(names)))
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = datasets.Dataset.from_dict({"image": cells(len(labels)), "label": list(labels)} | more, features=features)
    rows.to_parquet(str(path))
    return path


def arrays(root: Path, split: str, labels: Any, images: np.ndarray | None = None) -> Path:
    """A pair of npy files."""
    root.mkdir(parents=True, exist_ok=True)
    labels = np.asarray(labels)
    if images is None:
        images = np.stack([noise(next(_number), 8, 8) for _ in range(len(labels))])
    np.save(root / f"{split}_x.npy", images)
    np.save(root / f"{split}_y.npy", labels)
    return root


def tar(path: Path, members: Mapping[str, bytes | str | None]) -> Path:
    """A tar of files; None stands for a picture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as file:
        for name, content in members.items():
            content = picture() if content is None else content
            add(file, name, content.encode() if isinstance(content, str) else content)
    return path


def jsonl(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """A file with a JSON object in each line."""
    return put(path, "".join(json.dumps(row) + "\n" for row in rows))


@dataclass(frozen=True)
class Found:
    """What a run would train and evaluate on."""

    train: dict[str, int]
    eval: dict[str, int] | None
    ignored: dict[str, str]
    count: int
    words: str
    all: dict[str, Any]

    def why(self, path: str) -> str:
        """The reason for which a path is left out."""
        assert path in self.ignored, f"{path} is not named among {self.ignored}"
        return self.ignored[path]


def found(root: Path, **options: Any) -> Found:
    """Ask what a run would use. Classes without images are left out."""
    lines: list[str] = []
    described = mgd_timm.inspect_data(str(root), log=lines.append, **options)
    parts = [
        described[role] and {k: n for k, n in described[role]["per_class"].items() if n} for role in ("train", "eval")
    ]
    assert described["ignored_count"] >= len(described["ignored"])
    return Found(
        train=parts[0],
        eval=parts[1],
        ignored={row["path"]: row["why"] for row in described["ignored"]},
        count=described["ignored_count"],
        words="\n".join(lines),
        all=described,
    )


def refused(root: Path, *words: str, ask: Callable[..., Any] = found, **options: Any) -> str:
    """Ask, expect a refusal that holds these words, and return it."""
    with pytest.raises(DataError) as caught:
        ask(root, **options)
    message = str(caught.value)
    for word in words:
        assert word.lower() in message.lower(), f"{word!r} is not in: {message}"
    assert "\n" not in message
    assert not FOREIGN.search(message), message
    assert not LOSES_FILES.search(message), message
    return message
