"""`Optim`: the options of the optimizer, its schedule and the number of epochs."""

from dataclasses import dataclass, replace

from mgd_timm.recipe.checks import check_milestones, check_options, check_warmup
from mgd_timm.recipe.options import option


@dataclass(frozen=True)
class Optim:
    """Options of the optimizer, its schedule and the number of epochs.

    The paper: momentum, lr 0.05, 240 epochs, multistep at 150, 180 and 210.

    Raises:
        ValueError: A value out of range.
    """

    epochs: int = option(20, "passes over the training images", minimum=1, common=True)
    opt: str = option("momentum", "timm optimizer; 'momentum' is SGD with momentum, 'sgd' with Nesterov's", common=True)
    lr: float = option(0.05, "peak learning rate", above=0, common=True)
    momentum: float = option(0.9, "momentum of SGD", minimum=0, below=1)
    weight_decay: float = option(5e-4, "weight decay", minimum=0, common=True)
    filter_bias_and_bn: bool = option(False, "no weight decay for biases and normalisation, as timm")
    sched: str = option(
        "cosine", "timm scheduler: cosine, multistep, step, ...; also tanh, poly, ...; stepped by update", common=True
    )
    min_lr: float = option(0.0, "learning rate at the end of cosine, tanh, poly, wsd and rsqrt", minimum=0)
    warmup_epochs: int = option(0, "epochs of linear warm-up", common=True)
    warmup_lr: float = option(1e-5, "learning rate at the start of the warm-up", minimum=0)
    decay_milestones: tuple[float, ...] | None = option(
        None,
        "epochs at which multistep multiplies by the decay rate; default: 5/8, 3/4 and 7/8 of all, as the paper",
        above=0,
    )
    decay_epochs: float = option(30.0, "epochs between decays of the step scheduler", above=0)
    decay_rate: float = option(0.1, "factor of a decay (step, multistep)", above=0)
    poly_power: float = option(1.0, "power of poly; 1 is linear", above=0)
    clip_grad: float | None = option(None, "largest gradient norm", above=0, common=True)
    global_batch_size: int | None = option(
        None,
        "images per update, over all processes and micro-batches; default: batch size x processes x micro-batches per "
        "update at the run's start",
        minimum=2,
    )
    grad_accum_steps: int | None = option(
        None, "micro-batches per update, if --global-batch-size is not given; default: 1", minimum=1, digest=False
    )
    find_batch_size: bool = option(
        False, "halve the batch size while a trial update runs out of memory; the global batch stays", digest=False
    )
    model_ema: bool = option(
        False, "average the weights over the updates; the average is evaluated and exported", common=True
    )
    model_ema_decay: float = option(0.9998, "decay of the average per update", minimum=0, below=1)
    model_ema_warmup: bool = option(False, "let the decay of the average rise from 0 in the first updates")

    def __post_init__(self) -> None:
        check_options(self)
        check_warmup(self)
        check_milestones("decay_milestones", self.decay_milestones, self.sched, "epochs", self.epochs)

    @property
    def milestones(self) -> tuple[float, ...]:
        """Epochs at which multistep decays, in order."""
        if self.decay_milestones is None:
            return (self.epochs * 5 / 8, self.epochs * 3 / 4, self.epochs * 7 / 8)
        return tuple(sorted(self.decay_milestones))

    def with_epochs(self, epochs: int) -> "Optim":
        """Return these options for another number of epochs, with decays at the same shares of it.

        A warm-up keeps its length, or takes all epochs if they are fewer.
        """
        given = self.decay_milestones
        return replace(
            self,
            epochs=epochs,
            warmup_epochs=min(self.warmup_epochs, epochs),
            decay_epochs=self.decay_epochs * epochs / self.epochs,
            decay_milestones=tuple(m * epochs / self.epochs for m in given) if given is not None else None,
        )
