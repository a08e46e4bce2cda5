"""Images in: every kind of data set, the same batches for any workers and batch size, and errors that say what to
do."""

import io
import os
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image, ImageOps

from mgd_timm import decoding
from mgd_timm.checkpoint import file_mode
from mgd_timm.data import (
    EMBEDDED,
    DataError,
    Defaults,
    FileSource,
    Images,
    Source,
    StoreSource,
    cache_folder,
    decode,
    load_images,
)
from mgd_timm.features import Batch
from mgd_timm.locking import LOCK
from mgd_timm.recipe import Data
from mgd_timm.sampling import augment, mix, normalise

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
    say: Callable[[str], None] = lambda _: None,
    **data: Any,
) -> Images:
    return load_images(Data(data_dir=str(place), **data), seed, defaults, say=say)


def collect(source: Source | None, sizes: int = 4, epoch: int = 0, ids: torch.Tensor | None = None) -> Batch:
    assert source is not None
    parts = list(source.batches(list((source.ids if ids is None else ids).split(sizes)), epoch, CPU))
    return Batch(*(torch.cat(values) for values in zip(*parts, strict=True)))


def pixels(source: Source | None) -> torch.Tensor:
    """A store's images as they are, uint8 [n, c, h, w]."""
    assert isinstance(source, StoreSource)
    return source.images


