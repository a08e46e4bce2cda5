"""Read and write timm's pretrained_cfg: source of the weights, normalisation and size of their images."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from mgd_timm.features import Defaults
from mgd_timm.recipe.checks import check_statistics

# Keys of the default weights: their source, inputs and labels.
_WEIGHT_KEYS = (
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
    "custom_load",
    "label_names",
    "label_descriptions",
    "label_offset",
    "test_input_size",
    "test_crop_pct",
    "pool_size",
)


def describe_weights(
    model: nn.Module,
    *,
    input_size: tuple[int, int, int],
    mean: tuple[float, ...],
    std: tuple[float, ...],
    class_names: tuple[str, ...],
    license: str,
    tag: str,
    evaluation: Mapping[str, Any] | None = None,
) -> None:
    """Set a pretrained_cfg that describes the model's own weights, not the architecture's default ones.

    Args:
        model: Its `pretrained_cfg` and `default_cfg` are set.
        input_size: (channels, height, width).
        mean, std: Per channel, of pixels in [0, 1].
        class_names: Names of the classes, in the order of the classifier.
        license: Licence of the weights.
        tag: timm's tag of the weights.
        evaluation: crop_pct, crop_mode and interpolation that differ from the architecture's.
    """
    config = dict(getattr(model, "pretrained_cfg", {}) or {})
    for key in _WEIGHT_KEYS:
        config.pop(key, None)
    config |= {"tag": tag, "license": license, "input_size": input_size, "mean": mean, "std": std}
    config |= {"num_classes": len(class_names), "label_names": list(class_names), **(evaluation or {})}
    model.pretrained_cfg = config  # type: ignore[assignment]
    model.default_cfg = config  # type: ignore[assignment]


def read_defaults(config: Mapping[str, Any]) -> Defaults:
    """Read how a model expects its images from its pretrained_cfg."""
    return Defaults(
        mean=read_channel_values(config, "mean"),
        std=read_channel_values(config, "std"),
        img_size=int((config.get("input_size") or (3, 224, 224))[-1]),
        interpolation=str(config.get("interpolation") or "bicubic"),
        crop_pct=float(config.get("crop_pct") or 0.875),
        crop_mode=str(config.get("crop_mode") or "center"),
    )


def read_channel_values(config: Mapping[str, Any], name: str) -> tuple[float, ...] | None:
    """Read the mean or std from a pretrained_cfg.

    Returns:
        One value per channel; None if it is not a list of numbers: the file may be untrusted.

    Raises:
        ValueError: They are above 1, those of pixels in 0 to 255.
    """
    values = config.get(name)
    if not isinstance(values, list | tuple) or not values or not all(type(v) in (int, float) for v in values):
        return None
    try:
        check_statistics(name, values)
    except ValueError as error:
        raise ValueError(f"pretrained_cfg of the weights of {config.get('architecture')}: {error}") from error
    return tuple(float(v) for v in values)
