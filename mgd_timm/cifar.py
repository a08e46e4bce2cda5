"""The paper's CIFAR protocol: its pairs, schedules and weights as recipes, and stages that are found by what made them.

Reference: Shao, Chen, arXiv 2108.06681, and the authors' scripts, which follow RepDistiller's (Tian et al., arXiv
1910.10699): SGD with momentum, lr 0.05, batch 64, 240 epochs, decayed at 150, 180 and 210.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from mgd_timm import checkpoint
from mgd_timm.build import build_teacher
from mgd_timm.data import Images, load_images
from mgd_timm.optimizer_state import module_digest
from mgd_timm.options import as_dict, digest, unknown
from mgd_timm.processes import decided, join, local_main_first
from mgd_timm.recipe import Recipe, make_recipe
from mgd_timm.resolving import with_global_batch
from mgd_timm.run import run

PAIRS: dict[str, tuple[str, str]] = {
    "wrn_40_2-wrn_16_2": ("cifar_wrn_40_2", "cifar_wrn_16_2"),
    "wrn_40_2-wrn_40_1": ("cifar_wrn_40_2", "cifar_wrn_40_1"),
    "resnet56-resnet20": ("cifar_resnet56", "cifar_resnet20"),
    "resnet110-resnet20": ("cifar_resnet110", "cifar_resnet20"),
    "resnet110-resnet32": ("cifar_resnet110", "cifar_resnet32"),
    "resnet32x4-resnet8x4": ("cifar_resnet32x4", "cifar_resnet8x4"),
    "vgg13-vgg8": ("cifar_vgg13", "cifar_vgg8"),
    "vgg13-mobilenetv2": ("cifar_vgg13", "cifar_mobilenetv2"),
    "resnet50-mobilenetv2": ("cifar_resnet50", "cifar_mobilenetv2"),
    "resnet50-vgg8": ("cifar_resnet50", "cifar_vgg8"),
    "resnet32x4-shufflev1": ("cifar_resnet32x4", "cifar_shufflev1"),
    "resnet32x4-shufflev2": ("cifar_resnet32x4", "cifar_shufflev2"),
    "wrn_40_2-shufflev1": ("cifar_wrn_40_2", "cifar_shufflev1"),
}
"""Teacher and student by name: the paper's seven of one family, and the six across families that its scripts hold."""

EPOCHS, HEADS_EPOCHS = 240, 60
MILESTONES, HEADS_MILESTONES = (150, 180, 210), (30, 45)
STATISTICS: dict[str, dict[str, tuple[float, ...]]] = {
    "cifar100": {"mean": (0.5071, 0.4867, 0.4408), "std": (0.2675, 0.2565, 0.2761)},
    "cifar10": {"mean": (0.4914, 0.4822, 0.4465), "std": (0.2470, 0.2435, 0.2616)},
}
DATA_SETS = {"cifar10": "uoft-cs/cifar10", "cifar100": "uoft-cs/cifar100"}


def pair(name: str) -> tuple[str, str]:
    """Teacher and student of a pair.

    Raises:
        ValueError: No such pair; all of them are named.
    """
    if name not in PAIRS:
        raise ValueError(f"{unknown('pair', name, PAIRS)} All pairs: {', '.join(PAIRS)}.")
    return PAIRS[name]


