"""Find corrupt images before the first epoch, so that the images that are skipped depend on the data alone."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mgd_timm.data.decode import DataError
from mgd_timm.data.image_formats import readable_formats
from mgd_timm.data.loader import ReadAhead
from mgd_timm.data.readers.arrays import ArrayRows
from mgd_timm.data.readers.rows import HASHED, Rows
from mgd_timm.recipe.data import Data
from mgd_timm.storage.cache import cache_entry
from mgd_timm.storage.checkpoint import State
from mgd_timm.storage.lock import load_or_create

SKIP_HINT = "Or skip up to N corrupt images with --max-bad N."


@dataclass(frozen=True)
class CheckedRows:
    """The rows of a split and the errors of its corrupt images.

    Args:
        rows: The split.
        digest: Digest of the split.
        corrupt: Error of each row that cannot be decoded.
    """

    rows: Rows
    digest: str
    corrupt: dict[int, str]

    @property
    def labels(self) -> Tensor:
        """Labels of all rows, [n] or [n, k]."""
        return torch.from_numpy(self.rows.labels)

    def readable(self, ids: Tensor) -> Tensor:
        """Return the ids whose images can be decoded."""
        return ids[~torch.isin(ids, torch.tensor(list(self.corrupt), dtype=ids.dtype))] if self.corrupt else ids

    def pixels(self, row: int, in_chans: int) -> np.ndarray:
        """Return a decoded image, uint8 [height, width, in_chans].

        Raises:
            DataError: The image is corrupt. The message names --max-bad.
        """
        try:
            return self.rows.pixels(row, in_chans)
        except DataError as error:
            raise DataError(f"{error} {SKIP_HINT}") from error


def check_rows(rows: Rows, data: Data, log: Callable[[str], None]) -> CheckedRows:
    """Compute the digest of a split, and with --max-bad find its corrupt images.

    Every image is decoded once, which takes about as long as one evaluation's reading. The result is cached by the
    digest of the data.
    """
    digest = rows.digest()
    if not data.max_bad or isinstance(rows, ArrayRows):  # arrays are pixels already
        return CheckedRows(rows, digest, {})
    # The digest covers a part of the images of a large split: the files' times and inodes cover the others.
    state = getattr(rows, "state", "") if sum(getattr(rows, "sizes", ())) > HASHED else ""
    folder = cache_entry("corrupt", f"{digest}:{state}:{data.in_chans}:{sorted(readable_formats())}")

    def create() -> State:
        found = _find_corrupt(rows, data.in_chans, data.workers)
        log(f"checked {len(rows):,} images of split {rows.split!r}: {len(found)} cannot be decoded")
        return State({}, {"corrupt": {str(row): reason for row, reason in found.items()}})

    known = load_or_create(folder, f"list of the corrupt images of split {rows.split!r}", create, log)
    return CheckedRows(rows, digest, {int(row): reason for row, reason in known.values["corrupt"].items()})


def check_number_of_corrupt(splits: Sequence[CheckedRows], most: int, log: Callable[[str], None]) -> tuple[str, ...]:
    """Log the number of corrupt images, and return the error of each.

    Args:
        splits: The splits.
        most: Largest number that may be skipped.
        log: Logs one line.

    Raises:
        DataError: There are more. The message names the first ones.
    """
    reasons = tuple(reason for split in splits for _, reason in sorted(split.corrupt.items()))
    first = " ".join(reasons[:3]) + (f" And {len(reasons) - 3} more." if len(reasons) > 3 else "")
    if len(reasons) > most:
        raise DataError(
            f"{len(reasons)} corrupt images, more than --max-bad {most}: {first} Or skip all with --max-bad "
            f"{len(reasons)}."
        )
    if reasons:
        total = sum(len(split.rows) for split in splits)
        log(f"skipped {len(reasons)} corrupt images of {total:,} (--max-bad {most}): {first}")
    return reasons


class _Errors:
    """`errors[row]`: the error of decoding a row, "" if there is none."""

    def __init__(self, rows: Rows, in_chans: int) -> None:
        self.rows, self.in_chans = rows, in_chans

    def __getitem__(self, row: int) -> str:
        try:
            self.rows.pixels(row, self.in_chans)
        except DataError as error:
            return str(error)
        return ""


def _find_corrupt(rows: Rows, in_chans: int, workers: int) -> dict[int, str]:
    from tqdm import tqdm

    errors = _Errors(rows, in_chans)
    found: dict[int, str] = {}
    keys = [ids.tolist() for ids in torch.arange(len(rows)).split(64)]
    with tqdm(total=len(rows), desc=f"checking {rows.split}", unit="img", leave=False, disable=len(rows) < 2000) as bar:
        batches = ReadAhead(errors, workers).batches(keys, torch.device("cpu"))
        for ids, batch in zip(keys, batches, strict=True):
            suspects = [row for row, error in zip(ids, batch, strict=True) if error]
            # Decoded once more, as a disk may fail only once.
            found |= {row: error for row in suspects if (error := errors[row])}
            bar.update(len(ids))
    return found
