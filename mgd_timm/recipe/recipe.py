"""`Recipe`: all options of a run, from which the command line's flags are generated.

Options that do not change a run's final weights (where it writes, how often it logs) have digest=False and may differ
when it is resumed. So do the names of data sets and weights, whose content is digested instead.
"""

import dataclasses
import os
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from mgd_timm.recipe.checks import check_options, check_recipe, needs_no_teacher
from mgd_timm.recipe.data import Data
from mgd_timm.recipe.heads import Heads
from mgd_timm.recipe.optim import Optim
from mgd_timm.recipe.options import as_dict, option, plain_architecture, plain_model_name, typed, unknown

PROCESS_TIMEOUT = 600.0
"""Seconds that a collective waits for all processes, unless a recipe sets another number."""

# Options by their heading in the help.
_model = partial(option, group="model")
_teacher = partial(option, group="teacher")
_method = partial(option, group="method")
_speed = partial(option, group="speed and memory")
_int8 = partial(option, group="int8", digest=False)  # of a stage that has a digest of its own
_run = partial(option, group="run")


@dataclass(frozen=True)
class Recipe:
    """All options of a run: networks, method, data, optimizer, granularity heads.

    Raises:
        ValueError: A value out of range, or options that contradict each other.
    """

    student: str = _model("cifar_resnet8x05", "timm model to train", common=True)
    student_pretrained: bool = _model(False, "start the student from its pretrained weights", common=True)
    student_checkpoint: str | None = _model(
        None, "safetensors file with the student's initial weights", value="FILE", digest=False
    )
    teacher: tuple[str, ...] | None = _teacher(
        ("embedded",),
        "timm name, run folder, local-dir:PATH or hf-hub:ID; a timm name needs published weights or "
        "--teacher-checkpoint, and 'embedded' is in the package; given again: several teachers; default: embedded, and "
        "none with --peer or --criterion selfkd",
        common=True,
        digest=False,
    )
    teacher_weights: tuple[float, ...] | None = _teacher(
        None, "several teachers: weight of each; default: 1/N each", above=0
    )
    teachers_as: Literal["mean", "sum", "sequence"] = _teacher(
        "mean",
        "several teachers: mean takes the mean of their probabilities as one target, sum adds the losses of each, "
        "sequence has one teach after the other",
    )
    teacher_epochs: tuple[int, ...] | None = _teacher(
        None, "teachers in sequence: epochs with each; default: --epochs with each", minimum=1
    )
    peer: str | None = _teacher(
        None,
        "a second student, initialised from the seed; both learn from the labels and from each other, and from the "
        "teacher if --teacher names one; --drop is for both; with --criterion ekd, a teacher that trains along",
    )
    peer_pretrained: bool = _teacher(False, "start the peer from its pretrained weights")
    peer_checkpoint: str | None = _teacher(
        None, "safetensors file with the peer's initial weights", value="FILE", digest=False
    )
    peer_lr_scale: float | None = _teacher(
        None, "learning rate of the peer, as a multiple of --lr; default: 1", above=0
    )
    teacher_trajectory: str | None = _teacher(
        None,
        "run folder of mgd-timm train --keep-checkpoints: the student follows the snapshots of this teacher's training",
        value="RUN",
        digest=False,
    )
    teacher_checkpoint: str | None = _teacher(
        None,
        "safetensors file with the teacher's weights, for the name of a timm model without weights",
        value="FILE",
        digest=False,
    )
    teacher_classes: tuple[str, ...] | None = _teacher(
        None,
        "where the teacher has other classes than the data: 'auto' (match them by name), a file that names them "
        "(docs/teachers.md), or 'none' (do not use its logits); several teachers: once for all, or again for each in "
        "their order",
        digest=False,
    )
    fit_teacher_head: Literal["none", "probe", "finetune"] = _teacher(
        "none",
        "fit the teacher to the data's labels before the run: probe fits a classifier on its embedding, finetune all "
        "of it",
    )
    teacher_img_size: int | None = _teacher(
        None,
        "image side in pixels for the teacher; default: the student's, or the teacher's own if it takes no other",
        minimum=1,
    )
    teacher_resize: Literal["images", "positions"] = _teacher(
        "images", "a teacher of a fixed input size: resize the images for it, or its position embeddings for the images"
    )
    match_channels: int | None = _teacher(
        None,
        "re-order the channels of the teacher's maps to those of the student that respond alike to N training images; "
        "inspired by arXiv 2103.16844",
        minimum=2,
    )
    teacher_store: str | None = _teacher(
        None,
        "folder of teacher outputs, written once and read by every later run; for criteria that read no maps",
        value="FOLDER",
        digest=False,
    )
    # None without a store, so that they do not count in the digest of runs that they do not change.
    teacher_augmentations: int | None = _teacher(
        None,
        "stored outputs: augmentations per image; epoch e uses number e modulo this; default: --epochs",
        minimum=1,
    )
    teacher_augmentation_seed: int | None = _teacher(
        None, "stored outputs: random seed of the augmentations, independent of --seed; default: 0"
    )
    teacher_top_k: int | None = _teacher(
        None, "stored outputs: number of largest logits to store per augmentation; default: 0, all of them", minimum=0
    )
    method: Literal["none", "mag", "mas"] = _method(
        "mas",
        "mag (codes), mas (codes and stable logits) or none; around the criteria; default: mas, and none with --peer, "
        "--teacher-trajectory or --criterion selfkd",
        common=True,
    )
    criterion: tuple[str, ...] = _method(
        ("kd",),
        "criteria, each NAME, NAME:WEIGHT or NAME:WEIGHT:EPOCHS; the weight rises from 0 over EPOCHS; mgd-timm list "
        "criteria names them; default: kd, dml with --peer, and both with --peer and --teacher",
        common=True,
    )
    criterion_options: tuple[str, ...] = _method(
        (), "hyper-parameters of the criteria, as in kd.divergence=reverse", value="NAME.OPTION=VALUE"
    )
    standardise_logits: bool = _method(
        False,
        "standardise logits to mean 0 and standard deviation 1 (its authors: --kd-temperature 2 --kd-weight 9 "
        "--task-weight 0.1)",
    )
    sample_weight: Literal["none", "entropy"] = _method(
        "none",
        "weight samples by the teacher's certainty, 1 - entropy / log classes, in the losses that have a value per "
        "sample (docs/methods.md); none weights all alike",
    )
    sample_weight_temperature: float | None = _method(
        None, "--sample-weight: temperature of the teacher's probabilities; default: 1", above=0
    )
    fitting_epochs: int = _method(
        30, "epochs of pre-training before the run (ab, fsp, ft, sskd; --fit-teacher-head)", minimum=1
    )
    fitting_lr: float | None = _method(
        None,
        "learning rate of pre-training before the run; default: --lr, 0.01 at most for ft, 0.05 for sskd, a tenth of "
        "--lr for a teacher's fine-tuning, 0.001 for its probe",
        above=0,
    )
    task_weight: float | None = _method(
        None, "weight of the labels' loss; default: 0.2 if kd is the only criterion, 0.1 with sskd, else 1"
    )
    kd_weight: float | None = _method(
        None,
        "weight of logit KD; default: 0.8 as the only criterion, 0.9 with sskd, 1 with others in mag and mas, else 0",
    )
    kd_temperature: float = _method(4.0, "temperature of logit KD", above=0)
    smoothing: float = option(0.0, "label smoothing", group="optimisation", minimum=0, below=1, common=True)
    maps: str = _method(
        "stages",
        "maps for criteria that read them: stages (as many of both networks, the deepest), last, mid (all but the "
        "first), all, or a number of evenly spaced ones",
    )
    drop: float = _model(0.0, "dropout before the student's classifier", minimum=0, below=1)
    drop_path: float | None = _model(None, "stochastic depth of the student", minimum=0, below=1)
    train_only: Literal["all", "classifier"] = _model(
        "all", "train all weights, or the classifier alone on a frozen backbone (a linear probe)"
    )
    adapt_batchnorm: bool = _model(False, "with a frozen backbone: update its BatchNorm statistics all the same")
    for_student: str | None = _model(
        None,
        "train a teacher for this student: branches lead from its blocks into the student's (arXiv 2102.07650, from "
        "memory and unverified); they are not exported",
        common=True,
    )
    for_student_weights: tuple[float, ...] = _model(
        (1.0, 3.0, 1.0),
        "--for-student: weights of the labels, of the branches' divergence from the model and of the branches' labels",
        minimum=0,
    )
    for_student_temperature: float = _model(1.0, "--for-student: temperature of the divergence", above=0)
    for_student_divergence: Literal["reverse", "forward"] = _model(
        "reverse", "--for-student: reverse is KL(branch || model), forward KL(model || branch)"
    )
    amp: bool = _speed(False, "mixed precision; default: as accelerate launch sets it", common=True)
    amp_dtype: Literal["bfloat16", "float16"] = _speed("bfloat16", "type of mixed precision")
    channels_last: bool | None = _speed(
        None, "channels-last memory format; default: on a GPU, and for cifar_* networks anywhere"
    )
    compile: bool = _speed(
        False, "compile the train step and the teacher; with torch.compile, and CUDA graphs on one GPU", common=True
    )
    qat: bool = _int8(
        False,
        "after training, a short stage in which the student computes with rounded numbers, as an int8 file of it will; "
        "with --resume also for a run that has ended",
    )
    qat_epochs: int | None = _int8(None, "epochs of --qat; default: a tenth of --epochs, 1 or more", minimum=1)
    qat_lr: float | None = _int8(
        None, "learning rate of --qat, which falls to 0 along a cosine; default: a tenth of --lr", above=0
    )
    verify: bool = _teacher(
        True,
        "refuse a teacher's folder whose weights are not those that its recipe.json has the digest of",
        digest=False,
    )
    shard_teacher: bool = _teacher(
        False, "shard the frozen teacher over the processes (FSDP2), if it does not fit on each", digest=False
    )
    fold_teacher: bool = _teacher(
        True, "fold the teacher's BatchNorm into its convolutions; its outputs change by rounding only"
    )
    process_timeout: float = _run(
        PROCESS_TIMEOUT, "seconds to wait for a process that hangs, before the run ends", above=0, digest=False
    )
    seed: int = _run(42, "random seed", common=True)
    output: str = _run(
        "runs/distill", "folder of the run; must not exist unless resumed", value="FOLDER", common=True, digest=False
    )
    resume: bool = _run(
        False,
        "continue the run in the output folder from its newest checkpoint; without one, start it",
        common=True,
        digest=False,
    )
    checkpoint_interval: int = _run(
        0, "updates between checkpoints; 0: at the end of each epoch only", minimum=0, digest=False
    )
    checkpoint_hist: int = _run(2, "number of checkpoints to keep", minimum=1, digest=False)
    keep_checkpoints: int | None = _run(
        None,
        "evenly spaced snapshots of the model's weights to keep, for a student that follows them (distill "
        "--teacher-trajectory); default: none",
        minimum=1,
        digest=False,
    )
    log_interval: int = _run(50, "updates between checks and logs of the losses", minimum=1, digest=False)
    log_with: tuple[str, ...] = _run(
        (),
        "trackers of accelerate: tensorboard, wandb, trackio, mlflow, ...; also comet_ml, aim, clearml, dvclive, "
        "swanlab, or all that are installed",
        common=True,
        digest=False,
    )
    license: str = _run("other", "licence of the exported weights", digest=False)
    data: Data = field(default_factory=Data)
    optim: Optim = field(default_factory=Optim)
    heads: Heads = field(default_factory=Heads)

    def classes_of(self, place: int) -> str | None:
        """Return `teacher_classes` of the teacher at a place, counted from 0."""
        given = self.teacher_classes or (None,)
        return given[place if len(given) > 1 else 0]

    @property
    def has_branches(self) -> bool:
        """Whether branches into a student train along (for_student)."""
        return self.for_student is not None and any(self.for_student_weights[1:])

    def __post_init__(self) -> None:
        check_options(self)
        check_recipe(self)