def stacked(images: Sequence[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight training and four test images in two classes, too large for a store and of several sizes."""
    root = tmp_path_factory.mktemp("large")
    return folder(
        root,
        {
            "train/cat": [noise(i, 100 + 5 * i, 120) for i in range(4)],
            "train/dog": [noise(i, 110, 100 + 7 * i) for i in range(4, 8)],
            "test/cat": [noise(i, 128, 128) for i in range(8, 10)],
            "test/dog": [noise(i, 97, 150) for i in range(10, 12)],
        },
    )


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with images of 12x10 pixels."""
    root = tmp_path_factory.mktemp("small")
    splits = {"train/cat": range(4), "train/dog": range(4, 8), "test/cat": range(8, 10), "test/dog": range(10, 12)}
    return folder(root, {place: [noise(i) for i in seeds] for place, seeds in splits.items()})


# What can be read


def test_the_embedded_data_set_is_balanced_licensed_small_and_its_own_pngs() -> None:
    place = EMBEDDED / "fashion_mnist"
    files = {split: place / f"{split}.parquet" for split in ("train", "test")}
    assert sum(file.stat().st_size for file in files.values()) <= 6_000_000
    assert "MIT License" in (place / "LICENSE").read_text()
    data = load_images(Data(in_chans=1), 0, say=lambda _: None)
    assert (data.num_classes, data.num_samples, data.input_size) == (10, 10_000, (1, 28, 28))
    assert data.class_names[0] == "T-shirt/top"
    for split, source, per_class in (("train", data.train, 1000), ("test", data.test, 400)):
        assert source is not None
        assert torch.bincount(source.labels).tolist() == [per_class] * 10
        table = pq.read_table(files[split])
        assert table["label"].to_pylist() == source.labels.tolist()
        for row in range(0, len(table), 397):
            with Image.open(io.BytesIO(table["image"][row].as_py()["bytes"])) as image:
                np.testing.assert_array_equal(np.asarray(image), pixels(source)[row, 0].numpy())
    whole = pixels(data.train).double() / 255
    assert data.mean == pytest.approx([whole.mean().item()], abs=1e-4)
    assert data.std == pytest.approx([whole.std().item()], abs=1e-4)


def test_hub_parquet_with_two_label_columns(tmp_path: Path) -> None:
    import datasets

    features = datasets.Features(
        img=datasets.Image(),
        fine_label=datasets.ClassLabel(names=["apple", "bee", "cup"]),
        coarse_label=datasets.ClassLabel(names=["alive", "thing"]),
    )
    for split, count in (("train", 6), ("test", 3)):
        columns = {
            "img": samples(count),
            "fine_label": [i % 3 for i in range(count)],
            "coarse_label": [i % 2 for i in range(count)],
        }
        datasets.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / f"{split}-00000-of-00001.parquet")
    said: list[str] = []
    data = read(tmp_path, say=said.append)
    assert data.class_names == ("apple", "bee", "cup")
    assert data.train.labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert torch.equal(pixels(data.train), stacked([noise(i) for i in range(6)]))
    assert data.test is data.watched
    assert (
        "label column: fine_label of fine_label (3 classes), coarse_label (2 classes); --target-key to change" in said
    )
    assert read(tmp_path, target_key="coarse_label").class_names == ("alive", "thing")


@pytest.mark.parametrize("binary", [False, True])
def test_parquet_without_metadata(tmp_path: Path, binary: bool) -> None:
    images: list[Any] = [encoded(noise(i)) for i in range(6)] if binary else samples(6)
    parquet(tmp_path / "train.parquet", picture=images, label=[0, 1, 2, 0, 1, 2])
    parquet(tmp_path / "validation.parquet", picture=images[:2], label=[1, 0])  # without the highest class
    data = read(tmp_path)
    assert data.class_names == ("0", "1", "2")
    assert torch.equal(pixels(data.train), stacked([noise(i) for i in range(6)]))
    assert data.test is not None
    assert data.test.labels.tolist() == [1, 0]


def test_arrow_files(tmp_path: Path) -> None:
    table = pa.table({"image": samples(4), "label": [0, 1, 1, 0]})
    with pa.ipc.new_stream(str(tmp_path / "train.arrow"), table.schema) as writer:
        writer.write_table(table)
    data = read(tmp_path)
    assert data.test is None
    assert data.watched is None
    assert data.train.labels.tolist() == [0, 1, 1, 0]
    assert torch.equal(pixels(data.train), stacked([noise(i) for i in range(4)]))


def test_small_images_of_a_folder_are_stored(small: Path) -> None:
    data = read(small)
    assert data.class_names == ("cat", "dog")
    assert data.input_size == (3, 12, 10)
    assert data.train.labels.tolist() == [0] * 4 + [1] * 4
    assert torch.equal(pixels(data.train), stacked([noise(i) for i in range(8)]))
    assert torch.equal(pixels(data.test), stacked([noise(i) for i in range(8, 12)]))


def test_large_images_go_through_timms_transforms(large: Path) -> None:
    from timm.data.transforms_factory import create_transform

    defaults = Defaults(mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4), img_size=48, interpolation="bilinear", crop_pct=0.9)
    data = read(
        large, seed=5, defaults=defaults, workers=0, scale=(0.2, 0.9), hflip=0.4, aa="rand-m9-mstd0.5", color_jitter=0.3
    )
    assert isinstance(data.train, FileSource)
    assert (data.input_size, data.mean, data.std) == ((3, 48, 48), defaults.mean, defaults.std)
    common: dict[str, Any] = {
        "input_size": (3, 48, 48),
        "mean": defaults.mean,
        "std": defaults.std,
        "interpolation": "bilinear",
    }
    transform = create_transform(**common, crop_pct=0.9)
    pictures = [Image.fromarray(noise(i, 128, 128)) for i in (8, 9)] + [
        Image.fromarray(noise(i, 97, 150)) for i in (10, 11)
    ]
    assert torch.equal(collect(data.test).images, torch.stack([transform(picture) for picture in pictures]))
    transform = create_transform(
        **common,
        is_training=True,
        scale=(0.2, 0.9),
        ratio=(3 / 4, 4 / 3),
        hflip=0.4,
        auto_augment="rand-m9-mstd0.5",
        color_jitter=0.3,
    )
    batch = collect(data.train, epoch=3)
    assert batch.labels.tolist() == [0] * 4 + [1] * 4
    for row in (0, 3):
        seed = mix(5, 3, row)
        random.seed(seed)
        np.random.seed(seed & 0xFFFFFFFF)
        torch.manual_seed(seed)
        assert torch.equal(batch.images[row], transform(Image.fromarray(noise(row, 100 + 5 * row, 120))))


