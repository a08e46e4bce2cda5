"""The frozen teacher, and the one module that trains."""

import copy
from collections.abc import Callable, Sequence

import torch
from accelerate import Accelerator
from jaxtyping import Float
from torch import Tensor, nn

from mgd_timm.criteria.base import Objective
from mgd_timm.distributed.sharding import cut, units
from mgd_timm.features import Batch, Features, FeatureTap
from mgd_timm.granularity import MAG, GranularityHeads
from mgd_timm.models.input_adapter import InputAdapter
from mgd_timm.objective import SeveralTeachers
from mgd_timm.storage.digests import module_digest

AnyFeatures = Features | tuple[Features, ...]
"""Of a teacher, or of several."""


class Teacher(nn.Module):
    """A frozen teacher with its granularity heads: no gradient, always in eval mode, never in a checkpoint.

    Args:
        tap: The teacher's features.
        heads: Fitted heads with decoders; None shows no codes and no views.
        view: What to do with the student's normalised images first (another mean, std or size); see
            teacher_view.InputAdapter.
        digest: sha256 of the weights, for what is kept of this teacher, where the tap's are folded; by default
            computed.
        logits: Show its logits. Those of other classes than the data's are better not shown: their width is then 0.

    Raises:
        ValueError: Heads of another embedding width.
    """

    def __init__(
        self,
        tap: FeatureTap,
        heads: GranularityHeads | None = None,
        *,
        view: nn.Module | None = None,
        digest: str | None = None,
        logits: bool = True,
    ) -> None:
        super().__init__()
        if heads is not None:
            width = next(heads.encoders.parameters()).shape[1]
            if width != tap.embed_dim:
                raise ValueError(
                    f"heads for an embedding of {width} dims, but {tap.name} has {tap.embed_dim}: fit heads on it."
                )
        self.tap, self.heads = tap, heads
        self.view = view if view is not None else nn.Identity()
        self.shows_logits = logits and tap.num_classes > 0
        self.digest = digest if digest is not None else module_digest(tap.model)
        self.requires_grad_(False)
        self.eval()

    # "Teacher", not Self, which beartype refuses in a class that it does not decorate as a whole.
    def train(self, mode: bool = True) -> "Teacher":  # noqa: ARG002 - whatever it is
        """Stays in eval mode: BatchNorm statistics and dropout of a teacher never move."""
        return super().train(False)

    def with_heads(self, heads: GranularityHeads) -> "Teacher":
        """The same teacher with fitted heads, on the device that it is on."""
        device = next(self.tap.parameters()).device
        return Teacher(self.tap, heads, view=self.view, digest=self.digest, logits=self.shows_logits).to(device)

    def size(self, image_size: tuple[int, ...]) -> tuple[int, int]:
        """(height, width) at which the teacher sees images of a size."""
        fixed = self.view.size if isinstance(self.view, InputAdapter) else None
        return fixed or (image_size[0], image_size[1])

    @torch.no_grad()  # not inference_mode: adapters that read teacher maps save them for backward
    def forward(self, images: Float[Tensor, "b c h w"]) -> Features:
        """Features with the heads' codes and views."""
        features: Features = self.tap(self.view(images))
        if not self.shows_logits:
            features = features._replace(logits=features.logits[:, :0], cam=None)
        if self.heads is None:
            return features
        codes = self.heads.encode(features.embedding)
        return features._replace(codes=codes, views=self.heads.decode(codes))


def is_whole(batch: Batch, slot_size: int) -> bool:
    """Whether a batch is a slot of a whole update, which are of one size or, dealt unevenly, one sample smaller.

    A batch of another size, an epoch's last, is not worth compiling again for.
    """
    return slot_size - len(batch.labels) in (0, 1)


def shard_teacher(teacher: Teacher, accelerator: Accelerator) -> Teacher:
    """A copy of a frozen teacher, cut up between all processes, which have to ask it the same number of times from now
    on.

    Args:
        teacher: It is moved to the CPU.
        accelerator: Device and processes, several of them.
    """
    names = [f"tap.{name}" for name in units(teacher.tap)]
    parts = copy.deepcopy(teacher.to("cpu"))
    cut(parts, names, accelerator)
    return parts


