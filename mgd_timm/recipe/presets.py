"""The paper's CIFAR protocol as plain data: its pairs, statistics, schedules and options.

Reference: Shao, Chen, arXiv 2108.06681, and the authors' scripts, which follow RepDistiller's (Tian et al., arXiv
1910.10699): SGD with momentum, lr 0.05, batch 64, 240 epochs, decayed at 150, 180 and 210.
"""

from typing import Any

from mgd_timm.recipe.options import unknown

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

EPOCHS = 240
HEADS_EPOCHS = 60
STATISTICS: dict[str, dict[str, tuple[float, ...]]] = {
    "cifar100": {"mean": (0.5071, 0.4867, 0.4408), "std": (0.2675, 0.2565, 0.2761)},
    "cifar10": {"mean": (0.4914, 0.4822, 0.4465), "std": (0.2470, 0.2435, 0.2616)},
}
DATA_SETS = {"cifar10": "uoft-cs/cifar10", "cifar100": "uoft-cs/cifar100"}


def pair(name: str) -> tuple[str, str]:
    """Return the teacher and the student of a pair.

    Raises:
        ValueError: No such pair. The message names all pairs.
    """
    if name not in PAIRS:
        raise ValueError(f"{unknown('pair', name, PAIRS)} All pairs: {', '.join(PAIRS)}.")
    return PAIRS[name]


def training_options(network: str, epochs: int = EPOCHS, *, classes: int = 100) -> dict[str, Any]:
    """Return options of `make_recipe` to train a network, with or without a teacher.

    The learning rate decays at the default milestones, which are the paper's shares of the epochs.

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
        "decay_rate": 0.1,
        "batch_size": 64,
        "pad": 4,
        "hflip": 0.5,
        **STATISTICS["cifar10" if classes == 10 else "cifar100"],
    }


def distillation_options() -> dict[str, Any]:
    """Return further options of `make_recipe` for a student: maps as RepDistiller pairs them, without the stem's."""
    return {"maps": "mid"}


def heads_options(epochs: int = HEADS_EPOCHS) -> dict[str, Any]:
    """Return options of `make_recipe` to fit the granularity heads as the authors do."""
    return {
        "heads_protocol": "live",
        "heads_epochs": epochs,
        "heads_lr": 0.01,
        "heads_clip_grad": None,
        "heads_batch_size": 64,
        "heads_sched": "multistep",
    }
