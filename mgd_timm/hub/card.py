"""The model card of a student: metadata and text, as timm's cards have them."""

from collections.abc import Sequence
from typing import Any

from huggingface_hub import ModelCard

from mgd_timm.hub.compression import Row, compression_table, number_of
from mgd_timm.hub.markdown import NONE, code, escape, pairs, table
from mgd_timm.hub.metadata import base_model, card_data, dataset_name, hub_dataset
from mgd_timm.hub.origin import digest_table
from mgd_timm.hub.snippets import snippets
from mgd_timm.hub.student import Accuracy, Student, as_list
from mgd_timm.hub.training import training_table
from mgd_timm.pipeline.plan import terms_of
from mgd_timm.recipe.recipe import Recipe

SOURCE = "mgd_timm"
CLASSES = 30
"""Of many classes, how many are named."""

CITE_MGD = """@article{shao2021multi,
  title = {Multi-granularity for knowledge distillation},
  author = {Shao, Baitan and Chen, Ying},
  journal = {arXiv preprint arXiv:2108.06681},
  year = {2021}
}"""
CITE_TIMM = """@misc{rw2019timm,
  author = {Ross Wightman},
  title = {PyTorch Image Models},
  year = {2019},
  publisher = {GitHub},
  journal = {GitHub repository},
  doi = {10.5281/zenodo.4414861},
  howpublished = {\\url{https://github.com/huggingface/pytorch-image-models}}
}"""


def write_card(
    student: Student, repo_id: str, license: str, rows: Sequence[Row], formats: Sequence[dict[str, Any]] = ()
) -> str:
    """Return the content of README.md.

    Args:
        student: Published.
        repo_id: user/name.
        license: Identifier of the licence.
        rows: Of the compression table; the student's own is the last.
        formats: What mgd-timm export measured of each exported file.
    """
    data = card_data(student, repo_id, license)
    sections = [
        f"# Model card for {repo_id.partition('/')[2]}",
        _summary(student),
        "## Model details",
        _details(student, rows[-1], license),
        "## Results",
        _results(student, rows),
        *(["## Formats", _formats(formats)] if formats else []),
        "## Usage",
        *_usage(student, repo_id),
        *(["## Training", _training(student, student.recipe)] if student.recipe is not None else []),
        "## Limits",
        _limits(student),
        "## Provenance",
        _provenance(student, repo_id),
        "## Citation",
        f"```bibtex\n{_citations(student)}\n```",
    ]
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n"))


def _summary(student: Student) -> str:
    recipe = student.recipe
    classes = student.num_classes
    text = f"A `{student.architecture}` that classifies images into {classes:,} classes"
    if recipe is None:
        return f"{text}. A [timm](https://github.com/huggingface/pytorch-image-models) model."
    text += f", trained on {_data_link(student)}"
    if recipe.teacher is not None:
        text += f" and distilled from {_teachers(student, recipe)} with {_method(recipe)}"
    elif recipe.peer is not None and terms_of(recipe).trained_teacher is not None:
        text += f" and distilled from a `{recipe.peer}` that trained in the same run, with {_method(recipe)}"
    elif recipe.peer is not None:
        text += f" together with a `{recipe.peer}`, where both networks taught each other"
    accuracy = student.accuracy
    measured = (
        f" Its top-1 accuracy is {accuracy.top1:.2f} %{_on(student, accuracy)}." if accuracy.top1 is not None else ""
    )
    return f"{text}.{measured} Trained with {SOURCE}; loads in [timm](https://github.com/huggingface/pytorch-image-models)."


def _method(recipe: Recipe) -> str:
    """Return the method and the criteria, such as "MAS, KD"."""
    method = [recipe.method] if recipe.method != "none" else []
    return (
        ", ".join(name.upper() for name in (*method, *terms_of(recipe).criterion_names())) or "no loss of the teacher's"
    )


def _data_link(student: Student) -> str:
    dataset, name = hub_dataset(student.recipe), escape(dataset_name(student.recipe))
    return f"[{name}](https://huggingface.co/datasets/{dataset})" if dataset is not None else f"local images ({name})"


def _teachers(student: Student, recipe: Recipe) -> str:
    """Return the teachers by architecture, with a link to weights on the hub."""
    architectures = as_list(student.origin.get("teacher_architecture"))
    words = []
    for place, given in enumerate(recipe.teacher or ()):
        name = architectures[place] if place < len(architectures) else given
        if given.startswith("hf-hub:"):
            ident = given.removeprefix("hf-hub:")
            words.append(f"{code(name)} ([{escape(ident)}](https://huggingface.co/{ident.partition('@')[0]}))")
        elif given.partition(".")[0] == name:
            words.append(f"{code(name)} (timm's weights {escape(given)})")
        else:
            words.append(code(name))
    return " and ".join(words)


def _on(student: Student, accuracy: Accuracy) -> str:
    split = student.origin.get("evaluation_split")
    images = f" on {accuracy.images:,} images" if accuracy.images is not None else ""
    return f"{images} of split {code(split)}" if images and split else images


