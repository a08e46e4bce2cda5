"""Everything random that is done to pixels.

- Small images (up to `SMALL` pixels a side, such as 32x32): `augment_small` crops, flips and erases a batch.
- Large images: `timm_transform`, timm's transform of one image in a DataLoader worker, and of a batch on the device.
- Batches of both: `mix_batch`, mixup and cutmix, once, so that teacher and student see the same images.

Crops, flips and boxes are a function of (seed, epoch, sample id), mixing of (seed, epoch, sample ids of the batch).
"""

import contextlib
import math
import mmap
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from mgd_timm.data.decode import DataError, LazyImage, to_pil, to_tensor
from mgd_timm.data.rng import mix, normal, seeded, uniform
from mgd_timm.features import Defaults
from mgd_timm.recipe.data import Data

SMALL = 96
"""Pixels a side: up to here a decoded image is cached, as it costs less to store than to decode again."""

_TRIES = 10  # for a box that fits, as in timm
_AREA, _RATIO = (0.02, 1 / 3), (0.3, 1 / 0.3)


# -- small images


def augment_small(
    images: UInt8[Tensor, "b c h w"],
    keys: Int[Tensor, " b"],
    seed: int,
    epoch: int,
    data: Data,
    mean: Tensor,
    std: Tensor,
) -> Float[Tensor, "b c h w"]:
    """Return a batch of small images cropped, flipped, normalised and erased, by (seed, epoch, key) alone.

    Args:
        images: The batch.
        keys: Sample ids; an id plus a multiple of the number of samples is another augmentation of the same image.
        seed, epoch: Further keys of the random draws.
        data: Its `pad`, `hflip`, `reprob`, `remode` and `recount`.
        mean, std: [c, 1, 1], of pixels in [0, 1].
    """
    moved = pad_crop_flip(images, keys, seed, epoch, pad=data.pad, hflip=data.hflip)
    normalised = normalise(moved, mean, std)
    if not data.reprob:
        return normalised
    return erase(normalised, keys, seed, epoch, data.reprob, data.remode, data.recount)


def check_small_options(data: Data) -> None:
    """Raise DataError for an option that small images do not take."""
    for name in ("aa", "color_jitter", "train_interpolation"):
        if getattr(data, name):
            flag = f"--{name.replace('_', '-')}"
            raise DataError(
                f"{flag} {getattr(data, name)}: images of {SMALL} pixels or less take only --pad, --hflip, --reprob, "
                f"--mixup and --cutmix. Leave {flag} out, or resize with --img-size {SMALL + 1} or more."
            )


def pad_crop_flip(
    images: UInt8[Tensor, "b c h w"], keys: Int[Tensor, " b"], seed: int, epoch: int, *, pad: int, hflip: float
) -> UInt8[Tensor, "b c h w"]:
    """Zero-pad by `pad` pixels, crop at random to the original size, flip left-right with probability `hflip`."""
    draws = uniform(keys, seed, epoch, 3)
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
    """Return (pixels / 255 - mean) / std in float32; mean and std are [c, 1, 1], of pixels in [0, 1]."""
    return images.float().sub_(mean * 255).div_(std * 255)


