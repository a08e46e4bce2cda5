"""Connect the networks of a run: features, objective, teachers; refuse what does not go together before training."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from timm.models import get_model_input_config, get_pretrained_cfg
from torch import nn

from mgd_timm.criteria import CRITERIA, Criterion, Objective
from mgd_timm.criteria.base import trains_teacher
from mgd_timm.criteria.terms import Terms
from mgd_timm.data.dataset import Images
from mgd_timm.data.rng import set_seed
from mgd_timm.data.sources import SmallImageSource
from mgd_timm.distiller import Distiller, EvolutionaryLearning, MutualLearning, TaughtPeers, Teacher
from mgd_timm.export.rebuild import check_rebuild
from mgd_timm.features import Defaults, FeatureTap, Pair, Shapes, match_number_of_maps
from mgd_timm.granularity import MAG
from mgd_timm.models.build import build_student, set_memory_format
from mgd_timm.models.checks import check_channels, check_student
from mgd_timm.models.fake_quantise import find_places
from mgd_timm.models.fold_batchnorm import fold_batchnorm
from mgd_timm.models.input_adapter import build_input_adapter
from mgd_timm.models.load import check_model_name
from mgd_timm.models.pretrained_cfg import describe_weights, read_channel_values, read_defaults
from mgd_timm.models.unread_pixels import check_reads_all_pixels
from mgd_timm.objective import SeveralTeachers, build_objective
from mgd_timm.pipeline.branches import connect_branches
from mgd_timm.pipeline.checks import (
    check_rotates,
    check_several_teachers,
    check_teaches_without_logits,
    logits_conflict,
)
from mgd_timm.pipeline.fit_criteria import CriterionFit, fits_of_criteria, fits_of_student
from mgd_timm.pipeline.plan import objective_of
from mgd_timm.recipe.options import as_dict
from mgd_timm.recipe.recipe import Recipe
from mgd_timm.storage.digests import module_digest
from mgd_timm.teachers.channel_matching import match_shapes
from mgd_timm.teachers.classifier import check_probe
from mgd_timm.teachers.student_friendly import StudentFriendly
from mgd_timm.teachers.trajectory import Trajectory


@dataclass(frozen=True)
class Networks:
    """The networks of a run, connected.

    Args:
        student: Its features.
        objective: Of the student.
        teachers: As yet without heads.
        peer: The second student, where two teach each other, or the teacher that trains along.
        peer_objective: Of the second student.
        between: Beside a teacher, the objectives of student and peer with each other.
        trajectory: Of the teacher's training, which the student follows.
        criterion_fits: What criteria fit before the run.
        fingerprint: What decides the weights that the run ends with.
        loaded_sha256: Of each teacher's weights as they were loaded, before the run gave them other classes or sizes.
    """

    student: FeatureTap
    objective: Objective | MAG | SeveralTeachers
    teachers: tuple[Teacher, ...]
    peer: FeatureTap | None
    peer_objective: Objective | MAG | SeveralTeachers | None
    between: tuple[Objective | MAG, Objective | MAG] | None = None
    trajectory: Trajectory | None = None
    criterion_fits: list[CriterionFit] = field(default_factory=list)
    fingerprint: dict[str, Any] = field(default_factory=dict)
    loaded_sha256: list[str] = field(default_factory=list)

    def trainee(self) -> Distiller | EvolutionaryLearning | MutualLearning | TaughtPeers:
        """The one module that trains."""
        if self.peer is None or self.peer_objective is None:
            return Distiller(self.student, self.objective)
        if self.between is not None:
            return TaughtPeers(self.student, self.peer, self.objective, self.peer_objective, *self.between)
        assert not isinstance(self.objective, SeveralTeachers)
        assert not isinstance(self.peer_objective, SeveralTeachers)
        if trains_teacher(self.objective):
            assert not isinstance(self.objective, MAG)
            assert not isinstance(self.peer_objective, MAG)
            return EvolutionaryLearning(self.student, self.peer, self.objective, self.peer_objective)
        return MutualLearning(self.student, self.peer, self.objective, self.peer_objective)

    def students(self) -> dict[str, FeatureTap]:
        """The student, and the peer where there is one, by role."""
        return {"student": self.student} | ({"peer": self.peer} if self.peer is not None else {})


def connect(
    recipe: Recipe,
    terms: Terms,
    images: Images,
    accelerator: Accelerator,
    teachers: Sequence[nn.Module],
    student: nn.Module | None = None,
) -> Networks:
    """Build the student and connect all networks; `finish_teachers` follows once the teachers' weights are final.

    Args:
        recipe: Of the run.
        terms: Of its loss.
        images: Of the run.
        accelerator: Device, processes, precision.
        teachers: With the data's classes and the images' size (`adapt_teachers_to_data`).
        student: Instead of the recipe's.

    Raises:
        ValueError: Networks, criteria and data that do not go together.
    """
    check_rotates(terms, images)
    defaults = find_defaults(recipe, None, student)  # before the student is described
    tap = _connect_student(recipe, terms, images, accelerator, student, defaults)
    if len(teachers) > 1:
        check_several_teachers(terms, len(teachers), mean=recipe.teachers_as == "mean")
    taught_by = [
        connect_teacher(recipe, terms, accelerator, model, images, silent=recipe.classes_of(position) == "none")
        for position, model in enumerate(teachers)
    ]
    peer = _connect_peer(recipe, terms, images, defaults) if recipe.peer is not None else None
    match_number_of_maps(
        recipe.maps, tap, *(teacher.tap for teacher in taught_by), *([peer] if peer is not None else [])
    )
    networks = _build_objectives(recipe, terms, images, tap, taught_by, peer)
    fits: list[CriterionFit] = []
    if len(taught_by) == 1 and not isinstance(networks.objective, SeveralTeachers):
        lr, run_lr, teacher = recipe.fitting_lr, recipe.optim.lr, taught_by[0]
        fits = fits_of_criteria(terms, networks.objective, teacher, lr, run_lr)
        lr = run_lr if lr is None else lr
        pair = _pairs(tap, taught_by, images)[0]
        fits += fits_of_student(terms, tap, teacher, images, pair, maps=recipe.maps, seed=recipe.seed, lr=lr)
    networks = replace(networks, criterion_fits=fits)
    return replace(networks, fingerprint=_fingerprint(recipe, images, accelerator, networks))


def _build_objectives(
    recipe: Recipe,
    terms: Terms,
    images: Images,
    student: FeatureTap,
    teachers: Sequence[Teacher],
    peer: FeatureTap | None,
) -> Networks:
    """Return the networks with the objective of each student."""
    taught = [_pairs(tap, teachers, images) for tap in ([student] if peer is None else [student, peer])]
    if recipe.match_channels is not None:
        taught = [[pair._replace(teacher=match_shapes(pair.student, pair.teacher)) for pair in own] for own in taught]
    set_seed(recipe.seed, 4)
    if recipe.has_branches:
        return Networks(student, connect_branches(recipe, terms, student, taught[0][0], images), (), None, None)
    if peer is None:
        return Networks(student, objective_of(recipe, terms, taught[0]), tuple(teachers), None, None)
    (first, *_), (second, *_) = taught
    mutual = [
        own._replace(teacher=other.student, teacher_classifier=None)
        for own, other in ((first, second), (second, first))
    ]
    if not teachers:
        of_peer = terms if terms.trained_teacher is None else terms.of_labels()
        one, two = (
            build_objective(own, pair, recipe.method, recipe.heads.granularities)
            for own, pair in zip((terms, of_peer), mutual, strict=True)
        )
        return Networks(student, one, (), peer, two)
    objectives = [objective_of(recipe, terms.of_teacher(), pairs) for pairs in taught]
    one, two = (build_objective(terms.of_peer(), pair) for pair in mutual)
    return Networks(student, objectives[0], tuple(teachers), peer, objectives[1], (one, two))


def teachers_of(connected: Sequence[Networks]) -> list[Teacher]:
    """Return the teachers of all turns, in their order."""
    return [teacher for networks in connected for teacher in networks.teachers]


def finish_teachers(networks: Networks, *, fold: bool, fitted: bool) -> Networks:
    """Return the networks with their final teachers.

    Args:
        networks: Connected.
        fold: Fold the teachers' BatchNorm into their convolutions.
        fitted: The teachers' weights have changed since they were connected.
    """
    for objective in (networks.objective, networks.peer_objective):
        for criterion in objective.modules() if fitted and objective is not None else ():
            if isinstance(criterion, Criterion):
                criterion.reload_teacher_classifier()
    distinct = {id(one): one for one in (*networks.teachers, *(fit.teacher for fit in networks.criterion_fits))}
    final = {key: _finished(one, fold, fitted) for key, one in distinct.items()}
    fits = [replace(fit, teacher=final[id(fit.teacher)]) for fit in networks.criterion_fits]
    teachers = tuple(final[id(teacher)] for teacher in networks.teachers)
    return replace(networks, teachers=teachers, criterion_fits=fits)


def _finished(teacher: Teacher, fold: bool, fitted: bool) -> Teacher:
    digest = module_digest(teacher.tap.model) if fitted else teacher.digest
    device = next(teacher.tap.parameters()).device
    tap = (fold_batchnorm(teacher.tap) if fold else None) or teacher.tap
    return Teacher(tap, input_adapter=teacher.input_adapter, digest=digest, logits=teacher.has_logits).to(device)


def log_remarks(networks: Networks, terms: Terms, method: str, accelerator: Accelerator) -> None:
    """Log the criteria's remarks on the pair, and warn where nothing of the teacher is used."""
    if terms.sample_weight is not None:
        accelerator.print(terms.describe_weights(method))
    for role, objective in (("", networks.objective), ("peer_", networks.peer_objective)):
        for criterion in objective.modules() if objective is not None else ():
            if isinstance(criterion, Criterion) and (remark := criterion.remark()) is not None:
                name = next(name for name, kind in CRITERIA.items() if type(criterion) is kind)
                accelerator.print(f"{role}{name}: {remark}")
    if isinstance(networks.objective, StudentFriendly):
        accelerator.print(f"for_student: {networks.objective.note}")
    if networks.teachers and not networks.criterion_fits and not networks.objective.needs:
        accelerator.print("warning: all distillation weights are 0: the teacher is not used")


