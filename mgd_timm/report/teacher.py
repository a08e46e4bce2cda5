"""The teacher of a run, as the run used it, with the granularity heads that its folder holds."""

from collections.abc import Callable
from dataclasses import dataclass

from mgd_timm.data.dataset import Images
from mgd_timm.distiller import Teacher
from mgd_timm.features import FeatureTap
from mgd_timm.granularity import GranularityHeads
from mgd_timm.models.build import set_memory_format
from mgd_timm.models.input_adapter import build_input_adapter
from mgd_timm.pipeline.checks import logits_conflict
from mgd_timm.pipeline.load_teachers import adapt_teachers_to_data, load_named_teacher
from mgd_timm.report.measure import Predictions, Student, predict
from mgd_timm.report.runs import Run
from mgd_timm.storage import checkpoint


@dataclass(frozen=True)
class MeasuredTeacher:
    """A teacher, with what it says about the evaluation images.

    Args:
        run: Whose teacher it is.
        teacher: With heads where the run's folder holds them; its maps are those of its stages.
        predictions: None for a teacher without logits of the data's classes.
        no_heads: Why there are no heads; None if there are.
    """

    run: Run
    teacher: Teacher
    predictions: Predictions | None
    no_heads: str | None


def measure_teacher(student: Student, log: Callable[[str], None]) -> MeasuredTeacher | str:
    """Load the teacher of a student's run and show it the evaluation images: the last of a sequence, else the first.

    Returns:
        The teacher, or why it cannot be had.
    """
    run, images = student.run, student.images
    if run.recipe.fit_teacher_head != "none":
        return (
            f"the teacher's classifier was fitted for the run (--fit-teacher-head {run.recipe.fit_teacher_head}) and "
            "is in no folder: train the teacher with mgd-timm train and teach with its run folder."
        )
    try:
        teacher = _load(run, images, student)
    except (ValueError, OSError) as error:
        return f"the teacher cannot be loaded: {error}"
    found = load_heads(run, teacher, images, log)
    if isinstance(found, GranularityHeads):
        teacher = teacher.with_heads(found)
    predictions = None
    if teacher.has_logits:
        size = student.recipe.data.validation_batch_size
        predictions = predict(lambda shown: teacher(shown).logits, student.source, student.accelerator, size)
    return MeasuredTeacher(run, teacher, predictions, None if isinstance(found, GranularityHeads) else found)


def _load(run: Run, images: Images, student: Student) -> Teacher:
    recipe = run.last_turn.recipe
    assert recipe.teacher is not None
    model = load_named_teacher(recipe, recipe.teacher[0])
    adapt_teachers_to_data([model], recipe, images)
    has_logits = logits_conflict(model, images.class_names) is None and recipe.classes_of(0) != "none"
    adapter = build_input_adapter(model, images.mean, images.std, images.input_size, recipe.teacher_img_size)
    size = adapter.size or images.input_size[1:]
    tap = FeatureTap(model, "stages", input_size=(images.input_size[0], size[0], size[1]))
    teacher = Teacher(tap, input_adapter=adapter, logits=has_logits).to(student.accelerator.device)
    set_memory_format(teacher, tap.name, recipe.channels_last, student.accelerator.device)
    return teacher


def load_heads(run: Run, teacher: Teacher, images: Images, log: Callable[[str], None]) -> GranularityHeads | str:
    """Load the heads that a run fitted on its teacher: the last of a sequence, else the first.

    Returns:
        The heads, or why there are none.
    """
    recipe, place = run.last_turn.recipe, run.last_turn.folder
    if recipe.method == "none":
        return "the run has no granularity heads: they come with --method mag or mas."
    folder = place / ("heads" if len(recipe.teacher or ()) == 1 else "heads_1") / "checkpoints"
    state = checkpoint.load_newest(folder, log)
    if state is None:
        return (
            f"{folder} holds no weights: the run took its heads from the cache, where an earlier run had left them, or "
            "its checkpoints were removed. A run with an empty cache (MGD_TIMM_CACHE) writes them."
        )
    heads = GranularityHeads(teacher.tap.embed_dim, images.num_classes, recipe.heads.granularities)
    prefix = "heads."
    weights = {name.removeprefix(prefix): tensor for name, tensor in state.tensors.get("trainee", {}).items()}
    try:
        heads.load_state_dict(weights)
    except RuntimeError as error:
        return f"{folder} holds heads of other sizes ({str(error).splitlines()[-1].strip()})."
    return heads.eval()
