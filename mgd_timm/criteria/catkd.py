"""CAT-KD: class attention transfer (Guo et al. 2023)."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from mgd_timm.criteria.base import Criterion, at_least_float32, check_one_label_space
from mgd_timm.criteria.nst import selectivity
from mgd_timm.features import Batch, Features, Pair


def class_attention(
    cam: Float[Tensor, "b k h w"], size: tuple[int, int], normalise: bool
) -> Float[Tensor, "b k h2 w2"]:
    """Return class activation maps, average-pooled to a size.

    Args:
        cam: Class activation maps.
        size: (height, width) of the result.
        normalise: Give each map of each sample unit L2 norm. The root mean square of a map counts as at least 0.001.
    """
    pooled = F.adaptive_avg_pool2d(at_least_float32(cam), size)
    if not normalise:
        return pooled
    return selectivity(pooled).unflatten(2, size)


class CATKD(Criterion):
    """Class attention transfer: mean((phi(A_s) - phi(A_t))^2), A the class activation maps, phi their average pooling.

    Reference: Guo et al., "Class Attention Transfer Based Knowledge Distillation" (arXiv 2304.12777), the CAT loss.

    Weight: 15 with 1 for the task loss, 2x2, not normalised (the authors' configuration of resnet32x4 -> resnet8x4).
    The right weight depends on the scale of the maps. The authors use 0.7 to 15 within a family; normalised, 15 to 40
    at 2x2 (to MobileNetV2), 80 and 600 at 4x4 (to ShuffleNets); on ImageNet 0.5 at 4x4 (ResNet-34 -> 18) and 10 at 2x2,
    normalised (ResNet-50 -> MobileNet). If 15 diverges, as with the embedded teacher at lr 0.1, use catkd:1
    (benchmarks/hosts.py) or normalise=True, which removes the scale.

    Differs: the networks keep their classifier, whose bias is part of the maps (there it becomes a 1x1 convolution
    without bias). If a network has fewer positions than `resolution`, both networks are pooled to these. With
    normalise=True, a map with a root mean square below 0.001 is not scaled up to unit norm (there: any map above 1e-12
    is): the result and its gradient tend to 0 with the map.

    Args:
        pair: Shapes of both networks, with class activation maps of the same classes.
        resolution: Side of the pooled maps in positions, 1 or more.
        normalise: Give each map unit L2 norm, as the authors do between families.

    Raises:
        ValueError: A network has no class activation maps, the numbers of classes differ, resolution is below 1, or
            normalised maps would have one position.
    """

    weight = 15.0
    needs = frozenset({"cams"})

    def __init__(self, pair: Pair, *, resolution: int = 2, normalise: bool = False) -> None:
        super().__init__(pair)
        cams = {"student": pair.student.cam, "teacher": pair.teacher.cam}
        lacking = " and ".join(name for name, cam in cams.items() if cam is None)
        if pair.student.cam is None or pair.teacher.cam is None:
            raise ValueError(
                f"CAT-KD needs class activation maps of both networks (missing: {lacking}): use "
                "FeatureTap(model, cam=True), with a network that pools its last map and then classifies, such as a "
                "resnet."
            )
        check_one_label_space("CAT-KD", pair)
        if resolution < 1:
            raise ValueError(f"resolution={resolution}: expected 1 or more positions a side.")
        (height_s, width_s), (height_t, width_t) = pair.student.cam, pair.teacher.cam
        self.size = (min(resolution, height_s, height_t), min(resolution, width_s, width_t))
        self.normalise = normalise
        if normalise and self.size == (1, 1):
            raise ValueError(
                f"normalise=True: the student's {pair.student.cam} and the teacher's {pair.teacher.cam} positions are "
                f"pooled to one position (resolution={resolution}), where only the sign of a normalised map is left. "
                "Use larger images (--img-size), a resolution of 2 or more, or normalise=False."
            )

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Float[Tensor, ""]:
        """Return the loss, at least float32."""
        assert student.cam is not None  # the shapes have them
        assert teacher.cam is not None
        one, two = (class_attention(cam, self.size, self.normalise) for cam in (student.cam, teacher.cam))
        return F.mse_loss(one, two)