def _pairs(student: FeatureTap, teachers: Sequence[Teacher], images: Images) -> list[Pair]:
    """Return a Pair for each teacher; without one, that of the student with itself."""
    shapes = student.shapes(images.input_size[1:])
    alone = Pair(shapes, shapes, images.num_samples, images.trained_labels())
    return [
        alone._replace(teacher=_teacher_shapes(teacher, images), teacher_classifier=teacher.tap.classifier)
        for teacher in teachers
    ] or [alone]


def _teacher_shapes(teacher: Teacher, images: Images) -> Shapes:
    """Return a teacher's shapes; where views stand in for its logits, their classes are the data's."""
    shapes = teacher.tap.shapes(teacher.size(images.input_size[1:]))
    return shapes if teacher.has_logits else shapes._replace(num_classes=images.num_classes)


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


def _connect_student(
    recipe: Recipe,
    terms: Terms,
    images: Images,
    accelerator: Accelerator,
    student: nn.Module | None,
    defaults: Defaults,
) -> FeatureTap:
    random = student is None and not recipe.student_pretrained and recipe.student_checkpoint is None
    if student is None:
        set_seed(recipe.seed, 3)
        student = _build_student(recipe, images)
    check_student(student, images.input_size[0], images.num_classes)
    check_reads_all_pixels(student, "student", images.input_size, "--img-size")
    _describe(student, images, recipe, terms, defaults)
    maps = recipe.maps if terms.needs("maps", student=True) or recipe.has_branches else None
    tap = FeatureTap(student, maps, input_size=images.input_size, cam=terms.needs("cams"))
    check_rebuild(student, "student")  # after the probe of features, which names images that the student does not take
    if recipe.qat:
        find_places(tap)
    if recipe.train_only == "classifier":
        tap.freeze_backbone(adapt_batchnorm=recipe.adapt_batchnorm)
        if random:
            accelerator.print(
                "warning: the frozen backbone has random weights: give --pretrained or --initial-checkpoint FILE."
            )
    return tap


