"""The student's source: the training images with repeated augmentation, mixup and cutmix.

Heads, and whatever else is fitted before the run, see the images unmixed: a teacher's output for a mixed batch belongs
to no single image, so it could not be stored by sample id.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mgd_timm.data.dataset import Images
from mgd_timm.data.rng import mix
from mgd_timm.data.sampler import repeated_order
from mgd_timm.data.sources import Source, epoch_ids
from mgd_timm.data.transforms import mix_batch, to_distributions
from mgd_timm.features import Batch
from mgd_timm.recipe.data import Data

MIXING_OPTIONS = {"mixup", "cutmix", "mixup_prob", "mixup_switch_prob", "mixup_off_epoch", "aug_repeats"}
"""Options of Data that change the student's batches only."""


def mixed_source(images: Images, data: Data, seed: int) -> Source:
    """Return the student's source: the training images mixed and repeated, or as they are without these options."""
    if not (data.mixup or data.cutmix or data.aug_repeats > 1):
        return images.train
    return MixedSource(images.train, data, seed, images.num_samples, images.num_classes)


class MixedSource:
    """A Source that repeats and mixes another source's images.

    Args:
        source: The training images.
        data: Its options of mixing and repeated augmentation (`MIXING_OPTIONS`).
        seed: Seed of the mixing.
        num_samples: Rows of the split that the source's ids index.
        num_classes: Classes of the labels.
    """

    def __init__(self, source: Source, data: Data, seed: int, num_samples: int, num_classes: int) -> None:
        self.source, self.data, self.seed = source, data, seed
        self.num_samples, self.num_classes = num_samples, num_classes
        self.ids, self.labels, self.digest = source.ids, source.labels, source.digest

    def order(self, seed: int, epoch: int) -> Tensor:
        """Return an epoch's ids: a further augmentation of an image is its id plus a multiple of `num_samples`."""
        if self.data.aug_repeats < 2:
            return epoch_ids(self.source, seed, epoch)
        positions, repeats = repeated_order(len(self.ids), self.data.aug_repeats, seed, epoch)
        return self.ids[positions] + self.num_samples * repeats

    def batches(self, micro_batches: Sequence[Tensor], epoch: int, device: torch.device) -> Iterator[Batch]:
        """Yield the source's batches. With mixing all labels are distributions, also in batches that stay unmixed."""
        mixing = bool(self.data.mixup or self.data.cutmix)
        off = self.data.mixup_off_epoch
        for ids, batch in zip(micro_batches, self.source.batches(micro_batches, epoch, device), strict=True):
            if not mixing:
                yield batch
                continue
            images, labels = batch.images, to_distributions(batch.labels, self.num_classes)
            if not off or epoch < off:
                images, labels = mix_batch(images, labels, mix(self.seed, 7, epoch, *ids.tolist()), self.data)
            yield Batch(images, labels, batch.sample_ids)
