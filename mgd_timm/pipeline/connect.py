"""The networks of a run, connected: what fits together is found here, and what does not is refused before anything is
trained."""

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from accelerate import Accelerator
from timm.models import get_model_input_config, get_pretrained_cfg
from torch import nn

from mgd_timm.criteria import CRITERIA, Criterion, Objective
from mgd_timm.criteria.terms import criterion_names, needs, parse_terms
from mgd_timm.data.dataset import Defaults, Images, StoreSource
from mgd_timm.data.rng import set_seed
from mgd_timm.distiller import Distiller, MutualLearning, Teacher
from mgd_timm.features import FeatureTap, Pair, Shapes, match_number_of_maps
from mgd_timm.granularity import MAG
from mgd_timm.models.build import build_student, build_tap, set_memory_format
from mgd_timm.models.checks import check_channels, check_student, find_class_conflict
from mgd_timm.models.classes import select_classes
from mgd_timm.models.fold_batchnorm import fold_batchnorm
from mgd_timm.models.input_adapter import build_input_adapter
from mgd_timm.models.load import check_model_name, check_no_checkpoint, load_model
from mgd_timm.models.pretrained_cfg import describe_weights, read_channel_values, read_defaults
from mgd_timm.objective import SeveralTeachers, build_objective, build_several
from mgd_timm.recipe.options import as_dict
from mgd_timm.recipe.recipe import Recipe
from mgd_timm.storage.digests import module_digest
from mgd_timm.teachers.classifier import check_probe, needs_new_head, new_head
from mgd_timm.teachers.outputs.stored_source import StoredViews, open_store
from mgd_timm.teachers.pretraining import Stage, criterion_stages, student_stages

AnyObjective = Objective | MAG | SeveralTeachers


@dataclass(frozen=True)
class Networks:
    """The networks of a run, connected: taps, objective, and the teachers as yet without heads."""

    student: FeatureTap
    objective: AnyObjective
    teachers: tuple[Teacher, ...]
    peer: FeatureTap | None
    peer_objective: Objective | MAG | None
    stages: list[Stage]
    fingerprint: dict[str, Any]
    stored: StoredViews | None

    def trainee(self) -> Distiller | MutualLearning:
        """The one module that trains."""
        if self.peer is None or self.peer_objective is None:
            return Distiller(self.student, self.objective)
        assert not isinstance(self.objective, SeveralTeachers)
        return MutualLearning(self.student, self.peer, self.objective, self.peer_objective)


def load_teachers(recipe: Recipe, given: Sequence[nn.Module | None]) -> list[nn.Module]:
    """The recipe's teachers with their weights; a module that is given stands for its name."""
    names = recipe.teacher or ()
    modules = list(given) or [None] * len(names)
    for name, module in zip(names, modules, strict=True):
        if module is not None:
            check_no_checkpoint(recipe.teacher_checkpoint, name)
    # What is given is the caller's, and the run may give its teachers other classes, other weights or another size.
    return [
        copy.deepcopy(module) if module is not None else load_named_teacher(recipe, name)
        for name, module in zip(names, modules, strict=True)
    ]


def load_named_teacher(recipe: Recipe, name: str) -> nn.Module:
    """One of the recipe's teachers with its weights."""
    silent = recipe.fit_teacher_head != "none" or recipe.teacher_classes == ("none",)
    return load_model(name, recipe.teacher_checkpoint, in_chans=recipe.data.in_chans, classifier_required=not silent)


def suit_teachers(models: Sequence[nn.Module], recipe: Recipe, images: Images) -> None:
    """Give teachers, in place, the data's classes and the images' size where the recipe says how.

    Raises:
        ValueError: Classes that are not found among the teacher's, or a network that cannot take another size.
    """
    for place, model in enumerate(models):
        spec = recipe.classes_of(place)
        if spec not in (None, "none"):
            try:
                select_classes(model, str(spec), images.class_names)
            except ValueError as error:
                if len(models) == 1:
                    raise
                raise ValueError(f"teacher {(recipe.teacher or ())[place]!r}: {error}") from error
        if recipe.fit_teacher_head != "none" and needs_new_head(model, images):
            set_seed(recipe.seed, 7)
            new_head(model, images)
        if recipe.teacher_resize == "positions":
            _resize_positions(model, recipe.teacher_img_size or images.input_size[1])
    _check_size(models, recipe)