def erase(
    images: Float[Tensor, "b c h w"],
    keys: Int[Tensor, " b"],
    seed: int,
    epoch: int,
    probability: float,
    mode: str,
    count: int,
) -> Float[Tensor, "b c h w"]:
    """Erase boxes of normalised images, by (seed, epoch, key) alone: timm's RandomErasing as one operation on a batch.

    A box has 2 % to a third of the image's area, divided by the number of boxes, and a ratio of height to width from
    0.3 to 1 / 0.3, uniform in its logarithm.

    Reference: Zhong et al., "Random Erasing Data Augmentation" (arXiv 1708.04896).

    Args:
        images: Of mean 0 and standard deviation 1.
        keys: Sample ids.
        seed, epoch: Further keys of the random draws.
        probability: Probability that an image is erased at all.
        mode: const (0), rand (a normal number per box and channel) or pixel (one per pixel and channel).
        count: Largest number of boxes; each number from 1 to `count` is equally likely.
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
    erased = (draws[:, :1] < probability) & fits.any(2) & (torch.arange(count, device=keys.device) < boxes[:, None])
    rows, columns = torch.arange(h, device=keys.device), torch.arange(w, device=keys.device)
    noise = _erasing_noise(images, keys, mix(seed, 9, epoch), mode, count, erased.any(1))
    for box in range(count):
        y, x, bottom, right = (z[:, box, None] for z in (top, left, top + height, left + width))
        inside = ((rows >= y) & (rows < bottom))[:, :, None] & ((columns >= x) & (columns < right))[:, None, :]
        inside = inside & erased[:, box, None, None]
        if mode == "const":
            value = images.new_zeros(())
        elif mode == "rand":
            value = noise[:, box * c : (box + 1) * c, None, None]
        else:
            value = noise.reshape(images.shape)
        images = torch.where(inside[:, None], value, images)
    return images


def _erasing_noise(images: Tensor, keys: Tensor, seed: int, mode: str, count: int, some: Tensor) -> Tensor:
    """Return the normal numbers that fill boxes, [b, numbers]; on a CPU only of the images that are erased."""
    b, c, h, w = images.shape
    numbers = {"const": 0, "rand": c * count, "pixel": c * h * w}[mode]
    if images.device.type != "cpu":  # a GPU would wait for the number of erased images
        return normal(keys, seed, numbers).to(images.dtype)
    noise = images.new_zeros(b, numbers)
    noise[some] = normal(keys[some], seed, numbers).to(images.dtype)
    return noise


# -- large images


@dataclass(frozen=True)
class ImageTransform:
    """timm's transform of a large image in two steps: bytes in a worker, normalised floats of a batch on the device.

    A training image may differ from timm's by a level, as torch resizes it, and by more where a photo is decoded
    at a reduced size. An evaluated image is timm's to the bit.

    Args:
        to_pixels: An image to uint8 [c, h, w].
        mean, std: Per channel, of pixels in [0, 1].
        data: Its `reprob`, `remode` and `recount`.
    """

    to_pixels: Callable[[LazyImage], Tensor]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    data: Data

    def __call__(self, image: LazyImage, seed: int | None) -> UInt8[Tensor, "c h w"]:
        """Return the pixels of an image, augmented with draws of a seed; None does not seed them."""
        with seeded(seed):
            return self.to_pixels(image)

    def normaliser(
        self, seed: int | None, epoch: int, device: torch.device
    ) -> Callable[[UInt8[Tensor, "b c h w"], Int[Tensor, " b"]], Float[Tensor, "b c h w"]]:
        """Return the function (pixels, keys) -> images that normalises and erases a batch on a device.

        Args:
            seed, epoch: Further keys of the boxes that are erased; a seed of None erases none.
            device: Of the pixels and their keys, which are sample ids.
        """
        mean, std = (torch.tensor(values, device=device)[:, None, None] for values in (self.mean, self.std))
        levels = torch.full((), 255.0, device=device)  # a Python number is multiplied by its inverse on a GPU

        def normalise(pixels: Tensor, keys: Tensor) -> Tensor:
            # The operations of ToTensor and Normalize.
            images = _empty_floats(pixels).copy_(pixels).div_(levels).sub_(mean).div_(std)
            if seed is None or not self.data.reprob:
                return images
            return erase(images, keys, seed, epoch, self.data.reprob, self.data.remode, self.data.recount)

        return normalise


def _empty_floats(pixels: Tensor) -> Tensor:
    """Return an uninitialised float32 tensor of the shape of `pixels`, on a CPU with Linux in pages of its own.

    Once the C library is told to keep freed memory, blocks of this size leave holes in it that the next ones do not
    fit, and a process grows by one batch per step. Huge pages make fresh memory as fast as kept memory.
    """
    if pixels.device.type != "cpu" or sys.platform != "linux" or not pixels.numel():
        return torch.empty_like(pixels, dtype=torch.float32)
    pages = mmap.mmap(-1, 4 * pixels.numel(), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a system without huge pages
        pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=torch.float32).view(pixels.shape)


def timm_transform(
    data: Data,
    defaults: Defaults,
    size: tuple[int, int, int],
    mean: Sequence[float],
    std: Sequence[float],
    training: bool,
) -> ImageTransform:
    """Return timm's transform of an image.

    Args:
        data: The options of the data.
        defaults: Interpolation and crop of evaluation where `data` leaves them open.
        size: Channels, height and width of the tensor.
        mean, std: Per channel, of pixels in [0, 1].
        training: Augment; otherwise resize and crop.

    Raises:
        DataError: timm does not know an interpolation or a policy.
    """
    from timm.data.transforms_factory import create_transform

    _check_interpolations(data)
    interpolation = data.interpolation or defaults.interpolation
    common: dict[str, Any] = {"input_size": size, "mean": tuple(mean), "std": tuple(std), "use_prefetcher": True}
    if not training:
        common |= {"crop_pct": data.crop_pct or defaults.crop_pct, "crop_mode": defaults.crop_mode}
        plain = create_transform(**common, interpolation=interpolation)
        return ImageTransform(_Plain(plain), tuple(mean), tuple(std), data)
    common |= {"interpolation": data.train_interpolation or interpolation, "scale": data.scale, "ratio": data.ratio}
    common |= {"hflip": data.hflip, "auto_augment": data.aa, "color_jitter": data.color_jitter or None}
    try:
        steps = create_transform(**common, is_training=True, separate=True)
    except (AssertionError, ValueError, KeyError) as error:
        if data.aa is None:
            raise
        raise DataError(
            f"--aa {data.aa} is not a policy of timm ({error}): expected a policy such as rand-m9-mstd0.5-inc1, "
            "augmix-m3 or original."
        ) from error
    return ImageTransform(_Augmented(*(step.transforms for step in steps[:2])), tuple(mean), tuple(std), data)


@dataclass(frozen=True)
class _Plain:
    """timm's transform of evaluation, decoded and resized by Pillow as there."""

    transform: Callable[[Any], Tensor]

    def __call__(self, image: LazyImage) -> Tensor:
        return self.transform(image.load())


