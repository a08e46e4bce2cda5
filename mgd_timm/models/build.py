"""Build models and students, and set their memory format."""

from typing import Any

import timm
import torch
from timm.models import resolve_model_input_args
from torch import nn

from mgd_timm.models.checks import check_classifier
from mgd_timm.models.load import check_model_name, load_weights


def build_model(name: str, input_size: tuple[int, int, int], num_classes: int, **options: Any) -> nn.Module:
    """Build a timm model for an image size and a number of classes.

    Raises:
        ValueError: The name is unknown, or the architecture does not take an argument.
    """
    check_model_name(name)
    inputs = {"in_chans": input_size[0], "img_size": input_size[1:]}
    try:
        return timm.create_model(**resolve_model_input_args(name, inputs, num_classes=num_classes, **options))
    except Exception as error:
        weights = " from its pretrained weights" if options.get("pretrained") else ""
        raise ValueError(
            f"{name!r} cannot be built for {input_size} images and {num_classes} classes{weights}: {error}"
        ) from error


def build_student(
    name: str,
    input_size: tuple[int, int, int],
    num_classes: int,
    *,
    pretrained: bool = False,
    checkpoint: str | None = None,
    drop: float = 0.0,
    drop_path: float | None = None,
) -> nn.Module:
    """Build a student for an image size and a number of classes, with random, published or given weights.

    Args:
        name: timm's name of the architecture.
        input_size: (channels, height, width) of the images.
        num_classes: Number of classes of the data.
        pretrained: Start from the published weights.
        checkpoint: A safetensors file to start from.
        drop: Dropout rate; 0 for the architecture's default.
        drop_path: Stochastic depth rate; None for the architecture's default.

    Raises:
        ValueError: The name is unknown, the architecture does not take an argument or has no classifier, or the
            checkpoint does not fit.
    """
    options: dict[str, Any] = {"pretrained": pretrained}
    if drop:
        options["drop_rate"] = drop
    if drop_path is not None:
        options["drop_path_rate"] = drop_path
    model = build_model(name, input_size, num_classes, **options)
    check_classifier(model)
    if checkpoint is not None:
        load_weights(model, name, checkpoint)
    return model


def set_memory_format(module: nn.Module, name: str, channels_last: bool | None, device: torch.device) -> None:
    """Convert a module to channels-last if `channels_last` is true, or if it is None and the format is safe.

    It is safe on GPUs and for cifar_* networks. On CPUs, oneDNN's backward of a strided 1x1 convolution with few
    channels ends the process (see models.cifar.cifar_resnet.BasicBlock).

    Args:
        module: Converted in place.
        name: Name of the architecture.
        channels_last: True, False, or None for "if safe".
        device: Device that the module runs on.
    """
    safe = device.type == "cuda" or name.startswith("cifar_")
    if channels_last if channels_last is not None else safe:
        module.to(memory_format=torch.channels_last)
