"""The evaluation images of a trained model, at the size that it takes."""

from collections.abc import Callable
from dataclasses import replace

from accelerate import Accelerator
from timm.models import get_model_input_config
from torch import nn

from mgd_timm.data.dataset import Images, load_images
from mgd_timm.models.checks import check_channels, check_class_names
from mgd_timm.models.pretrained_cfg import read_defaults
from mgd_timm.models.unread_pixels import check_reads_all_pixels
from mgd_timm.recipe.recipe import Recipe


def load_evaluation_images(
    network: nn.Module,
    recipe: Recipe,
    accelerator: Accelerator,
    *,
    of_run: bool,
    log: Callable[[str], None] | None = None,
) -> Images:
    """Load the images of a recipe at a network's input size. Raise ValueError if channels or classes differ.

    Args:
        network: The model.
        recipe: Of the evaluation.
        accelerator: Device and processes.
        of_run: The model is of a run, and its pretrained_cfg has the size that the run showed it.
        log: Logs one line; by default on the main process.
    """
    inputs, config = get_model_input_config(network), getattr(network, "pretrained_cfg", {}) or {}
    data, fixed = recipe.data, inputs["fixed_input_size"]
    height, width = ((of_run and not fixed and config.get("input_size")) or inputs["input_size"])[1:]
    if data.img_size is None and (fixed or of_run) and height == width:
        data = replace(data, img_size=height)
    images = load_images(
        data, recipe.seed, read_defaults(config), log=log or accelerator.print, accelerator=accelerator
    )
    check_channels(network, "model", images.input_size[0])
    if network.num_classes != images.num_classes:
        raise ValueError(
            f"the model has {network.num_classes} classes, the data has {images.num_classes}: expected as many. For a "
            "teacher with more classes, mgd-timm distill --teacher-classes prints the accuracy on the data's."
        )
    check_class_names(network, "model", images.class_names)
    if fixed and images.input_size[1:] != tuple(inputs["input_size"][1:]):
        (own, shown) = ("x".join(map(str, size[1:])) for size in (inputs["input_size"], images.input_size))
        raise ValueError(f"the model takes images of {own} pixels, the data's are {shown}: leave --img-size out.")
    if not fixed:
        check_reads_all_pixels(network, "model", images.input_size, "--img-size")
    return images
