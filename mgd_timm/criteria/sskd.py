"""SSKD: self-supervision of rotated images as an auxiliary task (Xu et al. 2020)."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mgd_timm.criteria.base import Criterion, at_least_float32, check_one_label_space, smallest_norm, target_classes
from mgd_timm.features import Batch, Features, Pair
from mgd_timm.recipe.optim import Optim


def find_sources(similarities: Float[Tensor, "r b"]) -> Int[Tensor, " r"]:
    """Return the number of the image that each rotation is of."""
    count = similarities.shape[1]
    return torch.arange(count, device=similarities.device).repeat_interleave(len(similarities) // count)


def select_rows(scores: Float[Tensor, "r k"], targets: Int[Tensor, " r"], share: float) -> Bool[Tensor, " r"]:
    """Return which rows the student learns: those that the teacher gets right, and the share of its least mistakes.

    Rows are sorted by the rank of their target among their scores. Of w rows with a higher score than their target's,
    the first floor(share w) are kept.
    """
    ranks = (scores > scores.gather(1, targets[:, None])).sum(1)
    wrong = (ranks > 0).sum()
    kept = len(ranks) - wrong + (share * wrong.double()).floor()  # float32 rounds 0.29 x 100 up
    return ranks.argsort(stable=True).argsort() < kept


def kl_of_rows(
    student: Float[Tensor, "r k"], teacher: Float[Tensor, "r k"], temperature: float, kept: Bool[Tensor, " r"]
) -> Float[Tensor, ""]:
    """Return T^2 KL(softmax(teacher / T) || softmax(student / T)), mean over the kept rows; 0 without one."""
    student = torch.log_softmax(at_least_float32(student) / temperature, dim=1)
    teacher = torch.log_softmax(at_least_float32(teacher) / temperature, dim=1)
    rows = (teacher.exp() * (teacher - student)).sum(1)
    return temperature**2 * (rows * kept).sum() / kept.sum().clamp_min(1)  # a mask: to select rows would wait for a GPU


class RotationHead(nn.Module):
    """Linear-ReLU-Linear on an embedding, and the cosines of each rotation with all images of the batch.

    On a frozen teacher it is fitted to tell which image a rotation is of: cross-entropy of the cosines' softmax.

    Args:
        embed_dim: Width of the embedding, and of both layers.
    """

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(embed_dim, embed_dim), nn.ReLU(), nn.Linear(embed_dim, embed_dim))

    def similarities(self, features: Features) -> Float[Tensor, "r b"]:
        """Return the cosine of each rotation (3 for each image, one after the other) with each image.

        Raises:
            ValueError: The features have no rotations.
        """
        if features.rotated is None:
            raise ValueError(
                "SSKD compares images with their rotations, and these features have none: use Distiller for the "
                "student and LiveTeachers(teacher, rotate=True) for the teacher."
            )
        with torch.autocast(features.embedding.device.type, enabled=False):
            both = torch.cat([features.embedding, features.rotated.embedding])
            projected = self.layers(at_least_float32(both))
            norms = torch.linalg.vector_norm(projected, dim=1, keepdim=True)
            unit = projected / norms.clamp_min(smallest_norm(projected.shape[1]))
            count = len(features.embedding)
            return unit[count:] @ unit[:count].T

    def forward(self, batch: Batch, teacher: Features) -> tuple[dict[str, Float[Tensor, ""]], Float[Tensor, "b k"]]:
        """Return the loss "source", and the teacher's logits. `batch` is not used."""
        similarities = self.similarities(teacher)
        return {"source": F.cross_entropy(similarities, find_sources(similarities))}, teacher.logits


