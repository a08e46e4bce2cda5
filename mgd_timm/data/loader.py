"""DataLoader workers: batches that are decoded ahead of their use.

Workers live as long as their `ReadAhead`, so that an epoch does not wait until they have started.

Workers are forked, on Linux whatever the start method of the caller's script: others run the script again, and need a
guard (`if __name__ == "__main__"`) in it.

Python before 3.13 copies the lock of its list of threads into the new process as it is. If another thread holds it at
that moment (such as one of gloo's that releases a tensor just after a collective), the new process hangs. So each fork
first waits until the other threads are idle. From 3.13 on Python takes the lock itself before it forks.
"""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from mgd_timm.data.decode import DataError

_START_METHOD = "fork" if sys.platform == "linux" else None

SHARED_MEMORY = (
    "the shared memory (/dev/shm) is too small for the batches of DataLoader workers: give --workers 0, or a larger "
    "/dev/shm (docker run --shm-size 2g, or --ipc=host)"
)


def allowed_workers(workers: int, log: Callable[[str], None]) -> int:
    """Return the number of workers, or log why this process may start none and return 0: it is daemonic (such as those
    of a multiprocessing.Pool), or the machine has no semaphores."""
    reason = ""
    if multiprocessing.current_process().daemon:
        reason = "this process is daemonic"
    else:
        try:
            multiprocessing.Lock()
        except OSError as error:
            reason = f"no semaphore can be made in /dev/shm ({error})"
    if workers and reason:
        log(f"{reason}, so it may not start DataLoader workers: large images are decoded in it, as with --workers 0")
        return 0
    return workers


class ReadAhead:
    """Workers that read items ahead of their use. They start when they are first used, and end with this object.

    Args:
        items: `items[key]` is a tensor, number or string, or a tuple of them.
        workers: Number of DataLoader workers; 0 reads in this process.
    """

    def __init__(self, items: Any, workers: int) -> None:
        self.items, self.workers = items, workers
        self._keys = _Keys()
        self._loader: Any = None
        self._in_use = False

    def batches(self, keys: Iterable[list[Any]], device: torch.device, *, hint: str = "") -> Iterator[Any]:
        """Yield the collated `items[key]` of each list of keys, in order.

        Args:
            keys: One list of keys for each batch, iterated in this process, a few batches ahead.
            device: Device of the training step; memory is pinned for a GPU.
            hint: Added to the message of an item's error.

        Raises:
            DataError: An item raised it.
            OSError: The shared memory is too small for the batches.
            RuntimeError: A worker was killed.
        """
        if self._in_use:  # for batches that are not all taken yet: workers serve one iterator at a time
            yield from ReadAhead(self.items, self.workers).batches(keys, device, hint=hint)
            return
        self._in_use = True
        try:
            for batch in self._start(keys, device):
                if isinstance(batch, DataError):
                    raise DataError(f"{batch} {hint}".rstrip())
                yield batch
        except (DataError, GeneratorExit):
            raise
        except BaseException as error:  # a killed worker, or an interruption between two messages of the workers
            self._loader = None
            if isinstance(error, EOFError | ConnectionError):  # of a worker that was killed while it sent a batch
                time.sleep(1)  # in which torch's handler of its end raises the error that names the signal
                raise RuntimeError("DataLoader worker was killed while it sent a batch") from error
            if isinstance(error, RuntimeError) and "shared memory" in str(error):
                raise OSError(SHARED_MEMORY) from None  # raised in a worker, with its traceback as text
            raise
        finally:
            self._in_use = False

    def _start(self, keys: Iterable[list[Any]], device: torch.device) -> Iterator[Any]:
        """Return the batches of new keys; DataLoader discards what its workers still hold of earlier ones."""
        self._keys.keys = keys
        if self._loader is None:
            self._loader = torch.utils.data.DataLoader(
                _ErrorsAsItems(self.items),  # type: ignore[arg-type]  # beside a batch sampler it needs only __getitem__
                batch_sampler=self._keys,
                num_workers=self.workers,
                collate_fn=_collate,
                multiprocessing_context=_START_METHOD if self.workers else None,
                pin_memory=device.type == "cuda",
                worker_init_fn=_start_worker,
                persistent_workers=self.workers > 0,
                generator=torch.Generator(),  # DataLoader draws a seed, by default from the generator of dropout
            )
        with _signals_blocked():
            return iter(self._loader)


class _Keys:
    """The batch sampler of a DataLoader, which cannot be given another one."""

    keys: Iterable[list[Any]] = ()

    def __iter__(self) -> Iterator[list[Any]]:
        return iter(self.keys)


class _ErrorsAsItems:
    """`source[key]`, or the DataError that it raised: raised in a worker it would come with a traceback."""

    def __init__(self, source: Any) -> None:
        self.source = source

    def __getitem__(self, key: Any) -> Any:
        try:
            return self.source[key]
        except DataError as error:
            return error


def _collate(items: list[Any]) -> Any:
    failed = next((item for item in items if isinstance(item, DataError)), None)
    return failed if failed is not None else torch.utils.data.default_collate(items)


# -- signals

# macOS cannot wait for a signal and see its sender: there SIGTERM ends the workers.
_BLOCKED = {signal.SIGINT, signal.SIGTERM} if hasattr(signal, "sigwaitinfo") else {signal.SIGINT}


@contextlib.contextmanager
def _signals_blocked() -> Iterator[None]:
    """Block signals while workers start, so that a signal to the process group does not end them: the run first saves
    its state, then ends them itself.

    They are blocked before the start, as libraries start threads of their own in a forked process.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _BLOCKED)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker(_: int) -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, _BLOCKED)  # where it was not forked
    parent = multiprocessing.parent_process()
    if signal.SIGTERM not in _BLOCKED or parent is None:
        return

    def wait() -> None:
        # At the parent's exit multiprocessing sends SIGTERM to the workers that are left, and waits for them.
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent.pid:
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


# -- forks

_THREADS = Path("/proc/self/task")
MAX_WAIT = 0.05
"""Longest wait of a fork in seconds: a thread that computes for longer is not about to release a lock."""


def wait_for_idle_threads(seconds: float = MAX_WAIT) -> bool:
    """Wait until no other thread of this process runs, for at most `seconds` (Linux). Return whether none runs."""
    own, deadline = str(threading.get_native_id()), time.monotonic() + seconds
    while any(_is_running(thread) for thread in os.listdir(_THREADS) if thread != own):
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.0002)  # releases the interpreter to a waiting thread
    return True


def _is_running(thread: str) -> bool:
    try:
        line = (_THREADS / thread / "stat").read_bytes()
    except OSError:  # it has ended
        return False
    return line[line.rindex(b")") + 2 :].startswith(b"R")


if sys.version_info < (3, 13) and _THREADS.is_dir():
    os.register_at_fork(before=wait_for_idle_threads)
