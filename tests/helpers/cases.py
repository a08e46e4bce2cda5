"""What tests of criteria share: a pair, made-up features, reference loops, and what a case says of a criterion."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mgd_timm.criteria import Criterion
from mgd_timm.features import Batch, Features, Pair, Shapes

BATCH, CLASSES, ROTATIONS = 4, 6, 3
PAIR = Pair(
    student=Shapes(CLASSES, 10, ((4, 8, 8), (6, 4, 4)), cam=(4, 4)),
    teacher=Shapes(CLASSES, 14, ((5, 4, 4), (7, 4, 4)), cam=(2, 2)),
    num_samples=16,
    labels=torch.arange(16) % CLASSES,
    teacher_classifier=nn.Linear(14, CLASSES).requires_grad_(False),
)


def wave(shape: tuple[int, ...], a: float, b: float, gain: float = 1.0) -> Tensor:
    """The generator of the golden values: gain * sin(a n + b)."""
    return gain * torch.sin(a * torch.arange(math.prod(shape), dtype=torch.float64) + b).reshape(shape)


def features(shapes: Shapes, seed: int, dtype: torch.dtype = torch.float64, grad: bool = False) -> Features:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, count: int = BATCH) -> Tensor:
        return torch.randn(count, *shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_(grad)

    cam = draw(shapes.num_classes, *shapes.cam) if shapes.cam is not None else None
    shown = Features(draw(shapes.num_classes), draw(shapes.embed_dim), tuple(draw(*m) for m in shapes.maps), cam=cam)
    turned = (draw(width, count=ROTATIONS * BATCH) for width in (shapes.num_classes, shapes.embed_dim))
    return shown._replace(rotated=Features(*turned))


def parts(shown: Features) -> dict[str, Tensor]:
    """Every tensor that a network shows: logits, embedding, maps 0, maps 1, ..., cams, and those of rotated images."""
    maps = {f"maps {i}": m for i, m in enumerate(shown.maps)}
    return {
        "logits": shown.logits,
        "embedding": shown.embedding,
        **maps,
        **({} if shown.cam is None else {"cams": shown.cam}),
        **({f"{name} rotated": tensor for name, tensor in parts(shown.rotated).items()} if shown.rotated else {}),
    }


def of_parts(tensors: dict[str, Tensor]) -> Features:
    """The inverse of `parts`."""
    maps = tuple(tensor for name, tensor in tensors.items() if name.startswith("maps "))
    rotated = None
    if "logits rotated" in tensors:
        rotated = Features(tensors["logits rotated"], tensors["embedding rotated"])
    return Features(tensors["logits"], tensors["embedding"], maps, cam=tensors.get("cams"), rotated=rotated)


def rows(shown: Features, which: Tensor | slice) -> Features:
    """The features of some samples, in this order."""

    def choose(name: str, tensor: Tensor) -> Tensor:
        return tensor.unflatten(0, (-1, ROTATIONS))[which].flatten(0, 1) if "rotated" in name else tensor[which]

    return of_parts({name: choose(name, tensor) for name, tensor in parts(shown).items()})


def batch(labels: Tensor | None = None) -> Batch:
    ids = torch.arange(BATCH)
    return Batch(torch.zeros(BATCH, 3, 8, 8), ids % CLASSES if labels is None else labels, ids)


# References: plain Python numbers, none of the package's code.


def log_softmax(row: list[float]) -> list[float]:
    top = max(row)
    norm = top + math.log(sum(math.exp(v - top) for v in row))
    return [v - norm for v in row]


def loop_kl(student: Tensor, teacher: Tensor, temperature: float) -> float:
    total = 0.0
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
        log_s, log_t = log_softmax([v / temperature for v in s]), log_softmax([v / temperature for v in t])
        total += sum(math.exp(q) * (q - p) for p, q in zip(log_s, log_t, strict=True))
    return total * temperature**2 / len(student)


def loop_ce(logits: Tensor, target: Tensor) -> float:
    """Cross-entropy with a distribution per sample."""
    rows = zip(logits.tolist(), target.tolist(), strict=True)
    return -sum(y * p for row, weights in rows for y, p in zip(weights, log_softmax(row), strict=True)) / len(logits)


def loop_pool(image: list[list[float]], size: int) -> list[list[float]]:
    """Average over the cells of a size x size grid; the side is a multiple of it."""
    step = len(image) // size
    cells = range(step)
    return [
        [sum(image[i * step + u][j * step + v] for u in cells for v in cells) / step**2 for j in range(size)]
        for i in range(size)
    ]


Reference = Callable[[Criterion, Features, Features, Batch], float]
Same = Callable[[Criterion, Features], tuple[Features, Features]]


@dataclass(frozen=True)
class Case:
    """What is claimed of a criterion.

    Args:
        reference: Its value by plain Python loops in float64, from the paper, with none of the package's code.
        zero: Given the criterion of `pair` with the student's shapes on both sides, and a student's features: a student
            and a teacher between which it is 0; None where the maths has no zero.
        pair: Shapes it is tested on.
        ordered: Its value depends on the order of the batch, which the paper says.
        draws: It draws random numbers, or moves its buffers, in a forward pass: the same seed and state give the same
            value.
        negative: It can be below 0.
        rate: Learning rate at which 20 steps of SGD on the features lower it.
    """

    reference: Reference
    zero: Same | None
    pair: Pair = PAIR
    ordered: bool = False
    draws: bool = False
    negative: bool = False
    rate: float = 0.1