def test_soft_labels(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    soft = rng.dirichlet([1, 1, 1], 6).astype(np.float32)
    parquet(tmp_path / "train.parquet", image=samples(6), label=soft.tolist())
    parquet(tmp_path / "test.parquet", image=samples(2), label=soft[:2].tolist())
    data = read(tmp_path, val_split=0.4)
    assert data.num_classes == 3
    assert data.val is not None
    both = torch.cat([data.train.ids, data.val.ids])
    assert both.sort().values.tolist() == list(range(6))
    np.testing.assert_allclose(
        torch.cat([collect(data.train).labels, collect(data.val).labels])[both.argsort()].numpy(), soft
    )
    assert collect(data.test).labels.tolist() == soft[:2].tolist()
    parquet(tmp_path / "test.parquet", image=samples(2), label=[[0.5, 0.5], [1.0, 0.0]])
    with pytest.raises(
        DataError, match="split 'test' has the classes 0, 1, 'train' has 0, 1, 2: both need the same ones"
    ):
        read(tmp_path)


def test_the_validation_cut_is_stratified_disjoint_and_not_augmented() -> None:
    data = [load_images(Data(val_split=0.1), seed, say=lambda _: None) for seed in (0, 0, 1)]
    for one in data:
        assert one.val is one.watched
        assert one.val is not None
        assert torch.bincount(one.val.labels).tolist() == [100] * 10
        assert torch.equal(torch.cat([one.train.ids, one.val.ids]).sort().values, torch.arange(10_000))
        assert one.num_samples == 10_000
        batch = collect(one.val, 300, epoch=1)
        stats = torch.tensor(one.mean)[:, None, None], torch.tensor(one.std)[:, None, None]
        assert torch.equal(batch.images, normalise(pixels(one.val)[one.val.ids], *stats))
        assert torch.equal(batch.labels, one.val.labels)
    assert torch.equal(data[0].train.ids, data[1].train.ids)
    assert not torch.equal(data[0].train.ids, data[2].train.ids)


def test_mean_and_std_are_measured_on_what_is_trained_on(small: Path) -> None:
    data = read(small, val_split=0.5)
    used = pixels(data.train)[data.train.ids].double() / 255
    assert data.mean == pytest.approx(used.mean((0, 2, 3)).tolist(), abs=1e-4)
    assert data.std == pytest.approx(used.std((0, 2, 3), correction=0).tolist(), abs=1e-4)
    given = read(small, defaults=Defaults(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6)), std=(0.7, 0.8, 0.9))
    assert (given.mean, given.std) == ((0.1, 0.2, 0.3), (0.7, 0.8, 0.9))
    grey = read(small, defaults=Defaults(mean=(0.1, 0.2, 0.6), std=(0.4, 0.5, 0.6)), in_chans=1)
    assert grey.mean == pytest.approx((0.3,))
    assert collect(grey.train).images.shape == (8, 1, 12, 10)


def test_small_images_are_resized_on_request(small: Path) -> None:
    data = read(small, img_size=20)
    assert data.input_size == (3, 20, 20)
    expected = [np.asarray(Image.fromarray(noise(i)).resize((20, 20), Image.Resampling.BICUBIC)) for i in range(8)]
    assert torch.equal(pixels(data.train), stacked(expected))
    grown = read(small, img_size=128, workers=0)  # a store of these would not be small
    assert isinstance(grown.train, FileSource)
    assert collect(grown.test).images.shape == (4, 3, 128, 128)


# The same batches, however they are made


def states() -> tuple[str, list[int]]:
    return str(np.random.get_state()), torch.get_rng_state().tolist()


