"""SRRL: softmax regression representation learning (Yang et al. 2021)."""

import copy

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mgd_timm.criteria.base import Criterion, at_least_float32, check_parts
from mgd_timm.features import Batch, Features, Pair


class SRRL(Criterion):
    """Representations through the teacher's classifier W_t: alpha mean((h_s' - h_t)^2) + beta mean((W_t h_s' - W_t
    h_t)^2).

    h_s' is the student's embedding after a trained connector; the teacher's classifier is a frozen copy. W_t h_t are
    the teacher's logits, also under MAS, whose stable excitation cannot be computed from the embedding.

    Reference: Yang et al., "Knowledge distillation via softmax regression representation learning" (ICLR 2021,
    OpenReview ZzwDy_wiWv), L_FM and L_SR.

    Weight: 1 with 1 for the task loss, alpha 1, beta 1 (official code).

    Differs: the official connector (1x1 convolution, BatchNorm, ReLU) is applied to the last map before pooling; here
    the same three layers are applied to the embedding, which all networks have (other public code for SRRL does the
    same). L_SR is the paper's L2 form between logits, as in the official code. With ReLU the connector cannot reach
    negative values of an embedding (ViT, ConvNeXt): use relu=False. SimKD (Chen et al., arXiv 2203.14001) is similar,
    but it puts the projector and the teacher's classifier inside the student, which is then no timm model and cannot be
    exported for timm.create_model.

    Args:
        pair: Shapes of both networks, and the teacher's classifier as a module on its embedding. Numbers of classes may
            differ. Batches have 2 or more samples because of BatchNorm.
        alpha: Weight of the embeddings' part, 0 or more.
        beta: Weight of the logits' part, 0 or more.
        relu: End the connector in a ReLU, as in the official code.

    Raises:
        ValueError: The teacher has no such classifier or is a peer, or a weight is out of range.
    """

    weight = 1.0
    needs = frozenset({"embedding"})

    def __init__(self, pair: Pair, *, alpha: float = 1.0, beta: float = 1.0, relu: bool = True) -> None:
        super().__init__(pair)
        if pair.teacher_classifier is None:
            raise ValueError(
                "SRRL classifies with the teacher's classifier, and this teacher has no single module that maps its "
                "embedding to logits: choose one with a linear classifier, such as a resnet or a ViT, or another "
                "criterion. A peer's classifier is not trained yet: use a teacher instead of --peer."
            )
        self.alpha, self.beta = check_parts(alpha=alpha, beta=beta)
        linear = nn.Linear(pair.student.embed_dim, pair.teacher.embed_dim, bias=False)
        nn.init.kaiming_normal_(linear.weight, mode="fan_out")
        norm = nn.BatchNorm1d(pair.teacher.embed_dim)
        self.connector = nn.Sequential(linear, norm, nn.ReLU() if relu else nn.Identity())
        # A copy, which follows this criterion's device and dtype, not the teacher's; in float32 like the connector.
        self.classifier = copy.deepcopy(pair.teacher_classifier).float().requires_grad_(False).eval()
        self._original = [pair.teacher_classifier]  # in a list: it is no module of this criterion

    def reload_teacher_classifier(self) -> None:
        """Update the copy of the teacher's classifier, after the original was fitted."""
        self.classifier.load_state_dict(self._original[0].state_dict())

    # "SRRL", not Self, which beartype refuses in a class that it does not decorate as a whole.
    def train(self, mode: bool = True) -> "SRRL":
        """Set the mode; the teacher's classifier stays in eval mode."""
        super().train(mode)
        self.classifier.eval()
        return self

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Float[Tensor, ""]:
        """Return the loss, at least float32."""
        connected, target = self.connector(student.embedding), at_least_float32(teacher.embedding)
        features = F.mse_loss(at_least_float32(connected), target)
        logits, expected = (at_least_float32(self.classifier(embedding)) for embedding in (connected, target))
        return self.alpha * features + self.beta * F.mse_loss(logits, expected)
