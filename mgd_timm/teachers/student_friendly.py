"""Training a teacher for a student: branches lead from the teacher's blocks into the student's (Park et al. 2021)."""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mgd_timm.criteria import Criterion, Objective, kl_divergence
from mgd_timm.features import Batch, Features, FeatureTap, match_number_of_maps
from mgd_timm.models.tail import GenericTail, cut_tail

MapShape = tuple[int, int, int]


class Branch(nn.Module):
    """From one of the teacher's maps to logits: a feature transform to the shape of the student's map, then what the
    student computes after that map.

    Args:
        teacher, student: (channels, height, width) of the maps.
        tail: From the student's map to logits.
    """

    def __init__(self, teacher: MapShape, student: MapShape, tail: nn.Module) -> None:
        super().__init__()
        self.size = student[1:]
        self.transform = nn.Sequential(
            nn.Conv2d(teacher[0], student[0], 1, bias=False), nn.BatchNorm2d(student[0]), nn.ReLU()
        )
        self.tail = tail

    def forward(self, maps: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k"]:
        """Return the branch's logits."""
        if maps.device.type == "cpu":  # channels-last of a cifar_* teacher is not safe in any student
            maps = maps.contiguous()
        resized = maps if maps.shape[2:] == self.size else F.adaptive_avg_pool2d(maps, self.size)
        logits: Tensor = self.tail(self.transform(resized))
        return logits


class StudentFriendly(Objective):
    """Student-friendly teacher: while a teacher is trained, branches lead from its blocks into copies of the student's
    later blocks, so that its features become such as the student can compute with.

    With the teacher's logits z, and those of branch i, z_i = tail_i(transform_i(F_i)): L = w_1 CE(z, y) + w_2 mean_i
    KL(softmax(z_i / T) || softmax(z / T)) T^2 + w_3 mean_i CE(z_i, y). F_i are the teacher's maps but the deepest, one
    for each stage of the student; transform_i is a 1x1 convolution, BatchNorm and ReLU to the shape of the student's
    map; tail_i is all that the student computes after that map, with weights of its own. All gradients flow into both
    teacher and branches. The branches are not exported.

    Reference: Park, Cha, Jeong, Kim, Han, "Learning Student-Friendly Teacher Networks for Knowledge Distillation"
    (arXiv 2102.07650).

    Weight: 1, 3, 1 and T 1, for the three terms.

    Differs: the equation and its constants are from memory of the paper, and unverified; the direction of the
    divergence is uncertain. Where a student's blocks cannot be run from a map on, as those of most vision transformers
    cannot, a small network of depthwise separable convolutions stands for them, which is this package's; the run logs
    which it is. A larger map of the teacher is average-pooled, a smaller one repeats its positions.

    Args:
        task: Loss of the labels, of the teacher's logits and of each branch's.
        branches: From the teacher's maps, shallow to deep, to logits.
        weights: Of the task, the divergences and the branches' labels; the first is more than 0.
        temperature: T > 0.
        divergence: "reverse" is KL(branch || teacher), "forward" KL(teacher || branch).
        note: What the branches are, for the log.
    """

    def __init__(
        self,
        task: Criterion,
        branches: Sequence[nn.Module],
        *,
        weights: Sequence[float] = (1.0, 3.0, 1.0),
        temperature: float = 1.0,
        divergence: Literal["reverse", "forward"] = "reverse",
        note: str = "",
    ) -> None:
        weight, self.kl_weight, self.ce_weight = map(float, weights)
        super().__init__(task=(weight, task))
        self.branches = nn.ModuleList(branches)
        self.temperature, self.divergence, self.note = temperature, divergence, note

    def forward(self, student: Features, teacher: Features, batch: Batch) -> dict[str, Float[Tensor, ""]]:
        """Return the weighted losses by name. `student` is the network in training, the future teacher."""
        terms = super().forward(student, teacher, batch)
        shallow = student.maps[: len(self.branches)]
        logits = [branch(one) for branch, one in zip(self.branches, shallow, strict=True)]
        if self.kl_weight:
            divergences = torch.stack([self._diverge(one, student.logits) for one in logits])
            terms["branch_kl"] = self.kl_weight * divergences.mean()
        if self.ce_weight:
            task = self.criteria["task"]
            labels = torch.stack([task(student._replace(logits=one), teacher, batch) for one in logits])
            terms["branch_ce"] = self.ce_weight * labels.mean()
        return terms

    def _diverge(self, branch: Tensor, teacher: Tensor) -> Tensor:
        pair = (teacher, branch) if self.divergence == "reverse" else (branch, teacher)
        return kl_divergence(*pair, self.temperature)


def build_branches(
    tap: FeatureTap, name: str, build: Callable[[], nn.Module], input_size: tuple[int, int, int]
) -> tuple[list[Branch], str]:
    """Build the branches from a teacher's maps into a student.

    Args:
        tap: Of the teacher; keeps only as many maps, the deepest, as the student has.
        name: Of the student.
        build: Returns a new student with random weights, on each call.
        input_size: (channels, height, width) of the images.

    Returns:
        The branches, and what they are in words.

    Raises:
        ValueError: Both networks have fewer than 2 maps in common, or the student cannot be built or tapped.
    """
    student = _tap_student(name, build, "stages", input_size)
    match_number_of_maps("stages", tap, student)
    ours, shapes = tap.shapes(input_size[1:]).maps, student.shapes(input_size[1:])
    if len(ours) < 2:
        raise ValueError(
            f"for_student={name!r}: branches leave from all maps of {tap.name} but the deepest, and of images of "
            f"{input_size} the networks have {len(ours)} in common, {ours} and {shapes.maps}. Use larger images "
            "(--img-size) or another student."
        )
    if shapes.num_classes < 2:
        raise ValueError(f"for_student={name!r} compares classes, and the data has {shapes.num_classes}: leave it out.")
    branches, generic = list[Branch](), 0
    for position in range(len(ours) - 1):
        tail: nn.Module | None = cut_tail(_tap_student(name, build, student.indices, input_size), position)
        if tail is None:
            tail, generic = GenericTail(shapes.maps[position:], shapes.num_classes), generic + 1
        branches.append(Branch(ours[position], shapes.maps[position], tail))
    return branches, _describe(name, len(branches), generic)


def _tap_student(
    name: str, build: Callable[[], nn.Module], maps: Sequence[int] | str, input_size: tuple[int, int, int]
) -> FeatureTap:
    try:
        return FeatureTap(build(), maps, input_size=input_size)
    except ValueError as error:
        raise ValueError(f"for_student={name!r}: {error}") from error


def _describe(name: str, count: int, generic: int) -> str:
    """Return what the branches are: how many, and how many of them with a generic tail."""
    branches = f"{count} branch{'es' if count > 1 else ''} into {name}"
    if not generic:
        return f"{branches}, with its own blocks (exact)"
    which = "a" if generic == count else f"in {generic} of them a"
    return f"{branches}, with {which} generic tail in place of its blocks, which cannot be run from a map on"
