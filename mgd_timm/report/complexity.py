"""Supervision complexity: how far targets are from the functions that a student's tangent kernel favours.

Reference: Harutyunyan, Rawat, Menon, Kim, Kumar, "Supervision Complexity and its Role in Knowledge Distillation" (arXiv
2301.12245): y' K^-1 y of targets y under the kernel K of the student's gradients.

Differs: inspired by the paper, from its abstract and from memory; not checked against its numbers. Ours are: the kernel
of the trained student, a few images, the ridge, targets as probabilities less 1/C, and the relative value.
"""

import time
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from mgd_timm.pipeline.plan import terms_of
from mgd_timm.report.findings import Findings
from mgd_timm.report.markup import escape, missing, name, note, number, section, table
from mgd_timm.report.measure import Student

IMAGES, FEWEST = 32, 4
"""Images of the kernel; fewer for large students, and none below the fewest."""
NUMBERS = 2**27
"""Gradients that are held at once: images x classes x parameters, in float32 half a gigabyte."""
SECONDS = 60.0
"""For the kernel of one student."""
RIDGE = 1e-3
"""Added to the kernel's diagonal, in units of its mean."""


@dataclass(frozen=True)
class Complexity:
    """Supervision complexity of targets.

    Args:
        value: y' (K + r I)^-1 y, with the ridge r.
        relative: The value times the mean of K's diagonal, divided by y'y: 1 if K were a multiple of the identity, less
            for targets along the directions that the student learns fast.
    """

    value: float
    relative: float


def tangent_kernel(
    model: nn.Module, images: Float[Tensor, "n c h w"], *, seconds: float = float("inf")
) -> Float[Tensor, "m m"]:
    """Return the tangent kernel of a model in eval mode: the products of the gradients of its logits, in float64.

    Rows are the logits of the first image, then those of the second, and so on. Gradients are of all parameters.

    Args:
        model: Returns logits of images.
        images: As the model sees them.
        seconds: The most that the gradients may take.

    Raises:
        TimeoutError: They took longer.
    """
    deadline = time.monotonic() + seconds
    parameters = {key: parameter.detach() for key, parameter in model.named_parameters()}
    buffers = dict(model.named_buffers())

    def logits(values: dict[str, Tensor], image: Tensor) -> Tensor:
        found: Tensor = torch.func.functional_call(model, (values, buffers), (image[None],))[0]
        return found

    rows = []
    for image in images:
        if time.monotonic() > deadline:
            raise TimeoutError(f"its gradients take more than {seconds:g} s")
        with sdpa_kernel(SDPBackend.MATH):  # the only attention whose gradients torch.func batches
            jacobian: dict[str, Any] = torch.func.jacrev(logits)(parameters, image)
        rows.append(torch.cat([part.flatten(1).cpu() for part in jacobian.values()], 1))
    gradients = torch.cat(rows)
    kernel = torch.zeros(len(gradients), len(gradients), dtype=torch.float64)
    for part in gradients.split(2**16, 1):  # all at once would take the memory of them all in float64
        kernel += part.double() @ part.double().T
    return kernel


def supervision_complexity(
    kernel: Float[Tensor, "m m"], targets: Float[Tensor, "n k"], ridge: float = RIDGE
) -> Complexity:
    """Return the complexity of targets, one per logit, under a tangent kernel.

    Args:
        kernel: As `tangent_kernel` returns it.
        targets: Of each image and class.
        ridge: Added to the kernel's diagonal, in units of its mean.
    """
    y, mean = targets.double().flatten(), kernel.diagonal().mean()
    regular = kernel + ridge * mean * torch.eye(len(kernel), dtype=torch.float64)
    value = y @ torch.linalg.solve(regular, y)
    return Complexity(float(value), float(value * mean / (y @ y)))


def complexity_section(found: Findings) -> str:
    """Return the supervision complexity of the labels and of the teacher's probabilities for each group's student."""
    title = ("complexity", "Supervision complexity")
    teacher = found.teacher
    if isinstance(teacher, str):
        return section(*title, missing(f"the complexity of the targets: {teacher}"))
    if teacher.predictions is None:
        return section(*title, missing("the complexity: the teacher has no logits of the data's classes."))
    students = {group.label: found.first(group) for group in found.groups}
    sizes = {label: _most_images(student) for label, student in students.items()}
    count = min([IMAGES, *(size for size in sizes.values() if size >= FEWEST)])
    term, classes = terms_of(teacher.run.recipe).by_name["kd"], teacher.predictions.logits.shape[1]
    temperature = float(term.options.get("temperature", 4.0))
    rows, notes = [], []
    for label, student in students.items():
        places = student.places(count)
        labels = nn.functional.one_hot(teacher.predictions.labels[places], classes).double()
        probabilities = (teacher.predictions.logits[places].double() / temperature).softmax(1)
        try:
            if sizes[label] < FEWEST:
                raise TimeoutError("it has too many parameters and classes")
            kernel = tangent_kernel(student.model, student.some(count)[0], seconds=SECONDS)
        except (RuntimeError, TimeoutError) as error:  # not every operation has the gradients that torch.func takes
            notes.append(note(f"Left out: {name(label)}: {escape(str(error).splitlines()[0])}."))
            continue
        both = [supervision_complexity(kernel, one - 1 / classes) for one in (labels, probabilities)]
        values = [*(one.value for one in both), *(one.relative for one in both)]
        rows.append([name(label), *(f"{value:.3g}" for value in values)])
    head = ["", "labels", "teacher", "labels, relative", "teacher, relative"]
    about = (
        f"A diagnostic: y'(K + rI)⁻¹y of targets y under the tangent kernel K of the trained student, on {count} "
        f"evaluation images; r is {RIDGE:g} of K's mean diagonal. Targets are probabilities less 1/{classes}: of the "
        f"labels, and of the teacher at temperature {number(temperature, 1)}. Relative: times K's mean diagonal, "
        "divided by y'y; 1 for a kernel that favours nothing, less for targets that the student learns easily. "
        "Inspired by arXiv 2301.12245; its numbers were not reproduced, and the constants are ours. Of several seeds "
        "the lowest."
    )
    return section(*title, *([table(head, rows, about)] if rows else []), *notes)


def _most_images(student: Student) -> int:
    """Return the images whose gradients may be held at once."""
    parameters = sum(parameter.numel() for parameter in student.model.parameters())
    return min(NUMBERS // (parameters * student.images.num_classes), len(student.source.ids))
