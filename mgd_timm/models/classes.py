"""Select and reorder the rows of a teacher's classifier so that its classes are the data's."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import yaml
from timm.data import ImageNetInfo, infer_imagenet_subset
from timm.models import get_model_input_config
from torch import Tensor, nn

from mgd_timm.features.probe import eval_without_gradients, probe_image
from mgd_timm.recipe.options import few

FORMS = (
    "expected a text file with the teacher's name or index of each class of the data, one per line in the data's order "
    "(lines that begin with # are comments); or a .yaml or .json file with a list in the data's order, or a mapping "
    "from the data's names"
)


def select_classes(model: nn.Module, spec: str, class_names: Sequence[str]) -> None:
    """Give a teacher the data's classes in the data's order, in place.

    A teacher that has them already is unchanged. With "auto", a teacher with the same number of classes is unchanged
    too if its class names are unknown or numbers, unless the data's names are found among its ImageNet classes.

    Args:
        model: The teacher, with its classifier.
        spec: As for `find_teacher_rows`.
        class_names: Names of the data's classes, in order.

    Raises:
        ValueError: As for `find_teacher_rows` and `select_rows`.
    """
    names = (getattr(model, "pretrained_cfg", {}) or {}).get("label_names")
    if getattr(model, "num_classes", 0) == len(class_names):
        numbers = [str(i) for i in range(len(class_names))]  # numbers mean that there are no names
        own = list(names) if isinstance(names, list | tuple) else numbers
        if own == list(class_names) != numbers:
            return
        known = _ClassLookup(read_class_names(model) or ())
        if spec == "auto" and numbers in (own, list(class_names)) and not any(map(known.rows, class_names)):
            return
    select_rows(model, find_teacher_rows(spec, model, class_names), class_names)


def read_class_names(model: nn.Module) -> list[tuple[str, ...]] | None:
    """Return all names of each class of a model, its own name before its synonyms; None if they are unknown.

    The names are the weights' label names, or else those of the ImageNet subset with this number of classes: synsets
    (n01440764) and their lemmas.
    """
    config = getattr(model, "pretrained_cfg", {}) or {}
    names, count = config.get("label_names"), getattr(model, "num_classes", 0)
    if isinstance(names, list | tuple) and len(names) == count:
        described = config.get("label_descriptions")
        more = described if isinstance(described, list | tuple) and len(described) == count else ("",) * count
        if isinstance(described, Mapping):
            more = tuple(str(described.get(name, "")) for name in names)
        return [(str(name), *_lemmas(str(text))) for name, text in zip(names, more, strict=True)]
    subset = infer_imagenet_subset({"num_classes": count})
    if subset is None:
        return None
    info = ImageNetInfo(subset)
    return [(name, *_lemmas(info.label_name_to_description(name))) for name in info.label_names()]


def _lemmas(description: str) -> list[str]:
    return [part.strip() for part in description.partition(":")[0].split(",") if part.strip()]


def _normalise(name: str) -> str:
    return re.sub(r"[\s_-]+", " ", name).strip().lower()


class _ClassLookup:
    """Look up classes by any of their names: all names of each class, its own first."""

    def __init__(self, names: Sequence[tuple[str, ...]]) -> None:
        # A class's own name wins over synonyms of other classes: 'crane' may be one synset's name and another's lemma.
        # So does the list of all its lemmas, which the hub's data sets use as ImageNet's names: 'maillot' is one class,
        # 'maillot, tank suit' another.
        self.by_name = {known[0]: {index} for index, known in enumerate(names)}
        self.by_all_synonyms: dict[str, set[int]] = {}
        self.by_any_name: dict[str, set[int]] = {}
        for index, (own, *lemmas) in enumerate(names):
            if lemmas:
                self.by_all_synonyms.setdefault(_normalise(", ".join(lemmas)), set()).add(index)
            for name in (own, *lemmas):
                self.by_any_name.setdefault(_normalise(name), set()).add(index)

    def rows(self, word: str) -> set[int]:
        """Return the indices of the classes that a word names: none, one, or several if it is ambiguous."""
        plain = _normalise(word)
        found = self.by_name.get(word) or self.by_all_synonyms.get(plain) or self.by_any_name.get(plain)
        return found or set.intersection(*(self.by_any_name.get(_normalise(part), set()) for part in word.split(",")))


def find_teacher_rows(spec: str, model: nn.Module, class_names: Sequence[str]) -> list[int]:
    """Find the row of the teacher's classifier for each class of the data.

    Args:
        spec: "auto" looks the data's class names up among the teacher's; otherwise a file (`FORMS`).
        model: The teacher, with its classifier.
        class_names: Names of the data's classes, in order.

    Raises:
        ValueError: The file is missing or malformed; the teacher lacks a class or has several of its name; or two
            classes have the same row.
    """
    names = read_class_names(model)
    if spec == "auto":
        if names is None:
            raise ValueError(
                f"--teacher-classes auto: the names of the teacher's {getattr(model, 'num_classes', 0)} classes "
                f"are not known. Give a file instead; {FORMS}. Or fit a classifier of the data's classes "
                "(--fit-teacher-head probe), or use the teacher without its logits (--teacher-classes none)."
            )
        wanted: list[str | int] = list(class_names)
    else:
        wanted = _read_class_file(spec, class_names)
    known = _ClassLookup(names or ())
    rows, unknown, several = [], [], []
    count = int(cast(Any, model).num_classes)
    for name, word in zip(class_names, wanted, strict=True):
        found = {word} if isinstance(word, int) else known.rows(word)
        if not found or not all(0 <= row < count for row in found):
            unknown.append(repr(word) if word == name else f"{word!r} (for {name!r})")
        elif len(found) > 1:
            several.append(f"{word!r} (rows {', '.join(map(str, sorted(found)))})")
        rows.append(min(found, default=-1))
    if unknown or several:
        problems = [f"the teacher does not know {few(unknown)}"] if unknown else []
        problems += [f"it has several classes named {few(several)}"] if several else []
        examples = f", such as {few([called[0] for called in names])}" if names else ""
        raise ValueError(
            f"teacher_classes={spec!r}: {' and '.join(problems)}. It has {count} classes{examples}. Give a file; "
            f"{FORMS}. Or fit a classifier of the data's classes with --fit-teacher-head probe."
        )
    for index, name in enumerate(class_names):
        if rows[index] in rows[:index]:
            other = class_names[rows.index(rows[index])]
            raise ValueError(
                f"teacher_classes={spec!r}: {name!r} and {other!r} are the same class of the teacher: give each "
                "another one."
            )
    return rows


def _read_class_file(spec: str, class_names: Sequence[str]) -> list[str | int]:
    """Read the teacher's name or index of each class of the data from a file."""
    path = Path(spec)
    if not path.is_file():
        raise ValueError(
            f"teacher_classes={spec!r}: no such file; give 'auto', 'none' or a file, {FORMS.removeprefix('expected ')}."
        )
    try:
        text = path.read_text(encoding="utf-8-sig")  # Windows' editors put a mark before the text
        listed: Any = yaml.safe_load(text) if path.suffix in (".yaml", ".yml", ".json") else text.splitlines()
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: cannot be read ({error}); {FORMS}.") from error
    if isinstance(listed, dict):
        known = {str(name): value for name, value in listed.items()}
        missing = [name for name in class_names if name not in known]
        if missing:
            raise ValueError(f"{path}: the data's classes {few(missing)} are missing; {FORMS}.")
        listed = [known[name] for name in class_names]
    elif isinstance(listed, list):
        listed = [line for line in listed if not isinstance(line, str) or line.strip().partition("#")[0]]
    if not isinstance(listed, list) or not all(isinstance(v, str | int) and not isinstance(v, bool) for v in listed):
        raise ValueError(f"{path}: {FORMS}.")
    if len(listed) != len(class_names):
        raise ValueError(f"{path}: {len(listed)} classes, the data has {len(class_names)}; {FORMS}.")
    words = [word.strip() if isinstance(word, str) else word for word in listed]
    return [int(word) if isinstance(word, str) and word.isdecimal() else word for word in words]


