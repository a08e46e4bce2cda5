"""Base class of criteria, their weighted sum, and the functions that many of them use."""

from collections.abc import Callable, Mapping
from typing import ClassVar, Literal, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mgd_timm.features import Batch, Features, Pair
from mgd_timm.recipe.optim import Optim

Need = Literal["logits", "embedding", "maps", "cams"]

# Smallest divisors. The gradient of x / |x| is 1 / |x|: students whose classifier starts at zero, dead maps and equal
# samples would give gradients of 1e5 and more. Ordinary inputs have larger ones.
SMALLEST_SPREAD = 0.1  # standard deviation of logits; below it, their softmax is uniform within about 10 %
SMALLEST_RMS = 0.001  # root mean square of maps and embeddings; float16 does not resolve less beside values of about 1


def at_least_float32(tensor: Tensor) -> Tensor:
    """Convert half precision to float32: T^2 would magnify the rounding of a half-precision softmax."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def smallest_norm(size: int) -> float:
    """L2 norm of a vector of `size` elements whose root mean square is SMALLEST_RMS."""
    return SMALLEST_RMS * size**0.5


def kl_divergence_per_sample(
    student_logits: Float[Tensor, "b k"], teacher_logits: Float[Tensor, "b k"], temperature: float
) -> Float[Tensor, " b"]:
    """Return the divergence of each sample, whose mean is `kl_divergence`'s; arguments as there."""
    student = torch.log_softmax(at_least_float32(student_logits) / temperature, dim=-1)
    teacher = torch.log_softmax(at_least_float32(teacher_logits) / temperature, dim=-1)
    return (teacher.exp() * (teacher - student)).sum(-1) * temperature**2


def kl_divergence(
    student_logits: Float[Tensor, "b k"], teacher_logits: Float[Tensor, "b k"], temperature: float
) -> Float[Tensor, ""]:
    """Return the temperature-scaled Kullback-Leibler divergence of the student from the teacher, mean over the batch.

    T^2 / B * sum_b sum_k p_t(b, k) (log p_t(b, k) - log p_s(b, k)), with p = softmax(logits / T).

    Reference: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network" (arXiv 1503.02531), section 2.

    Args:
        student_logits: Raw scores of the student, in any float dtype; computed in at least float32.
        teacher_logits: Raw scores of the teacher, of the same shape. Gradients flow to both: detach constants.
        temperature: T > 0.

    Returns:
        A scalar in nats times T^2, 0 if both are equal.
    """
    return kl_divergence_per_sample(student_logits, teacher_logits, temperature).mean()


def check_one_label_space(method: str, pair: Pair) -> None:
    """Raise ValueError unless student and teacher have the same number of classes, 2 or more."""
    student, teacher = pair.student.num_classes, pair.teacher.num_classes
    if student != teacher:
        raise ValueError(
            f"{method} needs the same classes: the student has {student} classes, the teacher {teacher}. Retrain the "
            "teacher's classifier for these classes (mgd-timm train) or use a criterion that needs no logits."
        )
    if student < 2:
        raise ValueError(f"{method} compares classes, and the data has {student}: use data with 2 classes or more.")


def check_parts(**weights: float) -> tuple[float, ...]:
    """Return the weights of a criterion's parts.

    Raises:
        ValueError: A weight is negative or not finite, or all are 0.
    """
    if not all(0 <= weight < float("inf") for weight in weights.values()) or not any(weights.values()):
        words = ", ".join(f"{name}={weight}" for name, weight in weights.items())
        raise ValueError(f"{words}: expected finite numbers, 0 or more, and not all 0.")
    return tuple(weights.values())


def target_classes(labels: Int[Tensor, " b"] | Float[Tensor, "b k"]) -> Int[Tensor, " b"]:
    """Return class ids: of a distribution over classes (mixup, smoothing), the first of the most likely classes."""
    return labels.argmax(1) if labels.is_floating_point() else labels.long()


def convert_soft_labels(labels: Int[Tensor, " b"] | Float[Tensor, "b k"], dtype: torch.dtype) -> Tensor:
    """Return labels as F.cross_entropy takes them: distributions over classes in a dtype, class ids as they are."""
    return labels.to(dtype) if labels.is_floating_point() else labels


