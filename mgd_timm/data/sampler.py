"""All randomness of a run as a function of (seed, epoch, sample or position): nothing to save, nothing to restore.

Order and crops are the same on any number of processes and workers, and after any resume; so is dropout where an update
has the same slots (cut_updates).
"""

import contextlib
import math
import random
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


def mix(*key: int) -> int:
    """A 63-bit hash of integers (SplitMix64: Steele, Lea, Flood, OOPSLA 2014); for seeds."""
    state = 0
    for part in key:
        state = (state ^ (part & _MASK)) & _MASK
        state = (state + _GOLDEN) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state >> 1


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def _shift(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)  # int64's >> keeps the sign


def uniform(sample_ids: Int[Tensor, " b"], seed: int, epoch: int, draws: int) -> Float[Tensor, "b draws"]:
    """Numbers in [0, 1), float64, each a hash of (seed, epoch, sample id, draw): the same on every device and in any
    batch."""
    offsets = torch.arange(draws, device=sample_ids.device, dtype=torch.int64) * _signed(_GOLDEN)
    x = (sample_ids.to(torch.int64) * _signed(0xD1342543DE82EF95))[:, None] + offsets + _signed(mix(seed, epoch) << 1)
    for _ in range(2):  # a second round costs next to nothing
        x = x + _signed(_GOLDEN)
        x = (x ^ _shift(x, 30)) * _signed(0xBF58476D1CE4E5B9)
        x = (x ^ _shift(x, 27)) * _signed(0x94D049BB133111EB)
        x = x ^ _shift(x, 31)
    return _shift(x, 11).to(torch.float64) * 2.0**-53


def normal(sample_ids: Int[Tensor, " b"], seed: int, draws: int) -> Float[Tensor, "b draws"]:
    """Standard normal numbers, float64, each a function of (seed, sample id, draw): of two uniform ones, by Box and
    Muller.

    Reference: Box, Muller, "A Note on the Generation of Random Normal Deviates" (Annals of Mathematical Statistics 29,
    1958).

    Args:
        sample_ids: One row of numbers for each.
        seed: Of a stream of its own: none of the numbers that order and augmentation draw under this seed.
        draws: Numbers per sample. The first ones are the same for any number.

    Returns:
        Numbers of at most 8.6 in size. Devices may differ in the last bits of their logarithm and cosine.
    """
    u = uniform(sample_ids, mix(seed, 5), 0, draws + draws % 2)
    radius = (-2 * torch.log1p(-u[:, 0::2])).sqrt()  # of 1 - u, which is never 0
    angle = 2 * math.pi * u[:, 1::2]
    return torch.stack([radius * angle.cos(), radius * angle.sin()], 2).flatten(1)[:, :draws]


def epoch_order(count: int, seed: int, epoch: int) -> Int[Tensor, " n"]:
    """The permutation of positions 0 to count - 1 of an epoch."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(mix(seed, epoch, 1)))


def repeated_order(count: int, repeats: int, seed: int, epoch: int) -> tuple[Int[Tensor, " n"], Int[Tensor, " n"]]:
    """Positions of an epoch with repeated augmentation, and which augmentation of its image each one is.

    The epoch's permutation with each image `repeats` times in a row, cut off at an epoch's usual length, rounded down
    to a multiple of 256 (fewer than 256: not rounded). So an epoch shows a share 1 / repeats of the images.

    Reference: Hoffer et al., "Augment Your Batch" (CVPR 2020); Touvron et al., "Training data-efficient image
    transformers" (arXiv 2012.12877), whose sampler timm has as RepeatAugSampler.

    Differs: they deal an image's augmentations to different processes; here they lie in one update, in neighbouring
    places.
    """
    places = torch.arange(count // 256 * 256 if count >= 256 else count)
    return epoch_order(count, seed, epoch)[places // repeats], places % repeats


@contextlib.contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """timm draws from three global generators: seeded for a while, and left as they were found. None seeds nothing."""
    if seed is None:
        yield
        return
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        random.seed(seed)
        np.random.seed(seed & 0xFFFFFFFF)
        torch.default_generator.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


def cut_updates(order: Int[Tensor, " n"], batch_size: int, processes: int, global_batch: int) -> list[list[Tensor]]:
    """An epoch's order cut into updates, each a list of `processes * steps` slots; process r's step j takes slot j *
    processes + r.

    Which samples an update has depends on the global batch alone: the tail is an update as well, unless it is one
    sample, which is left out of this epoch. An update is dealt evenly over `num_slots` slots, or over as many as leave
    two samples or more in each, as BatchNorm has no statistics of one. What then lacks to a whole step are empty slots,
    at its end.

    Args:
        order: Sample ids.
        batch_size: The most samples in a slot, 2 or more; an odd number dealt to slots of 2 makes one of 3.
        processes: Which take part in every step, if only with an empty slot.
        global_batch: Samples of an update, 2 or more for each process.

    Raises:
        ValueError: A global batch too small for the processes, or fewer than 2 samples.
    """
    if global_batch < 2 * processes:
        raise ValueError(
            f"a global batch of {global_batch} images on {processes} processes: expected at least 2 for each, "
            f"{2 * processes}. Start fewer processes, or choose a larger --global-batch-size."
        )
    slots = num_slots(batch_size, processes, global_batch)
    updates = []
    for chunk in order.split(global_batch):
        filled = min(slots, len(chunk) // 2)
        if filled:
            empty = [chunk[:0]] * (-filled % processes)
            updates.append([*chunk.tensor_split(filled), *empty])
    if not updates:
        raise ValueError(f"{len(order)} training images: expected at least 2.")
    return updates


def num_slots(batch_size: int, processes: int, global_batch: int) -> int:
    """The slots of a whole update: those of as few steps of all processes as hold the global batch."""
    return processes * math.ceil(global_batch / (batch_size * processes))


def slot_size(batch_size: int, processes: int, global_batch: int) -> int:
    """Samples in the largest slot of a whole update; the others hold as many, or one fewer."""
    return math.ceil(global_batch / min(num_slots(batch_size, processes, global_batch), global_batch // 2))


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
