"""Versions that a run records in the files that it writes."""

import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_PACKAGES = ("mgd-timm", "torch", "timm", "accelerate", "datasets", "safetensors", "numpy", "pillow")


def versions() -> dict[str, str | None]:
    """Return the versions of Python and of the packages that a run depends on, and the commit of a git checkout."""
    found: dict[str, str | None] = {"python": sys.version.split()[0]}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    root, git = Path(__file__).parents[2], shutil.which("git")
    if (root / ".git").exists() and git is not None:
        head = subprocess.run([git, "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True)  # noqa: S603
        found["commit"] = head.stdout.strip() or None
    return found
