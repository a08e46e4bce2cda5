"""A data set as a whole: its splits, classes, statistics and cache, and names that do not exist."""

import io
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from image_files import collect, pixels, read
from PIL import Image

from mgd_timm.data.dataset import load_images
from mgd_timm.data.decode import DataError
from mgd_timm.data.transforms import normalise
from mgd_timm.features import Defaults
from mgd_timm.recipe.data import EMBEDDED, Data
from mgd_timm.storage.atomic_write import default_file_mode
from mgd_timm.storage.cache import cache_folder
from mgd_timm.storage.lock import LOCK_FILE


def test_the_embedded_data_set_is_balanced_licensed_small_and_its_own_pngs() -> None:
    place = EMBEDDED / "fashion_mnist"
    files = {split: place / f"{split}.parquet" for split in ("train", "test")}
    assert sum(file.stat().st_size for file in files.values()) <= 6_000_000
    assert "MIT License" in (place / "LICENSE").read_text()
    data = load_images(Data(in_chans=1), 0, log=lambda _: None)
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


def test_the_validation_split_is_stratified_disjoint_and_not_augmented() -> None:
    data = [load_images(Data(val_split=0.1), seed, log=lambda _: None) for seed in (0, 0, 1)]
    for one in data:
        assert one.val is one.evaluation
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


def test_the_cache_is_written_once_and_mapped(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MGD_TIMM_CACHE", str(tmp_path))
    said: list[str] = []
    data = read(small, log=said.append)
    files = sorted(cache_folder().glob("images/*/*.safetensors"))
    assert len(files) == sum("cached" in line for line in said) == 2
    assert {file.stat().st_mode & 0o777 for file in files} == {default_file_mode()}
    inodes = [file.stat().st_ino for file in files]
    again = read(small, log=said.append)
    assert [file.stat().st_ino for file in files] == inodes
    assert sum("cached" in line for line in said) == 2
    assert torch.equal(pixels(again.train), pixels(data.train))
    assert sum(str(file) in Path("/proc/self/maps").read_text() for file in files) == 2
    read(small, in_chans=1)
    assert len(list(cache_folder().glob("images/*"))) == 4


def test_a_full_disk_leaves_no_file_in_the_cache(
    small_disk: Callable[[str], AbstractContextManager[None]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MGD_TIMM_CACHE", str(tmp_path))
    with small_disk("size=12m"):
        with pytest.raises(OSError, match=r"no space left to write .*(images|tables)/.*: nothing was changed there"):
            load_images(Data(), 0, log=print)
        assert [path for path in (tmp_path / "images").rglob("*.*") if path.name != LOCK_FILE] == []


def test_labels_are_those_of_all_training_rows(small: Path) -> None:
    data = read(small, val_split=0.25)
    assert data.labels.tolist() == [0] * 4 + [1] * 4
    assert (len(data.labels), len(data.train.labels)) == (data.num_samples, 6)
    assert torch.equal(data.labels[data.train.ids], data.train.labels)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            Data(dataset="embeded"),
            r"unknown data set 'embeded': did you mean embedded\? Reading it from the hub failed: .*Error",
        ),
        (
            Data(dataset="uoft-cs/cifar11"),
            r"unknown data set 'uoft-cs/cifar11': did you mean uoft-cs/cifar10 or uoft-cs/cifar100\? ",
        ),
        (Data(dataset="uoft-cs/cifar10"), "uoft-cs/cifar10: cannot be read: .*Error"),
        (
            Data(dataset="./images"),
            "./images: no such folder. Give a folder with --data-dir, or 'embedded' or a hub id with --dataset",
        ),
        (
            Data(data_dir="/no/images"),
            "/no/images: no such folder; expected a folder with images in class folders",
        ),
        (Data(data_dir=__file__), "test_dataset.py: a file; expected a folder with images"),
        (Data(train_split="trian"), r"unknown split 'trian': did you mean train\?"),
        (Data(eval_split="validation"), r"unknown split 'validation': known: test, train"),
        (Data(input_key="imgae"), r"unknown column 'imgae': did you mean image\?"),
        (Data(target_key="fine_label"), r"unknown column 'fine_label': did you mean label\?"),
        (Data(input_key="label"), "column 'label' holds .*: expected encoded images or their paths; choose another w"),
        (
            Data(target_key="image"),
            "column 'image' of split 'train' holds .*: expected class names, class ids .* --target-key",
        ),
        (Data(val_split=1e-5), "--val-split 1e-05 of 10000 images leaves no image .*: choose another share"),
    ],
)
def test_unknown_names_are_refused_with_the_nearest_ones(data: Data, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_images(data, 0, log=lambda _: None)
