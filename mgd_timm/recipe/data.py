"""The part of a recipe that says which images a run sees, and how they are shown."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mgd_timm.recipe.options import check_choices, option


@dataclass(frozen=True)
class Data:
    """Which images, and how they are shown."""

    dataset: str = option("embedded", "'embedded' (part of Fashion-MNIST), a hub id, or a folder", digest=False)
    data_dir: str | None = option(
        None, "folder of parquet/arrow files or of images in class folders; instead of --dataset", digest=False
    )
    dataset_config: str | None = option(None, "configuration name of a hub data set that has several")
    input_key: str | None = option(None, "image column; found by its type by default")
    target_key: str | None = option(None, "label column; found by its type by default")
    train_split: str = option("train", "split to train on")
    eval_split: str | None = option(
        None, "split to evaluate on; default: test, validation, valid or val, whichever exists"
    )
    val_split: float = option(
        0.0, "share of the training images (0 to 0.5) cut off, class by class, to evaluate on each epoch"
    )
    streaming: bool = option(False, "read images one after the other, from the hub or files, and keep none on disk")
    shuffle_buffer: int = option(
        4096, "streaming: encoded images in memory that the next one is drawn from, in each process"
    )
    num_samples: int | None = option(
        None, "streaming: training images of an epoch; default: what the data set says of itself"
    )
    num_classes: int | None = option(None, "streaming: classes, where labels are numbers without names")
    img_size: int | None = option(None, "side in pixels; default: the images' own where small, else the model's")
    in_chans: int = option(3, "3 for colour, 1 for grey")
    mean: tuple[float, ...] | None = option(
        None, "per channel, of pixels in [0, 1]; default: the weights', else the images' own"
    )
    std: tuple[float, ...] | None = option(None, "as --mean")
    batch_size: int = option(64, "images per process and step, at most", digest=False)
    validation_batch_size: int = option(256, "images per process and evaluation step", digest=False)
    workers: int = option(2, "loader processes for large images", digest=False)
    max_bad: int = option(0, "damaged images that are left out, with a list of their names; more are refused")
    pad: int = option(4, "small images: zero padding in pixels before the random crop; 0 for no crop")
    hflip: float = option(0.5, "probability of a horizontal flip")
    scale: tuple[float, ...] = option((0.08, 1.0), "large images: share of the area of a random crop")
    ratio: tuple[float, ...] = option((0.75, 4.0 / 3.0), "large images: aspect ratio of a random crop")
    aa: str | None = option(None, "large images: timm's auto-augment policy, such as rand-m9-mstd0.5")
    color_jitter: float = option(0.0, "large images: strength of colour jitter; as in timm none beside --aa")
    reprob: float = option(0.0, "probability of random erasing")
    remode: Literal["const", "rand", "pixel"] = option(
        "pixel", "what erases: const (the mean), rand (one random colour a box) or pixel (one a pixel)"
    )
    recount: int = option(1, "largest number of boxes that are erased of an image")
    mixup: float = option(
        0.0, "alpha of mixup: student and teacher see mixed images (heads are fitted on images as they are); 0: none"
    )
    cutmix: float = option(0.0, "alpha of cutmix, as --mixup")
    mixup_prob: float = option(1.0, "probability that a batch is mixed")
    mixup_switch_prob: float = option(0.5, "probability of cutmix where there are both")
    mixup_off_epoch: int = option(0, "epoch from which on nothing is mixed; 0: never")
    aug_repeats: int = option(
        0,
        "repeated augmentation: an image's augmentations in a row; an epoch stays as long, and shows a part of the "
        "images",
    )
    crop_pct: float | None = option(
        None, "large images: share of the resized side that evaluation crops; default: the model's"
    )
    interpolation: str | None = option(None, "large images: bilinear or bicubic; default: the model's")
    train_interpolation: str | None = option(
        None, "large images: of training crops alone, and random for either by chance; default: as --interpolation"
    )

    def __post_init__(self) -> None:
        check_choices(self)
        if self.in_chans not in (1, 3):
            raise ValueError(f"in_chans={self.in_chans}: expected 3 (colour) or 1 (grey).")
        if not 0 <= self.val_split <= 0.5:
            raise ValueError(
                f"val_split={self.val_split}: expected a share from 0 to 0.5 (a split's name goes to eval_split)."
            )
        if self.batch_size < 2:
            raise ValueError(
                f"batch_size={self.batch_size}: expected 2 or more; BatchNorm has no statistics of one image."
            )
        self._check_streaming()
        if not 0 <= self.hflip <= 1:
            raise ValueError(f"hflip={self.hflip}: expected a probability from 0 to 1.")
        if self.pad < 0 or (self.img_size is not None and self.img_size < 1):
            raise ValueError(
                f"pad={self.pad}, img_size={self.img_size}: expected pixels, pad 0 or more and img_size 1 or more."
            )
        for name in ("mean", "std"):
            values = getattr(self, name)
            if values is not None and len(values) != self.in_chans:
                raise ValueError(f"{name}={values}: expected {self.in_chans} values, one per channel (in_chans).")
            if values is not None and not all(abs(value) < float("inf") for value in values):
                raise ValueError(f"{name}={values}: expected finite values, of pixels in [0, 1].")
        if self.std is not None and min(self.std) <= 0:
            raise ValueError(f"std={self.std}: expected positive values.")
        if self.validation_batch_size < 1 or self.workers < 0:
            raise ValueError(
                f"validation_batch_size={self.validation_batch_size}, workers={self.workers}: expected 1 or more and "
                "0 or more."
            )
        for name in ("scale", "ratio"):
            values = getattr(self, name)
            if len(values) != 2 or not 0 < values[0] <= values[1]:
                raise ValueError(f"{name}={values}: expected two positive numbers, the smaller one first.")
        if self.scale[1] > 1:
            raise ValueError(f"scale={self.scale}: expected shares of the image's area, 1 at most.")
        if self.crop_pct is not None and not 0 < self.crop_pct <= 1:
            raise ValueError(f"crop_pct={self.crop_pct}: expected 0 < crop_pct <= 1, or none for the model's.")
        for name in ("reprob", "mixup_prob", "mixup_switch_prob"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected a probability from 0 to 1.")
        for name in ("mixup", "cutmix"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name}={getattr(self, name)}: expected alpha of a Beta distribution, or 0 for none.")
        if self.recount < 1 or min(self.mixup_off_epoch, self.aug_repeats, self.max_bad) < 0:
            raise ValueError(
                f"recount={self.recount}, mixup_off_epoch={self.mixup_off_epoch}, aug_repeats={self.aug_repeats}, "
                f"max_bad={self.max_bad}: expected 1 or more, and 0 or more of the others."
            )

    def _check_streaming(self) -> None:
        for name, least in (("num_samples", 2), ("num_classes", 2)):
            value = getattr(self, name)
            if value is not None and not self.streaming:
                raise ValueError(f"{name}={value} is for streaming images: else they are counted. Leave it out.")
            if value is not None and value < least:
                raise ValueError(f"{name}={value}: expected {least} or more.")
        if self.shuffle_buffer < 1:
            raise ValueError(f"shuffle_buffer={self.shuffle_buffer}: expected 1 or more.")
        for name in ("val_split", "max_bad", "aug_repeats"):
            if self.streaming and getattr(self, name):
                raise ValueError(
                    f"{name}={getattr(self, name)} needs any image at any time, and a stream gives one after the "
                    "other: leave it out, or --streaming."
                )


OF_TRAINING = frozenset(
    {"batch_size", "shuffle_buffer", "pad", "hflip", "scale", "ratio", "aa", "color_jitter", "train_interpolation"}
)
OF_TRAINING |= {"reprob", "remode", "recount", "aug_repeats"}
OF_TRAINING |= {"mixup", "cutmix", "mixup_prob", "mixup_switch_prob", "mixup_off_epoch"}
"""Options of Data that say nothing about how images are evaluated."""


EMBEDDED = Path(__file__).parents[1] / "embedded"
