"""Flipped bits, truncations, missing and foreign files in real checkpoints and caches: all found, and what is whole is
used."""

import json
import os
import random
import shutil
import tarfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from forked import Ranks
from small import digest, write_pictures

from mgd_timm.data.dataset import Images, load_images
from mgd_timm.data.image_cache import FILE
from mgd_timm.data.sources import SmallImageSource
from mgd_timm.recipe.data import Data
from mgd_timm.storage.checkpoint import State, load, load_newest
from mgd_timm.storage.lock import LOCK_FILE

FLIPS, TRUNCATIONS, SEED = 200, 100, 5
CACHE_FLIPS, CACHE_TRUNCATIONS = 12, 4  # of each file


@pytest.fixture(scope="module")
def run(tiny_flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str], dict[str, str]]:
    """A finished run with its last two checkpoints, its words and its environment."""
    folder = tmp_path_factory.mktemp("corruption")
    words, environment = [*tiny_flags, "--output", str(folder / "run")], {"MGD_TIMM_CACHE": str(folder / "cache")}
    ranks = Ranks(words, folder / "log", environment=environment)
    assert ranks.wait(180) == [0], ranks.said()
    return folder / "run", words, environment


def same(one: State, two: State) -> bool:
    return one.values == two.values and all(
        torch.equal(tensor, two.tensors[group][name])
        for group, tensors in one.tensors.items()
        for name, tensor in tensors.items()
    )


def assert_found(checkpoints: Path, before: State, case: str) -> None:
    """The load_newest is refused in words that name it, and the one before it is read."""
    said: list[str] = []
    found = load_newest(checkpoints, said.append)
    assert found is not None, case
    assert same(found, before), case
    assert len(said) == 1, case
    assert said[0].startswith(f"skipped a corrupt checkpoint: {max(checkpoints.iterdir())}: "), case


