"""A disk without room at any write of a run: it is said, whatever is there stays whole, and --resume ends with the same
student.

The disk is a real one of a few megabytes that is filled at the n-th write, for every n; where none may be mounted, and
beside it, the system's limit on the size of files refuses the n-th write, or the next large one half-way.
"""

import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from forked import Ranks
from small import digest

from mgd_timm.storage.atomic_write import PARTIAL_PREFIX
from mgd_timm.storage.checkpoint import verify

ROOM = 40_000  # bytes that the limit on files leaves: half of the smallest tensors, more than the small files


def flags(tiny_flags: Sequence[str], place: Path) -> list[str]:
    """Fewer saves; a store of the teacher's outputs and a fitting stage beside the heads."""
    words = [word if word != "fitnet" else "ft" for word in tiny_flags[: tiny_flags.index("--checkpoint-interval")]]
    return [*words, "--fitting-epochs", "1", "--output", str(place / "run")]


def stored_flags(tiny_flags: Sequence[str], place: Path) -> list[str]:
    """The teacher's outputs from a store."""
    words = [word if word != "fitnet" else "kd" for word in tiny_flags[: tiny_flags.index("--checkpoint-interval")]]
    return [*words, "--teacher-store", str(place / "store"), "--output", str(place / "run")]


def full_at(number: int, room: int | None, filler: str, counted: str, *words: str) -> int:
    """The command line; at its write `number` there is no room any more, in files beyond `room` bytes where it is
    given."""
    from mgd_timm.cli.main import main

    sink = subprocess.Popen(["cat"], stdin=subprocess.PIPE)  # the log is a file as well: written by who has no limit
    assert sink.stdin is not None
    for stream in (1, 2):
        os.dup2(sink.stdin.fileno(), stream)
    make, writes = tempfile.mkdtemp, 0

    def mkdtemp(*args: Any, **options: Any) -> str:
        nonlocal writes
        if options.get("prefix") == PARTIAL_PREFIX:
            writes += 1
            if writes == number:
                if room is not None:
                    resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
                else:
                    fill(Path(filler))
        return make(*args, **options)

    tempfile.mkdtemp = mkdtemp
    code = main(list(words))
    if counted:
        Path(counted).write_text(str(writes))
    sys.stdout.flush()
    with open(os.devnull, "w") as nowhere:
        for stream in (1, 2):
            os.dup2(nowhere.fileno(), stream)
    sink.stdin.close()
    sink.wait()
    return code


def fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file:
        for size in (1 << 16, 1 << 10):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                pass


def check_whole(place: Path) -> None:
    """What an interrupted run left: nothing half-written, whole checkpoints, readable texts."""
    assert [str(path) for path in place.rglob(f"{PARTIAL_PREFIX}*")] == []
    for manifest in place.rglob("manifest.json"):
        verify(manifest.parent)
    for path in place.rglob("*.json"):
        json.loads(path.read_text())
    for path in place.rglob("metrics.jsonl"):
        for line in path.read_text().splitlines():
            json.loads(line)


KINDS = {
    "heads and a fitting stage": flags,
    "a store": stored_flags,
}


@pytest.fixture(scope="module")
def whole(tiny_flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str]]:
    """How often an undisturbed run writes, and the digest of its student."""
    found = {}
    for kind, words in KINDS.items():
        place = tmp_path_factory.mktemp("whole")
        given = [0, None, "", str(place / "writes"), *words(tiny_flags, place)]
        ranks = Ranks(given, place / "log", target=full_at, environment={"MGD_TIMM_CACHE": str(place / "cache")})
        assert ranks.wait(180) == [0], ranks.said()
        found[kind] = int((place / "writes").read_text()), digest(place / "run" / "export" / "model.safetensors")
    return found