class _Augmented:
    """timm's transform of training: its draws in its order, on tensors up to what only Pillow can do.

    Args:
        primary: timm's crop, and flips.
        secondary: Auto-augment and colour jitter, if there are any.
    """

    def __init__(self, primary: Sequence[Any], secondary: Sequence[Any]) -> None:
        (self.crop, *self.flips), self.secondary = primary, secondary

    def __call__(self, image: LazyImage) -> Tensor:
        crop = self.crop
        box = crop.get_params(image.image, crop.scale, crop.ratio)
        mode = crop.interpolation
        pixels = _resized_crop(image, box, crop.size, random.choice(mode) if isinstance(mode, tuple) else mode)
        for flip in self.flips:
            pixels = flip(pixels)
        if not self.secondary:
            return pixels
        picture = to_pil(pixels.permute(1, 2, 0).numpy())
        for step in self.secondary:
            picture = step(picture)
        return to_tensor(picture)


def _resized_crop(image: LazyImage, box: tuple[int, int, int, int], size: tuple[int, int], mode: Any) -> Tensor:
    """Return a box (top, left, height, width) of an image, resized to `size`.

    A box of twice the size or more is read from a JPEG that is decoded at the smallest size which holds enough pixels.
    """
    from timm.data.transforms import str_to_pil_interp

    top, left, height, width = box
    by = image.reduce(max(min(height // size[0], width // size[1]), 1))
    if by > 1:
        region = (left / by, top / by, (left + width) / by, (top + height) / by)
        return to_tensor(image.load().resize(size[::-1], str_to_pil_interp(mode.value), region))
    picture = image.load().crop((left, top, left + width, top + height))
    if mode.value in ("bilinear", "bicubic"):  # as Pillow's, in less time
        return F.interpolate(to_tensor(picture)[None], size, mode=mode.value, antialias=True)[0]
    return to_tensor(picture.resize(size[::-1], str_to_pil_interp(mode.value)))


def _check_interpolations(data: Data) -> None:
    from timm.data.transforms import str_to_interp_mode

    choices = {"interpolation": "bilinear or bicubic", "train_interpolation": "bilinear, bicubic or random"}
    for name, expected in choices.items():
        value = getattr(data, name)
        if value is None or (name == "train_interpolation" and value == "random"):
            continue
        try:
            str_to_interp_mode(value)
        except KeyError as error:
            raise DataError(f"--{name.replace('_', '-')} {value}: expected {expected}.") from error


# -- batches


def mix_batch(
    images: Float[Tensor, "b c h w"], labels: Float[Tensor, "b k"], seed: int, data: Data
) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, "b k"]]:
    """Mix a batch and its labels with themselves in reverse order, by mixup or cutmix with one coefficient.

    mixup: lam x_i + (1 - lam) x_j with lam from Beta(alpha, alpha); cutmix: x_i with a box of x_j, lam is the share of
    x_i that is left.

    Reference: Zhang et al., "mixup: Beyond Empirical Risk Minimization" (arXiv 1710.09412); Yun et al., "CutMix" (arXiv
    1905.04899); timm's Mixup with mode "batch", whose order of draws this is.

    Differs: a batch may have an odd size (its middle image stays). Labels are smoothed by the cross-entropy, not here:
    as both are affine, the loss is the same.

    Args:
        images, labels: The batch; labels are distributions over classes.
        seed: Seed of this batch.
        data: Its `mixup`, `cutmix`, `mixup_prob` and `mixup_switch_prob`. `mixup` or `cutmix` is positive.

    Returns:
        The mixed images and labels.
    """
    from timm.data.mixup import cutmix_bbox_and_lam

    with seeded(seed):
        if np.random.rand() >= data.mixup_prob:
            return images, labels
        use_cutmix = bool(data.cutmix) and (not data.mixup or np.random.rand() < data.mixup_switch_prob)
        alpha = data.cutmix if use_cutmix else data.mixup
        lam = float(np.random.beta(alpha, alpha))
        if use_cutmix:
            (top, bottom, left, right), lam = cutmix_bbox_and_lam(images.shape, lam)
            lam = float(lam)  # a numpy number
    if use_cutmix:
        images = images.clone()
        images[:, :, top:bottom, left:right] = images.flip(0)[:, :, top:bottom, left:right]
    else:
        images = images * lam + images.flip(0) * (1 - lam)
    return images, labels * lam + labels.flip(0) * (1 - lam)


def to_distributions(labels: Int[Tensor, " b"] | Float[Tensor, "b k"], num_classes: int) -> Float[Tensor, "b k"]:
    """Return labels as distributions over classes, float32."""
    return labels.float() if labels.is_floating_point() else F.one_hot(labels.long(), num_classes).float()
