"""Refuse image sizes of which a model leaves pixels unread: of 28x28 pixels, patches of 16 read the upper left 16x16.

What a model reads is found by a probe, not from its name. NaN in a pixel that is read reaches the output through every
operation and every weight, also through weights that are 0, where a gradient would vanish.
"""

from bisect import bisect_left
from typing import Any, cast

import torch
from timm.models import get_model_input_config
from torch import nn
from torch.utils._pytree import tree_leaves

from mgd_timm.features.probe import eval_without_gradients
from mgd_timm.features.tap import model_name


def check_reads_all_pixels(model: nn.Module, role: str, input_size: tuple[int, int, int], flag: str) -> None:
    """Raise ValueError, with the nearest sizes that fit, if a model leaves rows or columns of images unread.

    A network whose first layer cuts the image into patches has to read all of it. Others may leave out one row, or up
    to 1/16 of the side, as convolutions without padding do (inception_v3, legacy_xception). A size at which weights
    were published is accepted (vit_so400m_patch14_siglip_384 reads 378 of 384 pixels).

    Args:
        model: A timm model; unchanged afterwards.
        role: Its part in the run, for the message.
        input_size: (channels, height, width) of its images.
        flag: Option that sets the size, for the message.
    """
    weight = next(model.parameters(), None)
    if weight is None or weight.is_meta or _is_published_size(model, input_size):
        return
    channels, height, width = input_size
    patch, fixed = _patch_size(model, channels), get_model_input_config(model)["fixed_input_size"]
    try:
        unread = find_unread(model, input_size)
        problem = f"reads only the upper left {height - unread[0]}x{width - unread[1]} of {height}x{width} pixels"
    except Exception as error:  # an architecture may refuse in any way
        if isinstance(error, torch.OutOfMemoryError) or patch is None or fixed:
            return  # the probe of its features reports what it does not take
        unread, problem = (height % patch, width % patch), f"does not take images of {height}x{width} pixels ({error})"
    allowed = [0 if patch is not None else max(1, side // 16) for side in (height, width)]
    if unread[0] <= allowed[0] and unread[1] <= allowed[1]:
        return
    step = patch or _largest_reduction(model)
    nearest: set[int] = set()
    for side, pixels in zip((height, width), unread, strict=True):
        nearest |= {side - pixels, (side // step + 1) * step} if pixels else set()
    sizes = " or ".join(f"{flag} {side}" for side in sorted(nearest) if _takes(model, (channels, side, side)))
    sizes = sizes or f"{flag} of a multiple of {step}"
    raise ValueError(f"the {role} {model_name(model)} {problem}: give a size of which it reads every pixel, {sizes}.")


def find_unread(model: nn.Module, input_size: tuple[int, int, int]) -> tuple[int, int]:
    """Return how many rows at the bottom and columns at the right of an image a model never reads.

    It takes two forward passes of one image, and a few more where pixels are unread.
    """
    channels, height, width = input_size
    weight = next(model.parameters())

    def reads(rows: int, columns: int) -> bool:
        image = torch.zeros(1, channels, height, width, device=weight.device, dtype=weight.dtype)
        image[:, :, height - rows :] = torch.nan
        image[..., width - columns :] = torch.nan
        final = cast(Any, model).forward_features(image)
        return any(bool(part.isnan().any()) for part in tree_leaves(final))

    with eval_without_gradients(model):
        rows = bisect_left(range(1, height), True, key=lambda rows: reads(rows, 0)) if not reads(1, 0) else 0
        columns = bisect_left(range(1, width), True, key=lambda columns: reads(0, columns)) if not reads(0, 1) else 0
    return rows, columns


def _takes(model: nn.Module, input_size: tuple[int, int, int]) -> bool:
    """Return whether a model reads all of an image; one that is built for a size would be built for this one."""
    if get_model_input_config(model)["fixed_input_size"]:
        return min(input_size) > 0
    try:
        return not any(find_unread(model, input_size))
    except Exception:
        return False


def _is_published_size(model: nn.Module, input_size: tuple[int, int, int]) -> bool:
    config = getattr(model, "pretrained_cfg", None) or {}
    published = config.get("hf_hub_id") or config.get("url")
    return bool(published) and tuple(config.get("input_size") or ())[1:] == input_size[1:]


def _patch_size(model: nn.Module, channels: int) -> int | None:
    """Return the stride of a convolution that cuts the image into patches without overlap; None if there is none."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.in_channels == channels and max(module.stride) > 1:
            return max(module.stride) if tuple(module.kernel_size) == tuple(module.stride) else None
    return None


def _largest_reduction(model: nn.Module) -> int:
    """Return how many pixels a side of the image become one of the deepest map."""
    return max((int(stage["reduction"]) for stage in getattr(model, "feature_info", None) or ()), default=32)