class Criterion(nn.Module):
    """One distillation method: a scalar loss from the features of student and teacher.

    Subclasses take `(pair, *, options...)`, own their adapters, and are called with features. The caller must pass
    teacher features without gradients. They define `sample_values` where the loss is a mean of one value per sample,
    else `forward`.

    Attributes:
        weight: Usual weight of the method.
        needs: Parts of the teacher's features that the criterion uses.
        student_needs: Parts of the student's features that it uses in addition.
        relational: It compares the samples of a batch: with several processes, each process uses its local batch.
        preact: It uses maps before their activation.
        fits: What is pre-trained before the run, with `fit` as the granularity heads are: "teacher", modules of the
            criterion on the teacher's features (`fitting`); "student", the student's backbone with this criterion
            alone, which the run then does not use.
        per_sample: It defines `sample_values`, so that samples can be weighted.
        fitting_rule: How the module of `fitting` is fitted; None for the run's optimizer at a constant learning rate
            of 0.01 or less.
        rotates: It also reads logits and embedding of the images' rotations, of both networks (`Features.rotated`).
        beside: Usual weights of "ce" and "kd" beside this method, where they are its own.
        peers: It is for two networks that train together (`--peer`).
        trains_teacher: The second of them is a teacher that learns from the labels alone (`teacher_parts`).
        own_step: It has modules that a step of its own trains, between the updates (training/own_step.py).
        note: What is not the paper's own, as "inspired by arXiv 2501.07804; constants ours"; None where the docstring's
            "Differs" says all.
        synchronised: Buffers that the criterion keeps identical on all processes, so that they are not broadcast.
        num_classes: Number of classes of the student.
        standardised: It gets standardised logits, and has to standardise the logits that it computes.
        sample_weight: Returns the weights of samples from the teacher's logits, where samples are weighted.
        alone: Only this process runs the step: do not use collectives.
    """

    weight: ClassVar[float]
    needs: ClassVar[frozenset[Need]]
    student_needs: ClassVar[frozenset[Need]] = frozenset()
    relational: ClassVar[bool] = False
    preact: ClassVar[bool] = False
    fits: ClassVar[Literal["teacher", "student"] | None] = None
    per_sample: ClassVar[bool] = False
    fitting_rule: ClassVar[Optim | None] = None
    rotates: ClassVar[bool] = False
    beside: ClassVar[Mapping[str, float]] = {}
    peers: ClassVar[bool] = False
    own_step: ClassVar[bool] = False
    trains_teacher: ClassVar[bool] = False
    note: ClassVar[str | None] = None
    synchronised: ClassVar[tuple[str, ...]] = ()
    standardised: bool = False
    sample_weight: Callable[[Tensor], Tensor] | None = None
    alone: bool = False

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Float[Tensor, ""]:
        """Return the unweighted loss, at least float32."""
        return self.sample_values(student, teacher, batch).mean()

    def sample_values(self, student: Features, teacher: Features, batch: Batch) -> Float[Tensor, " b"]:
        """Return the unweighted loss of each sample, at least float32, if `per_sample`."""
        raise NotImplementedError  # pragma: no cover - the contract only

    def parts(self, student: Features, teacher: Features, batch: Batch) -> dict[str, Float[Tensor, ""]]:
        """Return the parts of the unweighted loss that are logged apart, by name; a loss in one piece has no name."""
        return {"": self(student, teacher, batch)}

    def teacher_parts(self, teacher: Features, batch: Batch) -> dict[str, Float[Tensor, ""]]:
        """Return what the teacher learns beside the task, by name, from its features with gradients, if
        `trains_teacher`."""
        return {}

    def teacher_modules(self) -> list[nn.Module]:
        """Return the modules that train with the teacher, if `trains_teacher`."""
        return []

    def __init__(self, pair: Pair) -> None:
        super().__init__()
        self.num_classes = pair.student.num_classes

    def fitting(self) -> nn.Module | None:
        """Return the module to pre-train if `fits` is "teacher": forward(batch, teacher) returns losses and logits."""
        return None

    def reload_teacher_classifier(self) -> None:
        """Update the criterion's copy of the teacher's classifier, if it has one, after the original was fitted."""

    def remark(self) -> str | None:
        """Return what the user should know before the run, such as the size of a memory bank."""
        return None


def needs_rotations(module: nn.Module) -> bool:
    """Return whether a criterion in a module reads features of the images' rotations."""
    return any(isinstance(criterion, Criterion) and criterion.rotates for criterion in module.modules())


def trains_teacher(module: nn.Module) -> bool:
    """Return whether a criterion in a module is learnt from a teacher that trains in the run."""
    return any(isinstance(criterion, Criterion) and criterion.trains_teacher for criterion in module.modules())


