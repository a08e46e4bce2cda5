"""A student that is published: its export, where it comes from, and its run where that is at hand."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from mgd_timm.features.tap import model_name
from mgd_timm.models.load import find_weights_folder, load_model
from mgd_timm.pipeline.run_folder import is_run_folder
from mgd_timm.recipe.checks import needs_no_teacher
from mgd_timm.recipe.options import as_dict
from mgd_timm.recipe.recipe import Recipe, flatten, make_recipe, without_paths
from mgd_timm.report.runs import Run, read_run


@dataclass(frozen=True)
class Accuracy:
    """What a run measured after its last epoch; None where it did not.

    Args:
        top1, top5: In %.
        images: Number of them.
    """

    top1: float | None
    top5: float | None
    images: int | None


@dataclass(frozen=True)
class Student:
    """An exported student.

    Args:
        folder: Of the export.
        model: The network, in eval mode.
        config: Of config.json.
        origin: Of recipe.json, without paths of this machine.
        recipe: Of the run, without paths; None for an export that tells of no run.
        run: The run, where `folder` lies in its folder.
    """

    folder: Path
    model: nn.Module
    config: dict[str, Any]
    origin: dict[str, Any]
    recipe: Recipe | None
    run: Run | None

    @property
    def architecture(self) -> str:
        """timm's name of the network."""
        return model_name(self.model)

    @property
    def input_size(self) -> tuple[int, int, int]:
        """(channels, height, width) of its images."""
        channels, height, width = self.config["pretrained_cfg"]["input_size"]
        return channels, height, width

    @property
    def class_names(self) -> list[str]:
        """Names of its classes, in the order of the classifier; empty where config.json has none."""
        return list(map(str, self.config.get("label_names") or ()))

    @property
    def num_classes(self) -> int:
        """Number of its classes."""
        return int(self.config["num_classes"])

    @property
    def accuracy(self) -> Accuracy:
        """What its run measured."""
        return accuracy_of(self.origin.get("metrics", {}), self.num_classes)

    @property
    def is_taught(self) -> bool:
        """Whether a teacher, a peer or heads of its own taught it."""
        recipe = self.recipe
        if recipe is None:
            return False
        return recipe.teacher is not None or recipe.peer is not None or needs_no_teacher(recipe.criterion)


def read_student(place: str) -> Student:
    """Read a run folder or an exported folder.

    Raises:
        ValueError: No such folder, one without an export, corrupt files, or weights that are not those exported.
    """
    folder = find_weights_folder(place)
    if folder is None:
        raise ValueError(f"{place}: expected a run folder, or a folder that mgd-timm export wrote.")
    model = load_model(f"local-dir:{folder}").eval()
    if not (folder / "recipe.json").is_file():
        raise ValueError(
            f"{folder}: no recipe.json, which says where the weights come from: write it with mgd-timm export."
        )
    origin = read_origin_file(folder)
    parent = folder.absolute().parent
    run = read_run(parent) if folder.name == "export" and is_run_folder(parent) else None
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return Student(folder, model, config, origin, _recipe_of(folder, origin), run)


def read_origin_file(folder: Path) -> dict[str, Any]:
    """Return recipe.json without absolute paths. Raise ValueError where it cannot be read."""
    path = folder / "recipe.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError("expected an object")
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read ({error}): export the model again.") from error
    return without_absolute_paths(values)


def _recipe_of(folder: Path, origin: dict[str, Any]) -> Recipe | None:
    try:
        return shared_recipe(origin["recipe"]) if "recipe" in origin else None
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(
            f"{folder / 'recipe.json'}: its recipe cannot be read ({error}): export the run again."
        ) from error


def shared_recipe(values: dict[str, Any]) -> Recipe:
    """Return the recipe of a recipe.json, without paths."""
    recipe = make_recipe(**flatten(values))
    return make_recipe(**flatten(without_paths(as_dict(recipe))))


def without_absolute_paths(value: Any) -> Any:
    """Return a JSON value in which each absolute path is its last name alone."""
    if isinstance(value, dict):
        return {key: without_absolute_paths(one) for key, one in value.items()}
    if isinstance(value, list):
        return [without_absolute_paths(one) for one in value]
    return Path(value).name if isinstance(value, str) and os.path.isabs(value) else value


def accuracy_of(metrics: dict[str, Any], classes: int) -> Accuracy:
    """Return the accuracy of summary.json, or of the metrics in recipe.json; of 5 classes or fewer no top-5."""
    row = metrics.get("test") or metrics.get("last") or {}
    return Accuracy(row.get("top1"), row.get("top5") if classes > 5 else None, int(row["n"]) if "n" in row else None)


def as_list(value: Any) -> list[Any]:
    """Return what recipe.json holds of one teacher, or of several, as a list."""
    return list(value) if isinstance(value, list) else [] if value is None else [value]
