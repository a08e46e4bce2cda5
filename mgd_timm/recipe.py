"""What a run is: frozen dataclasses, from which the command line's flags are generated.

Fields that do not change the weights a run ends with (where it writes, how often it logs) carry digest=False and may
differ between a run and its resumption; so do the names of images and weights, which are known by digests of their own.
"""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from mgd_timm.data_options import Data
from mgd_timm.granularity import Granularity
from mgd_timm.maps import WORDS as MAPS
from mgd_timm.options import check_choices, option, typed, unknown

PROCESS_TIMEOUT = 600.0
"""Seconds that a collective waits for all processes, where a recipe does not say another number."""

__all__ = ["OF_DISTILLING", "PARTS", "Data", "Heads", "Optim", "Recipe", "flatten", "make_recipe"]


@dataclass(frozen=True)
class Optim:
    """How long and by which rule the weights move. The paper: momentum, lr 0.05, 240 epochs, multistep at 150, 180 and
    210."""

    epochs: int = option(20, "passes over the training images")
    opt: str = option("momentum", "timm optimizer; 'momentum' is plain SGD, timm's 'sgd' is Nesterov's")
    lr: float = option(0.05, "peak learning rate")
    momentum: float = option(0.9, "momentum of SGD")
    weight_decay: float = option(5e-4, "weight decay")
    filter_bias_and_bn: bool = option(False, "spare biases and normalisation from weight decay")
    sched: str = option("cosine", "timm scheduler (cosine, multistep, step, tanh, poly, ...), stepped by update")
    min_lr: float = option(0.0, "learning rate at the end of a cosine")
    warmup_epochs: int = option(0, "epochs of linear warm-up")
    warmup_lr: float = option(1e-5, "learning rate at the start of the warm-up")
    decay_milestones: tuple[int, ...] = option(
        (150, 180, 210), "epochs at which multistep multiplies by the decay rate"
    )
    decay_epochs: float = option(30.0, "epochs between decays of the step scheduler")
    decay_rate: float = option(0.1, "factor of a decay")
    clip_grad: float | None = option(None, "largest gradient norm")
    global_batch_size: int | None = option(
        None,
        "images per update, of all processes and steps, whatever their number; default: batch size x processes x steps "
        "per update "
        "at the run's start",
    )
    grad_accum_steps: int | None = option(
        None, "steps per update, where no global batch says it (as many as it needs); default: 1", digest=False
    )
    find_batch_size: bool = option(
        False,
        "out of memory in a trial update: halve the batch size, with more steps for the same global batch",
        digest=False,
    )
    model_ema: bool = option(False, "keep an exponential moving average of the weights; it is evaluated and exported")
    model_ema_decay: float = option(0.9998, "its decay per update")
    model_ema_warmup: bool = option(False, "let the decay rise from 0 in the first updates")

    def __post_init__(self) -> None:
        steps = self.grad_accum_steps
        if self.epochs < 1 or (steps is not None and steps < 1):
            raise ValueError(f"epochs={self.epochs}, grad_accum_steps={steps}: expected 1 or more of each.")
        if self.global_batch_size is not None and self.global_batch_size < 2:
            raise ValueError(
                f"global_batch_size={self.global_batch_size}: expected 2 or more, and 2 or more for each process."
            )
        if not 0 < self.lr < float("inf"):
            raise ValueError(f"lr={self.lr}: expected a positive number.")
        if self.clip_grad is not None and not self.clip_grad > 0:
            raise ValueError(f"clip_grad={self.clip_grad}: expected a positive norm, or none.")
        for name in ("momentum", "model_ema_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected 0 <= {name} < 1.")
        for name in ("weight_decay", "min_lr", "warmup_lr"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name}={getattr(self, name)}: expected 0 or more.")
        for name in ("decay_epochs", "decay_rate"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name}={getattr(self, name)}: expected a positive number.")
        if not 0 <= self.warmup_epochs <= self.epochs:
            raise ValueError(f"warmup_epochs={self.warmup_epochs}: expected 0 to {self.epochs}, a part of the epochs.")


