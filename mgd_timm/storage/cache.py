"""The cache that runs share: decoded images, fitted heads and other results of long work."""

import hashlib
import os
from pathlib import Path


def cache_folder() -> Path:
    """Return the cache folder: $MGD_TIMM_CACHE, else mgd_timm in the user's cache folder.

    Raises:
        OSError: The home folder is unknown.
    """
    default = os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "mgd_timm")
    folder = os.path.expanduser(os.environ.get("MGD_TIMM_CACHE") or default)
    if folder.startswith("~/"):
        raise OSError(f"{folder}: the home folder is unknown: set the environment variable MGD_TIMM_CACHE to a folder.")
    return Path(folder)


def cache_entry(kind: str, made_of: str) -> Path:
    """Return the cache's folder for one result of a kind, named by a sha256 of what it was made of."""
    return cache_folder() / kind / hashlib.sha256(made_of.encode()).hexdigest()[:32]
