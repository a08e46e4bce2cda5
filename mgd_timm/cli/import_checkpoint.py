"""`mgd-timm import`: a public checkpoint as an exported folder."""

import os
from pathlib import Path
from typing import Any

from mgd_timm.export.timm_folder import export_model
from mgd_timm.models.import_checkpoint import load_public_checkpoint
from mgd_timm.storage.digests import sha256


def import_checkpoint(
    path: str | os.PathLike[str],
    architecture: str,
    folder: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    **options: Any,
) -> Path:
    """Write a public checkpoint as a folder that teaches, is evaluated and loads in timm as an exported student does.

    Args:
        path: The file.
        architecture: timm's name.
        folder: Where; must not exist unless `overwrite`.
        overwrite: Replace the folder.
        options: As `load_public_checkpoint` takes them.

    Raises:
        ValueError: As `load_public_checkpoint`.
        FileExistsError: The folder exists.
    """
    model = load_public_checkpoint(path, architecture, **options)
    origin = {"imported": {"file": Path(path).name, "sha256": sha256(Path(path))}, "architecture": architecture}
    return export_model(model, Path(folder), provenance=origin, overwrite=overwrite)