def _check_size(models: Sequence[nn.Module], recipe: Recipe) -> None:
    """Raise ValueError for a size that no teacher would see the images at."""
    side, inputs = recipe.teacher_img_size, [get_model_input_config(model) for model in models]
    sizes = [config["input_size"][-1] for config in inputs if config["fixed_input_size"]]
    if side is not None and len(sizes) == len(models) and side not in sizes:
        raise ValueError(
            f"teacher_img_size={side}: the teacher is fixed to {sizes[0]} pixels, at which it sees the images. Leave "
            "it out, or let its position embeddings be resized (--teacher-resize positions)."
        )


def _resize_positions(model: nn.Module, side: int) -> None:
    config = get_model_input_config(model)
    if not config["fixed_input_size"] or tuple(config["input_size"][1:]) == (side, side):
        return
    name = type(model).__name__
    way_out = f"let the images be resized to its {config['input_size'][-1]} pixels (--teacher-resize images)."
    if not hasattr(model, "set_input_size"):
        raise ValueError(f"teacher_resize='positions': {name} cannot be set to another input size: {way_out}")
    try:
        cast(Any, model).set_input_size(img_size=(side, side))
    except Exception as error:  # an architecture may refuse in any way
        raise ValueError(
            f"teacher_resize='positions': {name} cannot be set to {side} pixels ({error}): {way_out}"
        ) from error


def build_networks(
    recipe: Recipe,
    images: Images,
    accelerator: Accelerator,
    teachers: Sequence[nn.Module],
    student: nn.Module | None,
    *,
    fitted: bool = True,
) -> Networks:
    """Build the student and connect all networks.

    Args:
        recipe: Of the run.
        images: Its images.
        accelerator: Device, processes, precision.
        teachers: With their weights, suited to the data (`suit_teachers`).
        student: Instead of the recipe's.
        fitted: The teachers are as they will teach; without it no store is looked at, which would be of other weights,
            and nothing is said, as all is connected once more.

    Raises:
        ValueError: Networks, criteria and data that do not go together.
    """
    tap = _connect_student(recipe, images, accelerator, student)
    if len(teachers) > 1:
        _check_several(recipe)
    whole = [
        _connect_teacher(recipe, accelerator, model, images, silent=recipe.classes_of(place) == "none")
        for place, model in enumerate(teachers)
    ]
    other = _connect_peer(recipe, images) if recipe.peer is not None else None
    others = [*(teacher.tap for teacher, _ in whole), *([other] if other is not None else [])]
    match_number_of_maps(recipe.maps, tap, *others)
    shapes = tap.shapes(images.input_size[1:])
    seen = other.shapes(images.input_size[1:]) if other is not None else shapes
    alone = Pair(shapes, seen, images.num_samples, images.trained_labels())
    pairs = [
        alone._replace(teacher=_shapes_of(teacher, images), teacher_classifier=classifier)
        for teacher, classifier in whole
    ] or [alone]
    own = fingerprint(recipe, images, accelerator, tap.model, teachers, other.model if other is not None else None)
    own["teacher_logits"] = [
        teacher.shows_logits for teacher, _ in whole
    ]  # the recipe's word is a file's name, or "none"
    set_seed(recipe.seed, 4)
    objective = build_several(recipe, pairs) if len(pairs) > 1 else build_objective(recipe, pairs[0])
    peers = build_objective(recipe, pairs[0]._replace(student=seen, teacher=shapes)) if other is not None else None
    for role, own_terms in (("", objective), ("peer_", peers)):
        for term in own_terms.modules() if own_terms is not None and fitted else ():
            if isinstance(term, Criterion) and term.remark() is not None:
                accelerator.print(f"{role}{_name_of(term)}: {term.remark()}")
    stages, stored = [], None
    if len(whole) == 1 and not isinstance(objective, SeveralTeachers):
        teacher = whole[0][0]
        stages = criterion_stages(recipe, objective, teacher)
        stages += student_stages(recipe, tap, teacher, teachers[0], images, pairs[0])
        if recipe.teacher_store is not None and fitted:
            stored = open_store(recipe, teacher, images, accelerator)
    if whole and not stages and not objective.needs and fitted:
        accelerator.print("warning: nothing of the teacher is learnt: every weight but the task's is 0.")
    return Networks(tap, objective, tuple(teacher for teacher, _ in whole), other, peers, stages, own, stored)


