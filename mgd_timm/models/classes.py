"""A teacher of other classes than the data's: the rows of its classifier that are the data's classes."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import yaml
from timm.data import ImageNetInfo, infer_imagenet_subset
from timm.models import get_model_input_config
from torch import Tensor, nn

from mgd_timm.recipe.options import few

FORMS = (
    "expected a text file with a line for each class of the data, in the data's order, that is the teacher's name or "
    "index of it (a line that begins with # is a remark); or a .yaml or .json file, a list in the data's order or a "
    "mapping from the data's names"
)


def select_classes(model: nn.Module, spec: str, class_names: Sequence[str]) -> None:
    """Give a teacher the data's classes in the data's order, in place; one that has them already is left alone.

    Under "auto" so is one of as many classes where nothing says what they are called: numbers for names, or no names,
    unless their number is ImageNet's and the data's names are among ImageNet's.

    Raises:
        ValueError: As of `find_teacher_rows` and `select_rows`.
    """
    names = (getattr(model, "pretrained_cfg", {}) or {}).get("label_names")
    if getattr(model, "num_classes", 0) == len(class_names):
        numbers = [str(i) for i in range(len(class_names))]  # stand for no names
        own = list(names) if isinstance(names, list | tuple) else numbers
        if own == list(class_names) != numbers:
            return
        known = _Names(read_class_names(model) or ())
        if spec == "auto" and numbers in (own, list(class_names)) and not any(map(known.rows, class_names)):
            return
    select_rows(model, find_teacher_rows(spec, model, class_names), class_names)


def read_class_names(model: nn.Module) -> list[tuple[str, ...]] | None:
    """What each class of a model is called, every name of it; None where nothing says so.

    The weights' own label names, else those of the ImageNet that has this number of classes: synsets (n01440764) and
    their lemmas.
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


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]+", " ", name).strip().lower()


class _Names:
    """Which classes a word may stand for, of those whose names are given."""

    def __init__(self, names: Sequence[tuple[str, ...]]) -> None:
        # A class's own name comes before what others are called as well: 'crane' may be one synset's name and another's
        # lemma. So do all its lemmas together, as the hub's data sets name ImageNet's: 'maillot' is one, 'maillot, tank
        # suit' another.
        self.exact = {known[0]: {index} for index, known in enumerate(names)}
        self.whole: dict[str, set[int]] = {}
        self.single: dict[str, set[int]] = {}
        for index, (own, *lemmas) in enumerate(names):
            if lemmas:
                self.whole.setdefault(_plain(", ".join(lemmas)), set()).add(index)
            for name in (own, *lemmas):
                self.single.setdefault(_plain(name), set()).add(index)

    def rows(self, word: str) -> set[int]:
        """Indices of the classes: none, one, or several that it does not tell apart."""
        found = self.exact.get(word) or self.whole.get(_plain(word)) or self.single.get(_plain(word))
        return found or set.intersection(*(self.single.get(_plain(part), set()) for part in word.split(",")))


def find_teacher_rows(spec: str, model: nn.Module, class_names: Sequence[str]) -> list[int]:
    """For each class of the data, the row of the teacher's classifier that is this class.

    Args:
        spec: "auto" looks the data's class names up among the teacher's; else a file (`FORMS`).
        model: The teacher, with its classifier.
        class_names: Of the data, in its order.

    Raises:
        ValueError: No such file or another form; a class that the teacher does not know, or knows twice; two classes of
            one row.
    """
    names = read_class_names(model)
    if spec == "auto":
        if names is None:
            raise ValueError(
                f"teacher_classes='auto': nothing says what the teacher's {getattr(model, 'num_classes', 0)} classes "
                f"are called: give a file instead; {FORMS}. Or fit it a classifier of the data's classes "
                "(--fit-teacher-head probe), or let it teach without its logits (--teacher-classes none)."
            )
        wanted: list[str | int] = list(class_names)
    else:
        wanted = _read(spec, class_names)
    known = _Names(names or ())
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
        said = [f"the teacher does not know {few(unknown)}"] if unknown else []
        said += [f"it knows several classes as {few(several)}"] if several else []
        such = f", such as {few([called[0] for called in names])}" if names else ""
        raise ValueError(
            f"teacher_classes={spec!r}: {' and '.join(said)}. It has {count} classes{such}. Give a file; {FORMS}. Or "
            "fit it a classifier of the data's classes with --fit-teacher-head probe."
        )
    for place, name in enumerate(class_names):
        if rows[place] in rows[:place]:
            other = class_names[rows.index(rows[place])]
            raise ValueError(
                f"teacher_classes={spec!r}: {name!r} is to the teacher the class that {other!r} is: a row stands for "
                "one class."
            )
    return rows


