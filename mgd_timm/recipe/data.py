"""`Data`: the options of a recipe that choose a data set and its augmentation."""

import os
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Literal

from mgd_timm.recipe.checks import check_channels, check_crop, check_options, check_streaming
from mgd_timm.recipe.options import option

_augment = partial(option, group="augmentation")


@dataclass(frozen=True)
class Data:
    """Options of the data set and its augmentation.

    Raises:
        ValueError: A value out of range, or options that contradict each other.
    """

    dataset: str = option(
        "embedded", "hub id or folder; 'embedded' is a part of Fashion-MNIST in the package", common=True, digest=False
    )
    data_dir: str | None = option(
        None,
        "folder of images in class folders, or of tables, tar or npy files; instead of --dataset",
        value="FOLDER",
        common=True,
        digest=False,
    )
    dataset_config: str | None = option(None, "configuration of a hub data set that has several")
    input_key: str | None = option(None, "image column; default: image, else the only one")
    target_key: str | None = option(
        None, "label column; default: label, labels, target, class or fine_label, else the only one that it can be"
    )
    first_label: int = option(0, "number of the first class, where labels are numbers without names", minimum=0)
    train_split: str = option("train", "split to train on")
    eval_split: str | None = option(None, "split to evaluate on; default: the one for tests, else for validation")
    val_split: float = option(
        0.0,
        "share of the training images to hold out and evaluate on each epoch; 0 to 0.5, per class",
        common=True,
        minimum=0,
        maximum=0.5,
    )
    streaming: bool = option(False, "stream images from the hub or from files, without a copy on disk")
    shuffle_buffer: int = option(
        4096,
        "with --streaming: encoded images in memory, per process, from which the next is drawn at random",
        minimum=1,
    )
    num_samples: int | None = option(
        None, "with --streaming: training images per epoch; default: the number that the data set states", minimum=2
    )
    num_classes: int | None = option(
        None, "with --streaming: number of classes, if the data set does not name them", minimum=2
    )
    img_size: int | None = option(
        None,
        "image side in pixels; default: the images' own if they are small, else the model's",
        common=True,
        minimum=1,
    )
    in_chans: int = option(
        3,
        "channels: 3 for colour, 1 for grey; image files are converted, and npy arrays may have other numbers of "
        "channels",
        common=True,
        minimum=1,
    )
    mean: tuple[float, ...] | None = option(
        None, "mean per channel, of pixels in [0, 1]; default: that of the weights, else of the images"
    )
    std: tuple[float, ...] | None = option(None, "standard deviation per channel, as --mean", above=0)
    batch_size: int = option(64, "largest number of images per process and step", common=True, minimum=2, digest=False)
    validation_batch_size: int = option(256, "images per process and evaluation step", minimum=1, digest=False)
    workers: int = option(2, "DataLoader workers per process, for large images", common=True, minimum=0, digest=False)
    max_bad: int = option(
        0, "skip up to N corrupt images and list them in bad_images.txt; more are an error", minimum=0
    )
    pad: int = _augment(4, "small images: zero padding in pixels before a random crop; 0: no crop", minimum=0)
    hflip: float = _augment(0.5, "probability of a horizontal flip", minimum=0, maximum=1)
    scale: tuple[float, ...] = _augment(
        (0.08, 1.0), "large images: range of a random crop's share of the area", above=0, maximum=1
    )
    ratio: tuple[float, ...] = _augment(
        (0.75, 4.0 / 3.0), "large images: range of a random crop's aspect ratio", above=0
    )
    aa: str | None = _augment(None, "large images: timm's auto-augment policy, such as rand-m9-mstd0.5", common=True)
    color_jitter: float = _augment(0.0, "large images: strength of colour jitter; timm ignores it with --aa", minimum=0)
    reprob: float = _augment(0.0, "probability of random erasing", minimum=0, maximum=1)
    remode: Literal["const", "rand", "pixel"] = _augment(
        "pixel", "random erasing fills with: const (the mean), rand (one colour per box), pixel (one per pixel)"
    )
    recount: int = _augment(1, "random erasing: most boxes per image", minimum=1)
    mixup: float = _augment(
        0.0,
        "alpha of mixup, for student and teacher; heads are fitted on unmixed images; 0: no mixup",
        common=True,
        minimum=0,
    )
    cutmix: float = _augment(0.0, "alpha of cutmix, as --mixup", common=True, minimum=0)
    mixup_prob: float = _augment(1.0, "probability that a batch is mixed", minimum=0, maximum=1)
    mixup_switch_prob: float = _augment(
        0.5, "probability of cutmix instead of mixup if both are on", minimum=0, maximum=1
    )
    mixup_off_epoch: int = _augment(0, "first epoch without mixup and cutmix; 0: never off", minimum=0)
    aug_repeats: int = _augment(
        0,
        "repeated augmentation: augmentations per image, in a row; an epoch has as many samples of fewer images",
        minimum=0,
    )
    crop_pct: float | None = option(
        None, "large images: share of the resized side that evaluation crops; default: the model's", above=0, maximum=1
    )
    interpolation: str | None = option(None, "large images: bilinear or bicubic; default: the model's")
    train_interpolation: str | None = _augment(
        None, "large images: interpolation of training crops, or random; default: as --interpolation"
    )

    def __post_init__(self) -> None:
        check_options(self)
        check_channels(self)
        check_crop(self)
        check_streaming(self)


def with_absolute_folder(data: Data) -> Data:
    """Return the options with a local folder of images as an absolute path, which any working directory finds."""
    if data.data_dir is not None:
        return replace(data, data_dir=os.path.abspath(data.data_dir))
    if data.dataset != "embedded" and os.path.exists(data.dataset):
        return replace(data, dataset=os.path.abspath(data.dataset))
    return data


OF_TRAINING = frozenset({"batch_size", "shuffle_buffer"}) | {
    f.name for f in fields(Data) if f.metadata["group"] == "augmentation"
}
"""Options of Data that only training uses, not evaluation."""

OF_SHOWING = ("img_size", "in_chans", "mean", "std", "crop_pct", "interpolation")
"""Options of Data that decide how an image is shown to a model in evaluation."""

EMBEDDED = Path(__file__).parents[1] / "embedded"
"""Folder of the package's own data set and teacher."""