PARTS: dict[str, type] = {"data": Data, "optim": Optim, "heads": Heads}


OF_DISTILLING = {f.name for f in dataclasses.fields(Heads)}
OF_DISTILLING |= {f.name for f in dataclasses.fields(Recipe) if f.metadata.get("group") in ("teacher", "method")}
"""Options that mgd_timm.train and `mgd-timm train` do not take."""

# Flags of `train`, as timm's train.py has them, that `distill` spells with the student's name.
TRAIN_NAMES = {"student": "model", "student_pretrained": "pretrained", "student_checkpoint": "initial_checkpoint"}
TRAIN_ONLY = {"train_only", "adapt_batchnorm", "keep_checkpoints", "for_student"}
TRAIN_ONLY |= {f"for_student_{name}" for name in ("weights", "temperature", "divergence")}


def make_recipe(**options: Any) -> Recipe:
    """Build a Recipe from flat options, named as the command line's flags with underscores.

    With a peer, the defaults are teacher None, criterion dml (kd and dml beside a teacher) and method "none"; with a
    teacher's trajectory, its run as the teacher and method "none"; with criterion selfkd alone, teacher None and method
    "none".

    Raises:
        ValueError: An unknown option, with the nearest names, a value of another type or out of range.
    """
    if options.get("peer") is not None:
        criterion = ("dml",) if options.get("teacher") is None else ("kd", "dml")
        options = {"teacher": None, "criterion": criterion, "method": "none", **options}
    elif options.get("teacher_trajectory") is not None:
        options = {"teacher": options["teacher_trajectory"], "method": "none", **options}
    elif options.get("teacher") is None and needs_no_teacher(
        typed("criterion", options.get("criterion", ()), tuple[str, ...])
    ):
        options = {"teacher": None, "method": "none", **options}
    values: dict[str, dict[str, Any]] = {"recipe": {}, **{part: {} for part in PARTS}}
    homes = {f.name: ("recipe", f.type) for f in dataclasses.fields(Recipe) if f.name not in PARTS}
    homes |= {f.name: (part, f.type) for part, kind in PARTS.items() for f in dataclasses.fields(kind)}
    for name, value in options.items():
        if name not in homes:
            raise unknown("option", name, homes)
        home, annotation = homes[name]
        values[home][name] = _with_plain_names(name, typed(name, value, annotation))
    parts = {part: kind(**values[part]) for part, kind in PARTS.items()}
    return Recipe(**values["recipe"], **parts)


