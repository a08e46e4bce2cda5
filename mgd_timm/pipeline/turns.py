"""Who teaches the student when: all teachers of a run at once, or one after the other.

Reference: Cao, Li, Hays, Ramanan, Wang, Gui, "Learning Lightweight Object Detectors via Multi-Teacher Progressive
Distillation" (arXiv 2308.09105). The schedule is that of the authors' released code, which was read
(Shengcao-Cao/MTPD): one full training schedule with each teacher in turn; between two of them only the student's
weights stay, and optimizer, learning rate and the modules of the method start anew.

Differs: for classifiers, with any criterion. In the released code the student of the first teacher also takes over that
teacher's neck and heads; here it does not, as the networks of a pair need not share any shape. The results of the paper
are of detectors and were not reproduced.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mgd_timm.recipe.optim import Optim
from mgd_timm.recipe.recipe import Recipe
from mgd_timm.training.loop import Fitted


@dataclass(frozen=True)
class Turn:
    """One fit of the student: with all teachers of a run (or none), or with one of a sequence.

    Args:
        recipe: Of the run, with the teachers and epochs of this turn alone.
        stage: Name of the fit: train, distil, or distil_1, distil_2, ... in a sequence.
        folder: For its checkpoints and what is fitted before it.
        epochs_before: Epochs of earlier turns.
    """

    recipe: Recipe
    stage: str
    folder: Path
    epochs_before: int = 0


def turns_of(recipe: Recipe) -> list[Turn]:
    """Return the turns of a run: one for each teacher of a sequence of several, else one.

    The learning-rate schedule of a turn is the run's, stretched to its epochs. The order and the augmentations of the
    images are the same in epoch e of every turn.
    """
    folder, teachers = Path(recipe.output), recipe.teacher or ()
    if recipe.teachers_as != "sequence":
        stage = "train" if not teachers and recipe.peer is None else "distil"
        return [Turn(recipe, stage, folder)]
    epochs = recipe.teacher_epochs or (recipe.optim.epochs,) * len(teachers)
    if len(teachers) == 1:
        own = replace(recipe, teacher_epochs=None, optim=_with_epochs(recipe.optim, epochs[0]))
        return [Turn(own, "distil", folder)]
    turns = []
    for place, (name, count) in enumerate(zip(teachers, epochs, strict=True)):
        classes = recipe.classes_of(place)
        own = replace(
            recipe,
            teacher=(name,),
            teacher_classes=(classes,) if classes is not None else None,
            teacher_epochs=None,
            optim=_with_epochs(recipe.optim, count),
        )
        stage = f"distil_{place + 1}"
        turns.append(Turn(own, stage, folder / stage, sum(epochs[:place])))
    return turns


def _with_epochs(optim: Optim, epochs: int) -> Optim:
    return optim if epochs == optim.epochs else optim.with_epochs(epochs)


def merge_fits(turns: Sequence[Turn], fits: Sequence[Fitted]) -> Fitted:
    """Return the last turn's results, with the updates and seconds of all, and its best epoch counted from the run's
    start."""
    last = fits[-1]
    return replace(
        last,
        best_epoch=last.best_epoch and turns[-1].epochs_before + last.best_epoch,
        updates=sum(fitted.updates for fitted in fits),
        seconds=sum(fitted.seconds for fitted in fits),
    )


def summarise_turns(turns: Sequence[Turn], fits: Sequence[Fitted]) -> dict[str, Any]:
    """Return what the summary says of each teacher of a sequence; nothing without one."""
    if len(turns) == 1:
        return {}
    rows = [
        {
            "epochs": turn.recipe.optim.epochs,
            "updates": fitted.updates,
            "top1": fitted.last.get("top1"),
            "best_top1": fitted.best if fitted.best_epoch else None,
        }
        for turn, fitted in zip(turns, fits, strict=True)
    ]
    return {"turns": rows}
