"""The modules that run in a training step: the frozen Teacher, and the Distiller or MutualLearning that is trained."""

import copy
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch._dynamo.config as dynamo_config
import torch._inductor.config as inductor_config
from accelerate import Accelerator
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mgd_timm.criteria.base import Criterion, Objective, needs_rotations
from mgd_timm.distributed.sharding import fsdp_units, shard
from mgd_timm.features import Batch, Features, FeatureTap, extract_with_rotations
from mgd_timm.granularity import MAG, GranularityHeads
from mgd_timm.models.input_adapter import InputAdapter
from mgd_timm.objective import SeveralTeachers
from mgd_timm.storage.digests import module_digest

TeacherFeatures = Features | tuple[Features, ...]
"""Features of one teacher, or of each of several."""


class Teacher(nn.Module):
    """A frozen teacher with its granularity heads: without gradients, always in eval mode, never in a checkpoint.

    Args:
        tap: The teacher's features.
        heads: Fitted heads with decoders; None for no codes and no views.
        input_adapter: Gives the student's normalised images the teacher's mean, std and size (see
            models.input_adapter.InputAdapter); None for no change.
        digest: sha256 of the weights, by which this teacher's caches are found; None computes it. Pass that of the
            original weights if the tap's are folded.
        logits: Return logits. False if the classes are not the data's: their width is then 0.
        channels: Re-orders the channels of the maps (see teachers.channel_matching.ChannelMatching); None for no
            change.

    Raises:
        ValueError: The heads do not fit the width of the embedding.
    """

    def __init__(
        self,
        tap: FeatureTap,
        heads: GranularityHeads | None = None,
        *,
        input_adapter: nn.Module | None = None,
        digest: str | None = None,
        logits: bool = True,
        channels: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if heads is not None:
            width = next(heads.encoders.parameters()).shape[1]
            if width != tap.embed_dim:
                raise ValueError(
                    f"heads for an embedding of {width} dims, but {tap.name} has {tap.embed_dim}: fit heads on it."
                )
        self.tap, self.heads, self.channels = tap, heads, channels
        self.input_adapter = input_adapter if input_adapter is not None else nn.Identity()
        self.has_logits = logits and tap.num_classes > 0
        self.digest = digest if digest is not None else module_digest(tap.model)
        self.requires_grad_(False)
        self.eval()

    # "Teacher", not Self, which beartype refuses in a class that it does not decorate as a whole.
    def train(self, mode: bool = True) -> "Teacher":  # noqa: ARG002
        """Stay in eval mode: no dropout, and BatchNorm statistics never change."""
        return super().train(False)

    def with_heads(self, heads: GranularityHeads) -> "Teacher":
        """Return the same teacher with fitted heads, on its device."""
        return self._copied(heads, self.channels)

    def with_channels(self, channels: nn.Module) -> "Teacher":
        """Return the same teacher with its maps' channels re-ordered, on its device."""
        return self._copied(self.heads, channels)

    def _copied(self, heads: GranularityHeads | None, channels: nn.Module | None) -> "Teacher":
        device = next(self.tap.parameters()).device
        options: dict[str, Any] = {"digest": self.digest, "logits": self.has_logits, "channels": channels}
        return Teacher(self.tap, heads, input_adapter=self.input_adapter, **options).to(device)

    def describe_input(self) -> object:
        """Return how the input is adapted, as JSON values for fingerprints."""
        adapter = self.input_adapter
        return adapter.values() if isinstance(adapter, InputAdapter) else repr(adapter)

    def size(self, image_size: tuple[int, ...]) -> tuple[int, int]:
        """Return (height, width) of the teacher's input for images of a size (height, width), in pixels."""
        adapted = self.input_adapter.size if isinstance(self.input_adapter, InputAdapter) else None
        return adapted or (image_size[0], image_size[1])

    @torch.no_grad()  # not inference_mode: criteria that read teacher maps save them for backward
    def forward(self, images: Float[Tensor, "b c h w"]) -> Features:
        """Return features with the heads' codes and views."""
        features: Features = self.tap(self.input_adapter(images))
        if not self.has_logits:
            features = features._replace(logits=features.logits[:, :0], cam=None)
        if self.channels is not None:
            features = features._replace(maps=self.channels(features.maps))
        if self.heads is None:
            return features
        codes = self.heads.encode(features.embedding)
        return features._replace(codes=codes, views=self.heads.decode(codes))


def is_full(batch: Batch, micro_batch_size: int) -> bool:
    """Return whether a batch is a full micro-batch, or one sample smaller, as when an update is split unevenly.

    Other sizes, such as that of an epoch's last batch, are not worth compiling for.
    """
    return micro_batch_size - len(batch.labels) in (0, 1)


def shard_teacher(teacher: Teacher, accelerator: Accelerator) -> Teacher:
    """Copy a frozen teacher, which is moved to the CPU, and shard the copy over all processes.

    All processes must call the copy equally often.
    """
    names = [f"tap.{name}" for name in fsdp_units(teacher.tap)]
    sharded = copy.deepcopy(teacher.to("cpu"))
    shard(sharded, names, accelerator)
    return sharded


class LiveTeachers:
    """Compute teachers' features of a batch for `fit`; stored outputs would read them instead.

    Args:
        *teachers: One or several, with or without heads.
        rotate: Compute features of the images' rotations too (see `features.extract_with_rotations`).
    """

    def __init__(self, *teachers: Teacher, rotate: bool = False) -> None:
        self.teachers, self.rotate = teachers, rotate

    def __call__(self, batch: Batch) -> TeacherFeatures:
        """Return the features of one teacher, or of each of several."""
        return self._compute(self.teachers, batch)

    def _compute(self, teachers: Sequence[Callable[[Tensor], Features]], batch: Batch) -> TeacherFeatures:
        features = tuple(_extract(teacher, batch.images, self.rotate) for teacher in teachers)
        return features[0] if len(features) == 1 else features

    def compile(self, micro_batch_size: int, mode: str) -> Callable[[Batch], TeacherFeatures]:
        """Return the same function, compiled with torch.compile's `mode` for full micro-batches (see `is_full`).

        Teachers on a CPU are compiled with their present weights as constants.
        """
        compiled = [_compile(teacher, mode) for teacher in self.teachers]
        return lambda batch: self._compute(compiled if is_full(batch, micro_batch_size) else self.teachers, batch)


def _extract(network: Callable[[Tensor], Features], images: Tensor, rotate: bool) -> Features:
    return extract_with_rotations(network, images) if rotate else network(images)


def _compile(teacher: Teacher, mode: str) -> Callable[..., Features]:
    """Compile a teacher; on a CPU with inductor's freezing: BatchNorm is folded, weights are cast and packed once, and
    convolutions take the sums and activations after them."""
    if any(weight.device.type != "cpu" or isinstance(weight, DTensor) for weight in teacher.parameters()):
        return torch.compile(teacher, dynamic=False, mode=mode)
    # Dynamo finds a frozen graph by the identity of its weights, not by their values. New tensors of the same memory
    # keep a graph of earlier values from being found, and the caller's module from being held by this one.
    memo: dict[int, Tensor] = {id(buffer): buffer.detach() for buffer in teacher.buffers()}
    memo |= {id(weight): nn.Parameter(weight.detach(), requires_grad=False) for weight in teacher.parameters()}
    compiled = torch.compile(copy.deepcopy(teacher, memo), dynamic=False, mode=mode)

    # Not torch.compile's `options`, which Dynamo does not see: it would pass the weights as inputs.
    @torch.no_grad()
    @inductor_config.patch(freezing=True)
    @dynamo_config.patch(recompile_limit=dynamo_config.accumulated_recompile_limit)  # every teacher counts as one
    def compute_features(images: Tensor) -> Features:
        features: Features = compiled(images)
        return features

    return compute_features


class Distiller(nn.Module):
    """One module of the student, its encoders and the criteria's adapters; its forward computes the losses.

    Args:
        student: The student's features.
        objective: An Objective, a MAG or MAS around one, or a SeveralTeachers.
    """

    def __init__(self, student: FeatureTap, objective: Objective | MAG | SeveralTeachers) -> None:
        super().__init__()
        self.student, self.objective = student, objective
        self.rotate = needs_rotations(objective)

    def forward(
        self, batch: Batch, teacher: TeacherFeatures | None = None
    ) -> tuple[dict[str, Float[Tensor, ""]], Float[Tensor, "b k"]]:
        """Return weighted losses by name, and the student's logits.

        Raises:
            ValueError: `teacher` is None, and the objective reads its features.
        """
        student = _extract(self.student, batch.images, self.rotate)
        if teacher is None:
            if self.objective.needs:
                raise ValueError(
                    f"the objective reads the teacher's {', '.join(sorted(self.objective.needs))}: pass its features."
                )
            teacher = student  # not read
        return self.objective(student, teacher, batch), student.logits

    def sample_weights(self, teacher: TeacherFeatures) -> dict[str, Float[Tensor, " b"]]:
        """Return the weights of a batch's samples by name, for logs; nothing where samples count equally."""
        return _sample_weights(self.objective, teacher)


class TwoNetworks(nn.Module):
    """Two networks that train in one run, each with an objective of its own.

    Args:
        student, peer: Their features.
        objective: The student's.
        peer_objective: The peer's, with parameters of its own.
    """

    def __init__(
        self,
        student: FeatureTap,
        peer: FeatureTap,
        objective: Objective | MAG | SeveralTeachers,
        peer_objective: Objective | MAG | SeveralTeachers,
    ) -> None:
        super().__init__()
        self.student, self.peer = student, peer
        self.objective, self.peer_objective = objective, peer_objective

    def peer_parameters(self) -> list[nn.Parameter]:
        """Return the parameters of the peer, and of what trains with it."""
        return [*self.peer.parameters(), *self.peer_objective.parameters()]

    def clip_groups(self) -> list[list[nn.Parameter]]:
        """Return the parameters of each network: gradients are clipped apart, so that neither depends on the other's
        losses."""
        theirs = self.peer_parameters()
        known = {id(parameter) for parameter in theirs}
        return [[parameter for parameter in self.parameters() if id(parameter) not in known], theirs]


class MutualLearning(TwoNetworks):
    """One module of two students that teach each other: the teacher of each is the other student, detached.

    Under MAG each also learns the other's codes, computed by the encoders of both (MGD-DML).

    Reference: Zhang, Xiang, Hospedales, Lu, "Deep Mutual Learning" (arXiv 1706.00384); with codes: the MGD authors'
    code.

    Differs: both are updated at once from one forward pass of each (the paper: one after the other, each time after new
    forward passes; the MGD authors: one after the other from one pass, which is the same if both have the same rule).
    Divergences of codes are means over the batch, as in MAG; the MGD authors' also divide by the codes' width. Constant
    codes of both encoders minimise their divergence, and no other term prevents them: measure the gain of the codes, do
    not assume it.

    Args:
        student, peer: The students' features.
        objective: The student's objective, or a MAG around it.
        peer_objective: The peer's, with parameters of its own.
    """

    objective: Objective | MAG
    peer_objective: Objective | MAG

    def forward(
        self,
        batch: Batch,
        teacher: Features | None = None,  # noqa: ARG002
    ) -> tuple[dict[str, Float[Tensor, ""]], Float[Tensor, "b k"]]:
        """Return weighted losses by name, the peer's as peer_NAME, and the student's logits."""
        student = _add_codes(self.student(batch.images), self.objective)
        peer = _add_codes(self.peer(batch.images), self.peer_objective)
        terms = self.objective(student, _detach(peer), batch)
        peer_terms = self.peer_objective(peer, _detach(student), batch)
        return {**terms, **{f"peer_{name}": term for name, term in peer_terms.items()}}, student.logits


class EvolutionaryLearning(TwoNetworks):
    """One module of a student and a teacher that trains along: the student learns from the labels and from the teacher,
    detached; the teacher learns from the labels alone (see `criteria.ekd`).

    Args:
        student, peer: The features of the student and of the teacher.
        objective: The student's, with a criterion that trains its teacher.
        peer_objective: The teacher's: the task.
    """

    objective: Objective
    peer_objective: Objective

    def peer_parameters(self) -> list[nn.Parameter]:
        """As of `TwoNetworks`, with the modules of criteria that learn from the labels with the teacher."""
        criteria = [cast(Criterion, one) for one in self.objective.criteria.values()]
        guides = [module for criterion in criteria for module in criterion.teacher_modules()]
        return [*super().peer_parameters(), *(parameter for guide in guides for parameter in guide.parameters())]

    def forward(
        self,
        batch: Batch,
        teacher: Features | None = None,  # noqa: ARG002
    ) -> tuple[dict[str, Float[Tensor, ""]], Float[Tensor, "b k"]]:
        """Return weighted losses by name, the teacher's as peer_NAME, and the student's logits."""
        student, peer = self.student(batch.images), self.peer(batch.images)
        terms = self.objective(student, _detach(peer), batch)
        peer_terms = {**self.peer_objective(peer, _detach(student), batch), **self.objective.teacher_terms(peer, batch)}
        return {**terms, **{f"peer_{name}": term for name, term in peer_terms.items()}}, student.logits


class TaughtPeers(TwoNetworks):
    """One module of two students with a teacher: each learns from the labels, the teacher, and the other student,
    detached.

    The criteria that `--criterion` names are of the teacher, or of each of several, as are the codes of MAG and MAS;
    `dml` among them is of the other student. By default they are kd and dml, each of weight 1, as is the task. Both
    students are evaluated, saved and exported (`export`, `export_peer`).

    Reference: Gore, Dey, Mishra, "Uncertainty-Aware Dual-Student Knowledge Distillation for Efficient Image
    Classification" (arXiv 2511.18826).

    Differs: inspired by the paper; constants ours, as its weights of the three losses and their temperatures are not
    known to us. The loss between the students is `dml`'s: T = 1, not weighted by sample. Both are updated at once.

    Args:
        student, peer: The students' features.
        objective: The student's with the teacher, as of a Distiller.
        peer_objective: The peer's with the teacher, with parameters of its own.
        between: The student's with the peer as teacher, without a task.
        peer_between: The peer's with the student as teacher.
    """

    def __init__(
        self,
        student: FeatureTap,
        peer: FeatureTap,
        objective: Objective | MAG | SeveralTeachers,
        peer_objective: Objective | MAG | SeveralTeachers,
        between: Objective | MAG,
        peer_between: Objective | MAG,
    ) -> None:
        super().__init__(student, peer, objective, peer_objective)
        self.between, self.peer_between = between, peer_between

    def peer_parameters(self) -> list[nn.Parameter]:
        """As of `TwoNetworks`."""
        return [*super().peer_parameters(), *self.peer_between.parameters()]

    def forward(
        self, batch: Batch, teacher: TeacherFeatures
    ) -> tuple[dict[str, Float[Tensor, ""]], Float[Tensor, "b k"]]:
        """Return weighted losses by name, the peer's as peer_NAME, and the student's logits."""
        student, peer = self.student(batch.images), self.peer(batch.images)
        terms = {**self.objective(student, teacher, batch), **self.between(student, _detach(peer), batch)}
        peer_terms = {**self.peer_objective(peer, teacher, batch), **self.peer_between(peer, _detach(student), batch)}
        return {**terms, **{f"peer_{name}": term for name, term in peer_terms.items()}}, student.logits

    def sample_weights(self, teacher: TeacherFeatures) -> dict[str, Float[Tensor, " b"]]:
        """Return the weights of a batch's samples, which are the same for both students, as of a Distiller."""
        return _sample_weights(self.objective, teacher)


def _sample_weights(
    objective: Objective | MAG | SeveralTeachers, teacher: TeacherFeatures
) -> dict[str, Float[Tensor, " b"]]:
    if isinstance(objective, SeveralTeachers):
        return objective.sample_weights(teacher)
    assert isinstance(teacher, Features)
    return objective.sample_weights(teacher)


def _add_codes(features: Features, objective: Objective | MAG) -> Features:
    if not isinstance(objective, MAG):
        return features
    return features._replace(codes=objective.student_heads.encode(features.embedding))


def _detach(features: Features) -> Features:
    return Features(
        features.logits.detach(),
        features.embedding.detach(),
        tuple(m.detach() for m in features.maps),
        {name: code.detach() for name, code in features.codes.items()},
        {},
        features.cam.detach() if features.cam is not None else None,
    )
