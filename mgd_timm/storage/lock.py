"""Lock a folder that runs share, so that one run at a time writes to it while the others wait and log for whom.

The lock is the operating system's, on a file in the folder: it is released when its holder ends, however that happens.
Reading takes no lock, as files appear complete or not at all.
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

from mgd_timm.storage.atomic_write import remove_partial_writes
from mgd_timm.storage.checkpoint import State, load_newest, save

LOCK_FILE, HOLDER_FILE = ".lock", ".holder.json"
_POLL_SECONDS = 0.5
_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP}
_LOCK_FILE_MODE = 0o666  # whatever the umask: anyone who may write in the folder may take the lock after another user


class Lock:
    """An exclusive lock on a folder, held by one process. Acquiring it removes the partial writes of a killed holder.

    Args:
        folder: Created if it is missing.
        what: Name of its content in messages.
        log: Logs one line.
        progress: Returns the holder's progress in a few words, to show while waiting.
        quiet: Show no progress.
    """

    def __init__(
        self,
        folder: Path,
        what: str,
        log: Callable[[str], None],
        *,
        progress: Callable[[], str] = lambda: "",
        quiet: bool = False,
    ) -> None:
        self.folder, self.what, self.log, self.progress, self.quiet = folder, what, log, progress, quiet
        # A soft lock, a file that exists or not, would outlive a holder that was killed on another machine.
        self._lock = FileLock(folder / LOCK_FILE, mode=_LOCK_FILE_MODE, fallback_to_soft=False)
        self._waiting_since: float | None = None
        self._bar: tqdm | None = None

    def __enter__(self) -> "Lock":
        try:
            self.try_acquire()
        except BaseException:
            self._close_bar()  # so that the message of Ctrl-C begins on a new line
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def try_acquire(self, seconds: float = math.inf) -> bool:
        """Wait up to `seconds` for the lock, and log that another run holds it.

        Returns:
            Whether the lock is held now.

        Raises:
            OSError: The folder cannot be written.
        """
        began = time.monotonic()
        while not self._acquire_now():
            if self._waiting_since is None:
                self._waiting_since = began
                self.log(f"{self.what}: {self._describe_holder()} writes it; waiting for it to end")
            if self._bar is None:
                name = f"waiting for {self._describe_holder()}"
                self._bar = tqdm(
                    desc=name, bar_format="{desc}: {elapsed}{postfix}", mininterval=1.0, disable=self.quiet
                )
            self._bar.set_postfix_str(self.progress(), refresh=False)
            self._bar.update(0)
            if time.monotonic() - began >= seconds:
                return False
            time.sleep(_POLL_SECONDS)
        self._close_bar()
        if self._waiting_since is not None:
            self.log(f"{self.what}: free after {time.monotonic() - self._waiting_since:.0f} s")
            self._waiting_since = None
        return True

    def release(self) -> None:
        """Release the lock if it is held."""
        self._close_bar()
        if self._lock.is_locked:
            with contextlib.suppress(OSError):
                (self.folder / HOLDER_FILE).unlink()
            self._lock.release()

    def _close_bar(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _acquire_now(self) -> bool:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            # A lock file of an earlier run can be locked even where nothing can be written.
            with tempfile.TemporaryFile(dir=self.folder):
                pass
            self._lock.acquire(timeout=0)
        except Timeout:
            return False
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise OSError(
                    error.errno,
                    f"{self.what} cannot be written ({error}): make its folder writable, or choose another "
                    "(--teacher-store; the environment variable MGD_TIMM_CACHE for the cache)",
                ) from error
            self.log(
                f"warning: {self.what}: its file system has no locks ({error}). Another run may repeat the same work "
                "at the same time; files stay complete."
            )
            return True
        remove_partial_writes(self.folder)  # only under the lock: another run may be writing them without it
        with contextlib.suppress(OSError):  # on a full disk, waiting runs cannot name the holder
            (self.folder / HOLDER_FILE).unlink(missing_ok=True)  # of a killed holder, perhaps of another user
            (self.folder / HOLDER_FILE).write_text(json.dumps({"host": socket.gethostname(), "pid": os.getpid()}))
        return True

    def _describe_holder(self) -> str:
        try:
            holder = json.loads((self.folder / HOLDER_FILE).read_text())
            host, pid = str(holder["host"]), int(holder["pid"])
        except (OSError, ValueError, LookupError, TypeError):
            return "another run"
        if host == socket.gethostname() and not psutil.pid_exists(pid):
            return "another run"  # the file is of a killed holder; the present one has not replaced it yet
        return f"another run ({host}, pid {pid})"


def load_or_create(folder: Path, what: str, create: Callable[[], State], log: Callable[[str], None]) -> State:
    """Load the state that is stored in a folder, or create and store it under the folder's lock.

    Args:
        folder: Folder of the state, stored as a checkpoint.
        what: Name of the state in messages.
        create: Returns a new state.
        log: Logs one line.

    Raises:
        OSError: The folder cannot be written.
    """
    state = load_newest(folder, log)
    if state is not None:
        return state
    with Lock(folder, f"{what} ({folder})", log):
        state = load_newest(folder, lambda _: None)  # another run may have created it in the meantime
        if state is None:
            state = create()
            save(folder, 1, state)
    return state
