"""Locks on a folder: which run is waited for, and that a lock is free once its holder has ended, however it ended."""

import errno
import fcntl
import json
import multiprocessing
import os
import re
import signal
import stat
import tempfile
import time
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest
import torch
from small import holding

from mgd_timm.storage.atomic_write import PARTIAL_PREFIX
from mgd_timm.storage.checkpoint import State, save
from mgd_timm.storage.lock import HOLDER_FILE, LOCK_FILE, Lock, load_or_create


def test_waiting_names_the_holder_and_its_death_releases_the_lock(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said: list[str] = []
    lock = Lock(tmp_path / "store", "it", said.append, progress=lambda: "3 of 8")
    with holding(tmp_path / "store") as holder:
        assert not lock.try_acquire(1.4)
        assert not lock.try_acquire(0.1)
        assert re.fullmatch(rf"it: another run \(\S+, pid {holder.pid}\) writes it; waiting for it to end", *said)
        assert re.search(rf"waiting for another run \(\S+, pid {holder.pid}\): 00:01, 3 of 8", capsys.readouterr().err)
    with lock:
        assert json.loads((tmp_path / "store" / HOLDER_FILE).read_text())["pid"] == os.getpid()
    assert re.fullmatch(r"it: free after \d+ s", said[1])
    assert [path.name for path in (tmp_path / "store").iterdir()] == [LOCK_FILE]


def _hold_and_fork(folder: Path, ready: Event) -> None:
    lock = Lock(folder, "it", print)
    if lock.try_acquire(0) and os.fork():
        ready.set()
    time.sleep(600)


def test_a_worker_that_outlives_its_killed_parent_holds_no_lock(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    holder = context.Process(target=_hold_and_fork, args=(tmp_path, ready))
    holder.start()
    assert ready.wait(10)
    (worker,) = Path(f"/proc/{holder.pid}/task/{holder.pid}/children").read_text().split()
    os.kill(int(holder.pid or 0), signal.SIGKILL)
    holder.join()
    try:
        lock = Lock(tmp_path, "it", pytest.fail)
        assert lock.try_acquire(0)
        lock.release()
    finally:
        os.kill(int(worker), signal.SIGKILL)


def test_one_process_writes_at_a_time(tmp_path: Path) -> None:
    """Four processes add to a number 25 times each, which they read and write back."""
    context = multiprocessing.get_context("fork")
    (tmp_path / "number").write_text("0")

    def add() -> None:
        for _ in range(25):
            with Lock(tmp_path, "it", lambda _: None, quiet=True):
                number = int((tmp_path / "number").read_text())
                time.sleep(0.001)
                (tmp_path / "number").write_text(str(number + 1))

    processes = [context.Process(target=add) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert (tmp_path / "number").read_text() == "100"


def test_one_of_four_runs_replaces_a_corrupt_cache_entry(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    state, made, begin = State({"index": {"a": torch.arange(9)}}, {"x": 1}), context.Value("i", 0), context.Event()
    os.truncate(save(tmp_path, 1, state) / "index.safetensors", 50)

    def make() -> State:
        with made.get_lock():
            made.value += 1
        return state

    def read() -> None:
        begin.wait()
        found = load_or_create(tmp_path, "it", make, lambda _: None)
        assert torch.equal(found.tensors["index"]["a"], torch.arange(9))
        assert found.values == {"x": 1}

    processes = [context.Process(target=read) for _ in range(4)]
    for process in processes:
        process.start()
    begin.set()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert made.value == 1


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK])
def test_a_file_system_without_locks_is_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """As none can be had here, the system's call is made to answer as theirs does: Lustre's, and NFS's."""

    def refuse(*_: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)
    (tmp_path / f"{PARTIAL_PREFIX}x").mkdir()
    said: list[str] = []
    with Lock(tmp_path, "it", said.append), Lock(tmp_path, "it", said.append):
        pass
    assert len(said) == 2
    assert re.fullmatch(
        r"warning: it: its file system has no locks \(.*\)\. Another run may repeat the same work .*", said[0]
    )
    assert {path.name for path in tmp_path.iterdir()} == {LOCK_FILE, f"{PARTIAL_PREFIX}x"}  # it may be of a run at work


def test_another_user_may_lock_next_and_partial_writes_are_removed(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        Lock(tmp_path, "it", pytest.fail).try_acquire(0)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / LOCK_FILE).stat().st_mode) == 0o666
    (tmp_path / f"{PARTIAL_PREFIX}x").mkdir()
    with Lock(tmp_path, "it", pytest.fail):
        assert not (tmp_path / f"{PARTIAL_PREFIX}x").exists()


def _refused(folder: Path) -> None:
    if os.getuid() == 0:  # who may write everywhere
        os.setuid(65534)
    with pytest.raises(
        PermissionError,
        match=r"it cannot be written \(\[Errno 13\] Permission denied: '\S+'\): make its folder writable",
    ):
        Lock(folder, "it", pytest.fail).try_acquire(0)


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory() as name:  # in tmp_path only its owner may look
        folder = Path(name)
        with Lock(folder, "it", pytest.fail):
            pass
        folder.chmod(0o555)
        process = multiprocessing.get_context("fork").Process(target=_refused, args=(folder,))
        process.start()
        process.join()
        folder.chmod(0o755)
    assert process.exitcode == 0
    (tmp_path / "file").touch()
    with pytest.raises(
        NotADirectoryError, match=r"\] it cannot be written \(.*store'\): make its folder writable, or "
    ):
        Lock(tmp_path / "file" / "store", "it", pytest.fail).try_acquire(0)
