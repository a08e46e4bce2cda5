"""Versions that a run records in the files that it writes."""

import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_PACKAGES = ("mgd-timm", "torch", "timm", "accelerate", "datasets", "safetensors", "numpy", "pillow")


def versions() -> dict[str, str | None]:
    """Return the versions of Python and of the packages that a run depends on.

    Where this package is a git checkout, the commit is among them.
    """
    found: dict[str, str | None] = {"python": sys.version.split()[0]}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    here = Path(__file__).parents[1]
    if (here.parent / ".git").exists():
        git = shutil.which("git")
        head = (
            subprocess.run([git, "-C", str(here), "rev-parse", "HEAD"], capture_output=True, text=True) if git else None  # noqa: S603
        )
        found["commit"] = head.stdout.strip() or None if head else None
    return found
