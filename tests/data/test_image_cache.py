"""The cache of decoded images: every changed bit is found before a pixel is used, and the file is written again."""

import os
import random
import shutil
from pathlib import Path

import pytest
import torch
from small import holding

from mgd_timm.data import image_cache
from mgd_timm.data.dataset import load_images
from mgd_timm.data.decode import DataError
from mgd_timm.data.image_cache import FILE, CachedImages, load_or_create
from mgd_timm.data.sources import SmallImageSource
from mgd_timm.recipe.data import Data

SHAPE = (40, 3, 9, 7)
IMAGES = torch.randint(0, 256, SHAPE, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def refuse() -> torch.Tensor:
    raise AssertionError("decoded again")


def opened(place: Path, decode_all=lambda: IMAGES, log=lambda _: None) -> CachedImages:  # type: ignore[no-untyped-def]
    return load_or_create(place, SHAPE, decode_all, "train", log)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    assert torch.equal(opened(tmp_path / "cached").images, IMAGES)
    return tmp_path / "cached"


def corruptions(content: bytes) -> dict[str, bytes]:
    """30 flipped bits, half of them in the header, and truncations."""
    rng, header = random.Random(3), 8 + int.from_bytes(content[:8], "little")
    found = {}
    for number in range(30):
        bit = rng.randrange(8 * (header if number % 2 else len(content)))
        found[f"bit {bit}"] = content[: bit // 8] + bytes([content[bit // 8] ^ 1 << bit % 8]) + content[bit // 8 + 1 :]
    return found | {f"cut to {size}": content[:size] for size in (0, 5, header, len(content) // 2, len(content) - 1)}


def test_every_change_is_found_at_the_start_logged_and_mended(place: Path) -> None:
    content = (place / FILE).read_bytes()
    assert torch.equal(opened(place, refuse).images, IMAGES)
    for case, corrupt in corruptions(content).items():
        said: list[str] = []
        (place / FILE).write_bytes(corrupt)
        assert torch.equal(opened(place, log=said.append).images, IMAGES), case
        assert said[0].startswith(f"warning: {place / FILE} is corrupt ("), case
        assert said[0].endswith("): writing it again from the source"), case
        assert said[1:] == ["cached 40 images of split 'train', 0 MB"]
        assert (place / FILE).read_bytes() == content, case


def test_a_change_in_a_large_file_is_found_when_its_image_is_first_read(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_cache, "CHECKED_AT_ONCE", 0)
    content, rng = (place / FILE).read_bytes(), random.Random(4)
    header, size = 8 + int.from_bytes(content[:8], "little"), IMAGES[0].numel()
    for number in range(30):
        row = rng.randrange(len(IMAGES))
        first, length = (header + 8 * row, 8) if number % 3 == 0 else (header + 8 * len(IMAGES) + size * row, size)
        bit = 8 * first + rng.randrange(8 * length)
        (place / FILE).write_bytes(
            content[: bit // 8] + bytes([content[bit // 8] ^ 1 << bit % 8]) + content[bit // 8 + 1 :]
        )
        cached = opened(place, refuse)
        others = torch.tensor([other for other in torch.randperm(len(IMAGES)).tolist() if other != row])
        for rows in others.split(16):
            cached.check(rows)
        assert torch.equal(cached.images[others], IMAGES[others])
        with pytest.raises(
            DataError,
            match=rf"{FILE} is corrupt \(checksum of image {row}\): it was removed; start again",
        ):
            cached.check(torch.tensor([0, row, row, 1]))
        assert not (place / FILE).exists()
        assert torch.equal(opened(place).images, IMAGES)
        assert (place / FILE).read_bytes() == content
    for case, corrupt in corruptions(content).items():  # at the latest once all were read
        (place / FILE).write_bytes(corrupt)
        said: list[str] = []
        cached = opened(place, log=said.append)
        if not said:
            with pytest.raises(DataError, match="is corrupt"):
                cached.check(torch.arange(len(IMAGES)))
            opened(place)
        assert (place / FILE).read_bytes() == content, case


def test_a_batch_of_a_large_file_is_checked(small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MGD_TIMM_CACHE", str(tmp_path))
    monkeypatch.setattr(image_cache, "CHECKED_AT_ONCE", 0)
    data = Data(data_dir=str(small_data), mean=(0.5,) * 3, std=(0.5,) * 3)
    load_images(data, 0)
    path = next(path for path in tmp_path.glob(f"images/*/{FILE}") if path.stat().st_size > 320 * 3 * 28 * 28)
    with path.open("rb+") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read()
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 16]))
    source = load_images(data, 0).train
    assert isinstance(source, SmallImageSource)
    micro_batches = list(torch.arange(320).split(80))
    batches = source.batches([*micro_batches[:3], micro_batches[3] + 320], 0, torch.device("cpu"))
    assert sum(len(next(batches).images) for _ in range(3)) == 240
    with pytest.raises(DataError, match=r"corrupt \(checksum of image 319\)"):
        next(batches)
    with monkeypatch.context() as whole:
        whole.setattr(image_cache, "CHECKED_AT_ONCE", 1 << 30)
        load_images(data, 0)
    assert path.exists()


def test_a_cache_that_cannot_be_written_is_read(place: Path) -> None:
    """Nothing is written, so that a folder without the right to write will do, and another run's lock is not waited
    for."""
    with holding(place):
        before = sorted(place.iterdir())
        assert torch.equal(opened(place, refuse, pytest.fail).images, IMAGES)
        assert sorted(place.iterdir()) == before


def test_a_file_that_this_user_may_not_read_is_not_called_corrupt(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)  # above it only this user may look
    place.chmod(0o755)
    Path(FILE).chmod(0)
    user = os.geteuid()
    try:
        if user == 0:  # who may read everything
            os.seteuid(65534)
        with pytest.raises(PermissionError):
            load_or_create(Path(), SHAPE, refuse, "train", pytest.fail)
    finally:
        os.seteuid(user)


def test_what_a_killed_run_left_is_removed(place: Path) -> None:
    (place / FILE).unlink()
    (place / ".writing-x").mkdir()
    opened(place)
    assert not (place / ".writing-x").exists()


def test_images_that_another_run_writes_are_waited_for(place: Path, tmp_path: Path) -> None:
    said: list[str] = []

    def log(line: str) -> None:  # it waits: the other run ends its work
        said.append(line)
        if len(said) == 1:
            shutil.copy(place / FILE, tmp_path / "other")
            holder.kill()

    with holding(tmp_path / "other") as holder:
        assert torch.equal(opened(tmp_path / "other", refuse, log).images, IMAGES)
    assert f"pid {holder.pid}) writes it; waiting" in said[0]
    assert len(said) == 2