def select_rows(model: nn.Module, rows: Sequence[int], class_names: Sequence[str]) -> None:
    """Reduce a model's classifier to some of its rows, in place, and set the class names in its pretrained_cfg.

    Args:
        model: A timm model with a classifier.
        rows: Indices of its classes, in the new order of the logits.
        class_names: New names of these classes.

    Raises:
        ValueError: The classes are not the rows of a linear layer of the classifier; the model is unchanged.
    """
    count, name = int(cast(Any, model).num_classes), type(model).__name__
    found = cast(Any, model).get_classifier()
    layers = []
    for part in found if isinstance(found, tuple | list) else (found,):
        linear = [m for m in part.modules() if isinstance(m, nn.Linear | nn.Conv2d) and m.weight.shape[0] == count]
        layers += linear[-1:]
        if not linear:
            raise ValueError(
                f"{name} has no linear layer with one row per class ({count}): classes cannot be selected. Fit a "
                "classifier of the data's classes (--fit-teacher-head finetune)."
            )
    before = _logits(model)[:, list(rows)]
    original = [(layer.weight, layer.bias) for layer in layers]
    selected = torch.tensor(list(rows))
    for layer in layers:
        layer.weight = nn.Parameter(layer.weight.detach()[selected].clone(), layer.weight.requires_grad)
        if layer.bias is not None:
            layer.bias = nn.Parameter(layer.bias.detach()[selected].clone(), layer.bias.requires_grad)
        _set_num_outputs(layer, len(rows))
    model.num_classes = len(rows)  # type: ignore[assignment]
    after = _logits(model)
    if after.shape != before.shape or not torch.allclose(after, before, rtol=1e-4, atol=1e-5):
        for layer, (weight, bias) in zip(layers, original, strict=True):
            layer.weight, layer.bias = weight, bias
            _set_num_outputs(layer, count)
        model.num_classes = count  # type: ignore[assignment]
        raise ValueError(
            f"{name}'s logits are not the rows of one linear layer: classes cannot be selected. Fit a classifier of "
            "the data's classes (--fit-teacher-head finetune)."
        )
    config = dict(getattr(model, "pretrained_cfg", {}) or {})
    config.pop("label_descriptions", None)
    model.pretrained_cfg = {**config, "num_classes": len(rows), "label_names": tuple(class_names)}  # type: ignore[assignment]


def _set_num_outputs(layer: nn.Linear | nn.Conv2d, count: int) -> None:
    if isinstance(layer, nn.Linear):
        layer.out_features = count
    else:
        layer.out_channels = count


def _logits(model: nn.Module) -> Tensor:
    with eval_without_gradients(model):
        logits: Tensor = model(probe_image(model, tuple(get_model_input_config(model)["input_size"])))
        return logits.float()