def _build_student(recipe: Recipe, images: Images) -> nn.Module:
    return build_student(
        recipe.student,
        images.input_size,
        images.num_classes,
        pretrained=recipe.student_pretrained,
        checkpoint=recipe.student_checkpoint,
        drop=recipe.drop,
        drop_path=recipe.drop_path,
    )


def _connect_student(recipe: Recipe, images: Images, accelerator: Accelerator, student: nn.Module | None) -> FeatureTap:
    drawn = student is None and not recipe.student_pretrained and recipe.student_checkpoint is None
    if student is None:
        set_seed(recipe.seed, 3)
        student = _build_student(recipe, images)
    check_student(student, images.input_size[0], images.num_classes)
    _describe(student, images, recipe)
    maps = recipe.maps if needs(recipe, "maps", student=True) else None
    tap = build_tap(student, images.input_size, maps, cam=needs(recipe, "cams"))
    if recipe.train_only == "classifier":
        tap.freeze_backbone(adapt_batchnorm=recipe.adapt_batchnorm)
        if drawn:
            accelerator.print(
                "warning: the frozen backbone has random weights: give --pretrained or --initial-checkpoint FILE."
            )
    return tap


def _connect_teacher(
    recipe: Recipe, accelerator: Accelerator, model: nn.Module, images: Images, *, silent: bool
) -> tuple[Teacher, nn.Module | None]:
    """A frozen teacher as yet without heads, and the classifier of its network; one that is silent shows no logits."""
    check_channels(model, "teacher", images.input_size[0])
    logits = _shows_logits(recipe, model, images, silent)
    view = build_input_adapter(model, images.mean, images.std, images.input_size, recipe.teacher_img_size)
    size = view.size or (images.input_size[1], images.input_size[2])
    maps = recipe.maps if needs(recipe, "maps") else None
    tap = build_tap(model, (images.input_size[0], *size), maps, cam=needs(recipe, "cams"))
    check_probe(tap, recipe)
    classifier, own_digest = tap.classifier, module_digest(model)
    if recipe.fold_teacher:
        tap = fold_batchnorm(tap) or tap
    teacher = Teacher(tap, input_adapter=view, digest=own_digest, logits=logits).to(accelerator.device)
    set_memory_format(teacher, tap.name, recipe.channels_last, accelerator.device)
    return teacher, classifier


def _shows_logits(recipe: Recipe, model: nn.Module, images: Images, left_out: bool) -> bool:
    """Whether the teacher's logits are of the data's classes; refused where they are not and a criterion reads them.

    Under mas the views of a teacher without logits are fitted on the labels, and stand for them.
    """
    count = int(getattr(model, "num_classes", 0) or 0)
    name = (getattr(model, "pretrained_cfg", {}) or {}).get("architecture") or type(model).__name__
    conflict = find_class_conflict(model, "teacher", images.class_names) if count == images.num_classes else None
    if count == images.num_classes and conflict is None and not left_out:
        return True
    kinds = {term.criterion: CRITERIA[term.criterion] for term in parse_terms(recipe).values() if term.weight}
    reading = [key for key, kind in kinds.items() if "cams" in kind.needs]
    if recipe.method != "mas" or not (left_out or not count):
        reading += [key for key, kind in kinds.items() if "logits" in kind.needs]
    if reading or (recipe.method == "mas" and count and not left_out):
        has = f"{count} classes, the data {images.num_classes}" if count else "no classifier"
        has = f"other classes ({conflict})" if conflict is not None else has
        raise ValueError(
            f"the teacher {name} has {has}, and {', '.join(reading) or 'mas'} reads its logits. Ways out: its rows "
            "for the data's classes (--teacher-classes auto or FILE); a classifier fitted to it first "
            "(--fit-teacher-head probe or finetune); views of it that are fitted on the labels in place of its logits "
            "(--method mas --teacher-classes none); or criteria that read none (--criterion at --kd-weight 0 --method "
            "none or mag)."
        )
    if recipe.teacher_store is not None:
        raise ValueError(
            f"teacher_store={recipe.teacher_store!r}: the teacher {name} shows no logits of the data's classes, and a "
            "store holds them: leave --teacher-store out."
        )
    return False


def _shapes_of(teacher: Teacher, images: Images) -> Shapes:
    """What a criterion sees of a teacher; the views that stand for logits it does not show are of the data's
    classes."""
    shapes = teacher.tap.shapes(teacher.size(images.input_size[1:]))
    return shapes if teacher.shows_logits else shapes._replace(num_classes=images.num_classes)


