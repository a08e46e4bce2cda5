"""One run at a time fills a folder that runs share; the others wait for it, and say for whom.

The lock is the operating system's, on a file in the folder: it is free once its holder has ended, however that ended.
To read takes no lock, as files appear whole or not at all.
"""

import contextlib
import errno
import json
import math
import os
import socket
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import psutil
from filelock import FileLock, Timeout
from tqdm import tqdm

from mgd_timm.storage.checkpoint import State, newest, save, sweep

LOCK, HOLDER = ".lock", ".holder.json"
_POLL = 0.5
_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP}
_FOR_ALL = 0o666
"""Mode of the lock's file, whatever the umask: who may write in the folder may hold the lock after another user."""


class Lock:
    """The right to write in a folder, in one process. Who gets it removes what a killed holder left half written.

    Args:
        folder: Made where it lacks.
        what: What messages call it.
        say: Takes one line for the user.
        progress: How far the holder is, in a few words; shown while waiting.
        quiet: Show no progress.
    """

    def __init__(
        self,
        folder: Path,
        what: str,
        say: Callable[[str], None],
        *,
        progress: Callable[[], str] = lambda: "",
        quiet: bool = False,
    ) -> None:
        self.folder, self.what, self.say, self.progress, self.quiet = folder, what, say, progress, quiet
        # The other kind of lock, a file that is there or not, would outlive a holder that was killed on another
        # machine.
        self._lock = FileLock(folder / LOCK, mode=_FOR_ALL, fallback_to_soft=False)
        self._since: float | None = None
        self._bar: tqdm | None = None

    def __enter__(self) -> "Lock":
        try:
            self.attempt()
        except BaseException:
            self._close_bar()  # what is said of Ctrl-C gets a line of its own
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def attempt(self, seconds: float = math.inf) -> bool:
        """Whether the lock is held, after up to so many seconds of waiting for another run, which is said.

        Raises:
            OSError: Nothing can be written in the folder.
        """
        began = time.monotonic()
        while not self._take():
            if self._since is None:
                self._since = began
                self.say(f"{self.what}: {self._holder()} writes it; waiting for it to end")
            if self._bar is None:
                name = f"waiting for {self._holder()}"
                self._bar = tqdm(
                    desc=name, bar_format="{desc}: {elapsed}{postfix}", mininterval=1.0, disable=self.quiet
                )
            self._bar.set_postfix_str(self.progress(), refresh=False)
            self._bar.update(0)
            if time.monotonic() - began >= seconds:
                return False
            time.sleep(_POLL)
        self._close_bar()
        if self._since is not None:
            self.say(f"{self.what}: free after {time.monotonic() - self._since:.0f} s")
            self._since = None
        return True

    def release(self) -> None:
        """Let others in, where it is held."""
        self._close_bar()
        if self._lock.is_locked:
            with contextlib.suppress(OSError):
                (self.folder / HOLDER).unlink()
            self._lock.release()

    def _close_bar(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _take(self) -> bool:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(
                dir=self.folder
            ):  # the lock of a folder may be had where nothing can be written
                pass
            self._lock.acquire(timeout=0)
        except Timeout:
            return False
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                why = f"{self.what} cannot be written ({error}): free its folder for writing, or choose another one"
                raise OSError(error.errno, why) from error
            self.say(
                f"warning: {self.what}: its file system has no locks ({error}). Another run that fills it meanwhile "
                "does the same work once more; whole files are whole all the same."
            )
            return True
        sweep(self.folder)  # without a lock it might be what another run writes just now
        with contextlib.suppress(OSError):  # a full disk: who waits then cannot say for whom
            (self.folder / HOLDER).unlink(missing_ok=True)  # of one that was killed, perhaps another user
            (self.folder / HOLDER).write_text(json.dumps({"host": socket.gethostname(), "pid": os.getpid()}))
        return True

    def _holder(self) -> str:
        """Who holds the lock, as far as that is known."""
        try:
            found = json.loads((self.folder / HOLDER).read_text())
            host, pid = str(found["host"]), int(found["pid"])
        except (OSError, ValueError, LookupError, TypeError):
            return "another run"
        if host == socket.gethostname() and not psutil.pid_exists(
            pid
        ):  # one that was killed: its follower has not said so yet
            return "another run"
        return f"another run ({host}, pid {pid})"


def kept(place: Path, what: str, make: Callable[[], State], say: Callable[[str], None]) -> State:
    """The state in a folder of the cache: found, or made where it lacks or is damaged, by one run while others wait.

    Args:
        place: A folder of its own.
        what: What messages call it.
        make: Makes it.
        say: Takes one line for the user.

    Raises:
        OSError: It cannot be written.
    """
    known = newest(place, say)
    if known is not None:
        return known
    with Lock(place, f"{what} ({place})", say):
        known = newest(place, lambda _: None)  # another run's, meanwhile
        if known is None:
            known = make()
            save(place, 1, known)
    return known