@dataclass(frozen=True)
class Heads:
    """The teacher's granularity heads. The paper: 64 dims at T=2, 256 dims at T=8, weights 1, 60 epochs on live
    images."""

    abstract_dim: int = option(64, "width of the abstract code")
    abstract_temperature: float = option(2.0, "temperature of the abstract granularity")
    abstract_weight: float = option(1.0, "weight of the abstract code's loss")
    detailed_dim: int = option(256, "width of the detailed code")
    detailed_temperature: float = option(8.0, "temperature of the detailed granularity")
    detailed_weight: float = option(1.0, "weight of the detailed code's loss")
    heads_protocol: Literal["stored", "live"] = option(
        "stored", "fit on stored teacher outputs, or on live images as the authors"
    )
    heads_views: int = option(4, "stored: augmented views of each image that the teacher sees")
    heads_epochs: int = option(24, "passes over the training images while the heads are fitted")
    # 0.1 without clipping looks well with most seeds, and ends in dead units or inf with others.
    heads_lr: float = option(0.02, "learning rate of the heads (the authors: 0.01 at batch 64, live)")
    heads_clip_grad: float | None = option(1.0, "largest gradient norm of the heads; T^2 makes early gradients large")
    heads_batch_size: int = option(256, "images per update, of all processes, while the heads are fitted")
    heads_weight_decay: float = option(5e-4, "weight decay of the heads")
    heads_sched: Literal["cosine", "multistep"] = option("cosine", "schedule of the heads (the authors: multistep)")
    heads_decay_milestones: tuple[int, ...] = option(
        (30, 45), "epochs at which multistep divides the heads' learning rate by 10"
    )

    def __post_init__(self) -> None:
        check_choices(self)
        if not self.heads_weight_decay >= 0:
            raise ValueError(f"heads_weight_decay={self.heads_weight_decay}: expected 0 or more.")
        if min(self.heads_views, self.heads_epochs) < 1:
            raise ValueError(
                f"heads_views={self.heads_views}, heads_epochs={self.heads_epochs}: expected 1 or more of each."
            )
        if self.heads_batch_size < 2:
            raise ValueError(f"heads_batch_size={self.heads_batch_size}: expected 2 or more.")
        if self.heads_clip_grad is not None and self.heads_clip_grad <= 0:
            raise ValueError(f"heads_clip_grad={self.heads_clip_grad}: expected a positive norm, or none.")
        if not 0 < self.heads_lr < float("inf"):
            raise ValueError(f"heads_lr={self.heads_lr}: expected a positive number.")
        _ = self.granularities  # its ranges

    @property
    def granularities(self) -> tuple[Granularity, ...]:
        """Both levels of detail."""
        return (
            Granularity("abstract", self.abstract_dim, self.abstract_temperature, self.abstract_weight),
            Granularity("detailed", self.detailed_dim, self.detailed_temperature, self.detailed_weight),
        )


