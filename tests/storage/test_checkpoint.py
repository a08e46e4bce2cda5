"""Checkpoints under real corruption, full disks and kills: complete, or absent."""

import ast
import errno
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch

import mgd_timm
from mgd_timm.storage.atomic_write import remove_partial_writes
from mgd_timm.storage.checkpoint import CheckpointError, State, load, load_newest, save, verify

SmallDisk = Callable[[str], AbstractContextManager[None]]

# Saves number after number; `values` and every tensor say which one it is.
SAVER = """
import sys, torch
from pathlib import Path
from mgd_timm.storage.checkpoint import State, save
folder, size, first, last, keep = Path(sys.argv[1]), *map(int, sys.argv[2:])
for number in range(first, last):
    tensors = {"model": {"w": torch.full((size,), number)}, "optim": {"m": torch.full((size,), -number)}}
    save(folder, number, State(tensors, {"updates": number}), keep=keep)
    print(number, flush=True)
"""


def state(number: int = 1) -> State:
    generator = torch.Generator().manual_seed(number)
    model = {"weight": torch.randn(8, 4, 3, 3, generator=generator), "steps": torch.tensor(number)}
    return State(
        {"model": model, "optim": {"weight.momentum": torch.randn(8, 4, 3, 3, generator=generator)}},
        {"updates": number},
    )


def assert_equal(one: State, two: State) -> None:
    assert one.values == two.values
    assert {group: set(tensors) for group, tensors in one.tensors.items()} == {
        g: set(t) for g, t in two.tensors.items()
    }
    for group, tensors in one.tensors.items():
        for name, tensor in tensors.items():
            other = two.tensors[group][name]
            assert (tensor.dtype, tensor.shape) == (other.dtype, other.shape), name
            assert torch.equal(
                tensor.contiguous().view(-1).view(torch.uint8), other.contiguous().view(-1).view(torch.uint8)
            ), name


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_round_trip_of_every_type_and_shape(tmp_path: Path) -> None:
    random_bytes = torch.randint(0, 256, (2, 3, 4, 16), dtype=torch.uint8)
    types = [
        *(
            torch.float64,
            torch.float32,
            torch.float16,
            torch.bfloat16,
            torch.float8_e4m3fn,
            torch.float8_e5m2,
            torch.complex64,
        ),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64),
    ]
    tensors = {str(dtype).removeprefix("torch."): random_bytes.view(dtype) for dtype in types}
    weight = torch.randn(4, 3, 5, 5)
    odd = {
        "bool": torch.tensor([True, False]),
        "channels_last": weight.to(memory_format=torch.channels_last),
        "transposed": weight[0, 0].T,
        "slice": weight[:, 1:2, ::2],
        "expanded": torch.ones(1).expand(5),
        "shared 1": weight,
        "shared 2": weight,
        "parameter": torch.nn.Parameter(weight),
        "scalar": torch.tensor(3.5),
        "scalar bf16": torch.tensor(1.1, dtype=torch.bfloat16),
        "empty": torch.empty(0),
        "empty axis": torch.empty(3, 0, 2, dtype=torch.bfloat16),
        "not finite": torch.tensor([float("nan"), float("inf"), -0.0]),
    }
    values = {
        "updates": 7,
        "none": None,
        "text": "ü\n",
        "list": [1.5, True],
        "big": 2**63,
        "tiny": 5e-324,
        "pi": 3.141592653589793,
    }
    written = State({"model": tensors, "odd.names/é".replace("/", "-"): odd, "nothing": {}}, values)
    assert_equal(load(save(tmp_path / "checkpoints", 7, written)), written)


def test_loaded_tensors_do_not_depend_on_the_file(tmp_path: Path) -> None:
    """A resumed run trains on these tensors while their checkpoint is deleted."""
    path = save(tmp_path, 1, state())
    read = load(path)
    shutil.rmtree(path)
    assert_equal(read, state())
    read.tensors["model"]["weight"].zero_()


