"""Stages of the CIFAR protocol: runs whose folder is found by a digest of what decides their weights."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from mgd_timm.data.dataset import Images, load_images
from mgd_timm.distributed.collectives import broadcast_from_main, join
from mgd_timm.pipeline.load_teachers import load_named_teacher
from mgd_timm.pipeline.run import run
from mgd_timm.recipe.derived import with_global_batch
from mgd_timm.recipe.options import as_dict, digest
from mgd_timm.recipe.recipe import Recipe, make_recipe
from mgd_timm.storage.digests import module_digest, sha256


def images_of(recipe: Recipe) -> Images:
    """The images of a recipe, decoded by one process while the others wait.

    Raises:
        DataError: No such data.
    """
    accelerator = join(recipe.process_timeout)
    return load_images(recipe.data, recipe.seed, accelerator=accelerator, log=accelerator.print)


def made_from(recipe: Recipe) -> dict[str, Any]:
    """Return what decides a student's weights besides its recipe: its teachers' weights, and which rows of their
    classifiers are used."""
    digests = [module_digest(load_named_teacher(recipe, name)) for name in recipe.teacher or ()]
    found: dict[str, Any] = {"teacher": digests[0] if len(digests) == 1 else digests}
    if recipe.teacher_classes is not None:
        found["classes"] = [sha256(path) if (path := Path(word)).is_file() else word for word in recipe.teacher_classes]
    return found


def stage(
    root: Path, name: str, recipe: Recipe, made_from: dict[str, Any] | None = None, *, quiet: bool = False
) -> Path:
    """The folder of a finished run of this recipe under `root`: found by its digest, continued where it was stopped,
    else run.

    Args:
        root: Folder of all stages; all processes must see the same one.
        name: What the stage is called, before its digest.
        recipe: Of the run; its output folder is chosen here.
        made_from: What else decides the weights (`made_from`).
        quiet: No progress bar.

    Raises:
        ValueError, OSError: As `run`.
    """
    accelerator = join(recipe.process_timeout)
    recipe = with_global_batch(recipe, accelerator.num_processes, accelerator.gradient_accumulation_steps)
    images = images_of(recipe)
    initial = recipe.student_checkpoint
    made_of = {
        "recipe": as_dict(recipe, digest_only=True),
        "images": [source.digest if source is not None else None for source in (images.train, images.evaluation)],
        "from": made_from or {},
        "initial": sha256(Path(initial)) if initial is not None else None,
        "precision": recipe.amp_dtype if recipe.amp else str(accelerator.mixed_precision),
    }
    folder = root / f"{name}-{digest(made_of)[:12]}"
    # The main process looks, before any of them writes there.
    finished = broadcast_from_main(accelerator, lambda: (folder / "summary.json").is_file())
    begun = broadcast_from_main(accelerator, lambda: (folder / "recipe.yaml").is_file())
    if finished:
        accelerator.print(f"{name}: found in {folder}")
        return folder
    accelerator.print(f"{name}: {'continued' if begun else 'started'} in {folder}")
    run(replace(recipe, output=str(folder), resume=begun), quiet=quiet)
    return folder


def teacher_stage(root: Path, network: str, options: dict[str, Any], *, quiet: bool = False) -> Path:
    """The folder of a teacher trained on its own."""
    recipe = make_recipe(teacher=None, method="none", student=network, **options)
    return stage(root, f"teacher-{network}", recipe, quiet=quiet)
