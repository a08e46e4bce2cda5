"""The stage after training in which the student learns to compute in int8 (--qat)."""

from typing import Any

from torch import nn

from mgd_timm.data.sources import Source, epoch_ids
from mgd_timm.distiller import Distiller
from mgd_timm.distributed.collectives import broadcast_tensors
from mgd_timm.models.fake_quantise import FakeQuantisation
from mgd_timm.pipeline.connect import Networks
from mgd_timm.recipe.derived import qat_optim
from mgd_timm.recipe.options import as_dict
from mgd_timm.recipe.recipe import Recipe
from mgd_timm.teachers.pretraining import RunContext
from mgd_timm.training.evaluation import Metrics, evaluate_taps
from mgd_timm.training.loop import fit
from mgd_timm.training.step import Teach

CALIBRATION_IMAGES = 512
"""Training images from which ranges are taken: more than the 300 that a quantiser of files needs."""


class Int8Distiller(Distiller):
    """A Distiller whose student keeps BatchNorm's statistics, as its int8 file has them folded into the weights."""

    # "Int8Distiller", not Self, which beartype refuses in a class that it does not decorate as a whole.
    def train(self, mode: bool = True) -> "Int8Distiller":
        """Set the mode, but for the student's BatchNorm."""
        super().train(mode)
        for module in self.student.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.training = False
        return self


def learn_int8(
    recipe: Recipe,
    networks: Networks,
    source: Source,
    teach: Teach | None,
    context: RunContext,
) -> dict[str, Any]:
    """Train a student with fake quantisation, in place: the same objective and images, the teacher in float.

    The student ends as the module that it was, with float weights. The ranges of its tensors are taken from training
    images before the stage, and stay: an update is the same on any number of processes.

    Args:
        recipe: Of the run.
        networks: Of the run; the student is trained.
        source: Training images (or stored teacher outputs).
        teach: As of `fit`.
        context: Of the run.

    Returns:
        Epochs and learning rate, and metrics of the student before and after the stage, each in float and with fake
        quantisation by ranges of the time; none without evaluation images.
    """
    optim, tap, evaluation = qat_optim(recipe), networks.student, context.images.evaluation

    def evaluate() -> Metrics:
        if evaluation is None:
            return {}
        size = recipe.data.validation_batch_size
        return evaluate_taps({"student": tap}, evaluation, context.accelerator, size)["student"]

    context.accelerator.print(f"qat: {optim.epochs} epoch{'s' if optim.epochs > 1 else ''} with fake quantisation")
    before, rounding = {"float": evaluate()}, FakeQuantisation(tap)
    _calibrate(rounding, recipe, context)
    before["int8"] = evaluate()
    fitted = fit(
        Int8Distiller(tap, networks.objective),
        source,
        optim,
        context.accelerator,
        seed=recipe.seed,
        batch_size=recipe.data.batch_size,
        teach=teach,
        evaluate=(lambda _: evaluate()) if evaluation is not None else None,
        compile=recipe.compile,
        epochs_before=recipe.optim.epochs,
        options=context.fit_options(
            "qat",
            {**networks.fingerprint, "qat": as_dict(optim, digest_only=True)},
            advice="Lower --qat-lr, or clip gradients (--clip-grad 1).",
            checkpoint_interval=recipe.checkpoint_interval,
            checkpoint_hist=recipe.checkpoint_hist,
        ),
    )
    _calibrate(rounding, recipe, context)
    after = {"int8": evaluate()}
    rounding.remove()
    after["float"] = evaluate()
    found = {"epochs": optim.epochs, "lr": optim.lr, "seconds": round(fitted.seconds, 2)}
    return {**found, "before": before, "after": after}


def _calibrate(rounding: FakeQuantisation, recipe: Recipe, context: RunContext) -> None:
    """Take the ranges from training images as they are augmented, the first ones of the first epoch."""
    train, accelerator = context.images.train, context.accelerator
    ids = epoch_ids(train, recipe.seed, 0)[:CALIBRATION_IMAGES].split(recipe.data.batch_size)
    with accelerator.autocast():
        rounding.calibrate(batch.images for batch in train.batches(ids, 0, accelerator.device))
    broadcast_tensors(rounding.tap.buffers(), accelerator)
