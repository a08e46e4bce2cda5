"""The folder of a run: begun, continued, and read again."""

import json
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import yaml

from mgd_timm.data.dataset import Images
from mgd_timm.recipe.options import as_dict, differences
from mgd_timm.recipe.recipe import PARTS, Recipe, flatten, make_recipe
from mgd_timm.storage.atomic_write import PARTIAL_PREFIX, remove_partial_writes, write_text_atomically
from mgd_timm.storage.versions import versions


def fresh(folder: Path, recipe: Recipe) -> Recipe:
    """The recipe itself.

    Raises:
        FileExistsError: Something stands in its folder.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists: choose another --output, remove it, or continue it with --resume.")
    return recipe


def continued(folder: Path, recipe: Recipe) -> Recipe:
    """The recipe with the global batch of the run that it continues; as it is where nothing has begun yet.

    Steps per update that are those of the run's start are left open: on another number of processes others make its
    global batch.

    Raises:
        ValueError: A run of other values, or a folder of something else.
    """
    if not (folder / "recipe.yaml").is_file():
        # Whoever restarts what was killed gives --resume from the first start on: that one may have been killed at
        # once.
        if folder.exists() and (
            not folder.is_dir() or any(not path.name.startswith(PARTIAL_PREFIX) for path in folder.iterdir())
        ):
            raise ValueError(
                f"{folder} holds no run to resume (no recipe.yaml), but other files: choose another --output."
            )
        return recipe
    values = _read_yaml(folder / "recipe.yaml")
    before, optim = _digested(values), recipe.optim
    if optim.global_batch_size is None:
        optim = replace(optim, global_batch_size=before["optim"]["global_batch_size"])
    if optim.grad_accum_steps == values.get("optim", {}).get("grad_accum_steps"):
        optim = replace(optim, grad_accum_steps=None)
    recipe = replace(recipe, optim=optim)
    changed = differences(before, as_dict(recipe, digest_only=True))
    if changed:
        raise ValueError(
            f"{folder} is a run of another recipe ({'; '.join(changed[:5])}): resume with the flags of its start, or "
            "choose another --output."
        )
    return recipe


def _read_yaml(path: Path) -> dict[str, Any]:
    """A written recipe.

    Raises:
        ValueError: It is damaged.
    """
    try:
        values = yaml.safe_load(path.read_bytes())
        if not isinstance(values, dict) or not all(isinstance(values.get(part, {}), dict) for part in PARTS):
            raise ValueError("not a recipe")
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(
            f"{path} is damaged ({error}): put it back, or start a new run with another --output."
        ) from error
    return values


def _digested(values: dict[str, Any]) -> dict[str, Any]:
    """The part of a written recipe that decides the weights."""
    return {
        f.name: {
            g.name: values.get(f.name, {}).get(g.name)
            for g in fields(type(getattr(Recipe(), f.name)))
            if g.metadata["digest"]
        }
        if f.name in PARTS
        else values.get(f.name)
        for f in fields(Recipe)
        if f.metadata.get("digest", True)
    }


def start_folder(folder: Path, recipe: Recipe, images: Images, say: Callable[[str], None], steps: int | None) -> None:
    """Write what a run starts with, the steps per update as its command named them; what is there of an earlier start
    stays."""
    folder.mkdir(parents=True, exist_ok=True)
    remove_partial_writes(folder)
    if recipe.resume and not (folder / "recipe.yaml").exists():
        say(f"{folder}: nothing to resume there, a new run starts")
    kept = replace(recipe, resume=False, optim=replace(recipe.optim, grad_accum_steps=steps))
    texts = {"recipe.yaml": lambda: yaml.safe_dump(as_dict(kept), sort_keys=False)}
    texts["versions.json"] = lambda: json.dumps(versions(), indent=2) + "\n"
    if images.corrupt:
        texts["bad_images.txt"] = lambda: "".join(f"{line}\n" for line in images.corrupt)
    for name, text in texts.items():
        if not (folder / name).exists():  # of a start that was killed, or to be kept
            write_text_atomically(folder / name, text())


def read_recipe(folder: Path) -> Recipe:
    """The recipe of a run folder.

    Raises:
        ValueError: No run there, or a damaged one.
    """
    path = folder / "recipe.yaml"
    if not path.is_file():
        raise ValueError(f"{folder} holds no run (no recipe.yaml).")
    return make_recipe(**flatten(_read_yaml(path)))
