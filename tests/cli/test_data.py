"""`mgd-timm data`: what was understood of a data set, as words, as JSON and as a picture."""

import json
from pathlib import Path

import numpy as np
import pytest
from image_files import folder, noise
from PIL import Image

from mgd_timm.cli.main import main

KEYS = {
    *("train", "eval", "classes", "image_column", "label_column", "path", "ignored_count", "ignored"),
    *("duplicates", "duplicate_examples"),
}


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two classes, of which one evaluation image is also a training image, and a file that is no image."""
    splits = {"train/cat": range(9), "train/dog": range(9, 12), "test/cat": range(2), "test/dog": range(20, 22)}
    made = folder(tmp_path / "photos", {place: [noise(i) for i in seeds] for place, seeds in splits.items()})
    (made / "train/cat/note.txt").write_text("a cat")
    (made / "test/cat/0.png").rename(made / "test/cat/the same.png")
    return made


def test_json_is_one_object(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "--data-dir", str(photos), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found) == KEYS
    assert found["train"] == {"split": "train", "images": 12, "per_class": {"cat": 9, "dog": 3}}
    assert found["eval"] == {"split": "test", "images": 4, "per_class": {"cat": 2, "dog": 2}}
    assert (found["image_column"], found["label_column"], found["path"]) == (None, None, "memory")
    assert (found["ignored_count"], found["ignored"]) == (
        1,
        [{"path": "train/cat/note.txt", "why": "not an image (.txt)"}],
    )
    assert found["duplicates"] == 2
    assert "test/cat/the same.png" in " ".join(name for pair in found["duplicate_examples"] for name in pair)


def test_the_table_has_what_the_object_has(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "--data-dir", str(photos), "--val-split", "0.3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "train       split 'train', 8 images" in lines
    assert "evaluation  split 'train', 4 images" in lines
    assert "images      decoded once and kept in memory" in lines
    assert "            train/cat/note.txt: not an image (.txt)" in lines
    assert [line.split() for line in lines[-2:]] == [["cat", "6", "3"], ["dog", "2", "1"]]


def test_a_refusal_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = folder(tmp_path / "photos", {"train": [noise(0)], "test": [noise(1)]})
    assert main(["data", "--data-dir", str(made)]) == 1
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert "test, train hold images themselves: expected class folders in them" in said[0]


def test_the_sheet_shows_each_class_as_in_training(photos: Path, tmp_path: Path) -> None:
    """Without augmentation a training image is shown as it is, enlarged by whole pixels."""
    sheet = tmp_path / "sheet.png"
    words = ["--pad", "0", "--hflip", "0", "--sheet", str(sheet)]
    assert main(["data", "--data-dir", str(photos), *words]) == 0
    shown = np.asarray(Image.open(sheet))
    first = shown[20 : 20 + 64, 4 : 4 + 53]
    expected = Image.fromarray(noise(0)).resize((53, 64), Image.Resampling.NEAREST)
    assert np.abs(first.astype(int) - np.asarray(expected).astype(int)).max() <= 1
    blank = shown[20 + 64 + 20 + 10, 4 + 3 * (53 + 4) + 10]  # the second row has three images
    assert blank.tolist() == [255, 255, 255]
