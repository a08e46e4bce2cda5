"""The cache that runs share: decoded images, fitted heads and other results of long work."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """Return the cache folder: $MGD_TIMM_CACHE, else mgd_timm in the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "mgd_timm"
    return Path(os.environ.get("MGD_TIMM_CACHE") or default)
