"""What a run is: frozen dataclasses, from which the command line's flags are generated.

Options that do not change the weights a run ends with (where it writes, how often it logs) carry digest=False and may
differ between a run and its resumption. So do the names of images and weights, whose content is digested instead.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from mgd_timm.recipe.checks import check_options, check_recipe
from mgd_timm.recipe.data import Data
from mgd_timm.recipe.heads import Heads
from mgd_timm.recipe.optim import Optim
from mgd_timm.recipe.options import option, typed, unknown

__all__ = ["OF_DISTILLING", "PARTS", "Data", "Heads", "Optim", "Recipe", "flatten", "make_recipe"]


@dataclass(frozen=True)
class Recipe:
    """A whole run: which networks, which method, which images, which rule.

    Raises:
        ValueError: A value out of range, or options that contradict each other.
    """

    student: str = option("cifar_resnet8x05", "timm model to train", group="model", common=True)
    student_pretrained: bool = option(
        False, "start the student from its pretrained weights", group="model", common=True
    )
    student_checkpoint: str | None = option(
        None, "safetensors file with the student's initial weights", value="FILE", group="model", digest=False
    )
    teacher: tuple[str, ...] | None = option(
        ("embedded",),
        "timm name, run folder, local-dir:PATH or hf-hub:ID; a timm name needs published weights or "
        "--teacher-checkpoint, and 'embedded' is in the package; given again: several teachers; default: embedded, and "
        "none with --peer",
        group="teacher",
        common=True,
        digest=False,
    )
    teacher_weights: tuple[float, ...] | None = option(
        None, "several teachers: weight of each; default: 1/N each", group="teacher", above=0
    )
    teachers_as: Literal["mean", "sum"] = option(
        "mean",
        "several teachers: mean takes the mean of their probabilities as one target, sum adds the losses of each",
        group="teacher",
    )
    peer: str | None = option(
        None,
        "a second student, initialised from the seed, in place of a teacher; both learn from the labels and from each "
        "other, and --drop is for both",
        group="teacher",
    )
    teacher_checkpoint: str | None = option(
        None,
        "safetensors file with the teacher's weights, for the name of a timm model without weights",
        value="FILE",
        group="teacher",
        digest=False,
    )
    teacher_classes: tuple[str, ...] | None = option(
        None,
        "where the teacher has other classes than the data: 'auto' (match them by name), a file that names them "
        "(docs/teachers.md), or 'none' (do not use its logits); several teachers: once for all, or again for each in "
        "their order",
        group="teacher",
        digest=False,
    )
    fit_teacher_head: Literal["none", "probe", "finetune"] = option(
        "none",
        "fit the teacher to the data's labels before the run: probe fits a classifier on its embedding, finetune all "
        "of it",
        group="teacher",
    )
    teacher_img_size: int | None = option(
        None,
        "side in pixels at which the teacher sees the student's crop; default: the student's, or the one that the "
        "teacher is fixed to",
        group="teacher",
        minimum=1,
    )
    teacher_resize: Literal["images", "positions"] = option(
        "images",
        "a teacher of a fixed input size: resize the images for it, or its position embeddings for the images",
        group="teacher",
    )
    teacher_store: str | None = option(
        None,
        "folder of teacher outputs, written once and read by every later run; for criteria that read no maps",
        value="FOLDER",
        group="teacher",
        digest=False,
    )
    # None without a store, so that these are values of the runs alone that they decide.
    teacher_augmentations: int | None = option(
        None,
        "stored outputs: augmentations of each image; epoch e shows number e modulo this; default: the epochs",
        group="teacher",
        minimum=1,
    )
    teacher_augmentation_seed: int | None = option(
        None, "stored outputs: random seed of the augmentations, whatever the run's; default: 0", group="teacher"
    )
    teacher_top_k: int | None = option(
        None,
        "stored outputs: largest logits that are kept of each augmentation; default: 0, all of them",
        group="teacher",
        minimum=0,
    )
    method: Literal["none", "mag", "mas"] = option(
        "mas",
        "mag (codes), mas (codes and stable logits) or none; around the criteria; default: mas, and none with --peer",
        group="method",
        common=True,
    )
    criterion: tuple[str, ...] = option(
        ("kd",),
        "criteria, each NAME, NAME:WEIGHT or NAME:WEIGHT:EPOCHS; the weight rises from 0 over EPOCHS; mgd-timm list "
        "criteria names them; default: kd, and dml with --peer",
        group="method",
        common=True,
    )
    criterion_options: tuple[str, ...] = option(
        (),
        "hyper-parameters of the criteria, as in kd.divergence=reverse",
        value="NAME.OPTION=VALUE",
        group="method",
    )
    standardise_logits: bool = option(
        False,
        "compare logits of mean 0 and standard deviation 1 (its authors: --kd-temperature 2 --kd-weight 9 "
        "--task-weight 0.1)",
        group="method",
    )
    fitting_epochs: int = option(
        30, "epochs of what is fitted before the run (ab, fsp, ft; --fit-teacher-head)", group="method", minimum=1
    )
    fitting_lr: float | None = option(
        None,
        "learning rate of what is fitted before the run; default: the run's, 0.01 at most for ft, a tenth for a "
        "teacher's fine-tuning, 0.001 for its probe",
        group="method",
        above=0,
    )
    task_weight: float | None = option(
        None, "weight of the labels' loss; default: 0.2 where kd is the only criterion, else 1", group="method"
    )
    kd_weight: float | None = option(
        None,
        "weight of logit KD; default: 0.8 as the only criterion, 1 beside others in mag and mas, else 0",
        group="method",
    )
    kd_temperature: float = option(4.0, "temperature of logit KD", group="method", above=0)
    smoothing: float = option(0.0, "label smoothing", group="optimisation", minimum=0, below=1, common=True)
    maps: str = option(
        "stages",
        "maps for criteria that read them: stages (as many of both networks, the deepest), last, mid (all but the "
        "first), all, or a number of evenly spaced ones",
        group="method",
    )
    drop: float = option(0.0, "dropout before the student's classifier", group="model", minimum=0, below=1)
    drop_path: float | None = option(None, "stochastic depth of the student", group="model", minimum=0, below=1)
    train_only: Literal["all", "classifier"] = option(
        "all",
        "what is trained of a model: all, or the classifier on a frozen backbone (a linear probe)",
        group="model",
    )
    adapt_batchnorm: bool = option(
        False, "with a frozen backbone: its BatchNorm statistics still follow the images", group="model"
    )
    amp: bool = option(
        False, "mixed precision; else what accelerate launch says", group="speed and memory", common=True
    )
    amp_dtype: Literal["bfloat16", "float16"] = option("bfloat16", "type of mixed precision", group="speed and memory")
    channels_last: bool | None = option(
        None,
        "channels-last memory format; default: on a GPU, and for cifar_* networks anywhere",
        group="speed and memory",
    )
    compile: bool = option(
        False,
        "compile the train step and the teacher; with torch.compile, and CUDA graphs on one GPU",
        group="speed and memory",
        common=True,
    )
    shard_teacher: bool = option(
        False,
        "shard the frozen teacher over the processes (FSDP2), where it does not fit on each",
        group="teacher",
        digest=False,
    )
    fold_teacher: bool = option(
        True, "fold the teacher's BatchNorm into its convolutions; its outputs stay, but for rounding", group="teacher"
    )
    seed: int = option(42, "random seed", group="run", common=True)
    output: str = option(
        "runs/distill",
        "folder of the run; must not exist unless resumed",
        value="FOLDER",
        group="run",
        common=True,
        digest=False,
    )
    resume: bool = option(
        False,
        "continue the run in the output folder from its newest checkpoint; start it where there is none",
        group="run",
        common=True,
        digest=False,
    )
    checkpoint_interval: int = option(
        0, "updates between checkpoints; 0: at the end of each epoch only", group="run", minimum=0, digest=False
    )
    checkpoint_hist: int = option(2, "checkpoints kept", group="run", minimum=1, digest=False)
    log_interval: int = option(
        50, "updates between checks and logs of the losses", group="run", minimum=1, digest=False
    )
    log_with: tuple[str, ...] = option(
        (),
        "trackers of accelerate: tensorboard, wandb, trackio, mlflow, ...; also comet_ml, aim, clearml, dvclive, "
        "swanlab, or all that are installed",
        group="run",
        common=True,
        digest=False,
    )
    license: str = option("other", "licence of the exported weights", group="run", digest=False)
    data: Data = field(default_factory=Data)
    optim: Optim = field(default_factory=Optim)
    heads: Heads = field(default_factory=Heads)

    def classes_of(self, place: int) -> str | None:
        """Return `teacher_classes` of the teacher at a place, counted from 0."""
        given = self.teacher_classes or (None,)
        return given[place if len(given) > 1 else 0]

    def __post_init__(self) -> None:
        check_options(self)
        check_recipe(self)


PARTS: dict[str, type] = {"data": Data, "optim": Optim, "heads": Heads}


OF_DISTILLING = {f.name for f in dataclasses.fields(Heads)}
OF_DISTILLING |= {f.name for f in dataclasses.fields(Recipe) if f.metadata.get("group") in ("teacher", "method")}
"""Options that mgd_timm.train and `mgd-timm train` do not take."""


def make_recipe(**options: Any) -> Recipe:
    """Build a Recipe from flat options, named as the command line's flags with underscores.

    With a peer, the teacher is None, the criterion dml and the method "none" where they are not given.

    Raises:
        ValueError: An unknown option, with the nearest names, a value of another type or out of range.
    """
    if options.get("peer") is not None:
        options = {"teacher": None, "criterion": ("dml",), "method": "none", **options}
    values: dict[str, dict[str, Any]] = {"recipe": {}, **{part: {} for part in PARTS}}
    homes = {f.name: ("recipe", f.type) for f in dataclasses.fields(Recipe) if f.name not in PARTS}
    homes |= {f.name: (part, f.type) for part, kind in PARTS.items() for f in dataclasses.fields(kind)}
    for name, value in options.items():
        if name not in homes:
            raise unknown("option", name, homes)
        home, annotation = homes[name]
        values[home][name] = typed(name, value, annotation)
    parts = {part: kind(**values[part]) for part, kind in PARTS.items()}
    return Recipe(**values["recipe"], **parts)


def flatten(values: dict[str, Any]) -> dict[str, Any]:
    """Return the options of `make_recipe` from what `as_dict` returned."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= value if name in PARTS else {name: value}
    return flat