class SSKD(Criterion):
    """Self-supervision: w_r T_r^2 KL(teacher || student) of the rotated images' logits + w_s T_s^2 KL(teacher ||
    student) of their similarities, on kept rows.

    Each image is rotated by 90, 180 and 270 degrees. Similarities are the cosines of the 3B rotations with the B images
    of the batch, after a head on each network's embedding; their softmax, at T_s, is over the B images. The teacher's
    head is fitted before the run to tell which image a rotation is of, and then frozen; the student's learns from the
    similarities alone. Kept are the rows that the teacher gets right (the class of a rotation, or its image), and a
    share of the others, those first in which the right answer ranks high. With several processes, each process uses its
    local batch.

    Teacher and student see 4B images in each step, at four times the cost of B. Other criteria, and the codes and
    stable logits of MAG and MAS, see the images as they are.

    Reference: Xu, Liu, Li, Loy, "Knowledge Distillation Meets Self-Supervision" (arXiv 2006.07114), with one of its
    four transformations, as in the official code (github.com/xuguodong03/SSKD).

    Weight: 1, with w_r = 2.7 and w_s = 10 inside, beside 0.1 for the task loss and 0.9 for KD at T = 4 (official code;
    the paper's versions have other weights). The teacher's head is fitted by SGD with momentum at a learning rate of
    0.05, divided by 10 after 1/2 and 3/4 of the epochs, weight decay 5e-4 (official code: 60 epochs, so
    fitting_epochs=60).

    Differs: losses, kept rows and gradients are those of the official code (compared in float64). The four images of
    one share one augmentation, of which the rotations are made (there: each is cropped on its own). The teacher's head
    is fitted on stored outputs of a few augmentations of each image, which the heads of MAG and MAS share, unless
    heads_protocol is live, as there. Of wrong rows with the same rank, the first ones of the batch are kept (there: any
    of them). A score that equals the target's does not count as higher. If the teacher is wrong everywhere and no
    mistake is kept, the loss is 0 (there: not a number). A vector with a root mean square below 0.001 is not scaled up
    to unit norm.

    Args:
        pair: Shapes of both networks, with the same classes and embeddings of any width.
        rotated_weight: w_r, 0 or more.
        rotated_temperature: T_r, positive.
        rotated_kept: Share of the teacher's wrong rows that is kept for the logits, 0 to 1.
        similarity_weight: w_s, positive.
        similarity_temperature: T_s, positive.
        similarity_kept: As rotated_kept, for the similarities.

    Raises:
        ValueError: The numbers of classes differ, or an option is out of range.
    """

    weight = 1.0
    needs = frozenset({"logits", "embedding"})
    relational = True
    rotates = True
    fits = "teacher"
    fitting_rule = Optim(epochs=60, lr=0.05, sched="multistep", decay_milestones=(30.0, 45.0))
    beside = {"ce": 0.1, "kd": 0.9}

    def __init__(
        self,
        pair: Pair,
        *,
        rotated_weight: float = 2.7,
        rotated_temperature: float = 4.0,
        rotated_kept: float = 1.0,
        similarity_weight: float = 10.0,
        similarity_temperature: float = 0.5,
        similarity_kept: float = 0.75,
    ) -> None:
        super().__init__(pair)
        check_one_label_space("SSKD", pair)
        positive = {
            "rotated_temperature": rotated_temperature,
            "similarity_weight": similarity_weight,
            "similarity_temperature": similarity_temperature,
        }
        for name, value in positive.items():
            if not 0 < value < float("inf"):
                raise ValueError(f"{name}={value}: expected a finite number above 0.")
        if not 0 <= rotated_weight < float("inf"):
            raise ValueError(f"rotated_weight={rotated_weight}: expected a finite number, 0 or more.")
        for name, value in {"rotated_kept": rotated_kept, "similarity_kept": similarity_kept}.items():
            if not 0 <= value <= 1:
                raise ValueError(f"{name}={value}: expected a share from 0 to 1.")
        self.rotated = (rotated_weight, rotated_temperature, rotated_kept)
        self.similarity = (similarity_weight, similarity_temperature, similarity_kept)
        self.teacher_head = RotationHead(pair.teacher.embed_dim)  # first: its weights depend on the teacher alone
        self.student_head = RotationHead(pair.student.embed_dim)
        self.teacher_head.requires_grad_(False)

    def fitting(self) -> nn.Module:
        """Return the teacher's head."""
        return self.teacher_head

    def parts(self, student: Features, teacher: Features, batch: Batch) -> dict[str, Float[Tensor, ""]]:
        """Return the losses "rotated" (logits) and "similarity", at least float32."""
        with torch.no_grad():
            expected = self.teacher_head.similarities(teacher)
        similarities = self.student_head.similarities(student)
        assert student.rotated is not None
        assert teacher.rotated is not None
        weight, temperature, share = self.rotated
        labels = target_classes(batch.labels).repeat_interleave(len(expected) // len(batch.labels))
        kept = select_rows(teacher.rotated.logits, labels, share)
        logits = weight * kl_of_rows(student.rotated.logits, teacher.rotated.logits, temperature, kept)
        weight, temperature, share = self.similarity
        kept = select_rows(expected, find_sources(expected), share)
        return {"rotated": logits, "similarity": weight * kl_of_rows(similarities, expected, temperature, kept)}

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Float[Tensor, ""]:
        """Return the sum of the parts."""
        rotated, similarity = self.parts(student, teacher, batch).values()
        return rotated + similarity
