"""Write files and folders atomically: they appear complete, or not at all.

A file or folder is written under a temporary name beside its target, flushed to disk, and renamed. A process that is
killed leaves at most a folder whose name begins with `PARTIAL_PREFIX`; `remove_partial_writes` removes it.
"""

import errno
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

PARTIAL_PREFIX = ".writing-"
"""Prefix of the temporary folders in which files are written before they are renamed."""


def default_file_mode() -> int:
    """Return the permissions of a new file under the umask; safetensors itself writes 0600."""
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


def write_atomically(target: Path, write: Callable[[Path], object]) -> None:
    """Write a file or folder under a temporary name, flush it to disk and rename it to `target`.

    Args:
        target: Final path. An existing file is replaced; a folder must not exist.
        write: Writes the file or folder to the path that it gets.

    Raises:
        OSError: The write failed and left nothing behind. A full disk is reported as ENOSPC.
    """
    temporary: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=PARTIAL_PREFIX, dir=target.parent))
        draft = temporary / target.name
        write(draft)
        for path in [draft, *draft.rglob("*")]:
            if path.is_file():
                path.chmod(default_file_mode())
            _fsync(path)
        if draft.is_dir():
            draft.rename(target)
        else:
            draft.replace(target)
        _fsync(target.parent)
    except (OSError, SafetensorError) as error:
        if _is_disk_full(error):
            raise OSError(
                errno.ENOSPC,
                f"no space left to write {target}: nothing was changed there. Free some space and start again; "
                "--resume continues a run",
            ) from error
        raise
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def write_text_atomically(target: Path, text: str) -> None:
    """Write or replace a text file with `write_atomically`, in UTF-8 whatever the locale."""
    # A file's name that is not UTF-8 has surrogates in Python, and is written as it is.
    write_atomically(target, lambda draft: draft.write_text(text, encoding="utf-8", errors="surrogateescape"))


def remove_partial_writes(folder: Path) -> None:
    """Remove the temporary folders that interrupted writes left in `folder`."""
    for partial in folder.glob(f"{PARTIAL_PREFIX}*"):
        shutil.rmtree(partial, ignore_errors=True)


def _fsync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to disk. Windows cannot open folders, so they are skipped there."""
    if os.name == "nt" and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _is_disk_full(error: Exception) -> bool:
    # safetensors' error holds the system's message, not its errno
    texts = ("No space left", "File too large", "os error 28", "os error 27")
    numbers = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return getattr(error, "errno", None) in numbers or any(text in str(error) for text in texts)