def test_every_flipped_bit_and_truncation_is_found(run: tuple, tmp_path: Path, report: Callable[[str], None]) -> None:
    checkpoints, began, rng = tmp_path / "checkpoints", time.monotonic(), random.Random(SEED)
    shutil.copytree(run[0] / "checkpoints", checkpoints)
    older, newer = sorted(checkpoints.iterdir())
    before, files, hit = load(older), sorted(newer.iterdir()), Counter[str]()
    assert [path.name for path in files] == [
        *("ema.safetensors", "manifest.json", "optimizer.safetensors", "state.json", "trainee.safetensors")
    ]
    for number in range(FLIPS + TRUNCATIONS):
        path = files[number % len(files)]
        whole = path.read_bytes()
        if number < FLIPS:
            bit = rng.randrange(8 * len(whole))
            damaged = bytearray(whole)
            damaged[bit // 8] ^= 1 << bit % 8
            path.write_bytes(damaged)
            case = f"bit {bit} of {path.name}"
        else:
            length = rng.randrange(len(whole))
            os.truncate(path, length)
            case = f"{path.name} cut to {length} bytes"
        assert_found(checkpoints, before, case)
        hit[path.name] += 1
        path.write_bytes(whole)
    assert load_newest(checkpoints, pytest.fail) is not None  # whole again
    seconds = time.monotonic() - began
    report(f"corruption, seed {SEED}: {FLIPS} bits, {TRUNCATIONS} truncations, {dict(hit)}: all found; {seconds:.0f} s")


def test_every_missing_and_foreign_file_is_found(run: tuple, tmp_path: Path, report: Callable[[str], None]) -> None:
    checkpoints = tmp_path / "checkpoints"
    shutil.copytree(run[0] / "checkpoints", checkpoints)
    older, newer = sorted(checkpoints.iterdir())
    before, aside = load(older), tmp_path / "aside"
    cases = 0
    for path in sorted(newer.iterdir()):
        path.rename(aside)
        assert_found(checkpoints, before, f"{path.name} is missing")
        path.mkdir()
        assert_found(checkpoints, before, f"{path.name} is a folder")
        path.rmdir()
        path.symlink_to("nowhere")
        assert_found(checkpoints, before, f"{path.name} leads nowhere")
        path.unlink()
        shutil.copy(older / path.name, path)
        assert_found(checkpoints, before, f"{path.name} is the older checkpoint's")
        aside.replace(path)
        shutil.copy(path, newer / f"other-{path.name}")
        assert_found(checkpoints, before, f"{path.name} is there twice")
        (newer / f"other-{path.name}").unlink()
        cases += 5
    shutil.rmtree(newer)
    newer.mkdir()
    assert_found(checkpoints, before, "an empty folder")
    report(f"corruption: {cases + 1} missing and foreign files, all found")


@pytest.mark.parametrize("damage", ["newest", "both", "recipe", "metrics"])
def test_a_resumed_run_says_so_and_ends_with_the_same_student(
    run: tuple, tmp_path: Path, report: Callable[[str], None], damage: str
) -> None:
    whole, words, environment = run
    shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "export")
    older, newer = sorted((tmp_path / "run" / "checkpoints").iterdir())
    for path in {"newest": [newer], "both": [older, newer]}.get(damage, []):
        os.truncate(path / "optimizer.safetensors", 1000)
    if damage in ("recipe", "metrics"):
        path = tmp_path / "run" / ("recipe.yaml" if damage == "recipe" else "metrics.jsonl")
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2] + b"\0" + content[len(content) // 2 + 1 :])
    ranks = Ranks([*words[:-1], str(tmp_path / "run"), "--resume"], tmp_path / "log", environment=environment)
    codes = ranks.wait(180)
    if damage == "recipe":
        assert codes == [1]
        assert "recipe.yaml is corrupt" in ranks.said()
        assert "Traceback" not in ranks.said()
    else:
        assert codes == [0], ranks.said()
        skipped = {"newest": [newer], "both": [newer, older]}.get(damage, [])
        assert ranks.said().count("skipped a corrupt checkpoint") == len(skipped)
        for path in skipped:
            assert (
                f"skipped a corrupt checkpoint: {path}: optimizer.safetensors does not match its sha256" in ranks.said()
            )
        assert digest(tmp_path / "run" / "export" / "model.safetensors") == digest(
            whole / "export" / "model.safetensors"
        )
        assert [json.loads(line)["stage"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    report(f"corruption: {damage} corrupt: logged by the resumed run")


def test_every_change_in_a_cache_is_found_and_mended(
    run: tuple,
    tmp_path: Path,
    report: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Images, tar indices and the list of corrupt images; of the fitted heads, that nothing but what was written is
    read."""
    monkeypatch.setenv("MGD_TIMM_CACHE", str(tmp_path / "cache"))
    began, rng, data = time.monotonic(), random.Random(SEED), tmp_path / "data"
    for split, count in (("train", 12), ("test", 6)):
        write_pictures(tmp_path / "pictures", count, 20)
        (tmp_path / "pictures" / split / "a" / "0.png").write_text("no image")
        data.mkdir(exist_ok=True)
        with tarfile.open(data / f"{split}.tar", "w") as tar:
            tar.add(tmp_path / "pictures" / split, arcname=".")

    def read() -> tuple[Images, str]:
        found = load_images(Data(data_dir=str(data), max_bad=2, workers=0), 0)
        return found, capsys.readouterr().out

    def heads() -> tuple[State | None, str]:
        found = load_newest(place, print)
        return found, capsys.readouterr().out

    expected, _ = read()
    assert len(expected.corrupt) == 2
    assert isinstance(expected.train, SmallImageSource)
    pixels = expected.train.images.clone()  # they are mapped from a file that is changed below
    (place,) = (Path(run[2]["MGD_TIMM_CACHE"]) / "heads").iterdir()
    fitted, said = heads()
    assert fitted is not None
    assert not said
    files = [
        path
        for path in [*(tmp_path / "cache").rglob("*"), *place.rglob("*")]
        if path.is_file() and path.name != LOCK_FILE
    ]
    hit = Counter(
        path.relative_to(tmp_path / "cache").parts[0] if tmp_path in path.parents else "heads" for path in files
    )
    assert hit == {"images": 2, "tars": 6, "corrupt": 4, "heads": 3}
    for path in files:
        whole = path.read_bytes()
        for number in range(CACHE_FLIPS + CACHE_TRUNCATIONS):
            bit, length = rng.randrange(8 * len(whole)), rng.randrange(len(whole))
            flipped = whole[: bit // 8] + bytes([whole[bit // 8] ^ 1 << bit % 8]) + whole[bit // 8 + 1 :]
            case = f"bit {bit} of {path}" if number < CACHE_FLIPS else f"{path} cut to {length} bytes"
            path.write_bytes(flipped if number < CACHE_FLIPS else whole[:length])
            if tmp_path not in path.parents:
                assert heads()[0] is None, case
                path.write_bytes(whole)
                continue
            images, said = read()
            assert f"{path if path.name == FILE else path.parent}" in said, case
            assert "corrupt" in said, case
            assert path.read_bytes() == whole, case
            assert images.corrupt == expected.corrupt, case
            assert images.train.digest == expected.train.digest, case
            assert isinstance(images.train, SmallImageSource)
            assert torch.equal(images.train.images, pixels), case
    seconds = time.monotonic() - began
    report(
        f"corruption: {CACHE_FLIPS} bits and {CACHE_TRUNCATIONS} truncations in each of {dict(hit)}: all found; "
        f"{seconds:.0f} s"
    )


def test_a_run_with_damaged_caches_says_so_and_ends_with_the_same_student(
    run: tuple, tmp_path: Path, report: Callable[[str], None]
) -> None:
    whole, words, environment = run
    cache = shutil.copytree(environment["MGD_TIMM_CACHE"], tmp_path / "cache")
    images, heads = (
        max(cache.glob(f"images/*/{FILE}"), key=os.path.getsize),
        next(cache.glob("heads/*/0*/heads.safetensors")),
    )
    for path in (images, heads):
        content = bytearray(path.read_bytes())
        content[-5] ^= 1
        path.write_bytes(content)
    ranks = Ranks([*words[:-1], str(tmp_path / "run")], tmp_path / "log", environment={"MGD_TIMM_CACHE": str(cache)})
    assert ranks.wait(180) == [0], ranks.said()
    assert f"warning: {images} is corrupt (checksum of image 59): writing it again from the source" in ranks.said()
    assert f"skipped a corrupt checkpoint: {heads.parent}: heads.safetensors does not match its sha256" in ranks.said()
    assert digest(tmp_path / "run" / "export" / "model.safetensors") == digest(whole / "export" / "model.safetensors")
    report("corruption: corrupt images and heads in the cache: said, and the same student")