@pytest.mark.parametrize("kind", ["small", "large"])
def test_augmentation_depends_on_seed_epoch_and_sample_alone(kind: str, request: pytest.FixtureRequest) -> None:
    place = request.getfixturevalue(kind)
    options: dict[str, Any] = {"img_size": 24} if kind == "large" else {"img_size": None}
    order = torch.tensor([5, 0, 7, 2, 1, 6, 3, 4])
    train = read(place, seed=1, workers=0, **options).train
    whole = collect(train, 8, epoch=2)
    for workers in (0, 1, 2):
        again = read(place, seed=1, workers=workers, **options).train
        torch.manual_seed(workers)
        random.seed(workers)
        np.random.seed(workers)
        before = states()  # of Python's generator nothing can be said: beartype draws from it
        batch = collect(again, 3, epoch=2, ids=order)
        assert torch.equal(batch.images, whole.images[order])
        assert torch.equal(batch.labels, whole.labels[order])
        assert torch.equal(batch.sample_ids, order)
        assert states() == before
    assert not torch.equal(collect(train, 8, epoch=3).images, whole.images)
    assert not torch.equal(collect(read(place, seed=2, workers=0, **options).train, 8, epoch=2).images, whole.images)


def test_a_store_is_augmented_as_the_reference(small: Path) -> None:
    data = read(small, seed=3, pad=2, hflip=0.3)
    stats = torch.tensor(data.mean)[:, None, None], torch.tensor(data.std)[:, None, None]
    moved = augment(pixels(data.train), torch.arange(8), 3, 1, pad=2, hflip=0.3)
    assert torch.equal(collect(data.train, 3, epoch=1).images, normalise(moved, *stats))


def test_a_store_is_written_once_and_mapped(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MGD_TIMM_CACHE", str(tmp_path))
    said: list[str] = []
    data = read(small, say=said.append)
    files = sorted(cache_folder().glob("images/*/*.safetensors"))
    assert len(files) == len(said) == 2
    assert {file.stat().st_mode & 0o777 for file in files} == {file_mode()}
    inodes = [file.stat().st_ino for file in files]
    again = read(small, say=said.append)
    assert [file.stat().st_ino for file in files] == inodes
    assert len(said) == 2
    assert torch.equal(pixels(again.train), pixels(data.train))
    assert sum(str(file) in Path("/proc/self/maps").read_text() for file in files) == 2
    read(small, in_chans=1)
    assert len(list(cache_folder().glob("images/*"))) == 4


def test_a_full_disk_leaves_no_store(
    small_disk: Callable[[str], AbstractContextManager[None]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MGD_TIMM_CACHE", str(tmp_path))
    with small_disk("size=4m"):
        with pytest.raises(OSError, match=r"no room to write .*images/.*safetensors: nothing was changed there"):
            load_images(Data(), 0, say=print)
        assert [path for path in tmp_path.rglob("*.*") if path.name != LOCK] == []


def test_large_images_are_neither_decoded_nor_read_ahead(tmp_path: Path) -> None:
    content = encoded(np.zeros((1500, 1500, 3), np.uint8), compress_level=1)  # 6.75 MB decoded
    parquet(tmp_path / "train.parquet", image=[content] * 200, label=[0, 1] * 100)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    data = read(tmp_path, img_size=32, workers=0)
    assert collect(data.train, ids=torch.arange(8)).images.shape == (8, 3, 32, 32)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB; 1.35 GB in all


@pytest.mark.parametrize("hashed", [1 << 30, 1000])
def test_the_digest_tells_data_sets_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hashed: int) -> None:
    monkeypatch.setattr(decoding, "HASHED", hashed)
    plain, labels = [encoded(noise(i)) for i in range(8)], [0, 1] * 4
    longer = [*plain[:7], plain[7] + b"\0"]
    variants = {
        "one": (plain, labels),
        "same": (plain, labels),
        "labels": (plain, labels[::-1]),
        "longer": (longer, labels),
    }
    digests = {}
    for name, (images, label) in variants.items():
        parquet(tmp_path / name / "train.parquet", image=images, label=label)
        digests[name] = read(tmp_path / name).train.digest
    assert digests["one"] == digests["same"]
    assert len(set(digests.values())) == 3


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


def test_labels_are_those_of_all_training_rows(small: Path) -> None:
    data = read(small, val_split=0.25)
    assert data.labels.tolist() == [0] * 4 + [1] * 4
    assert (len(data.labels), len(data.train.labels)) == (data.num_samples, 6)
    assert torch.equal(data.labels[data.train.ids], data.train.labels)


# Readers


def test_readers_outlive_signals_to_the_process_group(large: Path) -> None:
    source = read(large, img_size=32, workers=2).train
    batches = source.batches(list(source.ids.split(1)), 0, CPU)
    found = [next(batches)]
    own = psutil.Process()
    readers = [
        child for child in own.children() if child.cmdline() == own.cmdline()
    ]  # not what another test's processes need
    assert len(readers) == 2
    for kind in (signal.SIGINT, signal.SIGTERM, signal.SIGTERM):
        for reader in readers:
            subprocess.run(["kill", f"-{kind.value}", str(reader.pid)], check=True)
        time.sleep(0.2)
    found += batches
    assert len(found) == 8
    _, alive = psutil.wait_procs(readers, timeout=10)
    assert not alive


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        (
            "aa",
            "rand-x9",
            r"aa='rand-x9', .* \(Unknown RandAugment config section\): expected a policy such as rand-m9",
        ),
        ("color_jitter", -1.0, r"color_jitter=-1\.0: .*: expected .* a strength of 0 or more"),
        ("interpolation", "random", r"interpolation='random': expected bilinear or bicubic\."),
        ("train_interpolation", "bicubik", r"train_interpolation='bicubik': expected bilinear or bicubic, or random"),
    ],
)
def test_what_timm_makes_no_transform_of_is_refused(name: str, value: object, said: str, large: Path) -> None:
    with pytest.raises(DataError, match=said):
        read(large, img_size=32, **{name: value})


