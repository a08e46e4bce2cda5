"""Batch, Features, Shapes and Pair: what passes between data, networks and criteria."""

from dataclasses import dataclass
from typing import NamedTuple

from jaxtyping import Float, Int
from torch import Tensor, nn


class Batch(NamedTuple):
    """What a loader yields: normalised images, labels (class ids, or a distribution over classes) and sample ids."""

    images: Float[Tensor, "b c h w"]
    labels: Int[Tensor, " b"] | Float[Tensor, "b k"]
    sample_ids: Int[Tensor, " b"]


class Features(NamedTuple):
    """What a network computes of a batch.

    Args:
        logits: Without columns where the network has no classifier.
        embedding: timm's pre-logits.
        maps: The chosen maps, shallow to deep.
        codes: Of the granularity heads, by granularity; empty without heads.
        views: Logits of the granularity heads, by granularity; empty without heads.
        cam: Class activation maps: the classifier at every position of the last map. Their mean over positions is the
            logits. None unless asked for.
    """

    logits: Float[Tensor, "b k"]
    embedding: Float[Tensor, "b d"]
    maps: tuple[Float[Tensor, "b c h w"], ...] = ()
    codes: dict[str, Float[Tensor, "b g"]] = {}
    views: dict[str, Float[Tensor, "b k"]] = {}
    cam: Float[Tensor, "b k h w"] | None = None


class Shapes(NamedTuple):
    """Sizes of a network's features.

    Args:
        num_classes: Width of the logits; 0 without a classifier.
        embed_dim: Width of the embedding.
        maps: (channels, height, width) of each chosen map.
        cam: (height, width) of class activation maps.
    """

    num_classes: int
    embed_dim: int
    maps: tuple[tuple[int, int, int], ...]
    cam: tuple[int, int] | None = None


class Pair(NamedTuple):
    """All that a criterion may know when it is built.

    Args:
        student, teacher: Sizes of their features.
        num_samples: Of the training split.
        labels: Class ids by sample id, -1 for samples held out of training.
        teacher_classifier: The module that maps the teacher's embedding to its logits, where there is one.
    """

    student: Shapes
    teacher: Shapes
    num_samples: int = 0
    labels: Int[Tensor, " n"] | None = None
    teacher_classifier: nn.Module | None = None


@dataclass(frozen=True)
class Defaults:
    """How a model expects its images, for what the recipe leaves open.

    Args:
        mean, std: Per channel, of pixels in [0, 1].
        img_size: Side in pixels.
        interpolation, crop_pct: Of evaluation, as in timm.
    """

    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    img_size: int = 224
    interpolation: str = "bicubic"
    crop_pct: float = 0.875
