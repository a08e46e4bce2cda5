"""200 flipped bits, 100 truncations, missing and foreign files in real checkpoints: all found, and the one before is used."""

import json
import os
import random
import shutil
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from forked import Ranks
from small import digest

from mgd_timm.checkpoint import State, load, newest

FLIPS, TRUNCATIONS, SEED = 200, 100, 5


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
        torch.equal(tensor, two.tensors[group][name]) for group, tensors in one.tensors.items() for name, tensor in tensors.items()
    )


def assert_found(checkpoints: Path, before: State, case: str) -> None:
    """The newest is refused in words that name it, and the one before it is read."""
    said: list[str] = []
    found = newest(checkpoints, said.append)
    assert found is not None, case
    assert same(found, before), case
    assert len(said) == 1, case
    assert said[0].startswith(f"skipped a damaged checkpoint: {max(checkpoints.iterdir())}: "), case


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
    assert newest(checkpoints, pytest.fail) is not None  # whole again
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
        assert "recipe.yaml is damaged" in ranks.said()
        assert "Traceback" not in ranks.said()
    else:
        assert codes == [0], ranks.said()
        skipped = {"newest": [newer], "both": [newer, older]}.get(damage, [])
        assert ranks.said().count("skipped a damaged checkpoint") == len(skipped)
        for path in skipped:
            assert f"skipped a damaged checkpoint: {path}: optimizer.safetensors does not match its sha256" in ranks.said()
        assert digest(tmp_path / "run" / "export" / "model.safetensors") == digest(whole / "export" / "model.safetensors")
        assert [json.loads(line)["stage"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    report(f"corruption: {damage} damaged: said by the resumed run")
