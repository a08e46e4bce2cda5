"""Decoded small images, cached in a file that is written once, mapped, and checked.

Each image has a checksum (xxh3, 64 bits) beside it. Up to `CHECKED_AT_ONCE` bytes all are checked when the file is
opened, which takes less time than the digest of the encoded images. In a larger file each image is checked when it is
first read: training reads in random order, so checking block by block would read the whole file within a few steps.
"""

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from xxhash import xxh3_64_intdigest

from mgd_timm.data.corrupt_images import CheckedRows
from mgd_timm.data.decode import DataError, resize
from mgd_timm.data.readers.rows import HASHED
from mgd_timm.data.transforms import SMALL
from mgd_timm.recipe.data import Data
from mgd_timm.storage.atomic_write import write_atomically
from mgd_timm.storage.cache import cache_entry
from mgd_timm.storage.lock import Lock
from mgd_timm.storage.safetensors_header import read_header

FILE = "images.safetensors"
CHECKED_AT_ONCE = 1 << 30  # bytes


class CorruptCacheError(DataError):
    """A cache file that has changed since it was written."""


class LargeImageError(Exception):
    """An image is too large to be kept in memory decoded."""


class CachedImages:
    """The images of a split, uint8 [n, c, h, w], mapped from a file.

    Args:
        path: The file.
        shape: n, c, h, w.

    Raises:
        CorruptCacheError: The header, or an image that is checked at once, has changed.
        FileNotFoundError: There is no such file.
        PermissionError: This user may not read it.
    """

    def __init__(self, path: Path, shape: Sequence[int]) -> None:
        if not path.exists():
            raise FileNotFoundError(path)
        size = int(np.prod(shape, dtype=np.int64))
        expected = {"sums": ("I64", [shape[0]], 8 * shape[0]), "images": ("U8", list(shape), size)}
        try:
            found, _ = read_header(path)
            if found != expected:
                raise ValueError("its header describes other images")
            tensors = load_file(path)
        except PermissionError:
            raise
        except (OSError, ValueError, SafetensorError) as error:
            raise CorruptCacheError(f"{path} is corrupt ({error})") from error
        self.path, self.images, self._sums = path, tensors["images"], tensors["sums"].numpy()
        self._unchecked: np.ndarray | None = np.ones(len(self._sums), dtype=bool)
        if size <= CHECKED_AT_ONCE:
            self._compare(np.arange(len(self._sums)))
            self._unchecked = None

    def check(self, rows: Tensor) -> None:
        """Check the images that this process reads for the first time.

        Raises:
            CorruptCacheError: An image has changed. The file is removed, so that the next start writes it again.
        """
        if self._unchecked is None:
            return
        wanted = rows.cpu().numpy()
        new = np.unique(wanted[self._unchecked[wanted]])
        try:
            self._compare(new)
        except CorruptCacheError as error:
            with contextlib.suppress(OSError):
                self.path.unlink()
            removed = "delete it and" if self.path.exists() else "it was removed;"
            raise CorruptCacheError(
                f"{error}: {removed} start again (with --resume if the run had started) to write it again from the "
                "source."
            ) from error
        self._unchecked[new] = False

    def _compare(self, rows: np.ndarray) -> None:
        pixels = self.images.numpy()
        changed = [row for row in rows.tolist() if xxh3_64_intdigest(pixels[row]) != int(self._sums[row]) % 2**64]
        if changed:
            more = f" and {len(changed) - 5} more" if len(changed) > 5 else ""
            raise CorruptCacheError(
                f"{self.path} is corrupt (checksum of image {', '.join(map(str, changed[:5]))}{more})"
            )


def size_error(name: str, size: Sequence[int], first: Sequence[int]) -> DataError:
    """Return the error of an image of another height and width than the first image."""
    return DataError(
        f"{name} has {size[0]}x{size[1]} pixels, the first image {first[0]}x{first[1]}: give --img-size to resize all "
        "to one size."
    )


def load_or_decode(split: CheckedRows, data: Data, size: tuple[int, int], log: Callable[[str], None]) -> CachedImages:
    """Load the decoded images of a split from the cache, or decode and cache them.

    Args:
        split: The split. Its corrupt images are black.
        data: Its `in_chans` and `img_size`. With `img_size` images are resized; without it all must have one size.
        size: Height and width.
        log: Logs one line.

    Raises:
        LargeImageError: An image has more than `SMALL` pixels a side.
        DataError: An image is corrupt or of another size.
        OSError: The cache cannot be written.
    """
    from tqdm import tqdm

    rows, in_chans = split.rows, data.in_chans
    # The digest covers a part of the images of a large split: the files' times and inodes cover the others.
    state = getattr(rows, "state", "") if np.sum(getattr(rows, "sizes", 0)) > HASHED else ""
    made_of = f"{split.digest}:{state}:{in_chans}:{size}:4" + (f":{sorted(split.corrupt)}" if split.corrupt else "")

    def decode_all() -> Tensor:
        pixels = torch.zeros(len(rows), in_chans, *size, dtype=torch.uint8)
        few = len(rows) < 20_000
        for row in tqdm(range(len(rows)), desc=f"decoding {rows.split}", unit="img", leave=False, disable=few):
            if row in split.corrupt:
                continue
            image = split.pixels(row, in_chans)
            if max(image.shape[:2]) > SMALL:
                raise LargeImageError
            if image.shape[:2] != size:
                if data.img_size is None:
                    raise size_error(rows.name(row), image.shape[:2], size)
                image = resize(image, size)
            pixels[row] = torch.from_numpy(image.copy()).permute(2, 0, 1)
        return pixels

    return load_or_create(cache_entry("images", made_of), (len(rows), in_chans, *size), decode_all, rows.split, log)


def load_or_create(
    folder: Path, shape: Sequence[int], decode_all: Callable[[], Tensor], split: str, log: Callable[[str], None]
) -> CachedImages:
    """Load the images of a folder. If they are missing or corrupt, one run writes them while others wait.

    Args:
        folder: A folder for these images alone.
        shape: n, c, h, w.
        decode_all: Returns the images to write, uint8 [n, c, h, w].
        split: Name of the split.
        log: Logs one line.

    Raises:
        DataError: `decode_all` raised it, or the file is corrupt right after it was written.
        OSError: The file cannot be written.
    """
    path = folder / FILE
    try:
        return CachedImages(path, shape)
    except FileNotFoundError:
        pass
    except CorruptCacheError as error:
        log(f"warning: {error}: writing it again from the source")
    with Lock(folder, f"cached images of split {split!r} ({folder})", log):
        with contextlib.suppress(FileNotFoundError, CorruptCacheError):
            return CachedImages(path, shape)  # written by another run in the meantime
        images = decode_all()
        rows = images.numpy()
        sums = np.fromiter((xxh3_64_intdigest(row) for row in rows), dtype=np.uint64, count=len(rows)).view(np.int64)
        write_atomically(path, lambda draft: save_file({"images": images, "sums": torch.from_numpy(sums)}, draft))
        log(f"cached {len(images)} images of split {split!r}, {images.numel() / 1e6:.0f} MB")
        try:
            return CachedImages(path, shape)
        except CorruptCacheError as error:
            raise CorruptCacheError(
                f"{error} right after it was written: use another disk, with the environment variable MGD_TIMM_CACHE."
            ) from error
