"""Multi-Granularity Distillation: the paper's heads, how they are fitted, and its two objectives.

Reference: Shao, Chen, "Multi-granularity for knowledge distillation" (arXiv 2108.06681). Two encoder-decoder heads
analyse the frozen teacher's embedding at an abstract (narrow code) and a detailed (wide code) granularity. MAG: the
student learns the codes. MAS: it also learns from the stable excitation, the mean of the teacher's logits and the
heads' views.
"""

import contextlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mgd_timm.criteria.base import (
    Criterion,
    Need,
    Objective,
    at_least_float32,
    check_one_label_space,
    convert_soft_labels,
    kl_divergence,
)
from mgd_timm.criteria.kd import soft_divergence
from mgd_timm.criteria.sample_weight import EntropyWeight
from mgd_timm.features import Batch, Features, Pair
from mgd_timm.recipe.granularity import DEFAULT_GRANULARITIES, Granularity


def _mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, outputs))


def _outside_autocast(tensor: Tensor) -> AbstractContextManager[Any]:
    # The meta device has no autocast, and torch refuses to disable it there.
    return contextlib.nullcontext() if tensor.is_meta else torch.autocast(tensor.device.type, enabled=False)


class GranularityHeads(nn.Module):
    """An encoder (embedding to code) and a decoder (code to class logits) per granularity, in at least float32.

    The layers are the paper's: Linear-ReLU-Linear in both, as wide inside as the embedding, without normalisation.

    Differs: computed outside autocast, as T^2 magnifies the bfloat16 rounding of the codes.

    Args:
        embed_dim: Width of the network's embedding.
        num_classes: Number of classes of the views; None builds encoders only, which is all that a student needs.
        granularities: Levels of detail, with distinct names.

    Raises:
        ValueError: There is no granularity, or two have the same name.
    """

    def __init__(
        self, embed_dim: int, num_classes: int | None, granularities: Sequence[Granularity] = DEFAULT_GRANULARITIES
    ) -> None:
        super().__init__()
        names = [g.name for g in granularities]
        if not names or len(set(names)) != len(names):
            raise ValueError(f"granularities {names}: expected one or more, with distinct names.")
        self.granularities = tuple(granularities)
        self.encoders = nn.ModuleDict({g.name: _mlp(embed_dim, embed_dim, g.dim) for g in granularities})
        self.decoders = nn.ModuleDict()
        if num_classes is not None:
            self.decoders.update({g.name: _mlp(g.dim, embed_dim, num_classes) for g in granularities})

    def encode(self, embedding: Float[Tensor, "b d"]) -> dict[str, Float[Tensor, "b g"]]:
        """Return codes by granularity, each [batch, dim]."""
        with _outside_autocast(embedding):
            embedding = at_least_float32(embedding)
            return {name: encoder(embedding) for name, encoder in self.encoders.items()}

    def decode(self, codes: dict[str, Float[Tensor, "b g"]]) -> dict[str, Float[Tensor, "b k"]]:
        """Return views by granularity, each [batch, classes]; none without decoders."""
        with _outside_autocast(next(iter(codes.values()))):
            return {name: decoder(at_least_float32(codes[name])) for name, decoder in self.decoders.items()}


def stable_excitation(logits: Float[Tensor, "b _"], views: dict[str, Float[Tensor, "b k"]]) -> Float[Tensor, "b k"]:
    """Return the mean of the teacher's logits and the heads' views, before any softmax.

    Args:
        logits: [batch, classes], or [batch, 0] for a teacher without logits, which leaves the mean of the views.
        views: By granularity, each [batch, classes].
    """
    scores = [logits, *views.values()] if logits.shape[1] else list(views.values())
    return torch.stack([at_least_float32(one) for one in scores]).mean(0)


class HeadFitting(nn.Module):
    """Fit all heads at once on a frozen teacher's embedding: per head CE(view, y) + T^2 KL(teacher logits || view).

    With a teacher without logits (a self-supervised one, or one of other classes) the loss is CE(view, y) alone.

    Differs: one pass and one optimiser for all heads (the authors' scripts: one pass each). The heads share no
    parameters, so with one learning rate the gradients are the same.

    Args:
        heads: Heads with decoders.

    Raises:
        ValueError: The heads have no decoders.
    """

    def __init__(self, heads: GranularityHeads) -> None:
        super().__init__()
        if not heads.decoders:
            raise ValueError("HeadFitting needs heads with decoders: GranularityHeads(embed_dim, num_classes, ...).")
        self.heads = heads

    def forward(self, batch: Batch, teacher: Features) -> tuple[dict[str, Float[Tensor, ""]], Float[Tensor, "b k"]]:
        """Return a loss per granularity, and the stable excitation. `batch.images` is not used."""
        views = self.heads.decode(self.heads.encode(teacher.embedding))
        dtype = next(iter(views.values())).dtype
        labels = convert_soft_labels(batch.labels, dtype)
        terms = {g.name: F.cross_entropy(views[g.name], labels) for g in self.heads.granularities}
        if teacher.logits.shape[1]:
            for g in self.heads.granularities:
                terms[g.name] = terms[g.name] + kl_divergence(views[g.name], teacher.logits, g.temperature)
        return terms, stable_excitation(teacher.logits, views)

    def clip_groups(self) -> list[list[nn.Parameter]]:
        """Return the parameters of each head: gradients are clipped per head, so that no head depends on another."""
        heads = self.heads
        parts = [(heads.encoders[g.name], heads.decoders[g.name]) for g in heads.granularities]
        return [[*encoder.parameters(), *decoder.parameters()] for encoder, decoder in parts]


