"""What a student is taught on: the training images in repeated augmentation and mixed, where a recipe asks for it.

Heads, and what else is fitted before the run, see the images as they are: what a teacher shows of a mixed batch has no
image of its own to be kept under.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mgd_timm.data.dataset import Images, Source, epoch_ids
from mgd_timm.data.rng import mix
from mgd_timm.data.sampler import repeated_order
from mgd_timm.data.transforms import distributions, mixed
from mgd_timm.features import Batch
from mgd_timm.recipe.recipe import Data, Recipe

MIXED = {"mixup", "cutmix", "mixup_prob", "mixup_switch_prob", "mixup_off_epoch", "aug_repeats"}
"""Options of Data that are of the student's batches alone."""


class Taught:
    """A Source of another one's images, as a student is taught on them.

    Args:
        source: The training images.
        data: Alphas, probabilities and repeats.
        seed: Of the mixing.
        num_samples: Rows of the split that the source's ids are of.
        num_classes: Classes of the labels.
    """

    def __init__(self, source: Source, data: Data, seed: int, num_samples: int, num_classes: int) -> None:
        self.source, self.data, self.seed = source, data, seed
        self.num_samples, self.num_classes = num_samples, num_classes
        self.ids, self.labels, self.digest = source.ids, source.labels, source.digest

    def order(self, seed: int, epoch: int) -> Tensor:
        """An epoch's ids: a further augmentation of an image is its id plus a multiple of the number of samples."""
        if self.data.aug_repeats < 2:
            return epoch_ids(self.source, seed, epoch)
        positions, repeats = repeated_order(len(self.ids), self.data.aug_repeats, seed, epoch)
        return self.ids[positions] + self.num_samples * repeats

    def batches(self, slots: Sequence[Tensor], epoch: int, device: torch.device) -> Iterator[Batch]:
        """The source's batches; with mixing, labels are distributions, also where chance or the recipe spares a
        batch."""
        mixing = bool(self.data.mixup or self.data.cutmix)
        off = self.data.mixup_off_epoch
        for slot, batch in zip(slots, self.source.batches(slots, epoch, device), strict=True):
            if not mixing:
                yield batch
                continue
            images, labels = batch.images, distributions(batch.labels, self.num_classes)
            if not off or epoch < off:
                images, labels = mixed(images, labels, mix(self.seed, 7, epoch, *slot.tolist()), self.data)
            yield Batch(images, labels, batch.sample_ids)


def taught(images: Images, recipe: Recipe) -> Source:
    """The training images as a recipe's student is taught on them."""
    data = recipe.data
    if not (data.mixup or data.cutmix or data.aug_repeats > 1):
        return images.train
    return Taught(images.train, data, recipe.seed, images.num_samples, images.num_classes)
