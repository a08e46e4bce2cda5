"""The order of an epoch, and its updates on any number of processes."""

import pytest
import torch

from mgd_timm.data.sampler import cut_updates, epoch_order, repeated_order
from mgd_timm.recipe.derived import micro_batch_size, num_micro_batches


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
        assert [torch.cat(micro_batches).tolist() for micro_batches in updates] == expected
        micro_batches = num_micro_batches(batch_size, processes, global_batch)
        for update in updates:
            sizes = [len(ids) for ids in update]
            assert len(update) % processes == 0
            assert len(update) <= micro_batches
            filled = [size for size in sizes if size]
            assert sizes == filled + [0] * (len(sizes) - len(filled))  # the first of each step is filled
            assert len(update) - len(filled) < processes
            assert min(filled) >= 2
            assert max(filled) <= max(batch_size, 3)
            assert max(filled) - min(filled) <= 1
            if len(torch.cat(update)) == global_batch:
                assert max(filled) == micro_batch_size(batch_size, processes, global_batch)


@pytest.mark.parametrize("count", [*range(96, 130), 240])
def test_micro_batches_are_the_same_where_batch_size_times_processes_divides_the_global_batch(count: int) -> None:
    """48 images in 12 micro-batches of 4: so are a tail's, and with them what dropout and BatchNorm see."""
    order, dealt = epoch_order(count, 1, 1), []
    for processes in (1, 2, 3, 4, 6, 12):
        updates = cut_updates(order, 4, processes, 48)
        dealt.append([[ids.tolist() for ids in update if len(ids)] for update in updates])
    assert all(one == dealt[0] for one in dealt)
    assert {len(ids) for ids in dealt[0][0]} == {4}


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


@pytest.mark.parametrize(("count", "length"), [(1000, 768), (100, 100), (256, 256)])
def test_repeated_augmentation_has_an_epochs_length_and_each_image_several_times(count: int, length: int) -> None:
    rows, repeats = repeated_order(count, 3, 1, 2)
    assert len(rows) == len(repeats) == length
    whole = length // 3 * 3
    assert torch.equal(rows[:whole:3], rows[1:whole:3])
    assert torch.equal(rows[:whole:3], rows[2:whole:3])
    assert len(rows[:whole:3].unique()) == whole // 3
    assert repeats[:whole].tolist() == [0, 1, 2] * (whole // 3)
    assert not torch.equal(repeated_order(count, 3, 1, 3)[0], rows)
