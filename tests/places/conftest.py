"""Data of a few images, which a run takes less than a second for."""

from pathlib import Path

import pytest
from image_files import folder, noise


def _two_classes(root: Path, side: int, count: int = 4) -> Path:
    places = {f"{split}/{name}": 0 for split in ("train", "test") for name in ("cat", "dog")}
    return folder(
        root, {place: [noise(count * i + n, side, side) for n in range(count)] for i, place in enumerate(places)}
    )


@pytest.fixture(scope="session")
def little(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of 28x28 pixels, which are kept in memory."""
    return _two_classes(tmp_path_factory.mktemp("little"), 28)


@pytest.fixture(scope="session")
def big(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of 120x120 pixels, which DataLoader workers read."""
    return _two_classes(tmp_path_factory.mktemp("big"), 120, 8)
