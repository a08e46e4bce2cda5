"""Show the evaluation images to the students of runs and to their teacher."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from accelerate import Accelerator
from jaxtyping import Float, Int
from torch import Tensor, nn

from mgd_timm.criteria.base import target_classes
from mgd_timm.data.dataset import Images
from mgd_timm.data.sources import Source
from mgd_timm.distiller import Teacher
from mgd_timm.features import FeatureTap
from mgd_timm.features.tap import model_name
from mgd_timm.models.build import set_memory_format
from mgd_timm.models.load import load_model
from mgd_timm.pipeline.evaluation_images import load_evaluation_images
from mgd_timm.pipeline.plan import accelerator_of
from mgd_timm.recipe.data import OF_TRAINING
from mgd_timm.recipe.options import as_dict
from mgd_timm.recipe.recipe import Recipe, make_recipe
from mgd_timm.report.runs import Run


@dataclass(frozen=True)
class Predictions:
    """Logits of a network for every evaluation image, on the CPU.

    Args:
        logits: One row per image.
        labels: Class of each image.
    """

    logits: Float[Tensor, "n k"]
    labels: Int[Tensor, " n"]

    @cached_property
    def classes(self) -> Int[Tensor, " n"]:
        """The predicted class of each image."""
        return self.logits.argmax(1)

    @cached_property
    def hits(self) -> Tensor:
        """Whether each image is classified correctly."""
        return self.classes == self.labels

    def top(self, count: int) -> float:
        """Return the share of images, in %, whose class is among the `count` largest logits."""
        ranked = self.logits.topk(min(count, self.logits.shape[1])).indices
        return 100 * float((ranked == self.labels[:, None]).any(1).double().mean())


@dataclass(frozen=True)
class Student:
    """A run's student, with what it says about the evaluation images."""

    run: Run
    model: nn.Module
    images: Images
    source: Source
    recipe: Recipe
    accelerator: Accelerator
    predictions: Predictions

    @property
    def name(self) -> str:
        """Its architecture."""
        return model_name(self.model)

    def some(self, count: int) -> tuple[Tensor, Tensor]:
        """Return evenly spaced evaluation images and their labels, at most `count` of each."""
        return self.at(self.places(count))

    def places(self, count: int) -> Tensor:
        """Return the places, from 0, of evenly spaced evaluation images, at most `count`."""
        return torch.linspace(0, len(self.source.ids) - 1, min(count, len(self.source.ids))).long()

    def at(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """Return the evaluation images at some places (from 0), as the student sees them, and their labels."""
        batch = next(iter(self.source.batches([self.source.ids[places]], 0, self.accelerator.device)))
        return batch.images, target_classes(batch.labels)


def measure_student(run: Run, given: dict[str, Any], log: Callable[[str], None]) -> Student:
    """Load a run's student, and show it the evaluation images as its run did.

    Args:
        run: Of the student.
        given: Options of Data that replace the run's.
        log: Logs one line.

    Raises:
        ValueError: As mgd_timm.evaluate.
    """
    model = load_model(str(run.folder))
    recipe = _evaluation_recipe(run.recipe, given)
    accelerator = accelerator_of(recipe)
    images = load_evaluation_images(model, recipe, accelerator, of_run=True, log=log)
    source = images.test if images.test is not None else images.val
    if source is None:
        raise ValueError(
            f"{run.folder}: the data has no split to evaluate on: name one with --eval-split, or hold one out with "
            "--val-split 0.1."
        )
    set_memory_format(model, model_name(model), recipe.channels_last, accelerator.device)
    model.to(accelerator.device).eval()
    predictions = predict(model, source, accelerator, recipe.data.validation_batch_size)
    return Student(run, model, images, source, recipe, accelerator, predictions)


def check_same_images(students: list[Student]) -> None:
    """Raise ValueError unless all students were shown the same evaluation images."""
    first = students[0]
    for other in students[1:]:
        same = other.source.digest == first.source.digest and torch.equal(other.source.ids, first.source.ids)
        if not same or other.images.class_names != first.images.class_names:
            raise ValueError(
                f"{other.run.folder} and {first.run.folder} are evaluated on different images or classes, and cannot "
                "be compared image by image. Report them apart, or name the same images for both (--data-dir, "
                "--eval-split); a part that --val-split holds out depends on the seed."
            )


@torch.no_grad()
def predict(
    network: Callable[[Tensor], Tensor], source: Source, accelerator: Accelerator, batch_size: int
) -> Predictions:
    """Return a network's predictions for all images of a source.

    Args:
        network: Returns logits of normalised images.
        source: Of the evaluation images.
        accelerator: Device and precision.
        batch_size: Images per step.
    """
    logits = []
    for batch in source.batches(source.ids.split(batch_size), 0, accelerator.device):
        with accelerator.autocast():
            logits.append(network(batch.images).float().cpu())
    return Predictions(torch.cat(logits), target_classes(source.labels).cpu())


@torch.no_grad()
def pooled_maps(network: Teacher | FeatureTap, images: Tensor, batch_size: int) -> list[Tensor]:
    """Return the mean over positions of each of a network's maps, [images, channels] each, shallow to deep."""
    parts = [[one.mean((2, 3)).cpu() for one in network(some).maps] for some in images.split(batch_size)]
    return [torch.cat(pieces) for pieces in zip(*parts, strict=True)]


def _evaluation_recipe(recipe: Recipe, given: dict[str, Any]) -> Recipe:
    """Return a recipe of the data, and of what decides how they are computed."""
    data = {name: value for name, value in as_dict(recipe.data).items() if name not in OF_TRAINING}
    if "dataset" in given:
        data["data_dir"] = None
    computed = {name: getattr(recipe, name) for name in ("seed", "amp", "amp_dtype", "channels_last")}
    return make_recipe(**computed, **{**data, **given})