def _connect_peer(recipe: Recipe, images: Images) -> FeatureTap:
    """The second student, from the seed."""
    assert recipe.peer is not None
    set_seed(recipe.seed, 6)
    drawn = replace(recipe, student=recipe.peer, student_pretrained=False, student_checkpoint=None)
    try:
        peer = _build_student(drawn, images)
    except ValueError as error:
        raise ValueError(f"peer: {error}") from error
    _describe(peer, images, recipe)
    maps = recipe.maps if needs(recipe, "maps") else None
    return build_tap(peer, images.input_size, maps, cam=needs(recipe, "cams"))


def _check_several(recipe: Recipe) -> None:
    """Raise ValueError for criteria that several teachers cannot serve together."""
    count = len(recipe.teacher or ())
    for name, kind in ((t.criterion, CRITERIA[t.criterion]) for t in parse_terms(recipe).values() if t.weight):
        if kind.fits is not None:
            raise ValueError(f"{name} is fitted on one teacher before the run, and there are {count}: leave it out.")
        beyond = ", ".join(sorted(kind.needs - {"logits"}))
        if beyond and recipe.teachers_as == "mean":
            raise ValueError(
                f"{name} reads a teacher's {beyond}, of which several have no mean: give --teachers-as sum."
            )


def _name_of(term: Criterion) -> str:
    return next(name for name, kind in CRITERIA.items() if type(term) is kind)


def _describe(model: nn.Module, images: Images, recipe: Recipe) -> None:
    """Let timm show images to the exported model as they were shown here: small ones whole, others by their centre."""
    data = recipe.data
    small = isinstance(images.train, StoreSource)
    shown = {"crop_pct": 1.0 if small else data.crop_pct, "interpolation": "bicubic" if small else data.interpolation}
    describe_weights(
        model,
        input_size=images.input_size,
        mean=images.mean,
        std=images.std,
        class_names=images.class_names,
        license=recipe.license,
        tag=weights_tag(recipe),
        evaluation={"crop_mode": "center", **{name: value for name, value in shown.items() if value is not None}},
    )


def weights_tag(recipe: Recipe) -> str:
    """timm's tag of the weights: method, hosts and data, as in mas_kd_cifar100."""
    place = Path(recipe.data.data_dir or recipe.data.dataset).name
    words = [place]
    if recipe.teacher is not None or recipe.peer is not None:
        words = [*([recipe.method] if recipe.method != "none" else []), *criterion_names(recipe), place]
    return re.sub(r"[^a-z0-9]+", "_", "_".join(words).lower()).strip("_")


def defaults_of(recipe: Recipe, teacher: nn.Module | None, student: nn.Module | None) -> Defaults:
    """Mean and std of the weights there are (the pretrained student's, else the teacher's), and the student's nominal
    size."""
    config: Mapping[str, Any] = {}
    if student is not None:
        config = getattr(student, "pretrained_cfg", {})
    else:
        check_model_name(recipe.student)
        found = get_pretrained_cfg(recipe.student)
        config = found.to_dict() if found is not None else {}
    weights: Mapping[str, Any] = config if recipe.student_pretrained else getattr(teacher, "pretrained_cfg", {})
    mean, std = read_channel_values(weights, "mean"), read_channel_values(weights, "std")
    fits = mean is not None and std is not None and len(mean) == len(std) == recipe.data.in_chans
    return replace(read_defaults(config), mean=mean if fits else None, std=std if fits else None)


def fingerprint(
    recipe: Recipe,
    images: Images,
    accelerator: Accelerator,
    student: nn.Module,
    teachers: Sequence[nn.Module],
    peer: nn.Module | None = None,
) -> dict[str, Any]:
    """What decides the weights: the recipe's values with the global batch, images and networks by digest, and
    precision.

    Not the number of processes, nor the batch size of a step: order, crops and learning rate do not depend on them.
    """
    return {
        **as_dict(recipe, digest_only=True),
        "images": images.train.digest,
        "mean": list(images.mean),
        "std": list(images.std),
        "student_sha256": module_digest(student),
        "teacher_sha256": [module_digest(teacher) for teacher in teachers],
        "peer_sha256": module_digest(peer) if peer is not None else None,
        "precision": str(accelerator.mixed_precision),
    }
