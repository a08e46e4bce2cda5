"""All randomness of a run as a function of (seed, epoch, sample or position): nothing to save, nothing to restore.

Order and crops are the same on any number of processes and workers, and after any resume; so is dropout where an update
has the same slots (cut_updates).
"""

import torch
from jaxtyping import Int
from torch import Tensor

from mgd_timm.data.rng import mix
from mgd_timm.recipe.derived import num_slots


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
