"""A small part of the embedded images as parquet, and real processes on it."""

import contextlib
import hashlib
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.context import ForkProcess
from multiprocessing.synchronize import Event
from pathlib import Path

import datasets
import numpy as np
from forked import Ranks, command_line
from PIL import Image

from mgd_timm.recipe.data import EMBEDDED
from mgd_timm.storage.lock import Lock

ONE_IMAGE = 1.01
"""Points of accuracy on the 100 test images: whatever computes an accuracy in another way (in batches of another size,
folded, in another memory format, on more processes) may see one image that lies between two classes otherwise."""
SHORT = ["--student", "cifar_resnet8x05", "--epochs", "1", "--heads-epochs", "1", "--heads-augmentations", "1"]
FAST = [
    "--student",
    "cifar_resnet8x05",
    "--batch-size",
    "32",
    "--heads-epochs",
    "2",
    "--heads-augmentations",
    "2",
    "--log-interval",
    "5",
]


def write_small(folder: Path, train: int = 320, test: int = 100) -> Path:
    """The first images of each class, as train.parquet and test.parquet."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", train), ("test", test)):
        table = datasets.Dataset.from_parquet(
            str(EMBEDDED / "fashion_mnist" / f"{split}.parquet"), cache_dir=str(folder / "cache")
        )
        labels = table.with_format("numpy")["label"][:]
        rows = sorted(i for label in range(10) for i in (labels == label).nonzero()[0][: count // 10].tolist())
        table.select(rows).to_parquet(folder / f"{split}.parquet")
    for stray in (folder / "cache").rglob("*"):
        if stray.is_file():
            stray.unlink()
    return folder


def write_pictures(folder: Path, count: int = 48, size: int = 128) -> Path:
    """Three classes of large pictures in folders: noise around a colour, which a few updates tell apart."""
    generator = np.random.default_rng(0)
    for split in ("train", "test"):
        for number in range(count if split == "train" else count // 2):
            place = folder / split / "abc"[number % 3]
            place.mkdir(parents=True, exist_ok=True)
            pixels = generator.integers(0, 160, (size, size, 3), dtype=np.uint8)
            pixels[..., number % 3] += 80
            Image.fromarray(pixels).save(place / f"{number}.png", compress_level=1)
    return folder


def command(*arguments: str, processes: int = 1) -> list[str]:
    return launched("-m", "mgd_timm", *arguments, processes=processes)


def launched(*program: str, processes: int = 1) -> list[str]:
    """A command of Python, such as a script with its arguments, on a number of processes."""
    launch = (
        ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--rdzv_backend", "c10d"]
        if processes > 1
        else []
    )
    launch += ["--rdzv_endpoint", "localhost:0"] if processes > 1 else []
    return [sys.executable, *launch, *program]


def environment(threads: int = 1) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": str(threads), "ACCELERATE_USE_CPU": "1", "PYTHONUNBUFFERED": "1"}


def call(
    *arguments: object,
    processes: int = 1,
    timeout: float = 400,
    target: Callable[..., object] = command_line,
    torchrun: bool = False,
) -> subprocess.CompletedProcess[str]:
    """Carry out a command on new processes, and wait.

    Args:
        *arguments: Words of the command, or the arguments of `target`.
        processes: Number of processes.
        timeout: Seconds to wait at most.
        target: As for `Ranks`.
        torchrun: Start Python anew, several processes by torchrun; otherwise fork, which costs no imports.
    """
    if torchrun:
        words = command(*map(str, arguments), processes=processes)
        return subprocess.run(words, capture_output=True, text=True, timeout=timeout, env=environment(), check=False)
    with tempfile.TemporaryDirectory() as folder:
        out, errors = Path(folder, "out"), Path(folder, "errors")
        ranks = Ranks(arguments, out, errors=errors, processes=processes, environment=environment(), target=target)
        codes = ranks.wait(timeout)
        code = next((code for code in codes if code != 0), 0)
        assert code is not None, f"runs after {timeout} s: {arguments}"
        texts = ["".join(file.read_text() for file in files) for files in (ranks.logs, ranks.errors)]
    return subprocess.CompletedProcess(arguments, code, *texts)


def _reached(number: int, checkpoints: Path, ended: Callable[[], object]) -> bool:
    """Wait until checkpoint `number` or a later one is there, or a run has ended."""
    deadline = time.monotonic() + 300
    while not ended() and time.monotonic() < deadline:
        if any(path.name.isdecimal() and int(path.name) >= number for path in checkpoints.glob("*")):
            return True
        time.sleep(0.002)
    return False


def end_at(
    number: int, checkpoints: Path, kind: signal.Signals, *arguments: str, group: bool = False
) -> tuple[int | None, str]:
    """Start a run on one process and send it (or its whole process group) a signal once checkpoint `number` or a later
    one is there.

    Gives exit code and stderr.
    """
    with tempfile.TemporaryDirectory() as folder:
        ranks = Ranks(arguments, Path(folder, "out"), errors=Path(folder, "errors"), environment=environment())
        if _reached(number, checkpoints, lambda: not ranks.alive()):
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                (os.killpg if group else os.kill)(ranks.ranks[0].pid or 0, kind)
        (code,) = ranks.wait(300)
        return code, ranks.errors[0].read_text()


def end_launched_at(number: int, checkpoints: Path, kind: signal.Signals, *arguments: str) -> tuple[int, str]:
    """As `end_at` with `group`, for two processes started by torchrun."""
    process = subprocess.Popen(
        command(*arguments, processes=2),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        start_new_session=True,
    )
    if _reached(number, checkpoints, lambda: process.poll() is not None):
        os.killpg(process.pid, kind)
    _, errors = process.communicate(timeout=300)
    return process.returncode, errors


def _hold(folder: Path, ready: Event) -> None:
    lock = Lock(folder, "", print)
    assert lock.try_acquire(0)
    ready.set()
    time.sleep(600)


@contextlib.contextmanager
def holding(folder: Path) -> Iterator[ForkProcess]:
    """A process that holds a store's lock until it is killed."""
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    process = context.Process(target=_hold, args=(folder, ready))
    process.start()
    assert ready.wait(10)
    try:
        yield process
    finally:
        process.kill()
        process.join()


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def refuse(mgd, expected: list[str], *words: str) -> None:
    """Assert that a command fails with these texts in its error, and without a traceback."""
    code, _, errors = mgd(*words)
    assert code in (1, 2), errors
    for text in expected:
        assert text in errors, errors
    assert "Traceback" not in errors
