"""The part of a recipe that says which images a run sees, and how they are shown."""

from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Literal

from mgd_timm.recipe.checks import check_channels, check_crop, check_options, check_streaming
from mgd_timm.recipe.options import option

_augment = partial(option, group="augmentation")


@dataclass(frozen=True)
class Data:
    """Which images, and how they are shown."""

    dataset: str = option(
        "embedded", "hub id or folder; 'embedded' is a part of Fashion-MNIST in the package", common=True, digest=False
    )
    data_dir: str | None = option(
        None,
        "folder of parquet/arrow files or of images in class folders; instead of --dataset",
        value="FOLDER",
        common=True,
        digest=False,
    )
    dataset_config: str | None = option(None, "configuration name of a hub data set that has several")
    input_key: str | None = option(None, "image column; found by its type by default")
    target_key: str | None = option(None, "label column; found by its type by default")
    train_split: str = option("train", "split to train on")
    eval_split: str | None = option(
        None, "split to evaluate on; default: test, validation, valid or val, whichever exists"
    )
    val_split: float = option(
        0.0,
        "share of the training images to hold out and evaluate on each epoch; 0 to 0.5, of each class",
        common=True,
        minimum=0,
        maximum=0.5,
    )
    streaming: bool = option(False, "read images one after the other, from the hub or files, and keep none on disk")
    shuffle_buffer: int = option(
        4096, "streaming: encoded images in memory that the next one is drawn from, in each process", minimum=1
    )
    num_samples: int | None = option(
        None, "streaming: training images of an epoch; default: what the data set says of itself", minimum=2
    )
    num_classes: int | None = option(None, "streaming: classes, where labels are numbers without names", minimum=2)
    img_size: int | None = option(
        None, "side in pixels; default: the images' own where small, else the model's", common=True, minimum=1
    )
    in_chans: int = option(
        3,
        "channels: 3 for colour, 1 for grey; grey, palette, CMYK and transparent images are converted, and images "
        "of other numbers of channels are not supported",
        common=True,
    )
    mean: tuple[float, ...] | None = option(
        None, "per channel, of pixels in [0, 1]; default: the weights', else the images' own"
    )
    std: tuple[float, ...] | None = option(None, "as --mean", above=0)
    batch_size: int = option(64, "images per process and step, at most", common=True, minimum=2, digest=False)
    validation_batch_size: int = option(256, "images per process and evaluation step", minimum=1, digest=False)
    workers: int = option(2, "loader processes for large images", common=True, minimum=0, digest=False)
    max_bad: int = option(
        0, "damaged images that are left out, with a list of their names; more are refused", minimum=0
    )
    pad: int = _augment(4, "small images: zero padding in pixels before the random crop; 0 for no crop", minimum=0)
    hflip: float = _augment(0.5, "probability of a horizontal flip", minimum=0, maximum=1)
    scale: tuple[float, ...] = _augment(
        (0.08, 1.0), "large images: share of the area of a random crop", above=0, maximum=1
    )
    ratio: tuple[float, ...] = _augment((0.75, 4.0 / 3.0), "large images: aspect ratio of a random crop", above=0)
    aa: str | None = _augment(None, "large images: timm's auto-augment policy, such as rand-m9-mstd0.5", common=True)
    color_jitter: float = _augment(
        0.0, "large images: strength of colour jitter; as in timm none beside --aa", minimum=0
    )
    reprob: float = _augment(0.0, "probability of random erasing", minimum=0, maximum=1)
    remode: Literal["const", "rand", "pixel"] = _augment(
        "pixel", "what erases: const (the mean), rand (one random colour a box) or pixel (one a pixel)"
    )
    recount: int = _augment(1, "largest number of boxes that are erased of an image", minimum=1)
    mixup: float = _augment(
        0.0,
        "alpha of mixup; student and teacher see mixed images, and heads are fitted on images as they are; 0: none",
        common=True,
        minimum=0,
    )
    cutmix: float = _augment(0.0, "alpha of cutmix, as --mixup", common=True, minimum=0)
    mixup_prob: float = _augment(1.0, "probability that a batch is mixed", minimum=0, maximum=1)
    mixup_switch_prob: float = _augment(0.5, "probability of cutmix where there are both", minimum=0, maximum=1)
    mixup_off_epoch: int = _augment(0, "epoch from which on nothing is mixed; 0: never", minimum=0)
    aug_repeats: int = _augment(
        0,
        "repeated augmentation: an image's augmentations in a row; an epoch stays as long, and shows a part of the "
        "images",
        minimum=0,
    )
    crop_pct: float | None = option(
        None, "large images: share of the resized side that evaluation crops; default: the model's", above=0, maximum=1
    )
    interpolation: str | None = option(None, "large images: bilinear or bicubic; default: the model's")
    train_interpolation: str | None = _augment(
        None, "large images: of training crops alone, and random for either by chance; default: as --interpolation"
    )

    def __post_init__(self) -> None:
        check_options(self)
        check_channels(self)
        check_crop(self)
        check_streaming(self)


OF_TRAINING = frozenset({"batch_size", "shuffle_buffer"}) | {
    f.name for f in fields(Data) if f.metadata["group"] == "augmentation"
}
"""Options of Data that say nothing about how images are evaluated."""


EMBEDDED = Path(__file__).parents[1] / "embedded"
