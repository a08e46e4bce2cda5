"""Batch, Features, Shapes and Pair: the data that loaders, networks and criteria exchange."""

from dataclasses import dataclass
from typing import NamedTuple

from jaxtyping import Float, Int
from torch import Tensor, nn


class Batch(NamedTuple):
    """A batch of a loader: normalised images, labels (class ids, or distributions over classes) and sample ids."""

    images: Float[Tensor, "b c h w"]
    labels: Int[Tensor, " b"] | Float[Tensor, "b k"]
    sample_ids: Int[Tensor, " b"]


class Features(NamedTuple):
    """The outputs of a network for a batch.

    Args:
        logits: [batch, classes]; [batch, 0] without a classifier.
        embedding: timm's pre-logits.
        maps: The chosen maps, shallow to deep.
        codes: Codes of the granularity heads, by granularity; empty without heads.
        views: Logits of the granularity heads, by granularity; empty without heads.
        cam: Class activation maps: the classifier at every position of the last map. Their mean over positions is the
            logits. None unless requested.
        rotated: Logits and embedding of each image rotated by 90, 180 and 270 degrees, 3 rows after one another for
            each image. None unless a criterion `rotates`.
    """

    logits: Float[Tensor, "b k"]
    embedding: Float[Tensor, "b d"]
    maps: tuple[Float[Tensor, "b c h w"], ...] = ()
    codes: dict[str, Float[Tensor, "b g"]] = {}
    views: dict[str, Float[Tensor, "b k"]] = {}
    cam: Float[Tensor, "b k h w"] | None = None
    rotated: "Features | None" = None


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
    """Shapes of a student and its teacher, from which criteria are built.

    Args:
        student, teacher: Sizes of their features.
        num_samples: Number of samples of the training split.
        labels: Class ids by sample id, -1 for samples that are not trained on.
        teacher_classifier: The one module that maps the teacher's embedding to its logits; None if there is none.
    """

    student: Shapes
    teacher: Shapes
    num_samples: int = 0
    labels: Int[Tensor, " n"] | None = None
    teacher_classifier: nn.Module | None = None


@dataclass(frozen=True)
class Defaults:
    """How a model expects its images: the defaults of a recipe.

    Args:
        mean, std: Per channel, of pixels in [0, 1].
        img_size: Side in pixels.
        interpolation, crop_pct, crop_mode: For evaluation, as in timm.
    """

    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    img_size: int = 224
    interpolation: str = "bicubic"
    crop_pct: float = 0.875
    crop_mode: str = "center"
