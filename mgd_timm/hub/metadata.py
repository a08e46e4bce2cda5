"""The metadata of a model card, which the hub reads: library, licence, data sets, results, base model, tags."""

import re

from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub.utils import HFValidationError, validate_repo_id
from timm.models import get_pretrained_cfg

from mgd_timm.hub.student import Student
from mgd_timm.pipeline.plan import terms_of
from mgd_timm.recipe.recipe import Recipe

FASHION_MNIST = "zalando-datasets/fashion_mnist"
UNDECIDED = "other"
"""The licence of a run that names none."""


def license_of(student: Student, given: str | None) -> str:
    """Return the licence to publish under: the one that is given, else the run's.

    Raises:
        ValueError: Neither names one, or it is not spelled as an identifier.
    """
    chosen = given if given is not None else str(student.config["pretrained_cfg"].get("license") or UNDECIDED)
    if given is None and chosen == UNDECIDED:
        raise ValueError(
            "the run names no licence, and who downloads the weights has to know what is allowed: give one, such as "
            "--license mit, apache-2.0 or cc-by-nc-4.0. Licences of the data and of the teacher may bind you. "
            "--license other publishes without one."
        )
    if not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", chosen.lower()):
        raise ValueError(
            f"--license {chosen!r}: expected an identifier of https://huggingface.co/docs/hub/repositories-licenses, "
            "such as mit, apache-2.0 or other."
        )
    return chosen.lower()


def card_data(student: Student, repo_id: str, license: str) -> ModelCardData:
    """Return the metadata.

    Args:
        student: Published.
        repo_id: user/name.
        license: Identifier of the licence.
    """
    base = base_model(student.recipe)
    dataset = hub_dataset(student.recipe)
    results = _results(student)
    return ModelCardData(
        library_name="timm",
        pipeline_tag="image-classification",
        license=license,
        datasets=[dataset] if dataset is not None else None,
        base_model=base,
        base_model_relation="finetune" if base is not None else None,
        metrics=["accuracy"] if results else None,
        tags=_tags(student),
        model_name=repo_id.partition("/")[2],
        eval_results=results or None,
    )


def _tags(student: Student) -> list[str]:
    tags = ["image-classification", "timm", "mgd-timm"]
    if not student.architecture.startswith("cifar_"):
        tags.insert(2, "transformers")
    if student.is_taught and student.recipe is not None:
        recipe = student.recipe
        tags += ["distillation", "knowledge-distillation"]
        tags += [recipe.method] if recipe.method != "none" else []
        tags += terms_of(recipe).criterion_names()
    return tags


def base_model(recipe: Recipe | None) -> str | None:
    """Return the hub id of the weights that the student started from; None where they are not on the hub.

    A teacher is no base model: the hub's relations are adapter, merge, quantized and finetune.
    """
    if recipe is None or not recipe.student_pretrained:
        return None
    config = get_pretrained_cfg(recipe.student)
    if config is None or not config.hf_hub_id:
        return None
    name = recipe.student if "." in recipe.student or not config.tag else f"{recipe.student}.{config.tag}"
    return f"timm/{name}" if config.hf_hub_id == "timm/" else config.hf_hub_id


def hub_dataset(recipe: Recipe | None) -> str | None:
    """Return the hub id of the data that a run trained on; None for local data."""
    if recipe is None or recipe.data.data_dir is not None:
        return None
    if recipe.data.dataset == "embedded":
        return FASHION_MNIST
    try:
        validate_repo_id(recipe.data.dataset)
    except HFValidationError:
        return None
    return recipe.data.dataset


def dataset_name(recipe: Recipe | None) -> str:
    """Return what people call the data: its folder or hub id."""
    if recipe is None:
        return "unknown data"
    if recipe.data.data_dir is None and recipe.data.dataset == "embedded":
        return "Fashion-MNIST (the part of it in mgd_timm)"
    return recipe.data.data_dir or recipe.data.dataset


def _results(student: Student) -> list[EvalResult]:
    found = student.accuracy
    dataset = hub_dataset(student.recipe)
    config = student.recipe.data.dataset_config if student.recipe is not None else None
    return [
        EvalResult(
            task_type="image-classification",
            task_name="Image Classification",
            dataset_type=dataset if dataset is not None else "imagefolder",
            dataset_name=dataset_name(student.recipe),
            dataset_config=config,
            dataset_split=student.origin.get("evaluation_split"),
            metric_type="accuracy",
            metric_name=f"Top-{count} accuracy (%)",
            metric_value=round(value, 3),
        )
        for count, value in ((1, found.top1), (5, found.top5))
        if value is not None
    ]
