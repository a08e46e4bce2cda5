"""What timm does to batches: random erasing, mixup and cutmix; once, so that teacher and student see the same picture.

Erasing is a function of (seed, epoch, sample), mixing of (seed, epoch, the samples of the batch): a batch is mixed
within itself.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from mgd_timm.data.rng import mix, normal, seeded, uniform
from mgd_timm.recipe.recipe import Data

_TRIES = 10  # for a box that fits, as timm has it
_AREA, _RATIO = (0.02, 1 / 3), (0.3, 1 / 0.3)


def erase(
    images: Float[Tensor, "b c h w"],
    keys: Int[Tensor, " b"],
    seed: int,
    epoch: int,
    probability: float,
    mode: str,
    count: int,
) -> Float[Tensor, "b c h w"]:
    """Normalised images with boxes erased, by (seed, epoch, key) alone: timm's RandomErasing as one operation on a
    batch.

    A box has 2 % to a third of the image's area, over the number of boxes, and a ratio of height to width from 0.3 to 1
    / 0.3, uniform in its logarithm.

    Reference: Zhong et al., "Random Erasing Data Augmentation" (arXiv 1708.04896).

    Args:
        images: Of mean 0 and standard deviation 1.
        keys: What the images' randomness goes by.
        seed, epoch: What else it goes by.
        probability: Of an image being erased at all.
        mode: const, rand or pixel: 0, a normal number per box and channel, or one per pixel and channel.
        count: Largest number of boxes; 1 to `count` with equal probability.
    """
    b, c, h, w = images.shape
    draws = uniform(keys, mix(seed, 8), epoch, 2 + 4 * count * _TRIES)
    boxes = 1 + (draws[:, 1] * count).long()
    tries = draws[:, 2:].reshape(b, count, _TRIES, 4)
    area = (_AREA[0] + tries[..., 0] * (_AREA[1] - _AREA[0])) * (h * w) / boxes[:, None, None]
    ratio = (math.log(_RATIO[0]) + tries[..., 1] * math.log(_RATIO[1] / _RATIO[0])).exp()
    heights, widths = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()
    fits = (heights < h) & (widths < w)
    first = fits.long().argmax(2, keepdim=True)
    height, width, u, v = (x.gather(2, first).squeeze(2) for x in (heights, widths, tries[..., 2], tries[..., 3]))
    top, left = (u * (h - height + 1)).floor(), (v * (w - width + 1)).floor()
    drawn = (draws[:, :1] < probability) & fits.any(2) & (torch.arange(count, device=keys.device) < boxes[:, None])
    rows, columns = torch.arange(h, device=keys.device), torch.arange(w, device=keys.device)
    numbers = {"const": 0, "rand": c * count, "pixel": c * h * w}[mode]
    if (
        images.device.type == "cpu"
    ):  # of those that are erased alone, which takes most of the time; a GPU would wait for their number
        some = drawn.any(1)
        noise = images.new_zeros(b, numbers)
        noise[some] = normal(keys[some], mix(seed, 9, epoch), numbers).to(images.dtype)
    else:
        noise = normal(keys, mix(seed, 9, epoch), numbers).to(images.dtype)
    for box in range(count):
        y, x, bottom, right = (z[:, box, None] for z in (top, left, top + height, left + width))
        inside = ((rows >= y) & (rows < bottom))[:, :, None] & ((columns >= x) & (columns < right))[:, None, :]
        inside = inside & drawn[:, box, None, None]
        if mode == "const":
            value = torch.zeros_like(images)
        elif mode == "rand":
            value = noise[:, box * c : (box + 1) * c, None, None]
        else:
            value = noise.reshape(images.shape)
        images = torch.where(inside[:, None], value, images)
    return images


def mixed(
    images: Float[Tensor, "b c h w"], labels: Float[Tensor, "b k"], key: int, data: Data
) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, "b k"]]:
    """A batch mixed with itself in reverse order, by mixup or cutmix with one coefficient, and the labels'
    distributions alike.

    mixup: lam x_i + (1 - lam) x_j with lam of Beta(alpha, alpha); cutmix: x_i with a box of x_j, lam the share that is
    left.

    Reference: Zhang et al., "mixup: Beyond Empirical Risk Minimization" (arXiv 1710.09412); Yun et al., "CutMix" (arXiv
    1905.04899); timm's Mixup of mode "batch", whose order of draws this is.

    Differs: a batch of odd size is taken too (its middle image stays). Labels are not smoothed here: the
    cross-entropy's own smoothing does it, and as both are affine, timm's order of the two gives the same loss.

    Args:
        images, labels: Of the batch.
        key: The seed of this batch.
        data: Alphas and probabilities; one alpha at least is positive.
    """
    from timm.data.mixup import cutmix_bbox_and_lam

    with seeded(key):
        if np.random.rand() >= data.mixup_prob:
            return images, labels
        cut = bool(data.cutmix) and (not data.mixup or np.random.rand() < data.mixup_switch_prob)
        alpha = data.cutmix if cut else data.mixup
        share = float(np.random.beta(alpha, alpha))
        if cut:
            (y, bottom, x, right), share = cutmix_bbox_and_lam(images.shape, share)
            share = float(share)  # of numpy
    if cut:
        images = images.clone()
        images[:, :, y:bottom, x:right] = images.flip(0)[:, :, y:bottom, x:right]
    else:
        images = images * share + images.flip(0) * (1 - share)
    return images, labels * share + labels.flip(0) * (1 - share)


def distributions(labels: Int[Tensor, " b"] | Float[Tensor, "b k"], num_classes: int) -> Float[Tensor, "b k"]:
    """Labels as distributions over classes, float32."""
    return labels.float() if labels.is_floating_point() else F.one_hot(labels.long(), num_classes).float()


def augment(
    images: UInt8[Tensor, "b c h w"],
    sample_ids: Int[Tensor, " b"],
    seed: int,
    epoch: int,
    *,
    pad: int,
    hflip: float,
) -> UInt8[Tensor, "b c h w"]:
    """Zero-pad by `pad` pixels, crop at random to the former size, flip left-right with probability `hflip`: as one
    gather."""
    draws = uniform(sample_ids, seed, epoch, 3)
    _, channels, height, width = images.shape
    top = (draws[:, 0] * (2 * pad + 1)).long()
    left = (draws[:, 1] * (2 * pad + 1)).long()
    rows = torch.arange(height, device=images.device) + top[:, None]
    columns = torch.arange(width, device=images.device).expand(len(images), width)
    columns = torch.where((draws[:, 2] < hflip)[:, None], columns.flip(1), columns) + left[:, None]
    padded_width = width + 2 * pad
    window = (rows[:, :, None] * padded_width + columns[:, None, :]).flatten(1)
    flat = F.pad(images, (pad, pad, pad, pad)).flatten(2)
    return flat.gather(2, window[:, None].expand(-1, channels, -1)).reshape(images.shape)


def normalise(images: UInt8[Tensor, "b c h w"], mean: Tensor, std: Tensor) -> Float[Tensor, "b c h w"]:
    """(pixels / 255 - mean) / std in float32; mean and std [c, 1, 1] of pixels in [0, 1]."""
    return images.float().sub_(mean * 255).div_(std * 255)
