"""`Heads`: the options of the teacher's granularity heads and of their fitting."""

from dataclasses import dataclass
from typing import Literal

from mgd_timm.recipe.checks import check_code_divergence, check_milestones, check_options
from mgd_timm.recipe.granularity import Granularity
from mgd_timm.recipe.options import option


@dataclass(frozen=True)
class Heads:
    """Options of the teacher's granularity heads and of their fitting.

    The paper: 64 dims at T=2, 256 dims at T=8, weights 1, 60 epochs on live images.

    Raises:
        ValueError: A value out of range.
    """

    abstract_dim: int = option(64, "width of the abstract code", minimum=1)
    abstract_temperature: float = option(2.0, "temperature of the abstract granularity", above=0)
    abstract_weight: float = option(1.0, "weight of the abstract code's loss", minimum=0)
    detailed_dim: int = option(256, "width of the detailed code", minimum=1)
    detailed_temperature: float = option(8.0, "temperature of the detailed granularity", above=0)
    detailed_weight: float = option(1.0, "weight of the detailed code's loss", minimum=0)
    code_divergence: Literal["forward", "reverse", "balanced", "bdd"] = option(
        "forward",
        "divergence of the student's codes from the teacher's; bdd is inspired by arXiv 2501.07804, constants ours",
    )
    code_reverse_weight: float = option(1.0, "bdd of the codes: weight of the reverse divergence", minimum=0)
    heads_protocol: Literal["stored", "live"] = option(
        "stored", "fit the heads (and sskd's) on stored teacher outputs, or on live images as the authors"
    )
    heads_augmentations: int = option(
        4, "stored protocol: augmentations of each image whose teacher outputs are stored", minimum=1
    )
    heads_epochs: int = option(24, "passes over the training images while the heads are fitted", minimum=1)
    # 0.1 without clipping works with most seeds, and ends in dead units or inf with others.
    heads_lr: float = option(0.02, "learning rate of the heads (the authors: 0.01 at batch 64, live)", above=0)
    heads_clip_grad: float | None = option(
        1.0, "largest gradient norm of each head; T^2 makes early gradients large (the authors: none)", above=0
    )
    heads_batch_size: int = option(256, "images per update, over all processes, while the heads are fitted", minimum=2)
    heads_weight_decay: float = option(5e-4, "weight decay of the heads", minimum=0)
    heads_sched: Literal["cosine", "multistep"] = option("cosine", "schedule of the heads (the authors: multistep)")
    heads_decay_milestones: tuple[float, ...] | None = option(
        None,
        "passes (of --heads-epochs) after which multistep divides the heads' learning rate by 10; default: 1/2 and 3/4 "
        "of all, as the paper",
        above=0,
    )

    def __post_init__(self) -> None:
        check_options(self)
        check_code_divergence(self)
        check_milestones(
            "heads_decay_milestones", self.heads_decay_milestones, self.heads_sched, "heads_epochs", self.heads_epochs
        )

    @property
    def milestones(self) -> tuple[float, ...]:
        """Passes over the images after which multistep decays."""
        if self.heads_decay_milestones is None:
            return (self.heads_epochs / 2, self.heads_epochs * 3 / 4)
        return self.heads_decay_milestones

    @property
    def granularities(self) -> tuple[Granularity, ...]:
        """Both levels of detail."""
        how = (self.code_divergence, self.code_reverse_weight)
        return (
            Granularity("abstract", self.abstract_dim, self.abstract_temperature, self.abstract_weight, *how),
            Granularity("detailed", self.detailed_dim, self.detailed_temperature, self.detailed_weight, *how),
        )