class MAG(nn.Module):
    """Granularity-wise distillation: an objective plus, per granularity, T^2 KL(teacher's code || student's code).

    `--code-divergence reverse | balanced | bdd` replaces the divergence of the codes by another one of `kd`'s.

    The criteria of --criterion stay as they are. The student gets one encoder per granularity, which is trained with it
    and not exported, and no decoders: these would never get a gradient.

    Args:
        pair: Shapes of both networks, with any two embedding widths.
        objective: The other terms of the loss; None for the codes alone.
        granularities: Those of the teacher's heads. Those of weight 0 are left out. The loss is their divergence's, in
            place of KL.
        sample_weight: Returns weights of the code losses' samples from the teacher's logits.

    Raises:
        ValueError: All granularities have weight 0, or one has the name of a term; or samples are weighted, and the
            networks have different numbers of classes.
    """

    def __init__(
        self,
        pair: Pair,
        objective: Objective | None,
        granularities: Sequence[Granularity] = DEFAULT_GRANULARITIES,
        *,
        sample_weight: EntropyWeight | None = None,
    ) -> None:
        super().__init__()
        self.granularities = tuple(g for g in granularities if g.weight)
        taken = sorted({g.name for g in self.granularities} & set(objective.weights if objective is not None else ()))
        if taken:
            raise ValueError(f"granularity {taken[0]!r} has the name of a term of the objective: rename one of them.")
        if sample_weight is not None:
            check_one_label_space("the weighting of samples by the teacher's logits", pair)
        self.objective, self.sample_weight = objective, sample_weight
        self.student_heads = GranularityHeads(pair.student.embed_dim, None, self.granularities)

    @property
    def needs(self) -> frozenset[Need]:
        """Parts of the teacher's features that the terms use."""
        codes: frozenset[Need] = frozenset({"embedding"} if self.sample_weight is None else {"embedding", "logits"})
        return (self.objective.needs if self.objective is not None else frozenset()) | codes

    def forward(self, student: Features, teacher: Features, batch: Batch) -> dict[str, Float[Tensor, ""]]:
        """Return the objective's weighted terms, and one per granularity.

        Raises:
            ValueError: The teacher has no codes of a granularity, or codes of another width.
        """
        terms = self.objective(student, teacher, batch) if self.objective is not None else {}
        return {**terms, **self.code_terms(student, teacher)}

    def code_terms(self, student: Features, teacher: Features) -> dict[str, Float[Tensor, ""]]:
        """Return one weighted term per granularity. The student's codes are computed if its features have none.

        Raises:
            ValueError: As for `forward`.
        """
        terms = {}
        weights = self.sample_weight(teacher.logits) if self.sample_weight is not None else None
        codes = student.codes or self.student_heads.encode(student.embedding)
        for g in self.granularities:
            if g.name not in teacher.codes or teacher.codes[g.name].shape != codes[g.name].shape:
                widths = {name: code.shape[1] for name, code in teacher.codes.items()}
                found = f"codes of {widths}" if widths else "no codes"
                raise ValueError(
                    f"granularity {g.name!r} of {g.dim} dims: the teacher has {found}. Use Teacher(tap, heads) with "
                    "heads of the same granularities."
                )
            values = soft_divergence(
                codes[g.name], teacher.codes[g.name], g.temperature, g.divergence, reverse_weight=g.reverse_weight
            )
            terms[g.name] = g.weight * (values if weights is None else weights * values).mean()
        return terms

    def sample_weights(self, teacher: Features) -> dict[str, Float[Tensor, " b"]]:
        """Return the weights of a batch's samples, for logs, under the name ""; nothing where there are none."""
        return {} if self.sample_weight is None else {"": self.sample_weight(teacher.logits)}


class MAS(MAG):
    """Stable excitation distillation: MAG with the stable excitation (`stable_excitation`) as the teacher's logits.

    The stable excitation is the mean of the teacher's logits and the heads' views. Every criterion that reads the
    teacher's logits reads it in their place.

    Args:
        pair, objective, granularities, sample_weight: As for MAG; the objective needs a weighted term that reads the
            teacher's logits.

    Raises:
        ValueError: As of MAG; or no weighted term of the objective reads the teacher's logits: MAS would be MAG.
    """

    def __init__(
        self,
        pair: Pair,
        objective: Objective,
        granularities: Sequence[Granularity] = DEFAULT_GRANULARITIES,
        *,
        sample_weight: EntropyWeight | None = None,
    ) -> None:
        super().__init__(pair, objective, granularities, sample_weight=sample_weight)
        criteria = [one for one in objective.criteria.values() if isinstance(one, Criterion)]
        if not any("logits" in one.needs and not one.rotates for one in criteria):  # rotations have no stable logits
            raise ValueError(
                "MAS replaces the teacher's logits, and no term with a weight reads the teacher's logits "
                f"(weights: {objective.weights}): without one MAS is MAG. Use --kd-weight 1 or --method mag."
            )

    def forward(self, student: Features, teacher: Features, batch: Batch) -> dict[str, Float[Tensor, ""]]:
        """Return the terms of MAG, computed with the stable excitation.

        Raises:
            ValueError: The teacher has no views.
        """
        return super().forward(student, self.stable(teacher), batch)

    def sample_weights(self, teacher: Features) -> dict[str, Float[Tensor, " b"]]:
        """Return the weights of a batch's samples by the stable excitation, as of MAG."""
        return super().sample_weights(self.stable(teacher))

    def stable(self, teacher: Features) -> Features:
        """Return the teacher's features with the stable excitation as logits.

        Raises:
            ValueError: The teacher has no views.
        """
        if not teacher.views:
            raise ValueError("MAS needs the teacher's views: use Teacher(tap, heads) with heads with decoders.")
        return teacher._replace(logits=stable_excitation(teacher.logits, teacher.views))
