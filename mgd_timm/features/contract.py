"""What every network shows: Batch, Features, Shapes and Pair."""

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
    """What a network shows of a batch. `codes` and `views` are the granularity heads' and empty without them.

    `logits` of a network without a classifier have no columns. `cam`: class activation maps, the classifier at every
    position of the last map; their mean is the logits. None unless tapped.
    """

    logits: Float[Tensor, "b k"]
    embedding: Float[Tensor, "b d"]
    maps: tuple[Float[Tensor, "b c h w"], ...] = ()
    codes: dict[str, Float[Tensor, "b g"]] = {}
    views: dict[str, Float[Tensor, "b k"]] = {}
    cam: Float[Tensor, "b k h w"] | None = None


class Shapes(NamedTuple):
    """Sizes of a network's features: (channels, height, width) of each tapped map, (height, width) of class activation
    maps.

    `num_classes` is 0 without a classifier.
    """

    num_classes: int
    embed_dim: int
    maps: tuple[tuple[int, int, int], ...]
    cam: tuple[int, int] | None = None


class Pair(NamedTuple):
    """All that a criterion may know when it is built; `labels` are class ids by sample id, -1 for samples held out of
    training."""

    student: Shapes
    teacher: Shapes
    num_samples: int = 0
    labels: Int[Tensor, " n"] | None = None
    teacher_classifier: nn.Module | None = None


@dataclass(frozen=True)
class Defaults:
    """What a recipe leaves open and the models know: mean and std of weights, and a model's nominal input."""

    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    img_size: int = 224
    interpolation: str = "bicubic"
    crop_pct: float = 0.875