def connect_teacher(
    recipe: Recipe, terms: Terms, accelerator: Accelerator, model: nn.Module, images: Images, *, silent: bool
) -> Teacher:
    """Return a frozen teacher without heads; a silent one returns no logits."""
    check_channels(model, "teacher", images.input_size[0])
    conflict = logits_conflict(model, images.class_names)
    has_logits = conflict is None and not silent
    if not has_logits:
        check_teaches_without_logits(model, terms, recipe, conflict or "", silent=silent)
    adapter = build_input_adapter(model, images.mean, images.std, images.input_size, recipe.teacher_img_size)
    size = adapter.size or (images.input_size[1], images.input_size[2])
    check_reads_all_pixels(model, "teacher", (images.input_size[0], *size), _size_flag(recipe, model))
    maps = recipe.maps if terms.needs("maps") else None
    tap = FeatureTap(model, maps, input_size=(images.input_size[0], *size), cam=terms.needs("cams"))
    if recipe.fit_teacher_head == "probe":
        check_probe(tap)
    teacher = Teacher(tap, input_adapter=adapter, logits=has_logits).to(accelerator.device)
    set_memory_format(teacher, tap.name, recipe.channels_last, accelerator.device)
    return teacher


def _size_flag(recipe: Recipe, teacher: nn.Module) -> str:
    """Return the flag that sets the size of a teacher's images."""
    fixed = get_model_input_config(teacher)["fixed_input_size"] and recipe.teacher_resize == "images"
    return "--teacher-resize positions --teacher-img-size" if fixed else "--teacher-img-size"


