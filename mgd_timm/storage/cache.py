"""The cache that runs share: decoded images, fitted heads and other results of long work."""

import hashlib
import os
from pathlib import Path


def cache_folder() -> Path:
    """Return the cache folder: $MGD_TIMM_CACHE, else mgd_timm in the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mgd_timm"
    return Path(os.environ.get("MGD_TIMM_CACHE") or default)


def cache_entry(kind: str, made_of: str) -> Path:
    """Return the cache's folder for one result of a kind, named by a sha256 of what it was made of."""
    return cache_folder() / kind / hashlib.sha256(made_of.encode()).hexdigest()[:32]
