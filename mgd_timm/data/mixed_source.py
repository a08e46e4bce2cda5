"""What a student is taught on: the training images in repeated augmentation and mixed, where a recipe asks for it.

Heads, and what else is fitted before the run, see the images as they are: what a teacher shows of a mixed batch has no
image of its own to be kept under.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mgd_timm.criteria.terms import parse_terms
from mgd_timm.data.dataset import Images, Source, epoch_ids
from mgd_timm.data.sampler import mix, repeated_order
from mgd_timm.data.transforms import distributions, mixed
from mgd_timm.features import Batch
from mgd_timm.recipe.recipe import Data, Recipe

MIXED = {"mixup", "cutmix", "mixup_prob", "mixup_switch_prob", "mixup_off_epoch", "aug_repeats"}
"""Options of Data that are of the student's batches alone."""


def check_taught(recipe: Recipe) -> None:
    """Raise ValueError where what reads images one by one stands beside what mixes, repeats or streams them."""
    data = recipe.data
    if data.streaming:
        _check_streamed(recipe)
    names = [name for name in ("mixup", "cutmix") if getattr(data, name)] + (
        ["aug_repeats"] if data.aug_repeats > 1 else []
    )
    if not names:
        return
    said = ", ".join(f"{name}={getattr(data, name)}" for name in names)
    if recipe.teacher_store is not None:
        raise ValueError(
            f"{said} beside teacher_store={recipe.teacher_store!r}: a store holds the teacher's outputs image by "
            "image, once a view. Leave one of both out."
        )
    if recipe.teacher is None and recipe.peer is None:
        return
    term = parse_terms(recipe).get("crd")
    if term is not None and term.weight:
        raise ValueError(
            f"{said} beside criterion 'crd', which keeps one embedding of each image, as of its class: leave one of "
            "both out."
        )


def _check_streamed(recipe: Recipe) -> None:
    """A stream's images have no number by which they are known again in the next epoch."""
    if recipe.fit_teacher_head == "probe":
        raise ValueError(
            "streaming beside fit_teacher_head='probe', which keeps the teacher's embedding of every image: choose "
            "'finetune'."
        )
    if recipe.teacher_store is not None:
        raise ValueError(
            f"streaming beside teacher_store={recipe.teacher_store!r}, which holds outputs by image: leave one of "
            "both out."
        )
    if recipe.teacher is not None and recipe.method != "none" and recipe.heads.heads_protocol == "stored":
        raise ValueError(
            "streaming beside heads_protocol='stored', which keeps the teacher's outputs of all images: give "
            "--heads-protocol live and a few --heads-epochs, each a pass over the stream."
        )
    if (
        (recipe.teacher is not None or recipe.peer is not None)
        and "crd" in (terms := parse_terms(recipe))
        and terms["crd"].weight
    ):
        raise ValueError(
            "streaming beside criterion 'crd', which keeps an embedding of each image: choose another criterion."
        )


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
