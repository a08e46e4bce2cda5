"""Transfer: train a new linear classifier for another data set on a distilled student's frozen backbone.

    accelerate launch recipes/transfer.py --student RUN_OR_EXPORT_FOLDER --data-dir FOLDER [--preset tiny-imagenet]

Its accuracy measures how general the student's embedding is. The protocol is that of CRD and of the paper's code:
images of 32 pixels, 50 epochs of cross-entropy, momentum 0.9, learning rate 0.02 (0.01 for MobileNetV2 and ShuffleNet)
times 0.1 at epochs 20 and 25, weight decay 5e-4, batches of 64. Tiny-ImageNet: batches of 128, twice the learning rate,
no flips.

Reference: Tian, Krishnan, Isola, "Contrastive Representation Distillation" (arXiv 1910.10699), the section on transfer.
Differs: their BatchNorm stays in training mode, so that its statistics follow the new images; here it is in eval mode,
a true linear probe, unless --adapt-batchnorm is given. They normalise by the new images' mean and std; here by those
that the student was trained with. They report the best epoch on the test images; here that is best_top1, and top1 is
that of the last epoch.
"""

import argparse
import math
import re
import sys
from pathlib import Path
from typing import Any

from timm.models import get_model_input_config
from torch import nn

import mgd_timm
from mgd_timm.cli.main import guarded
from mgd_timm.data.dataset import load_images
from mgd_timm.data.rng import set_seed
from mgd_timm.distributed.collectives import join
from mgd_timm.models.load import load_model
from mgd_timm.models.pretrained_cfg import read_channel_values
from mgd_timm.recipe.recipe import make_recipe

PRESETS: dict[str, dict[str, Any]] = {
    "stl10": {"batch_size": 64, "lr": 1.0, "hflip": 0.5},
    "tiny-imagenet": {"batch_size": 128, "lr": 2.0, "hflip": 0.0},  # lr: times the student's
}
EPOCHS, MILESTONES, PIXELS = 50, (20, 25), 32


def base_lr(architecture: str) -> float:
    """Return the learning rate at batch size 64, which is lower for two families, as in every stage of the paper."""
    return 0.01 if re.search("mobilenet_?v2|shuffle", architecture) else 0.02


def milestones(epochs: int) -> tuple[int, ...]:
    """Return the epochs at which the learning rate decays, in proportion to the number of epochs."""
    return tuple(math.ceil(at * epochs / EPOCHS) for at in MILESTONES)


def options_for(model: nn.Module, args: argparse.Namespace) -> dict[str, Any]:
    """Return the options of `mgd_timm.train` for this student: the given ones, else the preset's."""
    config = getattr(model, "pretrained_cfg", {}) or {}
    inputs = get_model_input_config(model)
    channels, height = inputs["input_size"][:2]
    preset = PRESETS[args.preset]
    mean, std = read_channel_values(config, "mean"), read_channel_values(config, "std")
    known = mean is not None and std is not None and len(mean) == len(std) == channels
    named = ("dataset", "data_dir", "input_key", "target_key", "train_split", "eval_split", "val_split", "workers")
    given = {name: value for name in named if (value := getattr(args, name)) is not None}
    return {
        **given,
        "train_only": "classifier",
        "adapt_batchnorm": args.adapt_batchnorm,
        "img_size": args.img_size or (height if inputs["fixed_input_size"] else PIXELS),
        "in_chans": channels,
        "mean": mean if known else None,
        "std": std if known else None,
        "pad": 4,
        "hflip": preset["hflip"],
        "batch_size": args.batch_size or preset["batch_size"],
        "epochs": args.epochs,
        "opt": "momentum",
        "momentum": 0.9,
        "lr": args.lr if args.lr is not None else base_lr(str(config.get("architecture", ""))) * preset["lr"],
        "weight_decay": 5e-4,
        "sched": "multistep",
        "decay_milestones": milestones(args.epochs),
        "decay_rate": 0.1,
        "amp": args.amp,
        "seed": args.seed,
        "checkpoint_interval": args.checkpoint_interval,
        "resume": args.resume,
    }


def transfer(args: argparse.Namespace) -> None:
    """Train the student's new classifier."""
    model = load_model(args.student)
    options = options_for(model, args)
    recipe = make_recipe(teacher=None, **options)  # refuses wrong options before images are read
    # `join` sets up the processes as the run does: they wait for the one that decodes the images.
    images = load_images(recipe.data, recipe.seed, log=lambda _: None, accelerator=join())
    set_seed(recipe.seed, 3)
    model.reset_classifier(images.num_classes)  # type: ignore[operator]  # timm's, of every classifier
    mgd_timm.train(model, output=args.output, **options)


def main() -> int:
    """Return the exit code: 0, 1 for a failure, 130 or 143 after a signal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--student", required=True, help="run folder, exported folder, hf-hub:ID, or timm name with weights"
    )
    place = parser.add_mutually_exclusive_group(required=True)
    place.add_argument("--data-dir", help="folder of parquet files, or of images in class folders")
    place.add_argument("--dataset", help="hub id, or 'embedded'")
    parser.add_argument("--preset", choices=PRESETS, default="stl10", help="default: stl10, for any small images")
    parser.add_argument("--epochs", type=int, default=EPOCHS, help=f"default: {EPOCHS}; the milestones scale with them")
    parser.add_argument("--lr", type=float, help="learning rate; default: by preset and student")
    parser.add_argument("--batch-size", type=int, help="images per process and step; default: the preset's")
    parser.add_argument(
        "--img-size",
        type=int,
        help=f"image side in pixels; default: {PIXELS}, or the student's fixed size",
    )
    parser.add_argument(
        "--adapt-batchnorm", action="store_true", help="let BatchNorm's statistics follow the new images"
    )
    parser.add_argument("--input-key", help="image column")
    parser.add_argument("--target-key", help="label column")
    parser.add_argument("--train-split")
    parser.add_argument("--eval-split")
    parser.add_argument("--val-split", type=float, help="share of the training images to evaluate on each epoch")
    parser.add_argument("--workers", type=int)
    parser.add_argument("--amp", action="store_true", help="mixed precision")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--checkpoint-interval", type=int, default=0, help="updates between checkpoints; 0: at each epoch's end"
    )
    parser.add_argument("--output", type=Path, default=Path("runs/transfer"))
    parser.add_argument("--resume", action="store_true", help="continue the run in the output folder")
    args = parser.parse_args()
    return guarded("transfer", lambda: transfer(args))


if __name__ == "__main__":
    sys.exit(main())
