"""The order of an epoch's samples, and their micro-batches by update and process.

The order is a function of (seed, epoch): it is the same on any number of processes and workers, and after any resume.
So is dropout where an update has the same micro-batches (`cut_updates`).
"""

import torch
from jaxtyping import Int
from torch import Tensor

from mgd_timm.data.rng import mix
from mgd_timm.recipe.derived import num_micro_batches


def epoch_order(count: int, seed: int, epoch: int) -> Int[Tensor, " n"]:
    """Return an epoch's permutation of positions 0 to count - 1."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(mix(seed, epoch, 1)))


def repeated_order(count: int, repeats: int, seed: int, epoch: int) -> tuple[Int[Tensor, " n"], Int[Tensor, " n"]]:
    """Return the positions of an epoch with repeated augmentation, and the number of each one's augmentation.

    The epoch's permutation with each image `repeats` times in a row, cut to the usual length of an epoch, rounded down
    to a multiple of 256 (below 256: not rounded). So an epoch has a share 1 / repeats of the images.

    Reference: Hoffer et al., "Augment Your Batch" (CVPR 2020); Touvron et al., "Training data-efficient image
    transformers" (arXiv 2012.12877), whose sampler timm has as RepeatAugSampler.

    Differs: there, the augmentations of an image go to different processes; here they are neighbours in one update.
    """
    numbers = torch.arange(count // 256 * 256 if count >= 256 else count)
    return epoch_order(count, seed, epoch)[numbers // repeats], numbers % repeats


def cut_updates(order: Int[Tensor, " n"], batch_size: int, processes: int, global_batch: int) -> list[list[Tensor]]:
    """Cut an epoch's order into updates, each a list of `processes * steps` micro-batches of sample ids.

    Process r takes micro-batch j * processes + r in step j.

    The samples of an update depend on the global batch alone: the tail is an update as well, unless it is one sample,
    which is left out of this epoch. An update is dealt evenly over `num_micro_batches` of them, or over as many as have
    two samples or more each, as BatchNorm has no statistics of one. Empty micro-batches fill up the last step.

    Args:
        order: Sample ids.
        batch_size: Largest number of samples in a micro-batch, 2 or more; an odd number dealt to micro-batches of 2
            makes one of 3.
        processes: Number of processes. All take part in every step, some with an empty micro-batch.
        global_batch: Samples of an update, 2 or more for each process.

    Returns:
        The updates of the epoch.

    Raises:
        ValueError: A global batch too small for the processes, or fewer than 2 samples.
    """
    if global_batch < 2 * processes:
        raise ValueError(
            f"global batch of {global_batch} images on {processes} processes: expected at least 2 for each, "
            f"{2 * processes}. Start fewer processes, or choose a larger --global-batch-size."
        )
    most = num_micro_batches(batch_size, processes, global_batch)
    updates = []
    for ids in order.split(global_batch):
        filled = min(most, len(ids) // 2)
        if filled:
            empty = [ids[:0]] * (-filled % processes)
            updates.append([*ids.tensor_split(filled), *empty])
    if not updates:
        raise ValueError(f"{len(order)} training images: expected at least 2.")
    return updates