@dataclass(frozen=True)
class Recipe:
    """A whole run: which networks, which method, which images, which rule."""

    student: str = option("cifar_resnet8x05", "timm model to train")
    student_pretrained: bool = option(False, "start the student from its pretrained weights")
    student_checkpoint: str | None = option(None, "safetensors file with the student's initial weights", digest=False)
    teacher: tuple[str, ...] | None = option(
        ("embedded",),
        "'embedded' (the default), a timm model with weights, local-dir:PATH, hf-hub:ID, or a run folder; several: "
        "give it again",
        digest=False,
    )
    teacher_weights: tuple[float, ...] | None = option(None, "several teachers: weight of each; default: 1/N each")
    teachers_as: Literal["mean", "sum"] = option(
        "mean", "several teachers: one target, the mean of their probabilities; or the sum of the losses of each"
    )
    peer: str | None = option(
        None,
        "a second student, from the seed, in place of a teacher: both learn from labels and from each other; --drop is "
        "for both",
    )
    teacher_checkpoint: str | None = option(
        None, "safetensors file with the teacher's weights, for a bare model name", digest=False
    )
    teacher_classes: tuple[str, ...] | None = option(
        None,
        "where the teacher has other classes: 'auto' (the data's, found by name), a file that names them "
        "(docs/teachers.md), or "
        "'none' (it shows no logits); several teachers: once for all, or again for each in their order",
        digest=False,
    )
    fit_teacher_head: Literal["none", "probe", "finetune"] = option(
        "none", "fit the teacher to the data's labels first: a classifier on its embedding, or all of it"
    )
    teacher_img_size: int | None = option(
        None,
        "side in pixels at which the teacher sees the student's crop; default: the student's, or the one that it is "
        "fixed to",
    )
    teacher_resize: Literal["images", "positions"] = option(
        "images", "a teacher of a fixed input size: resize the images for it, or its position embeddings for the images"
    )
    teacher_store: str | None = option(
        None,
        "folder of teacher outputs, written once and read by every later run; for criteria that read no maps",
        digest=False,
    )
    # None without a store, so that these are values of the runs alone that they decide.
    teacher_views: int | None = option(
        None, "stored: augmented views of each image; epoch e shows view e modulo this. Default: the epochs"
    )
    teacher_view_seed: int | None = option(None, "stored: seed of the views, whatever the run's seed. Default: 0")
    teacher_top_k: int | None = option(None, "stored: largest logits that are kept of each view. Default: 0, all")
    method: Literal["none", "mag", "mas"] = option(
        "mas",
        "multi-granularity part: none, mag (codes) or mas (codes, stable target); default: mas, and none with a peer",
    )
    criterion: tuple[str, ...] = option(
        ("kd",),
        "host methods, each NAME, NAME:WEIGHT or NAME:WEIGHT:EPOCHS, over which the weight rises from 0 (mgd-timm list "
        "criteria); "
        "default: kd, and dml with a peer",
    )
    criterion_options: tuple[str, ...] = option(
        (), "their hyper-parameters, each NAME.OPTION=VALUE, such as kd.divergence=reverse"
    )
    standardise_logits: bool = option(
        False,
        "criteria compare logits of mean 0 and deviation 1 (its authors: --kd-temperature 2 --kd-weight 9 "
        "--task-weight 0.1)",
    )
    fitting_epochs: int = option(30, "epochs of what is fitted before the run (ab, fsp, ft; --fit-teacher-head)")
    fitting_lr: float | None = option(
        None,
        "its learning rate; default: the run's, for ft 0.01 at most, a tenth for a teacher's fine-tuning, 0.001 for "
        "its probe",
    )
    task_weight: float | None = option(
        None, "weight of the labels' loss; default: 0.2 where kd is the only host, else 1"
    )
    kd_weight: float | None = option(
        None, "weight of logit KD; default: 0.8 as the only host, 1 beside others in mag/mas, else 0"
    )
    kd_temperature: float = option(4.0, "temperature of logit KD")
    smoothing: float = option(0.0, "label smoothing of the labels' loss")
    maps: str = option(
        "stages",
        "maps for criteria that read them: stages (of two networks as many, the deepest), last, mid (all but the "
        "first), all, or a "
        "number of evenly spaced ones",
    )
    drop: float = option(0.0, "dropout before the student's classifier")
    drop_path: float | None = option(None, "stochastic depth of the student")
    train_only: Literal["all", "classifier"] = option(
        "all", "what is trained of a network on its own: all, or the classifier on a frozen backbone (a linear probe)"
    )
    adapt_batchnorm: bool = option(False, "with a frozen backbone: its BatchNorm statistics go on to follow the images")
    amp: bool = option(False, "mixed precision; else what accelerate launch says")
    amp_dtype: Literal["bfloat16", "float16"] = option("bfloat16", "its type")
    channels_last: bool | None = option(
        None, "channels-last memory format; default: on a GPU, and for cifar_* networks anywhere"
    )
    compile: bool = option(False, "compile the train step and the teacher (torch.compile; CUDA graphs on one GPU)")
    shard_teacher: bool = option(
        False,
        "cut the frozen teacher up between the processes (FSDP2), for one that does not fit on each",
        digest=False,
    )
    fold_teacher: bool = option(
        True, "fold the teacher's BatchNorm into its convolutions: the same outputs but for rounding"
    )
    process_timeout: float = option(
        PROCESS_TIMEOUT,
        "seconds that processes wait for one that hangs before the run ends",
        digest=False,
    )
    seed: int = option(42, "of order, augmentation, initialisation and dropout")
    output: str = option("runs/distill", "folder of the run; must not exist unless resumed", digest=False)
    resume: bool = option(
        False,
        "continue the run in the output folder from its newest whole checkpoint; start it where there is none",
        digest=False,
    )
    checkpoint_interval: int = option(0, "updates between checkpoints; 0: at each epoch's end only", digest=False)
    checkpoint_hist: int = option(2, "checkpoints kept", digest=False)
    log_interval: int = option(50, "updates between checks and reports of the losses", digest=False)
    log_with: tuple[str, ...] = option((), "accelerate trackers, such as tensorboard or wandb", digest=False)
    license: str = option("other", "licence of the exported weights", digest=False)
    data: Data = field(default_factory=Data)
    optim: Optim = field(default_factory=Optim)
    heads: Heads = field(default_factory=Heads)

    def classes_of(self, place: int) -> str | None:
        """`teacher_classes` of the teacher at a place, from 0."""
        given = self.teacher_classes or (None,)
        return given[place if len(given) > 1 else 0]

    def __post_init__(self) -> None:
        check_choices(self)
        self._check_ranges()
        self._check_frozen_backbone()
        self._check_peer()
        self._check_teachers()
        self._check_stored()

    def _check_ranges(self) -> None:
        if not 0 <= self.smoothing < 1:
            raise ValueError(f"smoothing={self.smoothing}: expected 0 <= smoothing < 1.")
        if self.log_interval < 1 or self.checkpoint_interval < 0 or self.checkpoint_hist < 1:
            raise ValueError(
                f"log_interval={self.log_interval}, checkpoint_interval={self.checkpoint_interval}, "
                f"checkpoint_hist={self.checkpoint_hist}: expected 1, 0 and 1 or more."
            )
        if not 0 < self.process_timeout < float("inf"):
            raise ValueError(f"process_timeout={self.process_timeout}: expected a positive number of seconds.")
        if self.maps not in MAPS and not (self.maps.isdecimal() and int(self.maps)):
            raise ValueError(f"maps={self.maps!r}: expected {', '.join(MAPS)} or a number of maps, 1 or more.")
        if not 0 <= self.drop < 1:
            raise ValueError(f"drop={self.drop}: expected 0 <= drop < 1.")
        if self.drop_path is not None and not 0 <= self.drop_path < 1:
            raise ValueError(f"drop_path={self.drop_path}: expected 0 <= drop_path < 1.")
        if self.fitting_epochs < 1 or (self.fitting_lr is not None and not 0 < self.fitting_lr < float("inf")):
            raise ValueError(
                f"fitting_epochs={self.fitting_epochs}, fitting_lr={self.fitting_lr}: expected 1 or more, and a "
                f"positive number or "
                "none."
            )

    def _check_frozen_backbone(self) -> None:
        """Refuse what moves a backbone where the classifier alone is trained."""
        if self.train_only == "classifier" and (self.teacher is not None or self.peer is not None):
            beside = f"teacher {_list(self.teacher)}" if self.teacher is not None else f"peer {self.peer!r}"
            raise ValueError(
                f"train_only='classifier' beside the {beside}: what it teaches is the backbone. Train alone (mgd-timm "
                f"train)."
            )
        if self.train_only == "classifier" and (self.drop or self.drop_path):
            raise ValueError(
                f"drop={self.drop}, drop_path={self.drop_path}: a frozen backbone (train_only='classifier') has no "
                f"dropout. Leave "
                "them out."
            )
        if self.adapt_batchnorm and self.train_only == "all":
            raise ValueError(
                "adapt_batchnorm: BatchNorm follows the images wherever all is trained; give train_only='classifier'."
            )

    def _check_peer(self) -> None:
        """Refuse what a second student in place of a teacher does not go with."""
        if self.peer is not None and self.teacher is not None:
            raise ValueError(
                f"peer={self.peer!r} stands in place of a teacher, and there is one, {_list(self.teacher)}: leave one "
                f"out."
            )
        if self.peer is not None and self.teacher_checkpoint is not None:
            raise ValueError(
                f"teacher_checkpoint={self.teacher_checkpoint!r} beside peer={self.peer!r}: there is no teacher."
            )
        if self.peer is not None and self.optim.model_ema:
            raise ValueError(
                f"model_ema beside peer={self.peer!r}: an average of one of two students is not kept. Leave it out."
            )
        if self.peer is not None and self.method == "mas":
            raise ValueError(
                f"method='mas' with the peer {self.peer!r}: two students have no fitted heads whose views there could "
                f"be. Choose "
                "'mag' (with dml: MGD-DML) or 'none'."
            )

    def _check_stored(self) -> None:
        """Refuse what is of stored or cut-up teachers where there are none."""
        if self.shard_teacher and (self.teacher is None or self.teacher_store is not None):
            why = (
                "there is no teacher"
                if self.teacher is None
                else f"teacher_store={self.teacher_store!r} holds its outputs"
            )
            raise ValueError(f"shard_teacher: {why}, so there is nothing to cut up. Leave it out.")
        if self.teacher_store is not None and self.teacher is None:
            raise ValueError(f"teacher_store={self.teacher_store!r}: there is no teacher whose outputs it would hold.")
        for name, least in (("teacher_views", 1), ("teacher_view_seed", None), ("teacher_top_k", 0)):
            value = getattr(self, name)
            if value is not None and self.teacher_store is None:
                raise ValueError(
                    f"{name}={value} belongs to stored teacher outputs: give teacher_store=FOLDER, or leave it out."
                )
            if value is not None and least is not None and value < least:
                raise ValueError(f"{name}={value}: expected {least} or more.")

    def _check_teachers(self) -> None:
        """Refuse what goes with a teacher where there is none, and with one teacher where there are several."""
        names = self.teacher or ()
        if self.teacher is not None and not names:
            raise ValueError("teacher=(): name one, or give none at all (mgd-timm train).")
        weights = self.teacher_weights
        if weights is not None and (len(weights) != len(names) or not all(0 < w < float("inf") for w in weights)):
            raise ValueError(
                f"teacher_weights={weights}: expected a positive number for each of the teachers {list(names)}."
            )
        if weights is not None and len(names) == 1:
            raise ValueError(
                f"teacher_weights={weights} are of several teachers, and there is one. Leave them out (--kd-weight)."
            )
        classes = self.teacher_classes
        if names and classes is not None and len(classes) not in (1, len(names)):
            raise ValueError(
                f"teacher_classes={list(classes)}: {len(classes)} for {len(names)} "
                f"{'teachers' if len(names) > 1 else 'teacher'} "
                f"({_list(names)}): give one for all, or one for each in their order ('auto' for one that has the "
                f"data's classes)."
            )
        if "none" in (classes or ()) and self.fit_teacher_head != "none":
            raise ValueError(
                f"teacher_classes='none' beside fit_teacher_head={self.fit_teacher_head!r}: what is fitted would not "
                f"be shown. "
                "Leave one of both out."
            )
        if self.teacher_img_size is not None and self.teacher_img_size < 1:
            raise ValueError(f"teacher_img_size={self.teacher_img_size}: expected pixels, 1 or more.")
        if not names:
            given = {
                "teacher_classes": None,
                "fit_teacher_head": "none",
                "teacher_img_size": None,
                "teacher_resize": "images",
            }
            for name, default in given.items():
                if getattr(self, name) != default:
                    raise ValueError(f"{name}={getattr(self, name)!r}: there is no teacher. Leave it out.")
        if len(names) > 1:
            for name in ("teacher_store", "teacher_checkpoint"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"{name}={getattr(self, name)!r} is of one teacher, and there are {len(names)}: leave it out."
                    )


def _list(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))


PARTS: dict[str, type] = {"data": Data, "optim": Optim, "heads": Heads}


OF_DISTILLING = {f.name for f in dataclasses.fields(Heads)} | {
    "teacher",
    "teacher_checkpoint",
    "teacher_classes",
    "teacher_weights",
    "teachers_as",
    "fit_teacher_head",
    "teacher_img_size",
    "teacher_resize",
    "teacher_store",
    "teacher_views",
    "teacher_view_seed",
    "teacher_top_k",
    "method",
    "criterion",
    "task_weight",
    "kd_weight",
    "kd_temperature",
    "maps",
    "peer",
    "criterion_options",
    "standardise_logits",
    "fitting_epochs",
    "fitting_lr",
    "shard_teacher",
    "fold_teacher",
}
"""Options that mgd_timm.train and `mgd-timm train` do not take."""


def make_recipe(**options: Any) -> Recipe:
    """A Recipe from flat options, named as the command line's flags with underscores.

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
    """The options of `make_recipe` from what `as_dict` gave."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= value if name in PARTS else {name: value}
    return flat