def _connect_peer(recipe: Recipe, terms: Terms, images: Images, defaults: Defaults) -> FeatureTap:
    """Build the second student."""
    assert recipe.peer is not None
    set_seed(recipe.seed, 6)
    as_student = replace(
        recipe,
        student=recipe.peer,
        student_pretrained=recipe.peer_pretrained,
        student_checkpoint=recipe.peer_checkpoint,
    )
    try:
        peer = _build_student(as_student, images)
    except ValueError as error:
        raise ValueError(f"peer: {error}") from error
    check_reads_all_pixels(peer, "peer", images.input_size, "--img-size")
    _describe(peer, images, recipe, terms, defaults)
    check_rebuild(peer, "peer")
    maps = recipe.maps if terms.needs("maps", student=True) else None
    tap = FeatureTap(peer, maps, input_size=images.input_size, cam=terms.needs("cams"))
    tap.lr_scale = recipe.peer_lr_scale or 1.0
    return tap


def _describe(model: nn.Module, images: Images, recipe: Recipe, terms: Terms, defaults: Defaults) -> None:
    """Describe the model so that timm preprocesses images as the run's evaluation: small ones are resized as a whole,
    others resized and cropped."""
    if isinstance(images.train, SmallImageSource):
        evaluation = {"crop_pct": 1.0, "crop_mode": "squash", "interpolation": "bicubic"}
    else:
        evaluation = {
            "crop_pct": recipe.data.crop_pct or defaults.crop_pct,
            "crop_mode": defaults.crop_mode,
            "interpolation": recipe.data.interpolation or defaults.interpolation,
        }
    describe_weights(
        model,
        input_size=images.input_size,
        mean=images.mean,
        std=images.std,
        class_names=images.class_names,
        license=recipe.license,
        tag=_weights_tag(recipe, terms),
        evaluation=evaluation,
    )


def _weights_tag(recipe: Recipe, terms: Terms) -> str:
    """Return timm's tag of the weights: method, hosts and data, as in mas_kd_cifar100."""
    place = Path(recipe.data.data_dir or recipe.data.dataset).name
    words = [place]
    if terms.named:  # none without distillation
        words = [*([recipe.method] if recipe.method != "none" else []), *terms.criterion_names(), place]
    return re.sub(r"[^a-z0-9]+", "_", "_".join(words).lower()).strip("_")


def find_defaults(recipe: Recipe, teacher: nn.Module | None, student: nn.Module | None) -> Defaults:
    """Return mean and std of the pretrained student, else of the teacher, and the student's nominal input."""
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


def _fingerprint(recipe: Recipe, images: Images, accelerator: Accelerator, networks: Networks) -> dict[str, Any]:
    """Return what decides the weights: options with the global batch, digests of images and networks, precision.

    The number of processes and the batch size of a step are not among it: order, crops and learning rate do not depend
    on them. The teachers' digests are those of their weights before a classifier is fitted.
    """
    peer = networks.peer
    return {
        **as_dict(recipe, digest_only=True),
        "images": images.train.digest,
        "mean": list(images.mean),
        "std": list(images.std),
        "student_sha256": module_digest(networks.student.model),
        "teacher_sha256": [teacher.digest for teacher in networks.teachers],
        "peer_sha256": module_digest(peer.model) if peer is not None else None,
        "precision": str(accelerator.mixed_precision),
        # The recipe's word is a file's name, or "none".
        "teacher_logits": [teacher.has_logits for teacher in networks.teachers],
    }
