"""Export a trained student as a folder that timm loads: model.safetensors, config.json and recipe.json (its origin)."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from timm.models import get_model_input_config
from timm.models._hub import save_config_for_hf
from torch import nn

from mgd_timm.export.formats import FORMATS
from mgd_timm.export.merge import merge_weights
from mgd_timm.recipe.options import expand_home
from mgd_timm.storage.atomic_write import write_atomically
from mgd_timm.storage.checkpoint import copy_for_safetensors
from mgd_timm.storage.digests import sha256
from mgd_timm.storage.versions import versions

_EXPORTED = {"config.json", "model.safetensors", "recipe.json", "recipe.yaml", "README.md", "formats.json"}
_EXPORTED |= {file.partition("/")[0] for one in FORMATS.values() for file in one.files}
"""Names at the top of an exported or a published folder."""


def export_model(
    model: nn.Module, folder: str | Path, *, provenance: Mapping[str, Any] | None = None, overwrite: bool = False
) -> Path:
    """Write a model so that `timm.create_model("local-dir:FOLDER", pretrained=True)` loads exactly the same weights.

    Adapters of peft and parametrizations are merged. The folder is written atomically. `cifar_*` networks load after
    `import mgd_timm.models`.

    Args:
        model: A timm model. Its pretrained_cfg is written too: mean, std, labels, licence and tag, as set by
            models.pretrained_cfg.describe_weights.
        folder: Must not exist unless `overwrite`.
        provenance: JSON values to write to recipe.json, with versions and the digest of the weights.
        overwrite: Replace an earlier export.

    Returns:
        The folder.

    Raises:
        ValueError: The model was not built by timm, or with an argument that JSON cannot hold.
        FileExistsError: The folder exists.
        OSError: The folder could not be written; nothing partial is left.
    """
    model = merge_weights(model)
    target = Path(expand_home(str(folder), "folder"))
    if os.path.lexists(target) and not overwrite:
        raise FileExistsError(f"{target} exists: choose another folder.")
    place = target.resolve()  # what a link names is replaced, not the link

    def write(draft: Path) -> None:
        _write_files(draft, model, provenance or {})

    old, new = (place.with_name(f".{word}-{place.name}") for word in ("replaced", "new"))
    shutil.rmtree(new, ignore_errors=True)  # left by an export that was killed
    if place.exists():
        write_atomically(new, write)
        shutil.rmtree(old, ignore_errors=True)
        place.rename(old)
        new.rename(place)
    else:
        write_atomically(place, write)
    shutil.rmtree(old, ignore_errors=True)
    return target


def check_replaceable(target: Path) -> None:
    """Raise FileExistsError for a file, or for a folder with files that no export has: they would be lost."""
    if not target.exists():
        return
    if not target.is_dir():
        raise FileExistsError(f"{target} is a file: choose another folder.")
    paths = [path.relative_to(target) for path in target.rglob("*") if not path.is_dir()]
    others = sorted(path.as_posix() for path in paths if path.parts[0] not in _EXPORTED)
    if others:
        raise FileExistsError(
            f"{target} exists and is no export: {others[0]} is in it, and would be lost. Choose another folder, or "
            "remove this one."
        )


def _write_files(folder: Path, model: nn.Module, provenance: Mapping[str, Any]) -> None:
    folder.mkdir()
    weights = copy_for_safetensors(model.state_dict())
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    write_config(model, folder)
    origin = {"versions": versions(), "model_sha256": sha256(folder / "model.safetensors"), **provenance}
    (folder / "recipe.json").write_text(json.dumps(origin, indent=2) + "\n")


def write_config(model: nn.Module, folder: Path) -> None:
    """Write the config.json that timm.create_model and Transformers' pipeline build the model from.

    Raises:
        ValueError: The model was not built by timm, or with an argument that JSON cannot hold.
    """
    config = dict(getattr(model, "pretrained_cfg", {}) or {})
    if not config.get("architecture"):
        raise ValueError(
            f"{type(model).__name__} has no pretrained_cfg with an 'architecture': export a model of timm.create_model."
        )
    # The size that the model was built for: pretrained_cfg may have that of its original weights.
    inputs = get_model_input_config(model)
    size = inputs["input_size"]
    if config.get("input_size") and not inputs["fixed_input_size"]:
        size = (size[0], *config["input_size"][1:])
    data = {key: config[key] for key in ("interpolation", "crop_pct") if config.get(key) is not None}
    path = folder / "config.json"
    try:
        save_config_for_hf(
            model,
            str(path),
            model_config={"label_names": config.get("label_names")},
            data_config={**data, "input_size": size},
        )
    except ValueError as error:
        raise ValueError(
            f"{error} Give timm.create_model arguments that JSON can hold, such as act_layer='gelu' in place of a "
            "class."
        ) from error
    written = json.loads(path.read_text(encoding="utf-8"))
    # Transformers gives the root's num_classes to timm.create_model, beside these arguments.
    written.get("model_args", {}).pop("num_classes", None)
    path.write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
