"""An order for teachers in sequence, from how well a linear map takes the embeddings of one network to another's.

Reference: Cao, Li, Hays, Ramanan, Wang, Gui, "Learning Lightweight Object Detectors via Multi-Teacher Progressive
Distillation" (arXiv 2308.09105).

Differs: a heuristic inspired by the paper's adaptation cost and backward greedy choice, written from memory; the
authors' code has neither. Ours are: embeddings in place of maps, the ridge, the residual on images that the map was not
fitted on, and when a teacher is left out.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import timm
import torch
from accelerate import Accelerator
from jaxtyping import Float
from torch import Tensor, nn

from mgd_timm.criteria.terms import task_alone
from mgd_timm.data.dataset import Images, load_images
from mgd_timm.data.rng import set_seed
from mgd_timm.distiller import Teacher
from mgd_timm.models.build import build_student
from mgd_timm.pipeline.connect import connect_teacher, find_defaults
from mgd_timm.pipeline.evaluate_teachers import evaluate_teachers
from mgd_timm.pipeline.load_teachers import adapt_teachers_to_data, load_named_teacher, load_teachers
from mgd_timm.pipeline.plan import accelerator_of
from mgd_timm.recipe.recipe import Recipe, make_recipe

Residuals = Mapping[str, Mapping[str, float]]
"""Normalised residual of the linear map from a network (the first key) to another one (the second)."""


@dataclass(frozen=True)
class Order:
    """An order of teachers.

    Args:
        teachers: From the first to the last, the strongest.
        left_out: Those that are no nearer to the next teacher than the student is.
        residuals: From each network to each teacher.
        top1: Of the teachers, in %; None where it is not known.
        images: That the residuals are of.
    """

    teachers: tuple[str, ...]
    left_out: tuple[str, ...]
    residuals: Residuals
    top1: Mapping[str, float | None]
    images: int


def ridge_residual(source: Float[Tensor, "n d"], target: Float[Tensor, "n e"], ridge: float = 1e-3) -> float:
    """Return the share of a target's variance that no linear map of the source explains.

    The map, with a bias, is fitted on the rows at even places by ridge regression in float64. The squared error on the
    other rows is divided by that of the target's mean: 0 for a linear function of the source, 1 or more for what the
    source says nothing of.

    Args:
        source: Embeddings of one network.
        target: Embeddings of another one, of the same images.
        ridge: Weight of the penalty, in units of the source's mean variance.

    Raises:
        ValueError: The target is constant.
    """
    (x, unseen_x), (y, unseen_y) = ((one.double()[0::2], one.double()[1::2]) for one in (source, target))
    mean_x, mean_y = x.mean(0), y.mean(0)
    x = x - mean_x
    gram = x.T @ x
    penalty = ridge * gram.trace() / len(gram) + torch.finfo(torch.float64).tiny
    weights = torch.linalg.solve(gram + penalty * torch.eye(len(gram), dtype=gram.dtype), x.T @ (y - mean_y))
    error = unseen_y - mean_y - (unseen_x - mean_x) @ weights
    scale = (unseen_y - unseen_y.mean(0)).square().sum()
    if not scale > 0:
        raise ValueError("an embedding is the same for all images, and has no variance to explain.")
    return float(error.square().sum() / scale)


def backward_order(residuals: Residuals, student: str, teachers: Sequence[str], last: str) -> list[str]:
    """Return teachers in an order that ends at `last`, chosen from the end.

    Before each teacher comes the one of the smallest residual to it, until the student's own is no larger than that of
    any teacher left.
    """
    order, left = [last], [name for name in teachers if name != last]
    while left:
        nearest = min(left, key=lambda name: residuals[name][order[0]])
        if residuals[nearest][order[0]] >= residuals[student][order[0]]:
            break
        order.insert(0, nearest)
        left.remove(nearest)
    return order


def order_teachers(
    teachers: Sequence[str], student: str, *, images: int = 2000, ridge: float = 1e-3, **options: Any
) -> Order:
    """Order teachers for a student by the embeddings of training images.

    Args:
        teachers: As of `distill`, two or more. The last of the order is the one of the highest top-1 on the evaluation
            images; where none has a known one, the last here.
        student: A name with weights, as of a teacher; or an architecture without a tag, which then has random weights.
        images: Evenly spaced training images, augmented as in the first epoch.
        ridge: As of `ridge_residual`.
        **options: Of `distill`: data, teacher_classes, teacher_img_size, seed.

    Raises:
        ValueError: Fewer than two teachers or 16 images, a name twice, a ridge that is not positive, or what `distill`
            refuses.
    """
    if not 0 < ridge < float("inf"):
        raise ValueError(f"ridge={ridge}: expected a positive number, such as 0.001 (--ridge).")
    if len(teachers) < 2 or len(set(teachers)) < len(teachers) or student in teachers:
        raise ValueError(
            f"--teacher {list(teachers)} --student {student!r}: expected two or more teachers and a student of "
            "different names."
        )
    untrained = timm.is_model(student) and "." not in student
    named = {"student": student} if untrained else {}
    recipe = make_recipe(teacher=tuple(teachers), method="none", **named, **options)
    if recipe.data.streaming:
        raise ValueError(
            "streaming: an order is of evenly spaced images, and a stream has none: leave --streaming out."
        )
    accelerator = accelerator_of(recipe)
    models = load_teachers(recipe)
    trained = None if untrained else load_named_teacher(recipe, student)
    loaded = load_images(recipe.data, recipe.seed, find_defaults(recipe, models[0], trained), log=accelerator.print)
    if min(images, len(loaded.train.ids)) < 16:
        raise ValueError(
            f"images={min(images, len(loaded.train.ids))}: expected 16 or more training images (--images)."
        )
    adapt_teachers_to_data(models, recipe, loaded)
    taught_by = [
        connect_teacher(recipe, task_alone(0.0), accelerator, model, loaded, silent=recipe.classes_of(place) == "none")
        for place, model in enumerate(models)
    ]
    found = evaluate_teachers(taught_by, loaded, accelerator, recipe.data.validation_batch_size).get("teacher_top1")
    top1 = dict(zip(teachers, found or [None] * len(teachers), strict=True))
    known = [name for name in teachers if top1[name] is not None]
    last = max(known, key=lambda name: top1[name] or 0.0) if known else teachers[-1]
    networks = {**dict(zip(teachers, taught_by, strict=True)), student: _student(recipe, trained, loaded, accelerator)}
    size = recipe.data.validation_batch_size
    shown = {name: _embeddings(network, loaded, images, accelerator, size) for name, network in networks.items()}
    residuals = {
        one: {other: ridge_residual(shown[one], shown[other], ridge) for other in teachers if other != one}
        for one in networks
    }
    order = backward_order(residuals, student, teachers, last)
    left_out = tuple(name for name in teachers if name not in order)
    return Order(tuple(order), left_out, residuals, top1, len(shown[student]))


def _student(recipe: Recipe, model: nn.Module | None, images: Images, accelerator: Accelerator) -> Teacher:
    """Return the student's embedding, frozen: of the model, or of the recipe's student with random weights."""
    if model is None:
        name = recipe.student
        accelerator.print(f"student {name}: random weights; those of a run or a pretrained one say more")
        set_seed(recipe.seed, 3)
        model = build_student(name, images.input_size, images.num_classes)
    return connect_teacher(recipe, task_alone(0.0), accelerator, model, images, silent=True)


@torch.no_grad()
def _embeddings(
    network: Teacher, images: Images, count: int, accelerator: Accelerator, batch_size: int
) -> Float[Tensor, "n d"]:
    """Return a network's embeddings of evenly spaced training images, on the CPU."""
    source = images.train
    places = torch.linspace(0, len(source.ids) - 1, min(count, len(source.ids))).long()
    found = []
    for batch in source.batches(source.ids[places].split(batch_size), 0, accelerator.device):
        with accelerator.autocast():
            found.append(network(batch.images).embedding.float().cpu())
    return torch.cat(found)
