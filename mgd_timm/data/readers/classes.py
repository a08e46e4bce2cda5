"""Match the labels of a split with the classes of the training split: by name, not by number."""

import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from mgd_timm.data.decode import DataError
from mgd_timm.recipe.options import few, unknown


@dataclass(frozen=True)
class Labels:
    """Labels as a split's files give them.

    Args:
        values: Class ids, int64 [n], or distributions over classes, float32 [n, k].
        names: Names of the classes by id; None where the files hold numbers alone.
        first: Number that the files give the first class, where they hold numbers alone.
    """

    values: np.ndarray
    names: tuple[str, ...] | None
    first: int = 0

    @property
    def count(self) -> int:
        """Number of classes, as far as these labels show it."""
        return self.values.shape[1] if self.values.ndim == 2 else int(self.values.max()) + 1

    def class_names(self) -> tuple[str, ...]:
        """Return the names of the classes: of numbers the numbers themselves."""
        return self.names or tuple(str(i + self.first) for i in range(self.count))


def labels_of_words(words: Sequence[str]) -> Labels:
    """Return labels that are names: classes sorted by name."""
    normal = [unicodedata.normalize("NFC", word) for word in words]
    names, ids = np.unique(np.array(normal, dtype=object), return_inverse=True)
    return Labels(ids.astype(np.int64), tuple(names.tolist()))


def labels_of_numbers(numbers: np.ndarray, where: str, first: int, *, training: bool) -> Labels:
    """Return labels that are numbers, as class ids from 0.

    Args:
        numbers: Integers [n].
        where: Their column or file, for messages.
        first: Number of the first class.
        training: Whether it is the training split, which has all classes.

    Raises:
        DataError: They do not begin with `first`, or are no class ids.
    """
    low, high = int(numbers.min()), int(numbers.max())
    if low < first:
        raise DataError(
            f"{where}: row {int(numbers.argmin())} has the label {low}, expected class ids from {first}. A split with "
            "hidden labels cannot be used: choose another with --train-split or --eval-split."
        )
    if training and low > first == 0:
        raise DataError(
            f"{where}: labels from {low} to {high}, expected class ids from 0: give --first-label {low} if {low} is "
            "the first class, or choose another column with --target-key."
        )
    if training and high - first >= len(numbers):
        raise DataError(
            f"{where}: label {high} of only {len(numbers)} images: expected consecutive class ids from {first}."
        )
    return Labels(numbers.astype(np.int64) - first, None, first)


def is_number(word: str) -> bool:
    """Return whether a word is a class id as Python writes it: 7, not 07."""
    return word.isdecimal() and word.isascii() and (word == "0" or not word.startswith("0"))


def match_classes(
    labels: Labels, train_names: tuple[str, ...] | None, split: str, log: Callable[[str], None]
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Return labels as ids of the training split's classes, and the names of these.

    Names are compared with names. Numbers are compared with names that are numbers (class folders 0 to 9); with other
    names they are taken in their order, which is logged.

    Args:
        labels: Of the split.
        train_names: Class names of the training split; None for the training split itself.
        split: Name of the split, for messages.
        log: Logs one line.

    Raises:
        DataError: A class is not among those of the training split.
    """
    values = labels.values
    if train_names is None:
        return values, labels.class_names()
    if labels.names is None and not all(map(is_number, train_names)):
        return _in_order(labels, train_names, split, log), train_names
    names = labels.class_names()
    if names == train_names:
        return values, train_names
    if labels.names is None and values.ndim == 2:
        raise DataError(
            f"split {split!r} has distributions over {labels.count} classes, the training split has "
            f"{len(train_names)}: expected as many."
        )
    ids = {name: i for i, name in enumerate(train_names)}
    used = range(len(names)) if values.ndim == 2 else np.unique(values).tolist()
    strange = [names[i] for i in used if names[i] not in ids]
    if strange:
        raise DataError(
            f"split {split!r} has the class {strange[0]!r}, which the training split has not: "
            f"{unknown('class', strange[0], train_names)}"
        )
    new = np.array([ids.get(name, -1) for name in names], dtype=np.int64)
    if values.ndim == 1:
        return new[values], train_names
    moved = np.zeros((len(values), len(train_names)), dtype=values.dtype)
    moved[:, new] = values
    return moved, train_names


def _in_order(labels: Labels, train_names: tuple[str, ...], split: str, log: Callable[[str], None]) -> np.ndarray:
    """Return labels that are numbers as ids of classes that have names, in their order, which is logged."""
    first, count = labels.first, len(train_names)
    padded = next((name for name in train_names if name.isdecimal()), None)
    if padded is not None:
        raise DataError(
            f"split {split!r} has numbers for classes, and the training split names such as {padded!r}: write the "
            "labels of both in the same way."
        )
    if labels.count > count or (labels.values.ndim == 2 and labels.count != count):
        raise DataError(
            f"split {split!r} has the label {labels.count - 1 + first}, but there are {count} classes, "
            f"{few(train_names)}: expected {first} to {count - 1 + first}."
        )
    order = ", ".join(f"{i + first} = {name}" for i, name in enumerate(train_names[:2]))
    log(f"split {split!r} has numbers for classes, taken in the order of the training split's: {order}, ...")
    return labels.values