class Live:
    """Teachers as `fit` asks them about a batch: the features of one, or of each of several.

    Args:
        teachers: With or without heads.
    """

    def __init__(self, *teachers: Teacher) -> None:
        self.teachers = teachers

    def __call__(self, batch: Batch) -> AnyFeatures:
        """Features of a batch's images."""
        return _together(self.teachers, batch)

    def compiled(self, slot_size: int, mode: str) -> Callable[[Batch], AnyFeatures]:
        """The same, compiled for whole batches of `slot_size` (see `is_whole`) with torch.compile's `mode`."""
        fast = [torch.compile(teacher, dynamic=False, mode=mode) for teacher in self.teachers]
        return lambda batch: _together(fast if is_whole(batch, slot_size) else self.teachers, batch)


def _together(teachers: Sequence[Callable[..., Features]], batch: Batch) -> AnyFeatures:
    found = tuple(look(batch.images) for look in teachers)
    return found[0] if len(found) == 1 else found


class Distiller(nn.Module):
    """Student, its encoders and the criteria's adapters in one module, whose forward computes the losses.

    Args:
        student: The student's features.
        objective: An Objective, a MAG or MAS around one, or a SeveralTeachers.
    """

    def __init__(self, student: FeatureTap, objective: Objective | MAG | SeveralTeachers) -> None:
        super().__init__()
        self.student, self.objective = student, objective

    def forward(
        self, batch: Batch, teacher: AnyFeatures | None = None
    ) -> tuple[dict[str, Float[Tensor, ""]], Float[Tensor, "b k"]]:
        """Weighted losses by name, and the student's logits.

        Raises:
            ValueError: Without a teacher, for an objective that reads one.
        """
        student: Features = self.student(batch.images)
        if teacher is None:
            if self.objective.needs:
                raise ValueError(
                    f"the objective reads the teacher's {', '.join(sorted(self.objective.needs))}: give its features."
                )
            teacher = student  # no term looks at it
        return self.objective(student, teacher, batch), student.logits


class MutualLearning(nn.Module):
    """Two students that teach each other, in one module: to each one's objective the other is the teacher, detached.

    Under MAG each learns the other's codes as well, which the encoders of both give (MGD-DML).

    Reference: Zhang, Xiang, Hospedales, Lu, "Deep Mutual Learning" (arXiv 1706.00384); with codes: the MGD authors'
    code.

    Differs: both are updated at once from one forward pass of each (the paper: one after the other, each time after new
    forward passes; the MGD authors: one after the other from one pass, which with one rule for both is the same).
    Divergences of codes are means over the batch, as in MAG; the MGD authors' also divide by the codes' width. Constant
    codes of both encoders minimise their divergence, as nothing else holds them: the gain of the codes is to be
    watched, not assumed.

    Args:
        student, peer: Features of both.
        objective: The student's, or a MAG around it.
        peer_objective: The peer's, of its own parameters.
    """

    def __init__(
        self, student: FeatureTap, peer: FeatureTap, objective: Objective | MAG, peer_objective: Objective | MAG
    ) -> None:
        super().__init__()
        self.student, self.peer = student, peer
        self.objective, self.peer_objective = objective, peer_objective

    def forward(
        self,
        batch: Batch,
        teacher: Features | None = None,  # noqa: ARG002 - there is none
    ) -> tuple[dict[str, Float[Tensor, ""]], Float[Tensor, "b k"]]:
        """Weighted losses by name, the peer's as peer_NAME, and the student's logits."""
        one = _with_codes(self.student(batch.images), self.objective)
        two = _with_codes(self.peer(batch.images), self.peer_objective)
        terms = self.objective(one, _detached(two), batch)
        peers = self.peer_objective(two, _detached(one), batch)
        return {**terms, **{f"peer_{name}": term for name, term in peers.items()}}, one.logits


def _with_codes(shown: Features, objective: Objective | MAG) -> Features:
    return (
        shown._replace(codes=objective.student_heads.encode(shown.embedding)) if isinstance(objective, MAG) else shown
    )


def _detached(shown: Features) -> Features:
    return Features(
        shown.logits.detach(),
        shown.embedding.detach(),
        tuple(m.detach() for m in shown.maps),
        {name: code.detach() for name, code in shown.codes.items()},
        {},
        shown.cam.detach() if shown.cam is not None else None,
    )
