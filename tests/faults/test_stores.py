"""Two runs on one teacher store and one cache at the same moment: one writes, the other waits, and both train the same
student."""

import copy
import re
import signal
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from forked import Ranks
from safetensors.torch import load_file, save_file
from small import digest, holding

from mgd_timm.data.dataset import load_images
from mgd_timm.distributed.collectives import leave, lock_on_main
from mgd_timm.features import Batch, Features
from mgd_timm.recipe.data import Data
from mgd_timm.storage.lock import Lock
from mgd_timm.teachers.outputs.memory import StoredOutputs, store_outputs

VIEWS = 40  # a shard of 60 images each


@pytest.fixture
def words(tiny_data: Path, tmp_path: Path) -> list[str]:
    flags = [
        "distill",
        "--student",
        "cifar_resnet8x05",
        "--data-dir",
        str(tiny_data),
        "--method",
        "mag",
        "--batch-size",
        "10",
    ]
    flags += [
        "--epochs",
        "2",
        "--drop",
        "0.2",
        "--heads-epochs",
        "2",
        "--heads-augmentations",
        "2",
        "--validation-batch-size",
        "10",
    ]
    return [*flags, "--teacher-store", str(tmp_path / "store"), "--teacher-augmentations", str(VIEWS)]


def start(words: list[str], folder: Path, name: str, processes: int = 1) -> Ranks:
    place = {"MGD_TIMM_CACHE": str(folder / "cache")}
    return Ranks(
        [*words, "--output", str(folder / name), "--resume"],
        folder / f"log {name}",
        processes=processes,
        environment=place,
    )


def wait_and_show(folder: Path, data: Path) -> int:
    """One of two processes, whose collectives time out after 4 seconds: waits for a lock, then shows a teacher a single
    image."""
    accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=4))])
    with lock_on_main(Lock(folder / "store", "the store", accelerator.print, quiet=True), accelerator):
        accelerator.wait_for_everyone()
    shown = outputs(data, accelerator)
    save_file({"embedding": shown.embedding, "logits": shown.logits}, folder / f"rank {accelerator.process_index}")
    leave()
    return 0


def outputs(data: Path, accelerator: Accelerator) -> StoredOutputs:
    source = copy.copy(load_images(Data(data_dir=str(data), img_size=100, workers=0), 0).train)
    source.ids, source.labels = source.ids[7:8], source.labels[7:8]

    def teach(batch: Batch) -> Features:
        return Features(batch.images.mean((2, 3)), batch.images.flatten(1)[:, 5000:5005])

    return store_outputs(teach, source, 2, accelerator, 8, quiet=True)


def test_two_processes_wait_longer_than_a_collective_may_and_one_of_them_has_no_image(
    tiny_data: Path, tmp_path: Path, report: Callable[[str], None]
) -> None:
    with holding(tmp_path / "store") as other:
        ranks = Ranks([tmp_path, tiny_data], tmp_path / "log", processes=2, target=wait_and_show)
        until(lambda: "waiting for it to end" in ranks.said(), ranks)
        assert f"pid {other.pid})" in ranks.said()
        time.sleep(5)
        assert ranks.alive(), ranks.said(1)
    assert ranks.wait(60) == [0, 0], ranks.said() + ranks.said(1)
    assert ranks.said().count("writes it") == 1
    expected = outputs(tiny_data, Accelerator())
    for rank in range(2):
        found = load_file(tmp_path / f"rank {rank}")
        assert torch.equal(found["embedding"], expected.embedding)
        assert torch.equal(found["logits"], expected.logits)
    report("stores: two processes waited for 5 s, where a collective may take 4")


def until(condition: Callable[[], bool], run: Ranks) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert run.alive(), run.said()
        assert time.monotonic() < deadline, run.said()
        time.sleep(0.01)


def shards(folder: Path) -> list[Path]:
    return sorted((folder / "store").glob("view-*"))


def student(folder: Path, name: str) -> str:
    return digest(folder / name / "export" / "model.safetensors")


WAITED = r"teacher store \S+: another run \(\S+, pid (\d+)\) writes it; waiting for it to end\n"


def test_two_runs_at_once(words: list[str], tmp_path: Path, report: Callable[[str], None]) -> None:
    began, runs = time.monotonic(), [start(words, tmp_path, name) for name in "ab"]
    for run in runs:
        assert run.wait(120) == [0], run.said()
    assert sorted(path.name for path in (tmp_path / "store").iterdir()) == [
        *(".lock", "store.json", *(f"view-{view:05d}-rows-000000000.safetensors" for view in range(VIEWS)))
    ]
    first, second = sorted(runs, key=lambda run: "waiting for it" in run.said())
    assert re.search(WAITED, second.said()), second.said()
    assert int(re.search(WAITED, second.said())[1]) == first.ranks[0].pid  # type: ignore[index]
    assert "waiting for it" not in first.said()
    assert f"{VIEWS} of {VIEWS} shards to write" in first.said()
    assert "another run has written to it; nothing to write" in second.said()
    assert student(tmp_path, "a") == student(tmp_path, "b")
    report(f"stores: two runs at once: one store, one student; {time.monotonic() - began:.0f} s")


def test_a_killed_writer_is_followed(words: list[str], tmp_path: Path, report: Callable[[str], None]) -> None:
    """Of two processes the one that holds the lock, while the other one still writes; two others wait for it."""
    began, first = time.monotonic(), start(words, tmp_path, "a", 2)
    until(lambda: len(shards(tmp_path)) > 0, first)
    first.signal(signal.SIGSTOP)  # the others' start takes longer than the rest of its work
    second = start(words, tmp_path, "b", 2)
    until(lambda: "waiting for it" in second.said(), second)
    there = len(shards(tmp_path))
    first.signal(signal.SIGKILL, 0)
    first.signal(signal.SIGCONT, 1)
    first.wait(60)
    assert second.wait(120) == [0, 0], second.said()
    left = re.search(rf"another run has written to it; (\d+) of {VIEWS} shards to write", second.said())
    assert left is not None, second.said()
    assert 0 < int(left[1]) <= VIEWS - there
    assert not list((tmp_path / "store").glob(".writing-*"))
    again = start(words, tmp_path, "a", 2)
    assert again.wait(120) == [0, 0], again.said()
    assert "; nothing to write" in again.said()
    assert student(tmp_path, "a") == student(tmp_path, "b")
    report(f"stores: a writer killed at shard {there}: followed; {time.monotonic() - began:.0f} s")