def shrunk(milestones: tuple[int, ...], epochs: int, whole: int) -> tuple[int, ...]:
    """Milestones of a schedule of `whole` epochs in one of `epochs`, at the same shares of its length, each once.

    Rounded down, 1 or more; where two would coincide, which decays twice at once, one of them is left out.
    """
    return tuple(dict.fromkeys(max(1, milestone * epochs // whole) for milestone in milestones))


def training_options(network: str, epochs: int = EPOCHS, *, classes: int = 100) -> dict[str, Any]:
    """Options of `make_recipe` to train a network, alone or from a teacher, for a number of epochs.

    Differs: the authors decay their teachers at 60, 120 and 180; RepDistiller's, whose accuracies the paper reports,
    decay as here.
    """
    slow = network.removeprefix("cifar_").startswith(("mobilenet", "shuffle"))
    return {
        "epochs": epochs,
        "opt": "momentum",
        "lr": 0.01 if slow else 0.05,
        "momentum": 0.9,
        "weight_decay": 5e-4,
        "sched": "multistep",
        "decay_milestones": shrunk(MILESTONES, epochs, EPOCHS),
        "decay_rate": 0.1,
        "batch_size": 64,
        "pad": 4,
        "hflip": 0.5,
        **STATISTICS["cifar10" if classes == 10 else "cifar100"],
    }


def distillation_options() -> dict[str, Any]:
    """Options of `make_recipe` for a student beside those of its training: maps as RepDistiller pairs them, without the
    stem's."""
    return {"maps": "mid"}


def heads_options(epochs: int = HEADS_EPOCHS) -> dict[str, Any]:
    """Options of `make_recipe` to fit the granularity heads as the authors do: on live images, batch 64, lr 0.01,
    decayed twice."""
    return {
        "heads_protocol": "live",
        "heads_epochs": epochs,
        "heads_lr": 0.01,
        "heads_batch_size": 64,
        "heads_sched": "multistep",
        "heads_decay_milestones": shrunk(HEADS_MILESTONES, epochs, HEADS_EPOCHS),
    }


def images_of(recipe: Recipe) -> Images:
    """The images of a recipe, decoded by one process while the others wait.

    Raises:
        DataError: No such data.
    """
    accelerator = join(recipe.process_timeout)
    return load_images(
        recipe.data, recipe.seed, main_first=partial(local_main_first, accelerator), say=accelerator.print
    )


def made_from(recipe: Recipe) -> dict[str, Any]:
    """What decides a student's weights beside its recipe: those of its teachers, and which rows of their classifiers
    are read."""
    digests = [module_digest(build_teacher(recipe, name)) for name in recipe.teacher or ()]
    found: dict[str, Any] = {"teacher": digests[0] if len(digests) == 1 else digests}
    if recipe.teacher_classes is not None:
        found["classes"] = [
            checkpoint.sha256(path) if (path := Path(word)).is_file() else word for word in recipe.teacher_classes
        ]
    return found


def stage(
    root: Path, name: str, recipe: Recipe, made_from: dict[str, Any] | None = None, *, quiet: bool = False
) -> Path:
    """The folder of a finished run of this recipe under `root`: found by its digest, continued where it was stopped,
    else run.

    Args:
        root: Folder of all stages; all processes must see the same one.
        name: What the stage is called, before its digest.
        recipe: Of the run; its output folder is chosen here.
        made_from: What else decides the weights (`made_from`).
        quiet: No progress bar.

    Raises:
        ValueError, OSError: As `run`.
    """
    accelerator = join(recipe.process_timeout)
    recipe = with_global_batch(recipe, accelerator.num_processes, accelerator.gradient_accumulation_steps)
    images = images_of(recipe)
    initial = recipe.student_checkpoint
    made_of = {
        "recipe": as_dict(recipe, digest_only=True),
        "images": [source.digest if source is not None else None for source in (images.train, images.watched)],
        "from": made_from or {},
        "initial": checkpoint.sha256(Path(initial)) if initial is not None else None,
        "precision": recipe.amp_dtype if recipe.amp else str(accelerator.mixed_precision),
    }
    folder = root / f"{name}-{digest(made_of)[:12]}"
    # The main process looks, before any of them writes there.
    finished = decided(accelerator, (folder / "summary.json").is_file())
    begun = decided(accelerator, (folder / "recipe.yaml").is_file())
    if finished:
        accelerator.print(f"{name}: found in {folder}")
        return folder
    accelerator.print(f"{name}: {'continued' if begun else 'started'} in {folder}")
    run(replace(recipe, output=str(folder), resume=begun), quiet=quiet)
    return folder


def teacher_stage(root: Path, network: str, options: dict[str, Any], *, quiet: bool = False) -> Path:
    """The folder of a teacher trained on its own."""
    recipe = make_recipe(teacher=None, method="none", student=network, **options)
    return stage(root, f"teacher-{network}", recipe, quiet=quiet)
