"""ImageNet, and data sets of its kind: published pairs of teacher and student with their published schedules.

    accelerate launch recipes/imagenet.py --data-dir /data/imagenet
    accelerate launch recipes/imagenet.py --data-dir DIR --pair resnet50-mobilenet --method none --criterion kd
    accelerate launch recipes/imagenet.py --data-dir DIR --student resnet18 --teacher resnet34.a1_in1k --epochs 30 --amp
    python recipes/imagenet.py --list

A pair sets networks, schedule and augmentation. The recipe takes every flag of `mgd-timm distill`, which replaces the
pair's value. The default method is the package's, mas with kd, unless the pair sets one. The pair's stochastic depth
applies to its own student only; for another one, give --drop-path.

The global batch is the pair's on any number of processes. With another (--global-batch-size, or --batch-size and
--grad-accum-steps), the learning rate is scaled in proportion, unless --lr is given. With --epochs the schedule keeps
its shape: a decay comes at the same share of the epochs, and the warm-up is at most a tenth of them.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mgd_timm.cli.main import guarded
from mgd_timm.cli.parser import given_options, run_parser
from mgd_timm.distributed.collectives import join
from mgd_timm.pipeline.run import run
from mgd_timm.pipeline.run_folder import read_recipe
from mgd_timm.recipe.options import flag, unknown
from mgd_timm.recipe.recipe import PROCESS_TIMEOUT, Recipe, make_recipe

LARGEST_BATCH = 256  # images per process and step, without --batch-size
COMMON: dict[str, Any] = {
    "output": "runs/imagenet",
    "img_size": 224,
    "workers": 8,
    # Four augmentations of 1.28 million images would take tens of gigabytes.
    "heads_augmentations": 1,
}
SGD: dict[str, Any] = {
    "epochs": 100,
    "opt": "momentum",
    "lr": 0.1,
    "weight_decay": 1e-4,
    "sched": "step",
    "decay_epochs": 30.0,
    "decay_rate": 0.1,
    "interpolation": "bilinear",
    "crop_pct": 0.875,
}


@dataclass(frozen=True)
class Pair:
    """Teacher and student, images per update, options of `make_recipe`, their source, and what differs from it."""

    teacher: str
    student: str
    batch: int
    options: dict[str, Any]
    source: str
    differs: str


PAIRS = {
    "resnet34-resnet18": Pair(
        "resnet34.tv_in1k",
        "resnet18",
        256,
        SGD,
        "the pair of most papers since AT (Zagoruyko, Komodakis, arXiv 1612.03928), with the schedule of PyTorch's "
        "ImageNet example: the learning rate divided by 10 at epochs 30, 60 and 90",
        "nothing known; some of the papers' codes add colour jitter (--color-jitter 0.4).",
    ),
    "resnet50-mobilenet": Pair(
        "resnet50.tv_in1k",
        "mobilenetv1_100",
        256,
        SGD,
        "the second pair since overhaul (Heo et al., arXiv 1904.01866), with the schedule of the first",
        "timm's MobileNet has ReLU6 where their codes have ReLU; its parameters are the same 4.2 million.",
    ),
    "regnety_160-deit_tiny": Pair(
        "regnety_160.deit_in1k",
        "deit_tiny_patch16_224",
        1024,
        {
            "epochs": 300,
            "opt": "adamw",
            "lr": 1e-3,
            "weight_decay": 0.05,
            "filter_bias_and_bn": True,
            "sched": "cosine",
            "min_lr": 1e-5,
            "warmup_epochs": 5,
            "warmup_lr": 1e-6,
            "drop_path": 0.1,
            "smoothing": 0.1,
            "aa": "rand-m9-mstd0.5-inc1",
            "interpolation": "bicubic",
            "crop_pct": 0.875,
            "reprob": 0.25,
            "remode": "pixel",
            "mixup": 0.8,
            "cutmix": 1.0,
            "aug_repeats": 3,
        },
        "DeiT (Touvron et al., arXiv 2012.12877), its training of 300 epochs",
        "DeiT's best students have a distillation token, whose classifier learns the teacher's hard decision, half of "
        "the loss, and both classifiers' mean predicts. Here one classifier learns from labels and soft targets. The "
        "soft variant of the paper is --method none --criterion kd:0.1 --task-weight 0.9 --kd-temperature 3; its code "
        "divides the divergence by batch x classes, not by the batch, which is kd:0.0001 on 1000 classes. No moving "
        "average (--model-ema), as in the paper's table. Repeated augmentations of an image are in the same update, "
        "not on different GPUs.",
    ),
    "patient": Pair(
        "resnetv2_152x2_bit.goog_teacher_in21k_ft_in1k",
        "resnetv2_50x1_bit",
        4096,
        {
            "epochs": 1200,
            "opt": "adamw",
            "lr": 0.03,
            "weight_decay": 0.01,
            "filter_bias_and_bn": True,
            "sched": "cosine",
            "warmup_epochs": 16,
            "warmup_lr": 1e-6,
            "clip_grad": 1.0,
            "method": "none",
            "criterion": ("kd:1",),
            "kd_temperature": 1.0,
            "task_weight": 0.0,
            "scale": (0.05, 1.0),
            "interpolation": "bilinear",
            "crop_pct": 0.875,
            "mixup": 1.0,
        },
        "a patient and consistent teacher (Beyer et al., arXiv 2106.05237): one crop for both, mixed with a uniform "
        "coefficient, no labels, a long schedule; from 300 to 9600 epochs in the paper, 1200 are its code's middle "
        "ground (--epochs)",
        "their weight decay of 0.0003 is not multiplied by the learning rate, as AdamW's is: 0.01 x 0.03 is the same. "
        "They warm up over 5000 updates (16 epochs) and hold out 2 % of the training images; their best result uses "
        "another optimizer (Shampoo) and 9600 epochs.",
    ),
}
DEFAULT = "resnet34-resnet18"


def main(arguments: Sequence[str] | None = None) -> int:
    """Return the exit code: 0, 1 for a failure, 130 or 143 after a signal."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if "--list" in words:
        print("\n".join(listed(name, pair) for name, pair in PAIRS.items()))
        return 0
    parser = run_parser("recipes/imagenet.py", distill=True)
    group = parser.add_argument_group("published pairs")
    group.add_argument(
        "--pair", type=str, default=DEFAULT, help=f"networks, schedule and augmentation of: {', '.join(PAIRS)}"
    )
    group.add_argument("--list", action="store_true", help="print the pairs, their sources and what differs from them")
    given = given_options(parser, words)
    return guarded("recipes/imagenet.py", lambda: distil(given))


