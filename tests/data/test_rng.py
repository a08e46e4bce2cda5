"""Randomness is a function of (seed, epoch, sample): it looks random, and depends on nothing else."""

import numpy as np
import pytest
import torch

from mgd_timm.data.rng import mix, normal, uniform


@pytest.mark.parametrize(("seed", "epoch"), [(0, 0), (42, 1), (-1, 2**40)])
def test_uniform_has_the_moments_and_the_histogram_of_uniform_numbers(seed: int, epoch: int) -> None:
    x = uniform(torch.arange(50_000), seed, epoch, 3)
    n = x.shape[0]
    assert x.dtype == torch.float64
    assert 0 <= x.min() < 1e-3
    assert 1 - 1e-3 < x.max() < 1
    assert (x.mean(0) - 1 / 2).abs().max() < 4 * (1 / 12 / n) ** 0.5
    assert (x.var(0) - 1 / 12).abs().max() < 4 * (1 / 180 / n) ** 0.5
    for column in x.unbind(1):  # chi-square of 100 bins: mean 99, standard deviation 14
        counts = torch.bincount((column * 100).long(), minlength=100).double()
        assert 50 < ((counts - n / 100) ** 2 / (n / 100)).sum() < 160


def test_uniform_is_uncorrelated_between_neighbouring_ids_epochs_seeds_and_draws() -> None:
    ids = torch.arange(50_000)
    x = uniform(ids, 3, 5, 2)
    others = {
        "ids": (x[:-1, 0], x[1:, 0]),
        "draws": (x[:, 0], x[:, 1]),
        "epochs": (x[:, 0], uniform(ids, 3, 6, 2)[:, 0]),
        "seeds": (x[:, 0], uniform(ids, 4, 5, 2)[:, 0]),
        "even ids": (uniform(ids * 1024, 3, 5, 1)[:-1, 0], uniform(ids * 1024, 3, 5, 1)[1:, 0]),
    }
    for name, pair in others.items():
        assert torch.corrcoef(torch.stack(pair))[0, 1].abs() < 4 / len(ids) ** 0.5, name
        cells = (
            ((pair[0] * 10).long() * 10 + (pair[1] * 10).long()).bincount(minlength=100).double()
        )  # jointly uniform too
        assert ((cells - len(pair[0]) / 100) ** 2 / (len(pair[0]) / 100)).sum() < 160, name


def test_uniform_does_not_depend_on_the_batch_or_the_number_of_draws() -> None:
    whole = uniform(torch.arange(1000), 1, 2, 3)
    some = torch.tensor([999, 0, 500, 0])
    assert torch.equal(uniform(some, 1, 2, 3), whole[some])
    assert torch.equal(uniform(some, 1, 2, 1), whole[some, :1])
    assert torch.equal(uniform(some.int(), 1, 2, 3), whole[some])
    assert uniform(some[:0], 1, 2, 3).shape == (0, 3)
    assert len(whole.flatten().unique()) == whole.numel()


def test_normal_has_the_distribution_of_normal_numbers() -> None:
    x = normal(torch.arange(20_000), 3, 5)
    n = x.numel()
    assert x.dtype == torch.float64
    assert x.shape == (20_000, 5)
    moments = [x.mean(), x.square().mean() - 1, x.pow(3).mean(), x.pow(4).mean() - 3]
    for moment, spread in zip(moments, (1, 2**0.5, 15**0.5, 96**0.5), strict=True):
        assert abs(moment) < 4 * spread / n**0.5
    # Kolmogorov and Smirnov's distance from the error function's normal: above 1.95 / sqrt(n) in one of a thousand
    # samples.
    ordered = x.flatten().sort().values
    cumulative = 0.5 * (1 + torch.erf(ordered / 2**0.5))
    assert (cumulative - torch.arange(n) / n).abs().max() < 1.95 / n**0.5
    assert 4 < x.abs().max() < 6


def test_normal_is_independent_between_samples_draws_and_seeds() -> None:
    ids = torch.arange(50_000)
    x = normal(ids, 1, 4)
    pairs = {
        "ids": (x[:-1, 0], x[1:, 0]),
        "draws of one pair": (x[:, 0], x[:, 1]),
        "draws of two pairs": (x[:, 0], x[:, 2]),
        "draw of the next id": (x[:-1, 1], x[1:, 0]),
        "seeds": (x[:, 0], normal(ids, 2, 1)[:, 0]),
        "augmentation": (x[:, 0], uniform(ids, 1, 0, 1)[:, 0]),
    }
    for name, (one, two) in pairs.items():
        for f in (torch.clone, torch.square):  # squares: Box and Muller's pairs share a radius
            assert torch.corrcoef(torch.stack([f(one), f(two)]))[0, 1].abs() < 4 / len(one) ** 0.5, name


def test_normal_does_not_depend_on_the_batch_or_the_number_of_draws() -> None:
    whole = normal(torch.arange(1000), 1, 5)
    some = torch.tensor([999, 0, 500, 0])
    for draws in (1, 2, 3, 4, 5):
        torch.testing.assert_close(normal(some, 1, draws), whole[some, :draws])  # not the last bit of a logarithm
    assert normal(some[:0], 1, 3).shape == (0, 3)
    assert len(whole.flatten().unique()) == whole.numel()


def test_mix_tells_all_keys_apart() -> None:
    keys = [(a, b) for a in range(-20, 300) for b in range(100)]
    hashes = {mix(*key) for key in keys} | {mix(a) for a in range(-20, 300)} | {mix(a, 0, 0) for a in range(-20, 300)}
    assert len(hashes) == len(keys) + 2 * 320
    assert all(0 <= value < 2**63 for value in hashes)
    bits = np.array([[value >> bit & 1 for bit in range(63)] for value in hashes])
    assert np.abs(bits.mean(0) - 0.5).max() < 0.02


def test_mix_never_changes() -> None:
    """Resumes across versions rest on these; of one zero, SplitMix64's published first output."""
    assert (mix(0), mix(42, 7), mix(-1)) == (0xE220A8397B1DCDAF >> 1, 793502930448478848, 8245168133484221968)
