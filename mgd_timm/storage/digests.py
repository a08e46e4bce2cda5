"""sha256 of files and of networks."""

import hashlib
from pathlib import Path

import torch
from torch import nn


def module_digest(module: nn.Module) -> str:
    """sha256 over a module's state: names, shapes, types and bytes."""
    total = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        plain = tensor.detach().cpu().contiguous()
        total.update(f"{name}:{plain.dtype}:{tuple(plain.shape)};".encode())
        total.update(plain.reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def sha256(path: Path) -> str:
    """Digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
