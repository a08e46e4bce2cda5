"""Machines as people have them: little shared memory, closed or narrow streams, other locales, a deleted folder."""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TRAIN = ["train", "--model", "cifar_resnet8x05", "--epochs", "1", "--batch-size", "8"]


def run(words: list[object], *, shell: str = '"$@"', **environment: str) -> subprocess.CompletedProcess[bytes]:
    """A command in a process of its own; `shell` may redirect its streams."""
    command = ["bash", "-c", shell, "bash", sys.executable, *map(str, words)]
    return subprocess.run(command, capture_output=True, check=False, timeout=300, env={**os.environ, **environment})


def one_line(done: subprocess.CompletedProcess[bytes], *texts: str, code: int = 1) -> None:
    """Assert that a command failed in one line with these texts."""
    error = done.stderr.decode()
    assert done.returncode == code, error
    assert error.startswith("mgd-timm: error: ")
    assert error.count("\n") == 1, error
    assert all(text in error for text in texts), error


def may_mount() -> bool:
    if shutil.which("unshare") is None:
        return False
    command = ["unshare", "-m", "mount", "-t", "tmpfs", "tmpfs", "/dev/shm"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


@pytest.mark.slow
def test_little_shared_memory_is_named_and_none_is_done_without(big, tmp_path):
    if not may_mount():
        pytest.skip("mounting a small /dev/shm needs root")
    script = f"""
import subprocess, sys
from mgd_timm.cli.main import main
words = {[*TRAIN, "--data-dir", str(big)]!r}
assert main([*words, "--img-size", "224", "--output", {str(tmp_path / "small")!r}]) == 1
subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", "/dev/shm"], check=True)
sys.exit(main([*words, "--img-size", "32", "--output", {str(tmp_path / "none")!r}]))
"""
    mount = 'mount -t tmpfs -o size=512k tmpfs /dev/shm && exec "$@"'
    done = run(["-c", script], shell=f"unshare -m bash -c '{mount}' bash \"$@\"")
    error = done.stderr.decode()
    assert done.returncode == 0, error
    assert "Traceback" not in error
    assert "mgd-timm: error: the shared memory (/dev/shm) is too small" in error
    assert "--workers 0" in error
    assert b"no semaphore can be made in /dev/shm" in done.stdout
    assert (tmp_path / "none" / "summary.json").is_file()


@pytest.mark.slow
def test_a_run_needs_no_open_streams(little, tmp_path):
    words = ["-m", "mgd_timm", *TRAIN, "--data-dir", little, "--output", tmp_path / "run"]
    assert run(words, shell='"$@" <&- >&- 2>&-').returncode == 0
    assert (tmp_path / "run" / "summary.json").is_file()


@pytest.mark.slow
def test_a_run_prints_ascii_and_has_no_warnings(little, tmp_path):
    """Into a pipe whose encoding lacks the characters of the run's folder."""
    output = tmp_path / "it's café"
    words = ["-W", "error", "-m", "mgd_timm", *TRAIN, "--data-dir", little, "--output", output]
    done = run(words, PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    line = done.stdout.decode("ascii").splitlines()[-1]
    call = ast.parse(line.removeprefix("load it: ")).body[-1]
    assert isinstance(call, ast.Expr)
    assert ast.literal_eval(call.value.args[0]) == f"local-dir:{output / 'export'}"


@pytest.mark.slow
def test_a_c_locale_is_named(tmp_path):
    """Where Python's UTF-8 mode is turned off; a C locale alone turns it on."""
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    one_line(run(["-m", "mgd_timm", *TRAIN, "--output", tmp_path / "café"], **locale), "output=", "PYTHONUTF8=1")
    (tmp_path / "flags.yaml").write_text("output: café\n", encoding="utf-8")
    done = run(["-m", "mgd_timm", *TRAIN, "--config", tmp_path / "flags.yaml"], **locale)
    one_line(done, "'ascii' codec can't decode", "PYTHONUTF8=1")


@pytest.mark.slow
def test_output_that_cannot_be_written_is_one_line_at_most(tmp_path):
    words = ["-m", "mgd_timm", "list", "data"]
    for unbuffered in ("", "1"):  # written at the end, or at once
        one_line(run(words, shell='"$@" > /dev/full', PYTHONUNBUFFERED=unbuffered), "No space left")
        # The pipe's reader ends before the command writes.
        done = run(words, shell='exec 3> >(:); sleep 0.1; "$@" >&3', PYTHONUNBUFFERED=unbuffered)
        if done.returncode:
            one_line(done, "Broken pipe")
        else:
            assert done.stderr == b""


@pytest.mark.slow
def test_a_deleted_folder_is_named(tmp_path: Path):
    gone = tmp_path / "gone"
    gone.mkdir()
    words = ["-m", "mgd_timm", *TRAIN, "--output", tmp_path / "run"]
    done = run(words, shell=f'cd "{gone}" && rmdir "{gone}" && "$@"')
    one_line(done, "the current folder was deleted")
