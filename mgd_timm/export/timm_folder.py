"""Export a trained student as a folder that timm loads: model.safetensors, config.json and recipe.json (its origin)."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from timm.models import get_model_input_config
from timm.models._hub import save_config_for_hf
from torch import nn

from mgd_timm.recipe.options import expand_home
from mgd_timm.storage.atomic_write import write_atomically
from mgd_timm.storage.checkpoint import copy_for_safetensors
from mgd_timm.storage.digests import sha256
from mgd_timm.storage.versions import versions


def export_model(
    model: nn.Module, folder: str | Path, *, provenance: Mapping[str, Any] | None = None, overwrite: bool = False
) -> Path:
    """Write a model so that `timm.create_model("local-dir:FOLDER", pretrained=True)` loads exactly the same weights.

    The folder is written atomically. `cifar_*` networks load after `import mgd_timm.models`.

    Args:
        model: A timm model. Its pretrained_cfg is written too: mean, std, labels, licence and tag, as set by
            models.pretrained_cfg.describe_weights.
        folder: Must not exist unless `overwrite`.
        provenance: JSON values to write to recipe.json, with versions and the digest of the weights.
        overwrite: Replace an earlier export.

    Returns:
        The folder.

    Raises:
        ValueError: The model was not built by timm.
        FileExistsError: The folder exists.
        OSError: The folder could not be written; nothing partial is left.
    """
    config = dict(getattr(model, "pretrained_cfg", {}) or {})
    if not config.get("architecture"):
        raise ValueError(
            f"{type(model).__name__} has no pretrained_cfg with an 'architecture': export a model of timm.create_model."
        )
    target = Path(expand_home(str(folder), "folder"))
    if target.exists() and not overwrite:
        raise FileExistsError(f"{target} exists: choose another folder, or remove it first.")

    def write(draft: Path) -> None:
        _write_files(draft, model, config, provenance or {})

    old, new = (target.with_name(f".{word}-{target.name}") for word in ("replaced", "new"))
    shutil.rmtree(new, ignore_errors=True)  # left by an export that was killed
    if target.exists():
        write_atomically(new, write)
        shutil.rmtree(old, ignore_errors=True)
        target.rename(old)
        new.rename(target)
    else:
        write_atomically(target, write)
    shutil.rmtree(old, ignore_errors=True)
    return target


def _write_files(folder: Path, model: nn.Module, config: Mapping[str, Any], provenance: Mapping[str, Any]) -> None:
    folder.mkdir()
    weights = copy_for_safetensors(model.state_dict())
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    # The size that the model was built for: pretrained_cfg may have that of its original weights.
    inputs = get_model_input_config(model)
    size = inputs["input_size"]
    if config.get("input_size") and not inputs["fixed_input_size"]:
        size = (size[0], *config["input_size"][1:])
    data = {key: config[key] for key in ("interpolation", "crop_pct") if config.get(key) is not None}
    save_config_for_hf(
        model,
        str(folder / "config.json"),
        model_config={"label_names": config.get("label_names")},
        data_config={**data, "input_size": size},
    )
    origin = {"versions": versions(), "model_sha256": sha256(folder / "model.safetensors"), **provenance}
    (folder / "recipe.json").write_text(json.dumps(origin, indent=2) + "\n")