def refused_and_resumed(
    number: int, room: int | None, words: list[str], place: Path, log: Path, expected: str, processes: int = 1
) -> str:
    """One run whose write `number` finds no room, and its resumption; gives the name of what was not written."""
    filler, environment = place / "filler", {"MGD_TIMM_CACHE": str(place / "cache")}
    given = [number, room, str(filler), "", *words]
    ranks = Ranks(given, log, target=full_at, environment=environment, processes=processes)
    codes = ranks.wait(120)
    said = ranks.said()
    assert codes[0] == 1, said
    assert all(codes), codes  # None: it waited on
    assert "Traceback" not in said
    refused = re.search(
        r"no space left to write (\S+): nothing was changed there. Free some space and start again", said
    )
    assert refused is not None, said
    if room is None:
        filler.unlink()
    check_whole(place)
    again = Ranks([*words, "--resume"], log.with_suffix(".again"), environment=environment, processes=processes)
    assert again.wait(180) == [0] * processes, again.said()
    assert digest(place / "run" / "export" / "model.safetensors") == expected, f"write {number} ({refused[1]})"
    assert (place / "run" / "summary.json").is_file()
    return re.sub(r"[0-9a-f]{32}|\d{5,}", "#", str(Path(refused[1]).relative_to(place)))


@pytest.mark.parametrize("kind", KINDS)
def test_a_limit_on_files_at_every_write(
    whole: dict[str, tuple[int, str]], tiny_flags: list[str], tmp_path: Path, report: Callable[[str], None], kind: str
) -> None:
    writes, expected = whole[kind]

    def task(number: int) -> str:
        place = tmp_path / str(number)
        place.mkdir()
        # Every other one refuses all files, the others large ones alone: the export's weights at the latest.
        room = ROOM if number % 2 and number < writes else 0
        return refused_and_resumed(number, room, KINDS[kind](tiny_flags, place), place, place / "log", expected)

    began = time.monotonic()
    with ThreadPoolExecutor(2) as pool:
        refused = list(pool.map(task, range(1, writes + 1)))
    report(f"full disk: {kind}: a limit at each of {writes} writes, said and resumed; {time.monotonic() - began:.0f} s")
    report("full disk: refused: " + ", ".join(sorted(set(refused))))


@pytest.mark.parametrize("kind", KINDS)
def test_a_small_disk_that_is_full_at_every_write(
    whole: dict[str, tuple[int, str]],
    tiny_flags: list[str],
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    small_disk: Callable[[str], AbstractContextManager[None]],
    report: Callable[[str], None],
    kind: str,
) -> None:
    writes, expected = whole[kind]
    logs, began, refused = tmp_path_factory.mktemp("logs"), time.monotonic(), []
    with small_disk("size=16m"):
        for number in range(1, writes + 1):
            place = tmp_path / str(number)
            place.mkdir()
            refused.append(
                refused_and_resumed(number, None, KINDS[kind](tiny_flags, place), place, logs / f"{number}", expected)
            )
            shutil.rmtree(place)
    report(
        f"full disk: {kind}: really full at each of {writes} writes, said and resumed; {time.monotonic() - began:.0f} s"
    )
    found = " ".join(refused)
    names = [
        "cache/images/",
        "run/recipe.yaml",
        "run/versions.json",
        "run/metrics.jsonl",
        "run/checkpoints/",
        "run/summary.json",
    ]
    names += ["run/export", "run/heads/metrics.jsonl", "run/heads/checkpoints/", "cache/heads/"]
    names += ["store/store.json", "store/pass-"] if kind == "a store" else ["run/fitting/", "cache/ft/"]
    assert [name for name in names if name not in found] == []


def test_a_full_disk_ends_two_processes(tiny_flags: list[str], tmp_path: Path, report: Callable[[str], None]) -> None:
    """Also where one of them alone writes while the other waits: of the images, at the first write."""
    for number in (1, 5):
        place = tmp_path / str(number)
        place.mkdir()
        words = stored_flags(tiny_flags, place)
        environment = {"MGD_TIMM_CACHE": str(place / "cache")}
        ranks = Ranks([number, 0, "", "", *words], place / "log", target=full_at, environment=environment, processes=2)
        began, codes = time.monotonic(), ranks.wait(60, grace=2)
        assert None not in codes, ranks.said(1)
        assert 0 not in codes
        assert "no space left to write" in ranks.said(0)
        assert number == 1 or "no space left to write" in ranks.said(1)  # rank 0's error, where they act together
        check_whole(place)
        report(f"full disk: two processes at write {number}: both ended after {time.monotonic() - began:.0f} s")