@pytest.mark.slow
def test_readers_do_not_hold_up_the_exit(large: Path) -> None:
    script = f"""
import torch
from mgd_timm.data import load_images
from mgd_timm.recipe import Data
source = load_images(Data(data_dir={str(large)!r}, img_size=32, workers=2), 0).train
batches = source.batches(list(source.ids.split(1)), 0, torch.device("cpu"))
print(len(next(batches).labels))
held = [batches]
held.append(held)
del batches
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=300)
    assert (done.returncode, done.stdout.split()[-1]) == (0, "1"), done.stderr


# Colours

COLOUR, GREY = (200, 100, 50), 124  # ITU-R 601: 0.299 R + 0.587 G + 0.114 B


def palette(transparency: int | bytes | None) -> bytes:
    image = Image.new("P", (5, 4), 1)
    image.putpalette([9, 9, 9, *COLOUR, 8, 8, 8])
    return encoded(image) if transparency is None else encoded(image, transparency=transparency)


@pytest.mark.parametrize(
    ("content", "colour", "grey"),
    [
        pytest.param(encoded(Image.new("RGB", (5, 4), COLOUR)), COLOUR, GREY, id="RGB"),
        pytest.param(
            encoded(Image.new("RGB", (5, 4), COLOUR), transparency=COLOUR), COLOUR, GREY, id="RGB transparent colour"
        ),
        pytest.param(encoded(Image.new("RGBA", (5, 4), (*COLOUR, 0))), COLOUR, GREY, id="RGBA"),
        pytest.param(encoded(Image.new("L", (5, 4), 77)), (77,) * 3, 77, id="L"),
        pytest.param(encoded(Image.new("L", (5, 4), 77), transparency=77), (77,) * 3, 77, id="L transparent grey"),
        pytest.param(encoded(Image.new("LA", (5, 4), (77, 3))), (77,) * 3, 77, id="LA"),
        pytest.param(encoded(Image.new("1", (5, 4), 1)), (255,) * 3, 255, id="1"),
        pytest.param(encoded(Image.new("CMYK", (5, 4), (55, 155, 205, 0)), "TIFF"), COLOUR, GREY, id="CMYK"),
        pytest.param(palette(None), COLOUR, GREY, id="P"),
        pytest.param(palette(1), COLOUR, GREY, id="P transparent index"),
        pytest.param(palette(b"\xff\x40\xff"), COLOUR, GREY, id="P transparent bytes"),
        pytest.param(encoded(Image.new("RGB", (5, 4), COLOUR), "GIF"), COLOUR, GREY, id="GIF"),
        pytest.param(encoded(Image.new("RGB", (5, 4), COLOUR), "WEBP", lossless=True), COLOUR, GREY, id="WEBP"),
        pytest.param(encoded(Image.new("RGB", (5, 4), COLOUR), "BMP"), COLOUR, GREY, id="BMP"),
    ],
)
def test_every_mode_becomes_colour_and_grey(content: bytes, colour: tuple[int, ...], grey: int) -> None:
    expected = np.broadcast_to(np.array(colour, np.uint8), (4, 5, 3))
    np.testing.assert_array_equal(decode(content, 3, "x"), expected)
    got = decode(content, 1, "x")
    assert got.shape == (4, 5, 1)
    np.testing.assert_allclose(got.astype(int), grey, atol=1)


def test_exif_rotation_is_not_applied() -> None:
    image = Image.fromarray(noise(0))
    exif = Image.Exif()
    exif[0x0112] = 6
    content = encoded(image, exif=exif)
    with Image.open(io.BytesIO(content)) as opened:
        assert ImageOps.exif_transpose(opened).size == (12, 10)
    np.testing.assert_array_equal(decode(content, 3, "x"), noise(0))


def bomb() -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


BAD_IMAGES = [
    pytest.param(
        encoded(noise(0, 60, 60), "JPEG")[:-300], r"truncated or damaged \(.*\): remove or replace it", id="JPEG cut"
    ),
    pytest.param(encoded(noise(0, 60, 60))[:-300], r"truncated or damaged \(.*\): remove or replace it", id="PNG cut"),
    pytest.param(encoded(noise(0))[:20], r"truncated or damaged|not an image", id="PNG cut in its header"),
    pytest.param(
        b"not an image\n", r"not an image of a known format \(JPEG, PNG, .*\): remove or replace it", id="text"
    ),
    pytest.param(b"%!PS-Adobe-3.0 EPSF-3.0\n", "not an image of a known format", id="PostScript"),
    pytest.param(
        bomb(), "exceeds limit of .* pixels, could be decompression bomb DOS attack.: remove or shrink it", id="bomb"
    ),
    pytest.param(
        encoded(Image.fromarray(np.full((4, 5), 40_000, np.uint16))),
        "mode 'I;16' has more than 8 bits .* convert it to 8",
        id="16 bit",
    ),
    pytest.param(encoded(Image.new("I", (5, 4), 70_000), "TIFF"), "mode 'I' has more than 8 bits", id="32 bit"),
    pytest.param(encoded(Image.new("F", (5, 4), 0.5), "TIFF"), "mode 'F' has more than 8 bits", id="float"),
]


@pytest.mark.parametrize(("content", "message"), BAD_IMAGES)
def test_bad_images_are_named_and_refused(content: bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"^some name: .*{message}"):
        decode(content, 3, "some name")
    place = folder(tmp_path, {"train/cat": [noise(0), noise(1)], "train/dog": [noise(2), content]}, ending="jpg")
    with pytest.raises(DataError, match=rf"^train image 3 \({place}/train/dog/1.jpg\): .*{message}"):
        read(place)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_large_image_is_named_when_it_is_reached(tmp_path: Path, workers: int) -> None:
    bad = encoded(noise(2, 120, 120), "JPEG")[:-4000]
    place = folder(tmp_path, {"cat": [noise(0, 120, 120)], "dog": [noise(1, 120, 120), bad]}, ending="jpg")
    data = read(place, img_size=32, workers=workers)
    with pytest.raises(DataError, match=rf"train image 2 \({place}/dog/1.jpg\): truncated or damaged"):
        collect(data.train)


# What cannot be used


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            Data(dataset="embeded"),
            r"unknown data set 'embeded': did you mean embedded\? Reading it from the hub failed with .*Error",
        ),
        (
            Data(dataset="uoft-cs/cifar11"),
            r"unknown data set 'uoft-cs/cifar11': did you mean uoft-cs/cifar10 or uoft-cs/cifar100\? ",
        ),
        (Data(dataset="uoft-cs/cifar10"), "uoft-cs/cifar10: cannot be read: .*Error"),
        (
            Data(dataset="./images"),
            "./images: no such folder. Give --data-dir a folder, or --dataset 'embedded' or a hub id",
        ),
        (
            Data(data_dir="/no/images"),
            "/no/images: no such folder; expected a folder of parquet, arrow or npy files, or of images in class",
        ),
        (Data(data_dir=__file__), "test_data.py: a file; expected a folder of parquet"),
        (Data(train_split="trian"), r"unknown split 'trian': did you mean train\?"),
        (Data(eval_split="validation"), r"unknown split 'validation': known: test, train"),
        (Data(input_key="imgae"), r"unknown column 'imgae': did you mean image\?"),
        (Data(target_key="fine_label"), r"unknown column 'fine_label': did you mean label\?"),
        (Data(input_key="label"), "column 'label' holds .*: expected encoded images; choose another with --input-key"),
        (
            Data(target_key="image"),
            "column 'image' of split 'train' holds .*: expected class ids from 0, .* --target-key",
        ),
        (Data(val_split=1e-5), "val_split=1e-05 of 10000 images leaves a part empty: choose another share"),
    ],
)
def test_unknown_names_are_refused_with_the_nearest_ones(data: Data, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_images(data, 0, say=lambda _: None)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"label": [0, 1]}, "no image column among label: expected one; name it with --input-key"),
        (
            {"image": samples(2), "other": samples(2), "label": [0, 1]},
            "2 image columns, image, other, among image, other, label: exp",
        ),
        (
            {"image": samples(2)},
            "no label column among image: expected one of class ids or distributions; name it with --target-key",
        ),
        (
            {"image": samples(2), "label": [0, 1], "id": [7, 8]},
            "2 label columns, label, id, among image, label, id: expected one",
        ),
        ({"image": samples(2), "label": ["cat", "dog"]}, "no label column among image, label"),
        (
            {"image": samples(3), "label": [0, 2, 2]},
            r"split 'train' has no image of class '1' \(1\): add some, or remove the class",
        ),
        (
            {"image": samples(2), "label": [0, 0]},
            "split 'train' has one class only, '0': there is nothing to tell apart",
        ),
        ({"image": samples(2), "label": [[1.0], [1.0]]}, "split 'train' has one class only, '0'"),
        (
            {"image": samples(3), "label": [0, -1, 1]},
            r"column 'label' of split 'train': row 1 has the label -1, expected class ids from",
        ),
        (
            {"image": samples(3), "label": [0, None, 1]},
            "column 'label' of split 'train' holds .*: expected class ids from 0, none miss",
        ),
        (
            {"image": samples(2), "label": [[0.5, 0.5], [0.5, 0.6]]},
            "soft labels need to be distributions, each value 0 or more and of",
        ),
        ({"image": samples(2), "label": [[1.5, -0.5], [0.5, 0.5]]}, "soft labels need to be distributions"),
        (
            {"image": samples(2), "label": [[0.5, 0.5], [1.0]]},
            "expected class ids from 0, none missing, or distributions of equal len",
        ),
        (
            {"image": [*samples(1), {"bytes": None, "path": None}], "label": [0, 1]},
            "train image 1: the row holds neither bytes nor a",
        ),
        (
            {"image": [encoded(noise(0)), None], "label": [0, 1]},
            "train image 1: the row holds neither bytes nor a path: remove it",
        ),
        (
            {"image": [*samples(1), {"bytes": None, "path": "/no.png"}], "label": [0, 1]},
            r"train image 1 \(/no.png\): No such file or di",
        ),
        (
            {"image": [*samples(1), *samples(1, height=13)], "label": [0, 1]},
            r"train image 1 \(0.png\) has 13x10 pixels, the first image 12x10: give --img-size to "
            r"resize all to one size",
        ),
        (
            {"image": pa.array([], pa.binary()), "label": pa.array([], pa.int64())},
            "split 'train' has no images|cannot be read",
        ),
    ],
)
def test_tables_that_cannot_be_used(columns: dict[str, Any], message: str, tmp_path: Path) -> None:
    parquet(tmp_path / "train.parquet", **columns)
    with pytest.raises(DataError, match=message):
        read(tmp_path)


def test_labels_beyond_the_classes(tmp_path: Path) -> None:
    parquet(tmp_path / "train.parquet", image=samples(4), label=[0, 1, 0, 1])
    parquet(tmp_path / "test.parquet", image=samples(2), label=[0, 2])
    with pytest.raises(DataError, match="split 'test' has the label 2, but there are 2 classes, 0, 1: expected 0 to 1"):
        read(tmp_path)


def test_named_classes_without_images_or_with_other_names(tmp_path: Path) -> None:
    import datasets

    def write(place: str, names: list[str], label: list[int]) -> None:
        features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=names))
        (tmp_path / place).parent.mkdir(exist_ok=True)
        datasets.Dataset.from_dict({"image": samples(len(label)), "label": label}, features=features).to_parquet(
            tmp_path / place
        )

    write("empty/train.parquet", ["cat", "dog", "emu"], [0, 1])
    with pytest.raises(
        DataError, match=r"split 'train' has no image of class 'emu' \(2\): add some, or remove the class from the"
    ):
        read(tmp_path / "empty")
    write("hidden/train.parquet", ["cat", "dog"], [0, 1])
    write("hidden/test.parquet", ["cat", "dog"], [-1, -1])
    with pytest.raises(
        DataError, match=r"split 'test': row 0 has the label -1.* A split with hidden labels cannot be used: choose ano"
    ):
        read(tmp_path / "hidden")


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("link", ["train/dog", "train"])
def test_a_linked_folder_is_not_left_out_silently(link: str, streaming: bool, tmp_path: Path) -> None:
    """`datasets` follows links to images, and none to folders: two classes of three would be trained on."""
    made = folder(tmp_path / "made", {f"train/{name}": [noise(0), noise(1)] for name in ("cat", "dog", "emu")})
    (tmp_path / "away").mkdir()
    (made / link).rename(tmp_path / "away" / "the images")
    (made / link).symlink_to(tmp_path / "away" / "the images")
    with pytest.raises(DataError, match=rf"made/{link}: a link to a folder, .* \(cp -rs '.*away/the images' \.\.\.\)"):
        read(made, streaming=streaming)


def test_folders_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "nothing" / ".git").mkdir(parents=True)
    with pytest.raises(
        DataError, match="nothing: neither images nor parquet, arrow or npy files in it; expected a folder of parquet"
    ):
        read(tmp_path / "nothing")
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "cat.txt").write_text("cat")
    with pytest.raises(DataError, match="text: neither images nor parquet, arrow or npy files in it"):
        read(tmp_path / "text")
    gap = folder(
        tmp_path / "gap", {"train/cat": [noise(0)], "train/dog": [], "train/emu": [noise(1)], "train/.hidden": []}
    )
    with pytest.raises(
        DataError, match=r"gap/train/dog: a class folder without an image. Add images of the class or remove the folder"
    ):
        read(gap)
    (gap / "train/dog").rmdir()
    assert read(gap).class_names == ("cat", "emu")
    with pytest.raises(
        DataError, match=r"no label column among image: .* put images into one folder per class, of two classes or more"
    ):
        read(folder(tmp_path / "one", {"train/cat": [noise(0), noise(1)]}))
    (gap / "test" / "cat" / "more").mkdir(parents=True)
    (gap / "test" / "cat" / "more" / "9.png").write_bytes((gap / "train" / "cat" / "0.png").read_bytes())
    with pytest.raises(
        DataError, match=r"gap/test/cat/more/9\.png: not as deep in folders as .*gap/train/(cat|emu)/.*\.png, so that"
    ):
        read(gap)
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "train.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match="damaged: cannot be read: ArrowInvalid: Parquet file size is 7 bytes"):
        read(tmp_path / "damaged")
