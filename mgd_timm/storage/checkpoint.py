"""Checkpoints of safetensors and JSON files with a manifest of sha256 digests.

A checkpoint is a folder `00000123/`, named by the number of updates done. It is written atomically. Its manifest holds
the sha256 of every file, and a run resumes from the newest checkpoint that matches its manifest. Pickle is neither
written nor read.
"""

import errno
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mgd_timm.storage.atomic_write import write_atomically
from mgd_timm.storage.digests import sha256

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class State:
    """Content of a checkpoint: tensors by group and name, and JSON values."""

    tensors: Mapping[str, Mapping[str, Tensor]]
    values: Mapping[str, Any]


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used: corrupt, of another recipe, or not the same on all processes."""


def save(folder: Path, number: int, state: State, *, keep: int = 2) -> Path:
    """Write checkpoint `number` and verify it, then remove old ones.

    The newest `keep` checkpoints stay. Checkpoints of a higher number are removed too: the run resumed from an earlier
    one because they were corrupt.

    Args:
        folder: Folder of all checkpoints.
        number: Updates done.
        state: Tensors (any device and memory format) and JSON values.
        keep: Number of checkpoints to keep, 1 or more.

    Returns:
        The folder of the checkpoint.

    Raises:
        OSError: The disk is full, or writing failed otherwise; older checkpoints are unchanged.
        CheckpointError: The new checkpoint is corrupt right after it was written.
    """
    target = folder / f"{number:08d}"
    if target.exists():  # the same number means the same state: a run that resumed here and stopped at once
        try:
            verify(target)
            return target
        except CheckpointError:
            shutil.rmtree(target, ignore_errors=True)  # another run that shares this cache may have removed it first
    try:
        write_atomically(target, lambda draft: _write_files(draft, state))
    except OSError as error:
        # Otherwise another run that shares this folder (a cache) wrote the same state first.
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
            raise
    verify(target)
    others = [path for path in _newest_first(folder) if path != target]
    newer = [path for path in others if int(path.name) > number]
    older = [path for path in others if int(path.name) < number]
    for path in [*newer, *older[keep - 1 :]]:
        shutil.rmtree(path)
    return target


def verify(checkpoint: Path) -> None:
    """Compare every file of a checkpoint with the manifest.

    Raises:
        CheckpointError: A file is missing, unexpected, truncated or changed.
    """
    try:
        text = (checkpoint / MANIFEST).read_bytes()
        digests = json.loads(text)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{checkpoint}: its manifest cannot be read ({error})") from error
    if not isinstance(digests, dict) or "state.json" not in digests or text != _manifest_bytes(digests):
        raise CheckpointError(f"{checkpoint}: its manifest is corrupt")
    try:
        present = {path.name for path in checkpoint.iterdir()} - {MANIFEST}
    except OSError as error:  # another run has replaced it
        raise CheckpointError(f"{checkpoint}: cannot be read ({error})") from error
    if present != set(digests):
        raise CheckpointError(f"{checkpoint}: files {sorted(present ^ set(digests))} are missing or unexpected")
    for name, expected in digests.items():
        try:
            actual = sha256(checkpoint / name)
        except OSError as error:
            raise CheckpointError(f"{checkpoint}: {name} cannot be read ({error})") from error
        if actual != expected:
            raise CheckpointError(f"{checkpoint}: {name} does not match its sha256")


def load(checkpoint: Path) -> State:
    """Verify and read a checkpoint.

    Raises:
        CheckpointError: A file is missing, unexpected, truncated or changed.
    """
    verify(checkpoint)
    # Cloned: a deleted file that is still mapped keeps its space on disk, and cannot be deleted at all on NFS.
    try:
        tensors = {
            path.stem: {name: tensor.clone() for name, tensor in load_file(path).items()}
            for path in sorted(checkpoint.glob("*.safetensors"))
        }
        return State(tensors, json.loads((checkpoint / "state.json").read_text()))
    except OSError as error:  # another run has replaced it
        raise CheckpointError(f"{checkpoint}: cannot be read ({error})") from error


def load_newest(folder: Path, log: Callable[[str], None]) -> State | None:
    """Load the newest checkpoint that is not corrupt, and log each one that is skipped.

    Returns:
        None where there is no such checkpoint.
    """
    for checkpoint in _newest_first(folder):
        try:
            return load(checkpoint)
        except CheckpointError as error:
            log(f"skipped a corrupt checkpoint: {error}")
    return None


def copy_for_safetensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors to the CPU: safetensors refuses those that share memory or are not contiguous (channels-last)."""
    return {
        name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }


def _write_files(folder: Path, state: State) -> None:
    folder.mkdir()
    for group, tensors in state.tensors.items():
        save_file(copy_for_safetensors(tensors), folder / f"{group}.safetensors")
    (folder / "state.json").write_text(json.dumps(state.values))
    digests = {path.name: sha256(path) for path in sorted(folder.iterdir())}
    (folder / MANIFEST).write_bytes(_manifest_bytes(digests))


def _manifest_bytes(digests: Mapping[str, Any]) -> bytes:
    return json.dumps(digests, indent=1).encode()


def _newest_first(folder: Path) -> list[Path]:
    checkpoints = [path for path in folder.glob("*") if path.is_dir() and path.name.isdecimal()]
    return sorted(checkpoints, key=lambda path: int(path.name), reverse=True)
