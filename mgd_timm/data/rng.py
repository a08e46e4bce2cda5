"""Counter-based randomness: every number is a function of (seed, epoch, sample), so nothing is saved or restored."""

import contextlib
import math
import random
from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

_GOLDEN, _MASK = 0x9E3779B97F4A7C15, (1 << 64) - 1


def mix(*key: int) -> int:
    """Hash integers to a seed of 63 bits (SplitMix64: Steele, Lea, Flood, OOPSLA 2014)."""
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
    """Return numbers in [0, 1), float64, each a hash of (seed, epoch, sample id, draw): the same on every device and in
    any batch."""
    offsets = torch.arange(draws, device=sample_ids.device, dtype=torch.int64) * _signed(_GOLDEN)
    x = (sample_ids.to(torch.int64) * _signed(0xD1342543DE82EF95))[:, None] + offsets + _signed(mix(seed, epoch) << 1)
    for _ in range(2):  # a second round costs next to nothing
        x = x + _signed(_GOLDEN)
        x = (x ^ _shift(x, 30)) * _signed(0xBF58476D1CE4E5B9)
        x = (x ^ _shift(x, 27)) * _signed(0x94D049BB133111EB)
        x = x ^ _shift(x, 31)
    return _shift(x, 11).to(torch.float64) * 2.0**-53


def normal(sample_ids: Int[Tensor, " b"], seed: int, draws: int) -> Float[Tensor, "b draws"]:
    """Return standard normal numbers, float64, each a function of (seed, sample id, draw), by Box and Muller.

    Reference: Box, Muller, "A Note on the Generation of Random Normal Deviates" (Annals of Mathematical Statistics 29,
    1958).

    Args:
        sample_ids: Ids; one row of numbers for each.
        seed: The numbers are independent of those of order and augmentation with the same seed.
        draws: Numbers per sample. The first ones do not depend on `draws`.

    Returns:
        Numbers from -8.6 to 8.6. Devices may differ in the last bits, as their logarithm and cosine do.
    """
    u = uniform(sample_ids, mix(seed, 5), 0, draws + draws % 2)
    radius = (-2 * torch.log1p(-u[:, 0::2])).sqrt()  # of 1 - u, which is never 0
    angle = 2 * math.pi * u[:, 1::2]
    return torch.stack([radius * angle.cos(), radius * angle.sin()], 2).flatten(1)[:, :draws]


@contextlib.contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Seed the three global generators that timm draws from, and restore them at exit. None does nothing.

    In a DataLoader worker nothing else draws from them, so they are not restored, which takes longer than to seed them.
    """
    if seed is None:
        yield
        return
    if torch.utils.data.get_worker_info() is not None:
        _seed_generators(seed)
        yield
        return
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        _seed_generators(seed)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


def _seed_generators(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    torch.default_generator.manual_seed(seed)


def set_seed(*key: int) -> None:
    """Seed torch's generators by a key, such as before initial weights are drawn."""
    torch.manual_seed(mix(*key))