def _details(student: Student, own: Row, license: str) -> str:
    assert own.work is not None
    _, height, width = student.input_size
    size = (student.folder / "model.safetensors").stat().st_size
    names = student.class_names
    rows = [
        ("type", "image classification, feature backbone"),
        ("parameters (M)", number_of(own.work.parameters / 1e6)),
        ("GMACs", f"{own.work.macs / 1e9:.3g}"),
        ("activations (M)", number_of(own.work.activations / 1e6)),
        ("image size", f"{width} x {height}"),
        ("file size (MB)", number_of(size / 1e6)),
        ("licence", escape(license)),
    ]
    shown = ", ".join(escape(name) for name in names[:CLASSES])
    more = f" and {len(names) - CLASSES:,} more" if len(names) > CLASSES else ""
    classes = f"\n\nClasses: {shown}{more}; `config.json` has them in order." if names else ""
    return pairs(rows) + classes


def _results(student: Student, rows: Sequence[Row]) -> str:
    accuracy = student.accuracy
    has_teacher = student.recipe is not None and student.recipe.teacher is not None
    parts = [compression_table(rows, has_teacher)]
    if accuracy.top1 is None:
        parts.append("The run had no images to evaluate on, so the accuracy is not known.")
        return "\n\n".join(parts)
    notes = f"Measured after the last epoch{_on(student, accuracy)}; not the best of several epochs."
    if accuracy.images and 0 < accuracy.top1 < 100:
        share = accuracy.top1 / 100
        error = 100 * (share * (1 - share) / accuracy.images) ** 0.5
        notes += f" The standard error of this top-1 is {error:.2f} points, from the number of images alone."
    if has_teacher and "val_top1" in student.origin["metrics"]:
        notes += " The teacher was evaluated on the validation split, not on these images."
    if any(len(row.top1) > 1 for row in rows):
        notes += " Of several seeds: mean ± standard deviation."
    parts.append(notes + " MACs: multiply-accumulates of one image. In brackets: beside the teacher.")
    return "\n\n".join(parts)


def _formats(formats: Sequence[dict[str, Any]]) -> str:
    sizes = list(formats[0]["latency"])
    head = ["", "top-1, %", "drop", "agreement, %", "MB", *(f"ms, batch {size}" for size in sizes), "int8 by"]
    body = [
        [
            code(row["file"]),
            *(f"{row[name]:.2f}" for name in ("top1", "drop", "agreement", "megabytes")),
            *(f"{row['latency'][size]:.2f}" for size in sizes),
            escape(row.get("quantised_by") or NONE),
        ]
        for row in formats
    ]
    note = (
        "Drop: points of top-1 below PyTorch in float32. Agreement: share of images of the same prediction. Latencies "
        "are of the author's machine."
    )
    return f"{table(head, body)}\n\n{note}"


def _usage(student: Student, repo_id: str) -> list[str]:
    parts = [f"### {heading}\n\n```python\n{snippet}\n```" for heading, snippet in snippets(student, repo_id).items()]
    if not student.architecture.startswith("cifar_"):
        parts.append(f'Transformers loads it too: `pipeline("image-classification", "{repo_id}")`.')
    return parts


def _training(student: Student, recipe: Recipe) -> str:
    command = "distill" if student.is_taught else "train"
    text = f"`recipe.yaml` has all options: `mgd-timm {command} --config recipe.yaml` trains again"
    local = recipe.data.data_dir is not None
    flags = ["`--data-dir FOLDER`"] if local else []
    if recipe.teacher_trajectory is not None:
        flags.append("`--teacher-trajectory`")
    elif recipe.teacher not in (None, ("embedded",)):
        flags.append("`--teacher`")
    text += f", with {' and '.join(flags)} of your machine." if flags else "."
    return f"{training_table(student, recipe)}\n\n{text}"


def _limits(student: Student) -> str:
    lines = [
        "It answers with one of its classes whatever the image shows.",
        "Accuracy on other images than those above, robustness, calibration and differences between groups of people "
        "or places were not measured.",
    ]
    recipe = student.recipe
    if recipe is not None:
        lines.append(f"It is one run (seed {recipe.seed}); another seed gives another accuracy.")
    if student.is_taught:
        lines.append("It was taught to imitate its teacher, with its errors and biases.")
    base = base_model(recipe)
    derived = ["the data", *(["the teacher"] if student.is_taught else []), *([f"`{base}`"] if base else [])]
    lines.append(f"The licence is that of these weights; licences of {' and '.join(derived)} may apply as well.")
    return "\n".join(f"- {line}" for line in lines)


def _provenance(student: Student, repo_id: str) -> str:
    return (
        f"{digest_table(student.origin)}\n\n"
        f"`mgd-timm verify hf-hub:{repo_id}` checks that these files belong together. Nothing is signed: who replaces "
        "the weights and all digests is not found. The digests of networks are of their tensors, those of files of "
        "their bytes, and that of recipe.json of its content without `files_sha256`."
    )


def _citations(student: Student) -> str:
    recipe = student.recipe
    return "\n".join([*([CITE_MGD] if recipe is not None and recipe.method != "none" else []), CITE_TIMM])
