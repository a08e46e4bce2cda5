"""The pretrained_cfg of trained weights: how they were trained, and how images are shown to them."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from mgd_timm.features import Defaults


def describe_weights(
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


def read_defaults(config: Mapping[str, Any]) -> Defaults:
    """How a pretrained_cfg says that images are shown to the model."""
    return Defaults(
        mean=read_channel_values(config, "mean"),
        std=read_channel_values(config, "std"),
        img_size=int((config.get("input_size") or (3, 224, 224))[-1]),
        interpolation=str(config.get("interpolation") or "bicubic"),
        crop_pct=float(config.get("crop_pct") or 0.875),
    )


def read_channel_values(config: Mapping[str, Any], name: str) -> tuple[float, ...] | None:
    """Mean or std of a pretrained_cfg, which may come from outside; None where it is no list of numbers."""
    values = config.get(name)
    if not isinstance(values, list | tuple) or not values or not all(type(v) in (int, float) for v in values):
        return None
    return tuple(float(v) for v in values)
