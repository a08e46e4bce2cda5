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
    """

    values: np.ndarray
    names: tuple[str, ...] | None


def labels_of_words(words: Sequence[str]) -> Labels:
    """Return labels that are names: classes sorted by name."""
    normal = [unicodedata.normalize("NFC", word) for word in words]
    names, ids = np.unique(np.array(normal, dtype=object), return_inverse=True)
    return Labels(ids.astype(np.int64), tuple(names.tolist()))


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
    values, names = labels.values, labels.names
    count = values.shape[1] if values.ndim == 2 else int(values.max()) + 1
    if train_names is not None and names is None and values.ndim == 2 and count != len(train_names):
        raise DataError(
            f"split {split!r} has distributions over {count} classes, the training split has {len(train_names)}: "
            "expected as many."
        )
    if train_names is None:
        return values, names or tuple(str(i) for i in range(count))
    if names is None:
        if not all(map(is_number, train_names)):
            if count > len(train_names):
                raise DataError(
                    f"split {split!r} has the label {count - 1}, but there are {len(train_names)} classes, "
                    f"{few(train_names)}: expected 0 to {len(train_names) - 1}."
                )
            log(
                f"split {split!r} has numbers for classes, taken in the order of the training split's: "
                f"0 = {train_names[0]}, 1 = {train_names[1]}, ..."
            )
            return values, train_names
        names = tuple(str(i) for i in range(count))
    if names == train_names:
        return values, train_names
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
