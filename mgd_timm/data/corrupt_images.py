"""Images that cannot be decoded: found before the first epoch, so that who is left out depends on the data alone."""

import hashlib
from collections.abc import Callable, Sequence

import torch

from mgd_timm.data.decode import DataError, cache_folder
from mgd_timm.data.readers.tables import AnyRows, ArrayRows
from mgd_timm.data.sources import read_ahead
from mgd_timm.storage.checkpoint import State
from mgd_timm.storage.lock import load_or_create


class _Check:
    """`check[row]`: the row, or -1 - row where it cannot be decoded."""

    def __init__(self, rows: AnyRows, in_chans: int) -> None:
        self.rows, self.in_chans = rows, in_chans

    def __getitem__(self, row: int) -> int:
        try:
            self.rows.pixels(row, self.in_chans)
        except DataError:
            return -1 - row
        return row


def damaged(rows: AnyRows, digest: str, in_chans: int, workers: int, say: Callable[[str], None]) -> dict[int, str]:
    """The rows that cannot be decoded, and why.

    Every image is decoded once, which takes about as long as an epoch of evaluation does to read; the answer is kept in
    the cache by the data's digest.

    Args:
        rows: A split.
        digest: Of the split.
        in_chans: Channels to decode to.
        workers: Reader processes.
        say: Takes one line for the user.
    """
    if isinstance(rows, ArrayRows):
        return {}  # pixels already
    place = cache_folder() / "damaged" / hashlib.sha256(f"{digest}:{in_chans}".encode()).hexdigest()[:32]

    def make() -> State:
        found = _checked(rows, in_chans, workers)
        say(f"checked {len(rows):,} images of {rows.split!r}: {len(found)} cannot be decoded")
        return State({}, {"damaged": {str(row): reason for row, reason in found.items()}})

    known = load_or_create(place, f"list of the damaged images of {rows.split!r}", make, say)
    return {int(row): reason for row, reason in known.values["damaged"].items()}


def _checked(rows: AnyRows, in_chans: int, workers: int) -> dict[int, str]:
    """The rows that cannot be decoded, and why, by decoding all."""
    from tqdm import tqdm

    found: dict[int, str] = {}
    keys = [ids.tolist() for ids in torch.arange(len(rows)).split(64)]
    with tqdm(total=len(rows), desc=f"checking {rows.split}", unit="img", leave=False, disable=len(rows) < 2000) as bar:
        for numbers in read_ahead(_Check(rows, in_chans), keys, workers, torch.device("cpu")):
            for row in (-1 - numbers[numbers < 0]).tolist():
                reason = _reason(rows, row, in_chans)
                if reason is not None:
                    found[row] = reason
            bar.update(len(numbers))
    return found


def _reason(rows: AnyRows, row: int, in_chans: int) -> str | None:
    """What is wrong with an image; None where it was the disk's fault, and is over."""
    try:
        rows.pixels(row, in_chans)
    except DataError as error:
        return str(error)
    return None


def check_number(
    splits: Sequence[tuple[AnyRows, dict[int, str]]], most: int, say: Callable[[str], None]
) -> tuple[str, ...]:
    """What is said of all damaged images, after a line for the user.

    Raises:
        DataError: There are more than `most`; the first ones are named.
    """
    names = tuple(reason for _, bad in splits for _, reason in sorted(bad.items()))
    first = " ".join(names[:3]) + (f" And {len(names) - 3} more." if len(names) > 3 else "")
    if len(names) > most:
        raise DataError(f"{len(names)} damaged images, more than max_bad={most}: {first} Or raise --max-bad.")
    if names:
        total = sum(len(rows) for rows, _ in splits)
        say(f"left out {len(names)} of {total:,} images (max_bad={most}): {first}")
    return names
