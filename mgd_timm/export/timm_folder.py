"""A trained student as timm reads it: model.safetensors, config.json, and recipe.json with where it comes from."""

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from timm.models import get_model_input_config
from timm.models._hub import save_config_for_hf
from torch import nn

from mgd_timm.storage.checkpoint import sha256, write_whole

_PACKAGES = ("mgd-timm", "torch", "timm", "accelerate", "datasets", "safetensors", "numpy", "pillow")


def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that decide a run, and the commit where this package is a git checkout."""
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


def describe(
    model: nn.Module,
    *,
    input_size: tuple[int, int, int],
    mean: tuple[float, ...],
    std: tuple[float, ...],
    class_names: tuple[str, ...],
    license: str,
    tag: str,
    shown: Mapping[str, Any] | None = None,
) -> None:
    """Replace what the architecture's default weights said (tag, licence, source, mean, std, labels) by what is true
    here.

    Args:
        model: Described in place.
        input_size: Channels, height, width.
        mean, std: Per channel, of pixels in [0, 1].
        class_names: In the order of the classifier.
        license: Of the weights.
        tag: timm's word for the weights.
        shown: crop_pct, crop_mode and interpolation of an evaluation, as far as they are not the architecture's.
    """
    config = dict(getattr(model, "pretrained_cfg", {}) or {})
    for key in (
        "url",
        "hf_hub_id",
        "hf_hub_filename",
        "file",
        "source",
        "origin_url",
        "paper_name",
        "paper_ids",
        "notes",
        "state_dict",
    ):
        config.pop(key, None)
    for key in (
        "label_names",
        "label_descriptions",
        "label_offset",
        "test_input_size",
        "test_crop_pct",
        "pool_size",
        "custom_load",
    ):
        config.pop(key, None)
    config |= {"tag": tag, "license": license, "input_size": input_size, "mean": mean, "std": std}
    config |= {"num_classes": len(class_names), "label_names": list(class_names), **(shown or {})}
    model.pretrained_cfg = config  # type: ignore[assignment]
    model.default_cfg = config  # type: ignore[assignment]


def export_model(
    model: nn.Module, folder: str | Path, *, provenance: Mapping[str, Any] | None = None, overwrite: bool = False
) -> Path:
    """Write a model so that `timm.create_model("local-dir:FOLDER", pretrained=True)` gives the same weights, bit for
    bit.

    The folder appears whole or not at all. `cifar_*` networks load after `import mgd_timm.models`.

    Args:
        model: A timm model, alone: no heads, encoders or adapters. What `mgd_timm.distill` returns knows its mean, std,
            labels, licence and tag.
        folder: Where; must not exist unless `overwrite`.
        provenance: What to put into recipe.json beside versions and the digest of the weights.
        overwrite: Replace an earlier export.

    Raises:
        ValueError: Not a timm model.
        FileExistsError: The folder exists.
        OSError: A full disk or another fault; nothing half-written is left.
    """
    from safetensors.torch import save_file

    config = dict(getattr(model, "pretrained_cfg", {}) or {})
    if not config.get("architecture"):
        raise ValueError(
            f"{type(model).__name__} has no pretrained_cfg with its architecture: export takes models that timm built."
        )
    target = Path(folder)
    if target.exists() and not overwrite:
        raise FileExistsError(f"{target} exists: choose another folder, or remove it first.")

    def fill(draft: Path) -> None:
        draft.mkdir()
        # Contiguous: safetensors refuses channels-last weights.
        plain = {
            name: t.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
            for name, t in model.state_dict().items()
        }
        save_file(plain, draft / "model.safetensors", metadata={"format": "pt"})
        names = config.get("label_names")
        inputs = get_model_input_config(
            model
        )  # what the module was built for; pretrained_cfg may say what its weights were
        size = inputs["input_size"]
        if config.get("input_size") and not inputs["fixed_input_size"]:
            size = (size[0], *config["input_size"][1:])
        data = {key: config[key] for key in ("interpolation", "crop_pct") if config.get(key) is not None}
        save_config_for_hf(
            model,
            str(draft / "config.json"),
            model_config={"label_names": names},
            data_config={**data, "input_size": size},
        )
        origin = {"versions": versions(), "model_sha256": sha256(draft / "model.safetensors"), **(provenance or {})}
        (draft / "recipe.json").write_text(json.dumps(origin, indent=2) + "\n")

    old, new = (target.with_name(f".{word}-{target.name}") for word in ("replaced", "new"))
    shutil.rmtree(new, ignore_errors=True)  # of an export that was killed
    if target.exists():
        write_whole(new, fill)
        shutil.rmtree(old, ignore_errors=True)
        target.rename(old)
        new.rename(target)
    else:
        write_whole(target, fill)
    shutil.rmtree(old, ignore_errors=True)
    return target
