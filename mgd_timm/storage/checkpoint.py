"""A run's state as safetensors and JSON with a digest manifest: committed whole, or not at all.

A checkpoint is a folder `00000123/` (the number of updates done). It is written aside, every file and the folder are
flushed to disk, then it is renamed. The manifest holds every file's sha256; the newest checkpoint that matches its
manifest is resumed. No pickle is written or read.
"""

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mgd_timm.storage.digests import sha256

MANIFEST = "manifest.json"
ASIDE = ".writing-"
"""Start of the names under which files and folders are written before they appear."""


@dataclass(frozen=True)
class State:
    """What a run needs to go on as if it had never stopped: tensors by group and name, and JSON values."""

    tensors: Mapping[str, Mapping[str, Tensor]]
    values: Mapping[str, Any]


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used, with the reason."""


def file_mode() -> int:
    """The mode that the umask gives to a new file; safetensors itself writes 0600."""
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


def flush(path: Path) -> None:
    """Bring a file or a folder's entries to the disk; Windows cannot open folders and does without."""
    if os.name == "nt" and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_whole(target: Path, fill: Callable[[Path], None]) -> None:
    """Make a file or folder appear whole: `fill` writes it under a temporary name beside it, then it is flushed and
    renamed.

    Args:
        target: Where it appears. A file is replaced; a folder must not exist.
        fill: Writes the file or folder of the path that it is given.

    Raises:
        OSError: Nothing was left behind; a full disk is named as such.
    """
    aside: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=ASIDE, dir=target.parent))
        draft = aside / target.name
        fill(draft)
        for path in [draft, *draft.rglob("*")]:
            if path.is_file():
                path.chmod(file_mode())
            flush(path)
        draft.rename(target) if draft.is_dir() else draft.replace(target)
        flush(target.parent)
    except (OSError, SafetensorError) as error:
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or any(
            text in str(error) for text in ("No space left", "File too large", "os error 28", "os error 27")
        )
        if full:
            raise OSError(
                errno.ENOSPC,
                f"no room to write {target}: nothing was changed there. Free some space and start again; --resume "
                "continues a run",
            ) from error
        raise
    finally:
        if aside is not None:
            shutil.rmtree(aside, ignore_errors=True)


def write_text(target: Path, text: str) -> None:
    """Write or replace a text file, whole or not at all.

    Raises:
        OSError: As of `write_whole`.
    """

    def fill(draft: Path) -> None:
        draft.write_text(text)

    write_whole(target, fill)


def sweep(folder: Path) -> None:
    """Remove what an interrupted write left behind."""
    for stray in folder.glob(f"{ASIDE}*"):
        shutil.rmtree(stray, ignore_errors=True)


def save(folder: Path, number: int, state: State, *, keep: int = 2) -> Path:
    """Write checkpoint `number`; older ones than the newest `keep` go once the new one has been read back and matches.

    So do those of a higher number, which the resume that led here has passed over as damaged.

    Args:
        folder: Folder of all checkpoints.
        number: Updates done.
        state: Tensors (any device and memory format) and JSON values.
        keep: How many checkpoints stay, 1 or more.

    Raises:
        OSError: A full disk or another fault while writing; older checkpoints are as they were.
        CheckpointError: The new checkpoint does not read back as written.
    """
    target = folder / f"{number:08d}"
    if target.exists():  # a run resumed here and stopped at once: its state is a function of the recipe and this number
        try:
            verify(target)
            return target
        except CheckpointError:
            shutil.rmtree(target, ignore_errors=True)  # another run on the same cache may have been faster

    def fill(draft: Path) -> None:
        draft.mkdir()
        for group, tensors in state.tensors.items():
            plain = {
                name: t.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
                for name, t in tensors.items()
            }
            save_file(plain, draft / f"{group}.safetensors")
        (draft / "state.json").write_text(json.dumps(state.values))
        sums = {path.name: sha256(path) for path in sorted(draft.iterdir())}
        (draft / MANIFEST).write_bytes(_listed(sums))

    try:
        write_whole(target, fill)
    except (
        FileExistsError
    ):  # another run that shares this folder (a cache) was faster: the same number means the same state
        pass
    except OSError as error:
        if error.errno != errno.ENOTEMPTY:
            raise
    verify(target)
    others = [path for path in _numbered(folder) if path != target]
    past = [path for path in others if int(path.name) < number]
    for gone in [*(path for path in others if path not in past), *past[keep - 1 :]]:
        shutil.rmtree(gone)
    return target


def _listed(sums: Mapping[str, Any]) -> bytes:
    return json.dumps(sums, indent=1).encode()


def verify(checkpoint: Path) -> None:
    """Raise CheckpointError unless every file is there and has the digest of the manifest."""
    try:
        text = (checkpoint / MANIFEST).read_bytes()
        sums = json.loads(text)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{checkpoint}: its manifest cannot be read ({error})") from error
    if not isinstance(sums, dict) or "state.json" not in sums or text != _listed(sums):
        raise CheckpointError(f"{checkpoint}: its manifest is not one")
    present = {path.name for path in checkpoint.iterdir()} - {MANIFEST}
    if present != set(sums):
        raise CheckpointError(f"{checkpoint}: files {sorted(present ^ set(sums))} are missing or foreign")
    for name, expected in sums.items():
        try:
            actual = sha256(checkpoint / name)
        except OSError as error:
            raise CheckpointError(f"{checkpoint}: {name} cannot be read ({error})") from error
        if actual != expected:
            raise CheckpointError(f"{checkpoint}: {name} does not match its sha256")


def load(checkpoint: Path) -> State:
    """Read a checkpoint after verifying it.

    Raises:
        CheckpointError: A file is missing, foreign, truncated or changed.
    """
    verify(checkpoint)
    # copied: a mapped file keeps its room on the disk when it is deleted, and cannot be deleted at all on NFS
    tensors = {
        path.stem: {name: t.clone() for name, t in load_file(path).items()}
        for path in sorted(checkpoint.glob("*.safetensors"))
    }
    return State(tensors, json.loads((checkpoint / "state.json").read_text()))


def newest(folder: Path, say: Callable[[str], None]) -> State | None:
    """The newest checkpoint that is whole; None where there is none. What is skipped is said."""
    for checkpoint in _numbered(folder):
        try:
            return load(checkpoint)
        except CheckpointError as error:
            say(f"skipped a damaged checkpoint: {error}")
    return None


def _numbered(folder: Path) -> list[Path]:
    found = [path for path in folder.glob("*") if path.is_dir() and path.name.isdecimal()]
    return sorted(found, key=lambda path: int(path.name), reverse=True)
