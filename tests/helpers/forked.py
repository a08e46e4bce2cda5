"""Commands in real processes without the seconds that imports cost: forked from a process that has imported
everything."""

import contextlib
import math
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path

_lock = threading.Lock()  # an exit code is read once: two threads that ask for it at once would see another one
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["mgd_timm.pipeline.run", "mgd_timm.api", "mgd_timm.cli.main", "datasets", "tqdm"])


def command_line(*words: str) -> int:
    """`mgd-timm WORDS`; gives its exit code."""
    from mgd_timm.cli.main import main

    return main(list(words))


def _run(
    target: Callable[..., object], arguments: Sequence[object], environment: dict[str, str], log: Path, errors: Path
) -> None:
    os.setpgid(0, 0)
    multiprocessing.set_start_method(
        "fork", force=True
    )  # its own readers of images, as in a process that a user starts
    os.environ.update(environment)
    for place, stream in ((log, 1), (errors, 2)):
        os.dup2(os.open(place, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    sys.stdout.reconfigure(line_buffering=True)
    sys.exit(target(*arguments))


class Ranks:
    """A command on one or several processes, started as a launcher does, but without one that would end the others.

    Args:
        words: Of the command line; or the arguments of `target`.
        log: What they print is appended there, of rank r under the suffix .r.
        errors: As `log`, for stderr; by default `log`.
        processes: How many.
        environment: Beside this process's own.
        target: A module's function, in place of the command line; gives an exit code.
    """

    def __init__(
        self,
        words: Sequence[object],
        log: Path,
        *,
        errors: Path | None = None,
        processes: int = 1,
        environment: dict[str, str] | None = None,
        target: Callable[..., object] = command_line,
    ) -> None:
        self.logs = [log.with_suffix(f".{rank}") for rank in range(processes)]
        self.errors = [(errors or log).with_suffix(f".{rank}") for rank in range(processes)]
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.ranks: list[ForkServerProcess] = []
        for rank in range(processes):
            place = {
                "RANK": rank,
                "LOCAL_RANK": rank,
                "WORLD_SIZE": processes,
                "LOCAL_WORLD_SIZE": processes,
                "MASTER_PORT": port,
            }
            launched = {"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in place.items()}}
            given = {"ACCELERATE_USE_CPU": "1", **(environment or {}), **(launched if processes > 1 else {})}
            process = CONTEXT.Process(target=_run, args=(target, words, given, self.logs[rank], self.errors[rank]))
            with _lock:
                process.start()
            self.ranks.append(process)

    def signal(self, kind: signal.Signals, *ranks: int) -> None:
        """Send a signal to some of them, by default to all, where they are still there."""
        for rank in ranks or range(len(self.ranks)):
            process = self.ranks[rank]
            if self._lives(process) and process.pid is not None:
                with contextlib.suppress(ProcessLookupError):  # it has just ended
                    os.kill(process.pid, kind)

    def alive(self) -> bool:
        """Whether any of them still runs."""
        return any(self._lives(process) for process in self.ranks)

    def _failed(self) -> bool:
        with _lock:
            return any(process.exitcode for process in self.ranks)

    def _lives(self, process: ForkServerProcess) -> bool:
        with _lock:
            return process.is_alive()

    def wait(self, seconds: float, *, grace: float | None = None) -> list[int | None]:
        """Their exit codes, None for one that runs longer: it is killed.

        Args:
            seconds: How long to wait at most.
            grace: End the others as torchrun's agent does once one has failed: by a SIGTERM, and so many seconds later
                by a SIGKILL.
        """
        deadline, failed = time.monotonic() + seconds, math.inf
        while self.alive() and time.monotonic() < deadline:
            if grace is not None and failed == math.inf and self._failed():
                failed = time.monotonic()
                self.signal(signal.SIGTERM)
            if grace is not None and time.monotonic() > failed + grace:
                self.signal(signal.SIGKILL)
            time.sleep(0.01)
        codes = [None if self._lives(process) else process.exitcode for process in self.ranks]
        self.signal(signal.SIGKILL)
        while self.alive():
            time.sleep(0.01)
        return codes

    def said(self, rank: int = 0) -> str:
        """What a process printed, but for gloo's greeting (torch 2.10)."""
        lines = self.logs[rank].read_text().splitlines(keepends=True) if self.logs[rank].exists() else []
        return "".join(line for line in lines if not line.startswith("[Gloo] Rank"))
