"""Image folders that several files of tests read."""

from pathlib import Path

import pytest
from image_files import folder, noise


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight training and four test images in two classes, too large for the cache and of several sizes."""
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