@pytest.mark.parametrize("umask", [0o022, 0o007, 0o077])
def test_modes_follow_the_umask(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        path = save(tmp_path, 1, state())
        assert path.stat().st_mode & 0o777 == 0o777 & ~umask
        assert {file.stat().st_mode & 0o777 for file in path.iterdir()} == {0o666 & ~umask}
        assert os.umask(umask) == umask
    finally:
        os.umask(before)


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_only_the_newest_checkpoints_are_kept(tmp_path: Path, keep: int) -> None:
    for number in (8, 9, 10, 11, 99_999_999, 100_000_000):  # the last has a digit more
        save(tmp_path, number, state(number), keep=keep)
    expected = ["00000008", "00000009", "00000010", "00000011", "99999999", "100000000"][-keep:]
    assert names(tmp_path) == sorted(expected)
    found = load_newest(tmp_path, pytest.fail)
    assert found is not None
    assert_equal(found, state(100_000_000))


def test_load_newest_is_none_without_a_checkpoint(tmp_path: Path) -> None:
    assert load_newest(tmp_path, pytest.fail) is None
    assert load_newest(tmp_path / "missing", pytest.fail) is None
    (tmp_path / "report.html").touch()
    (tmp_path / "123").touch()
    (tmp_path / "export").mkdir()
    assert load_newest(tmp_path, pytest.fail) is None


def test_a_checkpoint_is_written_once_and_rewritten_if_corrupt(tmp_path: Path) -> None:
    path = save(tmp_path, 1, state())
    inode = path.stat().st_ino
    assert save(tmp_path, 1, state()) == path
    assert path.stat().st_ino == inode
    (path / "model.safetensors").write_bytes(b"")
    assert_equal(load(save(tmp_path, 1, state())), state())
    assert names(tmp_path) == ["00000001"]


@pytest.mark.parametrize("keep", [1, 2])
def test_a_corrupt_newest_checkpoint_does_not_displace_later_ones(tmp_path: Path, keep: int) -> None:
    for number in (10, 20):
        save(tmp_path, number, state(number))
    (tmp_path / "00000020" / "state.json").unlink()
    for number in (12, 14):
        save(tmp_path, number, state(number), keep=keep)
    assert names(tmp_path) == ["00000012", "00000014"][-keep:]
    found = load_newest(tmp_path, pytest.fail)
    assert found is not None
    assert_equal(found, state(14))


def flip(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= rng.randrange(1, 256)
    path.write_bytes(content)


def truncate(path: Path, rng: random.Random) -> None:
    os.truncate(path, rng.randrange(path.stat().st_size))


def append(path: Path, rng: random.Random) -> None:
    path.write_bytes(path.read_bytes() + rng.choice([b"\0", b"\n", b" "]))


def delete(path: Path, rng: random.Random) -> None:
    path.unlink()


def replace_by_folder(path: Path, rng: random.Random) -> None:
    path.unlink()
    path.mkdir()


def replace_by_older(path: Path, rng: random.Random) -> None:
    path.write_bytes((path.parents[1] / "00000001" / path.name).read_bytes())


def add_foreign(path: Path, rng: random.Random) -> None:
    path.with_name(f"other-{path.name}").write_bytes(path.read_bytes())


@pytest.mark.parametrize("file", ["model.safetensors", "optim.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("damage", [flip, truncate, append, delete, replace_by_folder, replace_by_older, add_foreign])
def test_every_corruption_is_found_and_the_older_checkpoint_used(
    damage: Callable[[Path, random.Random], None], file: str, tmp_path: Path
) -> None:
    rng = random.Random(file)
    for number in (1, 2):
        save(tmp_path / "whole", number, state(number))
    for attempt in range(150 if damage is flip else 20 if damage is truncate else 1):
        folder = tmp_path / str(attempt)
        shutil.copytree(tmp_path / "whole", folder)
        damage(folder / "00000002" / file, rng)
        with pytest.raises(CheckpointError, match="00000002"):
            verify(folder / "00000002")
        with pytest.raises(CheckpointError, match="00000002"):
            load(folder / "00000002")
        said: list[str] = []
        found = load_newest(folder, said.append)
        assert found is not None
        assert_equal(found, state(1))
        assert len(said) == 1
        assert said[0].startswith(f"skipped a corrupt checkpoint: {folder / '00000002'}: ")


def test_every_byte_of_the_manifest_counts(tmp_path: Path) -> None:
    manifest = save(tmp_path, 1, state()) / "manifest.json"
    whole = manifest.read_bytes()
    for place in range(len(whole)):
        for other in {b" ", b"\r", b"\n", whole[place : place + 1].swapcase()} - {
            whole[place : place + 1]
        }:  # to JSON all the same
            manifest.write_bytes(whole[:place] + other + whole[place + 1 :])
            with pytest.raises(CheckpointError):
                verify(manifest.parent)
    manifest.write_bytes(whole)
    verify(manifest.parent)


def test_a_manifest_that_is_none_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, 1, state())
    for text in ("", "[]", "null", "{}", '{"state.json": 1}', "\xff"):
        (path / "manifest.json").write_text(text, encoding="latin-1")
        with pytest.raises(CheckpointError, match="00000001"):
            verify(path)


def test_load_newest_is_none_and_logs_each_corrupt_checkpoint(tmp_path: Path) -> None:
    said: list[str] = []
    for number in (1, 2):
        (save(tmp_path, number, state(number)) / "state.json").write_text("{}")
    assert load_newest(tmp_path, said.append) is None
    assert ["00000002" in said[0], "00000001" in said[1]] == [True, True]


def test_a_failed_save_leaves_nothing(tmp_path: Path) -> None:
    save(tmp_path, 1, state())
    with pytest.raises(TypeError, match="not JSON serializable"):
        save(tmp_path, 2, State(state(2).tensors, {"updates": torch.tensor(2)}))
    assert names(tmp_path) == ["00000001"]


def run_saver(folder: Path, *args: int, limit: int | None = None) -> subprocess.CompletedProcess[str]:
    """SAVER in a process of its own, where asked for with a limit on the size of files: the write then fails with
    EFBIG."""

    def lower() -> None:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    command = [sys.executable, "-c", SAVER, str(folder), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, preexec_fn=lower)


def assert_refused_and_untouched(done: subprocess.CompletedProcess[str], folder: Path) -> None:
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(f"OSError: [Errno 28] no space left to write {folder}/0000000")
    assert "Free some space and start again" in done.stderr
    for name in names(folder):
        verify(folder / name)


@pytest.mark.slow
def test_a_limit_on_file_sizes_leaves_the_older_checkpoint(tmp_path: Path) -> None:
    save(tmp_path, 1, state())
    done = run_saver(tmp_path, 20_000, 2, 4, 2, limit=64 * 1024)  # 160 kB a group
    assert_refused_and_untouched(done, tmp_path)
    assert names(tmp_path) == ["00000001"]


# Two checkpoints of 328 kB and a filler of 400 kB leave no room in: tensors, tensors, state.json, the manifest; or no
# inode.
@pytest.mark.parametrize(
    "options", ["size=1080k", "size=1240k", "size=1376k", "size=1380k", "nr_inodes=14", "nr_inodes=16"]
)
def test_a_full_disk_leaves_the_older_checkpoints(tmp_path: Path, small_disk: SmallDisk, options: str) -> None:
    with small_disk(options):
        filler, folder = tmp_path / "filler", tmp_path / "checkpoints"
        filler.write_bytes(bytes(400 * 1024))
        big = State({"model": {"w": torch.ones(40_000)}, "optim": {"m": torch.ones(40_000)}}, {"updates": 0})
        for number in (1, 2):
            save(folder, number, State(big.tensors, {"updates": number}))
        (tmp_path / "inode 14").touch()
        for _ in range(2):
            with pytest.raises(
                OSError, match=r"no space left to write .*00000003: nothing was changed there\. Free some space"
            ) as caught:
                save(folder, 3, big)
            assert caught.value.errno == errno.ENOSPC
            assert names(folder) == ["00000001", "00000002"]
        verify(folder / "00000001")
        found = load_newest(folder, pytest.fail)
        assert found is not None
        assert_equal(found, State(big.tensors, {"updates": 2}))
        filler.unlink()
        if options.startswith("size"):
            save(folder, 3, big)
            assert names(folder) == ["00000002", "00000003"]


@pytest.mark.slow
def test_a_kill_at_any_moment_leaves_a_whole_newest_checkpoint(tmp_path: Path) -> None:
    """A real process, really killed: nothing that it reported as saved is lost, and what is found is of one save."""
    rng, first = random.Random(0), 1
    for _ in range(4):
        command = [sys.executable, "-c", SAVER, str(tmp_path), "200000", str(first), "100000", "1"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == f"{first}\n"
            time.sleep(rng.uniform(0, 0.1))
            process.kill()
            reported = [first, *map(int, process.stdout.read().split())]
        remove_partial_writes(tmp_path)
        found = load_newest(tmp_path, print)
        assert found is not None
        number = found.values["updates"]
        assert number in (reported[-1], reported[-1] + 1)  # killed between the rename and the report
        assert torch.equal(found.tensors["model"]["w"], torch.full((200_000,), number))
        assert torch.equal(found.tensors["optim"]["m"], torch.full((200_000,), -number))
        assert not list(tmp_path.glob(".writing-*"))
        first = number + 1


def test_no_pickle_anywhere() -> None:
    """Not even by another name: no import of a pickling module, no torch.save, torch.load or allow_pickle.

    Public checkpoints are read by one call in the module of the explicit import command, which loads tensors only.
    """
    package = Path(mgd_timm.__file__).parent
    loads = 0
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            banned = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
            assert not {module.split(".")[0] for module in modules} & banned, path
            if isinstance(node, ast.ImportFrom) and node.module == "torch":
                assert not {alias.name for alias in node.names} & {"save", "load"}, path
            if isinstance(node, ast.Attribute) and node.attr in ("save", "load", "hub"):
                of_torch = isinstance(node.value, ast.Name) and node.value.id == "torch"
                assert not of_torch or (path.name, node.attr) == ("import_checkpoint.py", "load"), path
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                loads += 1
                assert [k.value.value for k in node.keywords if k.arg == "weights_only"] == [True], path
            if isinstance(node, ast.Attribute):
                assert node.attr not in (
                    "load_state_dict_from_url",
                    "save_state",
                    "load_state",
                    "register_for_checkpointing",
                ), path
            if isinstance(node, ast.keyword):
                safe = {"allow_pickle": False, "weights_only": True}
                assert node.arg not in safe or node.value.value is safe[node.arg], path
    assert loads == 1


def test_the_files_are_plain(tmp_path: Path) -> None:
    path = save(tmp_path, 1, state())
    assert names(path) == ["manifest.json", "model.safetensors", "optim.safetensors", "state.json"]
    assert json.loads((path / "state.json").read_text()) == {"updates": 1}