def _with_plain_names(option: str, value: Any) -> Any:
    """Return the value of an option, with plain names of models."""
    if option in ("student", "peer", "for_student") and value is not None:
        return plain_architecture(value)
    return tuple(map(plain_model_name, value)) if option == "teacher" and value is not None else value


def without_paths(values: dict[str, Any]) -> dict[str, Any]:
    """Return what `as_dict` returned, with the last name of each path, which tells nothing of the user's machine.

    A local data set is named by data_dir alone.
    """
    data = dict(values["data"])
    place = data["data_dir"] or (data["dataset"] if os.path.isabs(data["dataset"]) else None)
    if place is not None:
        data |= {"dataset": Data.dataset, "data_dir": Path(place).name}
    files = ["student_checkpoint", "peer_checkpoint", "teacher_checkpoint"]
    files += ["teacher_trajectory", "teacher_store", "output"]
    shortened: dict[str, Any] = {name: Path(values[name]).name for name in files if values[name] is not None}
    for name in ("teacher", "teacher_classes"):
        if values[name] is not None:
            shortened[name] = [one if one.startswith("hf-hub:") else Path(one).name for one in values[name]]
    return {**values, **shortened, "data": data}


def flatten(values: dict[str, Any]) -> dict[str, Any]:
    """Return the options of `make_recipe` from what `as_dict` returned."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= value if name in PARTS else {name: value}
    return flat


def config_values(recipe: Recipe) -> dict[str, Any]:
    """Return what a --config of `mgd-timm distill`, or of `train` for a run without teacher and peer, sets to the same
    run: the options that decide the weights, and the names of networks and data."""
    alone = recipe.teacher is None and recipe.peer is None and not needs_no_teacher(recipe.criterion)
    decides = as_dict(recipe, digest_only=True)
    names = ["teacher_checkpoint", "teacher_classes", "student_checkpoint", "peer_checkpoint"]
    names += ["teacher"] if recipe.teacher_trajectory is None else ["teacher_trajectory"]
    decides |= {name: getattr(recipe, name) for name in names}
    decides["data"] |= {name: getattr(recipe.data, name) for name in ("dataset", "data_dir", "batch_size")}
    if recipe.data.data_dir is not None:
        del decides["data"]["dataset"]
    left_out = OF_DISTILLING if alone else TRAIN_ONLY
    return {
        TRAIN_NAMES.get(name, name) if alone else name: list(value) if isinstance(value, tuple) else value
        for name, value in flatten(decides).items()
        if value is not None and name not in left_out
    }
