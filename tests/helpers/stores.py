"""Files of a teacher store."""

from pathlib import Path

import torch
from small import digest

CPU = torch.device("cpu")


def state(folder: Path) -> dict[str, tuple[int, str]]:
    return {path.name: (path.stat().st_mtime_ns, digest(path)) for path in sorted(folder.glob("[!.]*"))}


def contents(folder: Path) -> dict[str, str]:
    return {name: sha for name, (_, sha) in state(folder).items()}
