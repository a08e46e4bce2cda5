"""Corrupt images are refused by name, or skipped by the data alone; a worker that is killed ends the run."""

import contextlib
import io
import re
import subprocess
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from small import call, command, environment, write_pictures

from mgd_timm.data import corrupt_images
from mgd_timm.data.dataset import Images, load_images
from mgd_timm.data.decode import DataError
from mgd_timm.data.sources import SmallImageSource
from mgd_timm.recipe.data import Data
from mgd_timm.storage.cache import cache_folder

CPU = torch.device("cpu")


def spoil(folder: Path, *names: str) -> Path:
    """Truncate files, and overwrite the last one with text."""
    for name in names:
        (folder / name).write_bytes((folder / name).read_bytes()[:600])
    (folder / names[-1]).write_text("no image")
    return folder


def read(place: Path, **data: object) -> Images:
    return load_images(Data(data_dir=str(place), **{"workers": 0, **data}), 1, log=lambda _: None)  # type: ignore[arg-type]


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """24 training and 12 test images of 100x100, one of each corrupt."""
    return spoil(write_pictures(tmp_path / "large", 24, 100), "train/b/4.png", "test/c/5.png")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_corrupt_image_is_refused_by_name_and_without_a_workers_traceback(workers: int, large: Path) -> None:
    images = read(large, img_size=32, workers=workers)
    expected = (
        r"^train image \d+ \(.*train/b/4\.png\): truncated or corrupt .*: replace it by an "
        r"intact copy, or move it out of the data\. Or skip up to N corrupt images with --max-bad N\.$"
    )
    with pytest.raises(DataError, match=expected):
        list(images.train.batches([images.train.ids], 0, CPU))


def test_corrupt_images_are_skipped_up_to_a_number(
    large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MGD_TIMM_CACHE", str(tmp_path / "cache"))
    with pytest.raises(
        DataError,
        match=r"2 corrupt images, more than --max-bad 1: .*4\.png.* test image .*5\.png.* --max-bad 2",
    ):
        read(large, img_size=32, max_bad=1)
    assert len(list((cache_folder() / "corrupt").iterdir())) == 2
    with monkeypatch.context() as context:  # looked for once
        context.setattr(corrupt_images, "ReadAhead", None)
        found = read(large, img_size=32, max_bad=2)
    assert [re.sub(r".*/(\w/\d\.png).*", r"\1", line) for line in found.corrupt] == ["b/4.png", "c/5.png"]
    assert found.test is not None
    assert (len(found.train.ids), len(found.test.ids), found.num_samples) == (23, 11, 24)
    again = read(large, img_size=32, max_bad=5, workers=2)
    monkeypatch.setenv("MGD_TIMM_CACHE", str(tmp_path / "other"))
    fresh = read(large, img_size=32, max_bad=5, workers=2)
    for other in (again, fresh):
        assert torch.equal(other.train.ids, found.train.ids)
        assert other.corrupt == found.corrupt
    (batch,) = found.train.batches([found.train.ids], 0, CPU)
    assert batch.labels.bincount().tolist() == [8, 7, 8]
    cut = read(large, img_size=32, max_bad=2, val_split=0.25)
    whole = read(write_pictures(tmp_path / "whole", 24, 100), img_size=32, val_split=0.25)
    assert cut.val is not None
    assert whole.val is not None
    bad = set(range(24)) - set(found.train.ids.tolist())
    assert set(cut.train.ids.tolist()) == set(whole.train.ids.tolist()) - bad
    assert set(cut.val.ids.tolist()) == set(whole.val.ids.tolist()) - bad


def test_a_corrupt_list_is_named_and_made_again(large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MGD_TIMM_CACHE", str(tmp_path / "cache"))
    found = read(large, img_size=32, max_bad=2)
    for path in cache_folder().glob("corrupt/*/*/state.json"):
        text = path.read_text()
        path.write_text(text.replace("image 1", "image 2").replace(": {}", ": {}\n"))
    said: list[str] = []
    again = load_images(Data(data_dir=str(large), img_size=32, max_bad=2, workers=0), 1, log=said.append)
    assert sum("state.json does not match its sha256" in line for line in said) == 2
    assert again.corrupt == found.corrupt
    assert torch.equal(again.train.ids, found.train.ids)


def test_small_images_are_skipped_too_and_no_cache_without_them_is_mistaken(tmp_path: Path) -> None:
    place = write_pictures(tmp_path / "small", 24, 20)
    place = spoil(place, "train/a/0.png")  # the first of all
    found = read(place, max_bad=1)
    assert isinstance(found.train, SmallImageSource)
    assert found.input_size == (3, 20, 20)
    (row,) = set(range(24)) - set(found.train.ids.tolist())
    assert not found.train.images[row].any()
    with pytest.raises(DataError, match=r"train/a/0\.png.*--max-bad"):
        read(place)


def test_a_class_of_only_corrupt_images_is_refused(tmp_path: Path) -> None:
    place = write_pictures(tmp_path / "few", 6, 100)
    spoil(place, "train/b/1.png", "train/b/4.png")
    with pytest.raises(DataError, match="no image of class 'b' can be decoded"):
        read(place, max_bad=3, img_size=32)


FAST = ["--model", "cifar_resnet8x05", "--img-size", "32", "--batch-size", "8", "--workers", "2"]


@pytest.mark.slow
def test_a_run_writes_the_list_of_what_it_skipped(large: Path, tmp_path: Path) -> None:
    done = call(
        "train", *FAST, "--data-dir", str(large), "--epochs", "1", "--max-bad", "2", "--output", str(tmp_path / "run")
    )
    assert done.returncode == 0, done.stderr
    assert "skipped 2 corrupt images of 36 (--max-bad 2): train image" in done.stdout
    lines = (tmp_path / "run" / "bad_images.txt").read_text().splitlines()
    assert [line.split(" image ")[0] for line in lines] == ["train", "test"]


@pytest.mark.slow
def test_a_killed_worker_ends_the_run_by_name(tmp_path: Path) -> None:
    place = tmp_path / "pictures"
    for split, count in (("train", 64), ("test", 8)):  # large enough that workers are always busy
        for number in range(count):
            (place / split / "ab"[number % 2]).mkdir(parents=True, exist_ok=True)
            buffer = io.BytesIO()
            Image.fromarray(np.random.default_rng(number).integers(0, 256, (700, 700, 3), dtype=np.uint8)).save(
                buffer, "JPEG"
            )
            (place / split / "ab"[number % 2] / f"{number}.jpg").write_bytes(buffer.getvalue())
    words = command("train", *FAST, "--data-dir", str(place), "--epochs", "500", "--output", str(tmp_path / "run"))
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment())
    killed: list[int] = []
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:  # again where a worker was about to end anyway
        with contextlib.suppress(psutil.NoSuchProcess):
            run = psutil.Process(process.pid)
            workers = [
                child for child in run.children() if child.cmdline() == run.cmdline()
            ]  # not a git that was asked for versions
            for worker in workers[:1]:
                worker.kill()
                killed.append(worker.pid)
        time.sleep(1 if killed else 0.01)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert re.search(
        rf"error: a DataLoader worker was killed.*use fewer --workers.*({'|'.join(map(str, killed))})",
        errors,
    )
    assert "Error in" not in errors