def _read(spec: str, class_names: Sequence[str]) -> list[str | int]:
    """The teacher's name or index of each class of the data, from a file."""
    path = Path(spec)
    if not path.is_file():
        raise ValueError(
            f"teacher_classes={spec!r}: no such file; give 'auto', 'none' or a file, {FORMS.removeprefix('expected ')}."
        )
    try:
        text = path.read_text()
        listed: Any = yaml.safe_load(text) if path.suffix in (".yaml", ".yml", ".json") else text.splitlines()
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: cannot be read ({error}); {FORMS}.") from error
    if isinstance(listed, dict):
        known = {str(name): value for name, value in listed.items()}
        lacking = [name for name in class_names if name not in known]
        if lacking:
            raise ValueError(f"{path}: says nothing of the data's classes {few(lacking)}; {FORMS}.")
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
    """Cut a model's classifier down to some of its rows, in place, and let its config say what is left.

    Args:
        model: A timm model with a classifier.
        rows: Indices of its classes, in the order that the logits are to have.
        class_names: What these are called from now on.

    Raises:
        ValueError: A classifier without one linear layer of its own whose rows are the classes; the model is as it was.
    """
    count, name = int(cast(Any, model).num_classes), type(model).__name__
    found = cast(Any, model).get_classifier()
    layers = []
    for part in found if isinstance(found, tuple | list) else (found,):
        linear = [m for m in part.modules() if isinstance(m, nn.Linear | nn.Conv2d) and m.weight.shape[0] == count]
        layers += linear[-1:]
        if not linear:
            raise ValueError(
                f"{name} has no linear layer whose {count} rows are its classes: they cannot be chosen. Fit it a "
                "classifier of the data's classes (--fit-teacher-head finetune)."
            )
    before = _logits(model)[:, list(rows)]
    whole = [(layer.weight, layer.bias) for layer in layers]
    kept = torch.tensor(list(rows))
    for layer in layers:
        layer.weight = nn.Parameter(layer.weight.detach()[kept].clone(), layer.weight.requires_grad)
        if layer.bias is not None:
            layer.bias = nn.Parameter(layer.bias.detach()[kept].clone(), layer.bias.requires_grad)
        _say_count(layer, len(rows))
    model.num_classes = len(rows)  # type: ignore[assignment]
    after = _logits(model)
    if after.shape != before.shape or not torch.allclose(after, before, rtol=1e-4, atol=1e-5):
        for layer, (weight, bias) in zip(layers, whole, strict=True):
            layer.weight, layer.bias = weight, bias
            _say_count(layer, count)
        model.num_classes = count  # type: ignore[assignment]
        raise ValueError(
            f"{name}'s logits are not the rows of one linear layer: its classes cannot be chosen (--fit-teacher-head)."
        )
    config = dict(getattr(model, "pretrained_cfg", {}) or {})
    config.pop("label_descriptions", None)
    model.pretrained_cfg = {**config, "num_classes": len(rows), "label_names": tuple(class_names)}  # type: ignore[assignment]


def _say_count(layer: nn.Linear | nn.Conv2d, count: int) -> None:
    if isinstance(layer, nn.Linear):
        layer.out_features = count
    else:
        layer.out_channels = count


def _logits(model: nn.Module) -> Tensor:
    """Logits of a smooth picture in eval mode; the modules' modes are as before afterwards."""
    modes = {module: module.training for module in model.modules()}
    size = tuple(get_model_input_config(model)["input_size"])
    weight = next(model.parameters())
    images = (torch.arange(2 * size[0] * size[1] * size[2], dtype=torch.float32) * 0.37).sin().reshape(2, *size)
    try:
        with torch.no_grad():
            found: Tensor = model.eval()(images.to(weight.device, weight.dtype)).float()
            return found
    finally:
        for module, mode in modes.items():
            module.training = mode