def distil(given: dict[str, Any]) -> None:
    """Run a pair with the given options."""
    accelerator = join(given.get("process_timeout", PROCESS_TIMEOUT))
    options = options_of(with_batch_of_run(given), accelerator.num_processes)
    accelerator.print(
        f"{given.get('pair', DEFAULT)}: {options['global_batch_size']} images per update, {options['epochs']} epochs "
        f"of {options['opt']}, lr {options['lr']:.4g} ({options['sched']})"
    )
    run(make_recipe(**options))


def with_batch_of_run(given: dict[str, Any]) -> dict[str, Any]:
    """Return the given options with the global batch of the run that --resume continues, on any number of processes."""
    folder = Path(given.get("output", Recipe.output))
    if not given.get("resume") or not (folder / "recipe.yaml").is_file():
        return given
    return {"global_batch_size": read_recipe(folder).optim.global_batch_size, **given}


def options_of(given: dict[str, Any], processes: int) -> dict[str, Any]:
    """Return options of `make_recipe`: the given ones, else the pair's, adapted to batch size and epochs.

    Raises:
        ValueError: No such pair.
    """
    name = given.get("pair", DEFAULT)
    if name not in PAIRS:
        raise ValueError(f"{unknown('pair', name, PAIRS)} All pairs: {', '.join(PAIRS)}.")
    pair = PAIRS[name]
    options = {**COMMON, **pair.options, "teacher": pair.teacher, "student": pair.student}
    if given.get("peer") is not None:
        options.pop("teacher")
    if given.get("student", pair.student) != pair.student:
        options.pop("drop_path", None)  # not every network takes it
    size = options["batch_size"] = given.get("batch_size", max(2, min(LARGEST_BATCH, -(-pair.batch // processes))))
    steps = given.get("grad_accum_steps")
    global_batch = given.get("global_batch_size", size * processes * steps if steps is not None else pair.batch)
    options["global_batch_size"] = global_batch
    options["lr"] *= global_batch / pair.batch
    epochs = given.get("epochs", options["epochs"])
    if "decay_epochs" in options:
        options["decay_epochs"] *= epochs / options["epochs"]
    if "warmup_epochs" in options:
        options["warmup_epochs"] = min(options["warmup_epochs"], epochs // 10)
    return {**options, **{key: value for key, value in given.items() if key not in ("pair", "list")}}


def listed(name: str, pair: Pair) -> str:
    """Return a description of a pair."""
    flags = " ".join(_flag(key, value) for key, value in pair.options.items())
    return (
        f"{name}\n  teacher {pair.teacher}, student {pair.student}, {pair.batch} images per update\n  {flags}\n"
        f"  from: {pair.source}.\n  differs: {pair.differs}\n"
    )


def _flag(name: str, value: Any) -> str:
    words = [str(part) for part in value] if isinstance(value, tuple) else [] if value is True else [str(value)]
    return " ".join([flag(name), *words])


if __name__ == "__main__":
    sys.exit(main())
