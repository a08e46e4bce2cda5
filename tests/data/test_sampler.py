"""Randomness is a function of (seed, epoch, sample): it looks random, and depends on nothing else."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from mgd_timm.data.rng import mix, normal, uniform
from mgd_timm.data.sampler import cut_updates, epoch_order
from mgd_timm.data.transforms import augment, normalise
from mgd_timm.recipe.derived import num_slots, slot_size

MEAN, STD = torch.tensor([0.5071, 0.4867, 0.4408])[:, None, None], torch.tensor([0.2675, 0.2565, 0.2761])[:, None, None]


def images(count: int, channels: int = 3, height: int = 9, width: int = 7) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randint(0, 256, (count, channels, height, width), dtype=torch.uint8, generator=generator)


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


def test_epoch_order_is_another_permutation_each_epoch_and_seed() -> None:
    orders = [epoch_order(1000, seed, epoch) for seed in (0, 1) for epoch in (0, 1, 2)]
    for order in orders:
        assert torch.equal(order.sort().values, torch.arange(1000))
    assert len({tuple(order.tolist()) for order in orders}) == len(orders)
    assert torch.equal(epoch_order(1000, 1, 2), orders[-1])


def test_epoch_order_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    epoch_order(10, 0, 0)
    assert torch.equal(torch.get_rng_state(), before)


COUNTS = [16, 17, 18, 19, 24, 25, 31, 32, 33, 100]


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("global_batch", [8, 13, 16, 24, 200])
@pytest.mark.parametrize("batch_size", [2, 3, 4, 7, 64])
def test_updates_hold_the_same_samples_on_any_number_of_processes_and_steps(count, global_batch, batch_size) -> None:
    order = epoch_order(count, 0, 0)
    left_out = count % global_batch == 1
    expected = [chunk.tolist() for chunk in order[: count - left_out].split(global_batch)]
    for processes in (1, 2, 3, 4):
        updates = cut_updates(order, batch_size, processes, global_batch)
        assert [torch.cat(slots).tolist() for slots in updates] == expected
        slots = num_slots(batch_size, processes, global_batch)
        for update in updates:
            sizes = [len(slot) for slot in update]
            assert len(update) % processes == 0
            assert len(update) <= slots
            filled = [size for size in sizes if size]
            assert sizes == filled + [0] * (len(sizes) - len(filled))  # the first of each step is filled
            assert len(update) - len(filled) < processes
            assert min(filled) >= 2
            assert max(filled) <= max(batch_size, 3)
            assert max(filled) - min(filled) <= 1
            if len(torch.cat(update)) == global_batch:
                assert max(filled) == slot_size(batch_size, processes, global_batch)


@pytest.mark.parametrize("count", [*range(96, 130), 240])
def test_slots_are_the_same_where_batch_size_times_processes_divides_the_global_batch(count: int) -> None:
    """48 images in 12 slots of 4: so are a tail's, and with them what dropout and BatchNorm see."""
    order, dealt = epoch_order(count, 1, 1), []
    for processes in (1, 2, 3, 4, 6, 12):
        updates = cut_updates(order, 4, processes, 48)
        dealt.append([[slot.tolist() for slot in update if len(slot)] for update in updates])
    assert all(one == dealt[0] for one in dealt)
    assert {len(slot) for slot in dealt[0][0]} == {4}


@pytest.mark.parametrize(("global_batch", "processes"), [(3, 2), (15, 8)])
def test_a_global_batch_too_small_for_the_processes_is_refused(global_batch: int, processes: int) -> None:
    with pytest.raises(
        ValueError, match=rf"{global_batch} images on {processes} processes: expected at least 2 for each"
    ):
        cut_updates(torch.arange(100), 4, processes, global_batch)


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_samples_are_refused(count: int) -> None:
    with pytest.raises(ValueError, match=rf"{count} training images: expected at least 2"):
        cut_updates(torch.arange(count), 4, 1, 8)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("pad", "hflip"), [(4, 0.5), (1, 1.0), (3, 0.0), (0, 0.5)])
def test_augment_is_pil_padding_cropping_and_mirroring(channels: int, pad: int, hflip: float) -> None:
    x, ids = images(64, channels), torch.arange(64) * 31 + 5
    height, width = x.shape[2:]
    got, draws = augment(x, ids, 7, 3, pad=pad, hflip=hflip), uniform(ids, 7, 3, 3).numpy()
    for image, (u, v, w), result in zip(x.numpy(), draws, got.numpy(), strict=True):
        top, left = int(u * (2 * pad + 1)), int(v * (2 * pad + 1))
        picture = Image.fromarray(image[0] if channels == 1 else image.transpose(1, 2, 0))
        picture = ImageOps.expand(picture, pad).crop((left, top, left + width, top + height))
        expected = np.asarray(ImageOps.mirror(picture) if w < hflip else picture).reshape(height, width, channels)
        np.testing.assert_array_equal(result, expected.transpose(2, 0, 1))


def test_augment_draws_every_offset_and_both_directions() -> None:
    marked = torch.zeros(3000, 1, 9, 9, dtype=torch.uint8)
    marked[:, :, 4, 4] = 1  # stays inside: moved by -2 to 2
    places = augment(marked, torch.arange(3000), 0, 0, pad=2, hflip=0.0).flatten(1).argmax(1)
    counts = torch.bincount(places, minlength=81)
    assert (counts > 0).sum() == 25
    assert counts[counts > 0].min() > 60  # 120 expected
    ramp = torch.arange(9, dtype=torch.uint8).expand(3000, 1, 9, 9)
    flipped = (augment(ramp, torch.arange(3000), 0, 0, pad=0, hflip=0.25)[:, 0, 0, 0] == 8).double().mean()
    assert abs(flipped - 0.25) < 0.03


def test_augment_without_pad_and_flip_is_the_identity() -> None:
    x = images(8)
    assert torch.equal(augment(x, torch.arange(8), 0, 0, pad=0, hflip=0.0), x)


def test_augment_does_not_depend_on_the_batch() -> None:
    x, ids = images(40), torch.arange(40)
    whole = augment(x, ids, 1, 2, pad=4, hflip=0.5)
    parts = [augment(x[part], part, 1, 2, pad=4, hflip=0.5) for part in ids.flip(0).split(7)]
    assert torch.equal(torch.cat(parts).flip(0), whole)
    assert not torch.equal(augment(x, ids, 1, 3, pad=4, hflip=0.5), whole)
    assert not torch.equal(augment(x, ids, 2, 2, pad=4, hflip=0.5), whole)


def test_normalise_agrees_with_float64() -> None:
    x = torch.arange(256, dtype=torch.uint8).expand(2, 3, 1, 256)
    expected = (x.double() / 255 - MEAN.double()) / STD.double()
    got = normalise(x, MEAN, STD)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), expected, atol=2e-6, rtol=1e-6)
    assert x.dtype == torch.uint8
