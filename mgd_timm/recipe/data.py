"""`Data`: the options of a recipe that choose a data set and its augmentation."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mgd_timm.recipe.options import check_choices, option


@dataclass(frozen=True)
class Data:
    """Options of the data."""

    dataset: str = option("embedded", "'embedded' (part of Fashion-MNIST), a hub id or a folder", digest=False)
    data_dir: str | None = option(
        None,
        "folder with images in class folders, or with tar, parquet, arrow or npy files; instead of --dataset",
        digest=False,
    )
    dataset_config: str | None = option(None, "configuration of a hub data set that has several")
    input_key: str | None = option(None, "image column; default: found by its type")
    target_key: str | None = option(None, "label column; default: found by its type")
    train_split: str = option("train", "split to train on")
    eval_split: str | None = option(
        None, "split to evaluate on; default: test, validation, valid or val, whichever exists"
    )
    val_split: float = option(
        0.0, "share of the training images (0 to 0.5) held out, per class, to evaluate on each epoch"
    )
    streaming: bool = option(False, "stream images from the hub or from files, without storing them on disk")
    shuffle_buffer: int = option(
        4096, "with --streaming: encoded images in memory, per process, from which the next one is drawn"
    )
    num_samples: int | None = option(
        None, "with --streaming: training images per epoch; default: the number that the data set states"
    )
    num_classes: int | None = option(None, "with --streaming: number of classes, if labels are numbers without names")
    img_size: int | None = option(
        None, "image side in pixels; default: the images' own if they are small, else the model's"
    )
    in_chans: int = option(3, "image channels: 3 (colour) or 1 (grey)")
    mean: tuple[float, ...] | None = option(
        None, "mean per channel, of pixels in [0, 1]; default: that of the weights, else of the images"
    )
    std: tuple[float, ...] | None = option(None, "standard deviation per channel, as --mean")
    batch_size: int = option(64, "most images per process and step", digest=False)
    validation_batch_size: int = option(256, "images per process and evaluation step", digest=False)
    workers: int = option(2, "DataLoader workers per process, for large images", digest=False)
    max_bad: int = option(0, "skip up to N corrupt images and list them in bad_images.txt; more are an error")
    pad: int = option(4, "small images: zero padding in pixels before a random crop; 0: no crop")
    hflip: float = option(0.5, "probability of a horizontal flip")
    scale: tuple[float, ...] = option((0.08, 1.0), "large images: range of a random crop's share of the area")
    ratio: tuple[float, ...] = option((0.75, 4.0 / 3.0), "large images: range of a random crop's aspect ratio")
    aa: str | None = option(None, "large images: timm's auto-augment policy, such as rand-m9-mstd0.5")
    color_jitter: float = option(0.0, "large images: strength of colour jitter; timm ignores it with --aa")
    reprob: float = option(0.0, "probability of random erasing")
    remode: Literal["const", "rand", "pixel"] = option(
        "pixel", "random erasing fills with: const (the mean), rand (one colour per box), pixel (one per pixel)"
    )
    recount: int = option(1, "random erasing: most boxes per image")
    mixup: float = option(
        0.0, "alpha of mixup, seen by student and teacher; heads are fitted on unmixed images; 0: no mixup"
    )
    cutmix: float = option(0.0, "alpha of cutmix, as --mixup")
    mixup_prob: float = option(1.0, "probability that a batch is mixed")
    mixup_switch_prob: float = option(0.5, "probability of cutmix instead of mixup if both are on")
    mixup_off_epoch: int = option(0, "first epoch without mixup and cutmix; 0: never off")
    aug_repeats: int = option(
        0, "repeated augmentation: augmentations per image, in a row; an epoch stays as long and shows fewer images"
    )
    crop_pct: float | None = option(
        None, "large images: share of the resized side that evaluation crops; default: the model's"
    )
    interpolation: str | None = option(None, "large images: bilinear or bicubic; default: the model's")
    train_interpolation: str | None = option(
        None, "large images: interpolation of training crops, or random; default: as --interpolation"
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
"""Options of Data that only training uses, not evaluation."""


EMBEDDED = Path(__file__).parents[1] / "embedded"
