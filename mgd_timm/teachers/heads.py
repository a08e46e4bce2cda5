"""The granularity heads of a teacher: fitted once, kept by a digest of all that made them, and measured."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import Tensor, nn

from mgd_timm.data.dataset import Images
from mgd_timm.data.rng import set_seed
from mgd_timm.distiller import LiveTeachers, Teacher
from mgd_timm.distributed.collectives import on_main
from mgd_timm.features import Batch, Features
from mgd_timm.granularity import GranularityHeads, HeadFitting, stable_excitation
from mgd_timm.recipe.options import as_dict
from mgd_timm.recipe.recipe import Optim, Recipe
from mgd_timm.teachers.outputs.memory import StoredOutputs, read_outputs, store_outputs
from mgd_timm.teachers.outputs.stored_source import StoredViews
from mgd_timm.teachers.pretraining import found_or_fitted, shown_by_teacher
from mgd_timm.training.checkpointer import Upkeep
from mgd_timm.training.evaluation import Metrics, evaluate
from mgd_timm.training.loop import fit

FAR_BELOW = 3.0  # points of top-1: the paper's heads are within about 1 of their teacher


def fit_heads(
    teacher: Teacher,
    images: Images,
    recipe: Recipe,
    accelerator: Accelerator,
    summary: dict[str, Any],
    *,
    stored: StoredViews | None = None,
    name: str = "heads",
    quiet: bool = False,
) -> GranularityHeads:
    """Fitted heads of a teacher: from the cache where a digest of all that makes them matches, else fitted and kept
    there.

    `name` is what a second teacher's are called in the run folder and in `summary`.

    Their accuracy is said and put into `summary`; a head far below the teacher is warned of. A filled store of the
    teacher's outputs is read instead of showing it images again, where the protocol is "stored" and it holds enough
    views and all logits.
    """
    if stored is not None and not (
        recipe.heads.heads_protocol == "stored"
        and recipe.heads.heads_views <= stored.store.views
        and not stored.store.layout.top_k  # the heads' targets at T=8 are what the other logits say
    ):
        stored = None
    heads_recipe = replace(
        recipe.heads, abstract_weight=1.0, detailed_weight=1.0
    )  # weights belong to the student's objective
    made_of = {"heads": as_dict(heads_recipe), **shown_by_teacher(teacher, images, recipe, accelerator)}
    made_of["logits"] = teacher.shows_logits
    made_of["watched"] = (
        images.watched.digest if images.watched is not None else None
    )  # as their accuracy is kept with them
    if stored is not None:
        made_of["store"] = stored.store.digest
    set_seed(recipe.seed, 5)
    heads = GranularityHeads(teacher.tap.embed_dim, images.num_classes, recipe.heads.granularities).to(
        accelerator.device
    )
    metrics, found = found_or_fitted(
        "heads",
        heads,
        made_of,
        accelerator,
        lambda: _fit_fresh_heads(heads, teacher, images, recipe, accelerator, made_of, stored, name, quiet),
    )
    if found:
        accelerator.print("granularity heads: fitted before, from the cache")
    summary[name] = metrics
    shown = {
        name: value
        for name, value in metrics.items()
        if name in ("teacher", "top1", *(g.name for g in heads.granularities))
    }
    if shown:
        said = ", ".join(f"{'stable' if name == 'top1' else name} {value:.2f} %" for name, value in shown.items())
        accelerator.print(f"granularity heads, top-1: {said}")
    for key, value in shown.items():
        if value < shown.get("teacher", value) - FAR_BELOW:
            accelerator.print(
                f"warning: {'the stable logits are' if key == 'top1' else f'the head {key!r} is'} "
                f"{shown['teacher'] - value:.1f} points below the teacher: raise --heads-epochs, --heads-views or its "
                "dim."
            )
    return heads


def _fit_fresh_heads(
    heads: GranularityHeads,
    teacher: Teacher,
    images: Images,
    recipe: Recipe,
    accelerator: Accelerator,
    made_of: dict[str, Any],
    views: StoredViews | None,
    name: str,
    quiet: bool,
) -> Metrics:
    options = recipe.heads

    def look(batch: Batch) -> Features:
        return teacher(batch.images)

    stored: StoredOutputs | None = None
    if views is not None:
        stored = read_outputs(views.store, images.train, options.heads_views, accelerator)
    elif options.heads_protocol == "stored":
        stored = store_outputs(
            look, images.train, options.heads_views, accelerator, recipe.data.validation_batch_size, quiet
        )
    held = None
    if images.watched is not None:
        held = store_outputs(look, images.watched, 1, accelerator, recipe.data.validation_batch_size, quiet)
    names = (*(("teacher",) if teacher.shows_logits else ()), *(g.name for g in heads.granularities), "stable")

    def watch(_: nn.Module | None) -> Metrics:
        assert held is not None

        def predict(batch: Batch) -> dict[str, Tensor]:
            shown = held.features(batch)
            views = heads.decode(heads.encode(shown.embedding))
            return {"teacher": shown.logits, **views, "stable": stable_excitation(shown.logits, views)}

        found = evaluate(predict, names, held, accelerator, recipe.data.validation_batch_size)
        return {"top1" if name == "stable" else name: found[name]["top1"] for name in names}

    passes = options.heads_epochs
    optim = Optim(
        epochs=-(-passes // options.heads_views) if stored is not None else passes,
        lr=options.heads_lr,
        weight_decay=options.heads_weight_decay,
        sched=options.heads_sched,
        decay_milestones=options.heads_decay_milestones,
        clip_grad=options.heads_clip_grad,
        global_batch_size=options.heads_batch_size,
    )
    folder = Path(recipe.output) / name
    on_main(accelerator, lambda: folder.mkdir(exist_ok=True))
    batch_size = max(2, -(-options.heads_batch_size // accelerator.num_processes))  # one step of all processes
    fitted = fit(
        HeadFitting(heads),
        stored if stored is not None else images.train,
        optim,
        accelerator,
        seed=recipe.seed,
        batch_size=batch_size,
        teach=stored.features if stored is not None else LiveTeachers(teacher),
        compile=recipe.compile,
        watch=watch if held is not None else None,
        upkeep=Upkeep(
            folder=folder,
            fingerprint=made_of,
            stage="heads",
            resume=recipe.resume,
            log_interval=recipe.log_interval,
            quiet=quiet,
            track=False,
            advice="Lower --heads-lr, or clip more (--heads-clip-grad).",
            memory_advice="give a smaller --heads-batch-size.",
        ),
    )
    return fitted.last
