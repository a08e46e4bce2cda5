"""What a report found out: the students by group, the teacher, and what they are compared by."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mgd_timm.report.costs import Costs
from mgd_timm.report.measure import Predictions, Student
from mgd_timm.report.runs import Group, Run, baseline
from mgd_timm.report.teacher import MeasuredTeacher

NO_TEACHER = "no run here has a teacher: name one of mgd-timm distill as well."
NO_ALONE = "no run here trained the same student alone: name one of mgd-timm train --model STUDENT as well."


@dataclass(frozen=True)
class Findings:
    """What a report shows.

    Args:
        groups: Of the runs.
        students: By folder of the run.
        teacher: Of the first run that has one, or why there is none.
        costs: By label of the group.
        teacher_costs: None without a teacher.
    """

    groups: Sequence[Group]
    students: Mapping[Path, Student]
    teacher: MeasuredTeacher | str
    costs: Mapping[str, Costs]
    teacher_costs: Costs | None

    def of(self, group: Group) -> list[Student]:
        """Return the students of a group, in the order of their seeds."""
        return [self.students[run.folder] for run in group.runs]

    def first(self, group: Group) -> Student:
        """Return the student of a group's lowest seed."""
        return self.students[group.first.folder]

    def top1(self, group: Group) -> list[float]:
        """Return the top-1, in %, of each student of a group."""
        return [student.predictions.top(1) for student in self.of(group)]

    def gains(self, group: Group, *, kd: bool = False) -> list[float]:
        """Return the points of top-1 that a group gains over the student alone, or over KD; none without such a group.

        See `gains`.
        """
        other = baseline(self.groups, group, kd=kd)
        if other is None or group.first.is_alone:
            return []
        return gains(self._by_seed(group), self._by_seed(other))

    def _by_seed(self, group: Group) -> dict[int, float]:
        return {student.run.recipe.seed: student.predictions.top(1) for student in self.of(group)}

    @cached_property
    def best(self) -> Group | None:
        """The group with the highest mean top-1 among those that were taught; None if there is none."""
        taught = [group for group in self.groups if not group.first.is_alone]
        return max(taught, key=lambda group: sum(self.top1(group)) / len(group.runs), default=None)

    @property
    def any_student(self) -> Student:
        """The first student, whose data are those of all."""
        return self.first(self.groups[0])


def teaching_run(runs: Sequence[Run]) -> Run | None:
    """Return the run whose teacher a report shows: the first with granularity heads, else the first with a teacher."""
    taught = [run for run in runs if run.recipe.teacher is not None]
    return next((run for run in taught if run.recipe.method != "none"), taught[0] if taught else None)


def gains(ours: Mapping[int, float], theirs: Mapping[int, float]) -> list[float]:
    """Return what `ours` gain over `theirs`, both by seed: one difference for each seed where both have the same seeds,
    else the difference of their means."""
    if ours.keys() == theirs.keys():
        return [ours[seed] - theirs[seed] for seed in ours]
    return [sum(ours.values()) / len(ours) - sum(theirs.values()) / len(theirs)]


def class_accuracy(predictions: Predictions, count: int) -> Float[Tensor, " k"]:
    """Return the accuracy of each of `count` classes, in %; nan for one without images."""
    zeros = torch.zeros(count, dtype=torch.float64)
    images = zeros.index_add(0, predictions.labels, torch.ones(len(predictions.labels), dtype=torch.float64))
    return 100 * zeros.index_add(0, predictions.labels, predictions.hits.double()) / images


def agreement(one: Predictions, other: Predictions) -> float:
    """Return the share of images, in %, for which two networks predict the same class."""
    return 100 * float((one.classes == other.classes).double().mean())


def divergence(teacher: Predictions, student: Predictions) -> float:
    """Return the mean over images of KL(teacher || student) of their probabilities, in nats."""
    ours, theirs = (one.logits.double().log_softmax(1) for one in (student, teacher))
    return float((theirs.exp() * (theirs - ours)).sum(1).mean())


def learnt_images(ours: Sequence[Predictions], alone: Sequence[Predictions]) -> Int[Tensor, " n"]:
    """Return the places of images that every one of `ours` has right and every one of `alone` has wrong, those first
    whose probability of the image's class rose the most."""
    right = torch.stack([one.hits for one in ours]).all(0)
    wrong = ~torch.stack([one.hits for one in alone]).any(0)
    gained = _probability(ours) - _probability(alone)
    found = (right & wrong).nonzero()[:, 0]
    return found[gained[found].argsort(descending=True, stable=True)]


def _probability(networks: Sequence[Predictions]) -> Tensor:
    """Return the probability of each image's class, as a mean over networks."""
    each = [one.logits.double().softmax(1).gather(1, one.labels[:, None])[:, 0] for one in networks]
    return torch.stack(each).mean(0)
