"""The contract of a criterion, and the one KL divergence that everything uses."""

from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mgd_timm.features import Batch, Features, Pair

Need = Literal["logits", "embedding", "maps", "cams"]

# Smallest divisors. The gradient of x / |x| is 1 / |x|: students whose classifier starts at zero, dead maps and equal
# samples would give gradients of 1e5 and more. Ordinary inputs lie above and are divided by their own spread or norm.
SMALLEST_SPREAD = 0.1  # standard deviation of logits; below it, their softmax is uniform within about 10 %
SMALLEST_RMS = 0.001  # root mean square of maps and embeddings; float16 does not resolve less beside values of about 1


def at_least_float32(tensor: Tensor) -> Tensor:
    """Half precision widened, float32 and float64 unchanged: T^2 would magnify the rounding of a half-precision
    softmax."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def smallest_norm(size: int) -> float:
    """L2 norm of a vector of `size` elements whose root mean square is SMALLEST_RMS."""
    return SMALLEST_RMS * size**0.5


def kl_divergence(
    student_logits: Float[Tensor, "b k"], teacher_logits: Float[Tensor, "b k"], temperature: float
) -> Float[Tensor, ""]:
    """Temperature-scaled Kullback-Leibler divergence of the student from the teacher, mean over the batch.

    T^2 / B * sum_b sum_k p_t(b, k) (log p_t(b, k) - log p_s(b, k)), with p = softmax(logits / T).

    Reference: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network" (arXiv 1503.02531), section 2.

    Args:
        student_logits: Raw scores of the learner; any float dtype, at least float32 inside.
        teacher_logits: Raw scores of the target, of the same shape. Gradients flow to both; detach what is fixed.
        temperature: T > 0.

    Returns:
        A scalar, 0 where both are equal, in nats times T^2.
    """
    student = torch.log_softmax(at_least_float32(student_logits) / temperature, dim=-1)
    teacher = torch.log_softmax(at_least_float32(teacher_logits) / temperature, dim=-1)
    per_sample = (teacher.exp() * (teacher - student)).sum(-1)
    return per_sample.mean() * temperature**2


def check_temperature(temperature: float) -> float:
    """The temperature itself; ValueError unless it is positive and finite."""
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature={temperature}: expected a positive, finite number.")
    return temperature


class Criterion(nn.Module):
    """One distillation method: a scalar from the features of student and teacher.

    Subclasses take `(pair, *, hyper...)`, own their adapters, and are called with features. The teacher's carry no
    gradient, which the caller promises.

    Attributes:
        weight: The method's usual weight.
        needs: The parts of the teacher's features that it reads.
        student_needs: The parts of the student's features that it reads beside those.
        relational: It compares the samples of a batch: under several processes it sees the local batch only.
        preact: The maps that it reads are those before an activation.
        fits: What is fitted before the run, by `fit` as the granularity heads are: "teacher", own modules on the
            teacher's features (`fitting`); "student", the student's backbone by this criterion alone, which the run
            then leaves out.
        peers: It is made for two students that teach each other.
        synchronised: Buffers that the criterion itself keeps identical on all processes, so that nothing else need send
            them.
        num_classes: Of the student.
        standardised: It is given standardised logits, and has to standardise those that it makes itself.
        alone: Other processes do not take part in this step: it must not wait for them.
    """

    weight: ClassVar[float]
    needs: ClassVar[frozenset[Need]]
    student_needs: ClassVar[frozenset[Need]] = frozenset()
    relational: ClassVar[bool] = False
    preact: ClassVar[bool] = False
    fits: ClassVar[Literal["teacher", "student"] | None] = None
    peers: ClassVar[bool] = False
    synchronised: ClassVar[tuple[str, ...]] = ()
    standardised: bool = False
    alone: bool = False

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Float[Tensor, ""]:
        """The unweighted loss, at least float32."""
        raise NotImplementedError  # pragma: no cover - the contract only

    def __init__(self, pair: Pair) -> None:
        super().__init__()
        self.num_classes = pair.student.num_classes

    def fitting(self) -> nn.Module | None:
        """What `fits="teacher"` fits: a module whose forward(batch, teacher) gives losses by name, and logits."""
        return None

    def remark(self) -> str | None:
        """What a user should know before the run, such as the size of a memory bank."""
        return None


class Objective(nn.Module):
    """Named, weighted criteria; the loss is their sum.

    Args:
        **terms: name=(weight, criterion), or name=(weight, criterion, warmup): epochs over which the weight rises
            linearly from 0. The name is the one in logs.

    Raises:
        ValueError: No term at all, a name that no module can have, or a negative or non-finite weight or warm-up.
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
        # A criterion of weight 0 is left out: its adapters would never see a gradient.
        try:
            self.criteria = nn.ModuleDict({name: term[1] for name, term in terms.items() if term[0]})
        except KeyError as error:
            raise ValueError(
                f"terms {', '.join(map(repr, terms))}: {error.args[0]}. A name is a key of an nn.ModuleDict: it has no "
                f"dot, and is "
                "none of that class's own, such as 'keys'."
            ) from error
        if self.warmups:
            # A buffer, which a compiled step reads anew. Full weights until a loop says how far it is.
            self.register_buffer("progress", torch.tensor(float("inf")), persistent=False)

    def forward(self, student: Features, teacher: Features, batch: Batch) -> dict[str, Float[Tensor, ""]]:
        """The weighted scalars by name, without the terms of weight 0."""
        terms = {name: self.weights[name] * term(student, teacher, batch) for name, term in self.criteria.items()}
        for name, epochs in self.warmups.items():
            terms[name] = terms[name] * (self.progress / epochs).clamp(max=1.0).to(terms[name].dtype)
        return terms

    def set_progress(self, epochs: float) -> None:
        """Epochs of training done, which warm-ups go by."""
        if self.warmups:
            self.progress.fill_(epochs)

    @property
    def needs(self) -> frozenset[Need]:
        """The parts of the teacher's features that terms with a weight read."""
        return frozenset[Need]().union(*(c.needs for c in self.criteria.values() if isinstance(c, Criterion)))
