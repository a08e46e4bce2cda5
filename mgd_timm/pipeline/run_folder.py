"""The folder of a run: start it, resume from it, and read its recipe."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import yaml

from mgd_timm.data.dataset import Images
from mgd_timm.data.readers.splits import role_of, split_of_file
from mgd_timm.recipe.data import Data
from mgd_timm.recipe.options import as_dict, differences
from mgd_timm.recipe.recipe import PARTS, Recipe, flatten, make_recipe
from mgd_timm.storage.atomic_write import PARTIAL_PREFIX, remove_partial_writes, write_text_atomically
from mgd_timm.storage.versions import versions


def check_new_folder(folder: Path) -> None:
    """Raise FileExistsError unless a run can start in the folder: it does not exist, or is empty."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists: choose another --output, or continue it with --resume.")


def check_outside_data(data: Data, written: Mapping[str, Path]) -> None:
    """Raise ValueError if a later run would read a folder that will be written as images or as a class: it is the data
    folder, one of its splits, or lies beside its class folders. Beside split folders and files it may lie.

    Args:
        data: Names the data folder, if the data are local.
        written: Folders that will be written, by their names in the message.
    """
    if data.data_dir is None and data.dataset == "embedded":
        return
    folder = Path(data.data_dir or data.dataset)
    if not folder.is_dir():
        return
    has_splits = any(role_of(path.name) or split_of_file(path.name) for path in folder.iterdir())
    for name, target in written.items():
        if not target.resolve().is_relative_to(folder.resolve()):
            continue
        inside = target.resolve().relative_to(folder.resolve()).parts
        if not has_splits or not inside or role_of(inside[0]):
            raise ValueError(
                f"{name} {target} is in the data folder {folder}, where a later run would read it as data: choose a "
                "folder outside of it."
            )


def match_resumed_run(folder: Path, recipe: Recipe) -> Recipe:
    """Return the recipe with the global batch of the run in the folder, or as it is where none has started yet.

    Micro-batches per update that are those of the run's start are left open: another number of processes needs others
    for the same global batch.

    Raises:
        ValueError: The folder holds a run of another recipe, or something else than a run.
    """
    if not (folder / "recipe.yaml").is_file():
        # --resume may be given from the first start on, which may have been killed before it wrote its recipe.
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
    """Return the options of a written recipe. Raise ValueError for a corrupt file."""
    try:
        values = yaml.safe_load(path.read_bytes())
        if not isinstance(values, dict) or not all(isinstance(values.get(part, {}), dict) for part in PARTS):
            raise ValueError("not a recipe")
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(
            f"{path} is corrupt ({error}): restore it, or start a new run with another --output."
        ) from error
    return values


def _digested(values: dict[str, Any]) -> dict[str, Any]:
    """Return the part of a written recipe that decides the weights."""
    return {
        f.name: {g.name: values.get(f.name, {}).get(g.name) for g in fields(PARTS[f.name]) if g.metadata["digest"]}
        if f.name in PARTS
        else values.get(f.name)
        for f in fields(Recipe)
        if f.metadata.get("digest", True)
    }


def start_folder(folder: Path, recipe: Recipe, images: Images, log: Callable[[str], None], steps: int | None) -> None:
    """Write recipe, versions, data and corrupt images of a run, where an earlier start has not written them.

    Args:
        folder: Made where it lacks.
        recipe: Of the run.
        images: Of the run.
        log: Takes a line for the user.
        steps: Micro-batches per update, as the command named them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    remove_partial_writes(folder)
    if recipe.resume and not (folder / "recipe.yaml").exists():
        log(f"{folder}: nothing to resume, a new run starts")
    kept = replace(recipe, resume=False, optim=replace(recipe.optim, grad_accum_steps=steps))
    texts = {"recipe.yaml": lambda: yaml.safe_dump(as_dict(kept), sort_keys=False)}
    texts["data.json"] = lambda: json.dumps(images.description, indent=2, ensure_ascii=False) + "\n"
    texts["versions.json"] = lambda: json.dumps(versions(), indent=2) + "\n"
    if images.corrupt:
        texts["bad_images.txt"] = lambda: "".join(f"{line}\n" for line in images.corrupt)
    for name, text in texts.items():
        adds_qat = name == "recipe.yaml" and recipe.qat and recipe.resume
        if adds_qat or not (folder / name).exists():  # of a start that was killed, or to be kept
            write_text_atomically(folder / name, text())


def is_run_folder(folder: Path) -> bool:
    """Return whether a folder is that of a run: a published folder has a recipe.yaml too, beside an export's files."""
    exported = ("config.json", "model.safetensors", "recipe.json")
    return (folder / "recipe.yaml").is_file() and not any((folder / name).is_file() for name in exported)


def read_recipe(folder: Path) -> Recipe:
    """Return the recipe of a run folder. Raise ValueError where it holds no run, or a corrupt recipe."""
    path = folder / "recipe.yaml"
    if not path.is_file():
        raise ValueError(f"{folder} holds no run (no recipe.yaml).")
    return make_recipe(**flatten(_read_yaml(path)))


@dataclass(frozen=True)
class Origin:
    """The run that a model comes from.

    Args:
        recipe: Of the run.
        train_sha256, evaluation_sha256: Digests of its images and labels; None where they are not known.
        has_paths: The recipe is the run's own; that of an export has the last name of each path.
    """

    recipe: Recipe
    train_sha256: str | None
    evaluation_sha256: str | None
    has_paths: bool

    def describe_changes(self, train: str, evaluation: str) -> str | None:
        """Return one line that names the images whose digests are not those of the run; None if there are none."""
        found = {"training": (self.train_sha256, train), "evaluation": (self.evaluation_sha256, evaluation)}
        changed = {name: pair for name, pair in found.items() if pair[0] not in (None, pair[1])}
        if not changed:
            return None
        digests = ", ".join(f"{name} {before[:12]} -> {now[:12]}" for name, (before, now) in changed.items() if before)
        return (
            f"warning: the data has changed since the run: its {' and '.join(changed)} images or labels are others "
            f"(sha256: {digests})"
        )


def read_provenance(folder: Path) -> dict[str, Any]:
    """Return the recipe.json of a run folder or exported folder, for another export of its model; empty if there is
    none."""
    path = next((one / "recipe.json" for one in (folder / "export", folder) if (one / "recipe.json").is_file()), None)
    found = json.loads(path.read_text(encoding="utf-8")) if path is not None else {}
    if not isinstance(found, dict):
        raise ValueError(f"{path}: expected a JSON object, found a {type(found).__name__}: correct or remove the file.")
    # export_model writes these.
    return {name: value for name, value in found.items() if name not in ("versions", "model_sha256", "files_sha256")}


def read_origin(folder: Path) -> Origin | None:
    """Return the origin of a model from its run folder or exported folder; None if it has none.

    An export that lies in its run folder has the run's recipe.

    Raises:
        ValueError: Its recipe cannot be read.
    """
    run = next((one for one in (folder, folder.absolute().parent) if is_run_folder(one)), None)
    exported = folder / "export" if run == folder else folder
    path = exported / "recipe.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if not isinstance(values, dict):
            raise TypeError(f"expected a JSON object, found a {type(values).__name__}")
        recipe = make_recipe(**flatten(values["recipe"])) if "recipe" in values else None
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: its recipe cannot be read ({error}): correct or remove the file.") from error
    if run is not None and (recipe is not None or run == folder):
        recipe = read_recipe(run)
    if recipe is None:
        return None
    return Origin(recipe, values.get("data_sha256"), values.get("evaluation_sha256"), has_paths=run is not None)