def synchronised_buffers(module: nn.Module) -> list[str]:
    """Return the names of the buffers that the criteria in a module keep identical on all processes."""
    return [
        f"{path}.{name}"
        for path, criterion in module.named_modules()
        if isinstance(criterion, Criterion)
        for name in criterion.synchronised
    ]


class Objective(nn.Module):
    """Named, weighted criteria; the loss is their sum.

    Args:
        **terms: name=(weight, criterion), or name=(weight, criterion, warmup) with the epochs over which the weight
            rises linearly from 0. The name is used in logs, and NAME_PART for a part of a criterion.

    Raises:
        ValueError: There is no term, a name is not allowed for a module, or a weight or warm-up is negative or not
            finite.
    """

    progress: Tensor

    def __init__(self, **terms: tuple[float, Criterion] | tuple[float, Criterion, float]) -> None:
        super().__init__()
        if not terms:
            raise ValueError("Objective() has no term: give at least one, such as task=(1.0, CrossEntropy(pair)).")
        for name, (weight, _, *rest) in terms.items():
            if not 0 <= weight < float("inf"):
                raise ValueError(f"weight of {name!r} is {weight}: expected a finite number, 0 or more.")
            if rest and not 0 <= rest[0] < float("inf"):
                raise ValueError(f"warm-up of {name!r} is {rest[0]} epochs: expected a finite number, 0 or more.")
        self.weights = {name: float(weight) for name, (weight, *_) in terms.items()}
        self.warmups = {name: float(term[2]) for name, term in terms.items() if len(term) == 3 and term[2] and term[0]}
        # Criteria of weight 0 are left out: their adapters would never get a gradient.
        try:
            self.criteria = nn.ModuleDict({name: term[1] for name, term in terms.items() if term[0]})
        except KeyError as error:
            raise ValueError(
                f"terms {', '.join(map(repr, terms))}: {error.args[0]}. A name must have no dot, and must "
                "not be an attribute of nn.ModuleDict, such as 'keys'."
            ) from error
        if self.warmups:
            # A buffer, which a compiled step reads each time. Weights are full until set_progress is called.
            self.register_buffer("progress", torch.tensor(float("inf")), persistent=False)

    def forward(self, student: Features, teacher: Features, batch: Batch) -> dict[str, Float[Tensor, ""]]:
        """Return the weighted losses by name, without the terms of weight 0."""
        terms: dict[str, Float[Tensor, ""]] = {}
        for name, criterion in self.criteria.items():
            terms |= self._named(name, cast(Criterion, criterion).parts(student, teacher, batch))
        return terms

    def teacher_terms(self, teacher: Features, batch: Batch) -> dict[str, Float[Tensor, ""]]:
        """Return the weighted losses by name of a teacher that trains in the run, from its features with gradients."""
        terms: dict[str, Float[Tensor, ""]] = {}
        for name, criterion in self.criteria.items():
            terms |= self._named(name, cast(Criterion, criterion).teacher_parts(teacher, batch))
        return terms

    def _named(self, name: str, parts: dict[str, Float[Tensor, ""]]) -> dict[str, Float[Tensor, ""]]:
        return {f"{name}_{part}" if part else name: self.weigh(name, loss) for part, loss in parts.items()}

    def weigh(self, name: str, loss: Float[Tensor, ""]) -> Float[Tensor, ""]:
        """Return the loss of a term, or of its part, times the term's weight at this time of its warm-up."""
        term = self.weights[name] * loss
        if name in self.warmups:
            term = term * (self.progress / self.warmups[name]).clamp(max=1.0).to(term.dtype)
        return term

    def set_progress(self, epochs: float) -> None:
        """Set the number of epochs trained so far, which warm-ups depend on."""
        if self.warmups:
            self.progress.fill_(epochs)

    @property
    def needs(self) -> frozenset[Need]:
        """Parts of the teacher's features that the terms use, without those of weight 0."""
        weights: frozenset[Need] = frozenset({"logits"} if self.sample_weight is not None else ())
        return weights.union(*(c.needs for c in self.criteria.values() if isinstance(c, Criterion)))

    @property
    def sample_weight(self) -> Callable[[Tensor], Tensor] | None:
        """Returns the weights of samples from the teacher's logits; None where no term is weighted by sample."""
        found = (c.sample_weight for c in self.criteria.values() if isinstance(c, Criterion))
        return next((one for one in found if one is not None), None)

    def sample_weights(self, teacher: Features) -> dict[str, Float[Tensor, " b"]]:
        """Return the weights of a batch's samples, for logs, under the name ""; nothing where there are none."""
        return {} if self.sample_weight is None else {"": self.sample_weight(teacher.logits)}
