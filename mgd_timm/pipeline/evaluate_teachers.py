"""The accuracy of each teacher on the data, logged before the first epoch."""

from collections.abc import Sequence
from typing import Any

from accelerate import Accelerator

from mgd_timm.data.dataset import Images
from mgd_timm.distiller import Teacher
from mgd_timm.training.evaluation import Metrics, evaluate_taps


def evaluate_teachers(
    teachers: Sequence[Teacher], images: Images, accelerator: Accelerator, batch_size: int
) -> dict[str, Any]:
    """Log each teacher's accuracy on the data, before the first epoch; `teacher_top1` and `teacher_top5` of the
    summary."""
    found: list[Metrics | None] = []
    for teacher in teachers if images.evaluation is not None else ():
        assert images.evaluation is not None
        if not teacher.has_logits:
            accelerator.print(f"teacher {teacher.tap.name}: no accuracy, because it has no logits of these classes")
            found.append(None)
            continue
        row = evaluate_taps({"teacher": teacher}, images.evaluation, accelerator, batch_size)["teacher"]
        found.append(row)
        accelerator.print(f"teacher {teacher.tap.name}: top-1 {row['top1']:.2f} % on {int(row['n']):,} images")
        if near_chance(row["top1"], images.num_classes):
            accelerator.print(
                f"warning: the teacher is near chance ({100 / images.num_classes:.2f} %): are its weights those of "
                "these classes, in this order?"
            )
    if all(row is None for row in found):
        return {}
    tops = {f"teacher_{name}": [row and row[name] for row in found] for name in ("top1", "top5")}
    return {name: values[0] if len(teachers) == 1 else values for name, values in tops.items()}


def near_chance(top1: float, num_classes: int) -> bool:
    """Return whether an accuracy in % is below twice chance, or, if that is lower, below chance plus a quarter of the
    distance from chance to 100."""
    chance = 100 / num_classes
    return top1 < chance + min(chance, (100 - chance) / 4)
