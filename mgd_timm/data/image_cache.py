"""Decoded small images, kept in a file of the cache that is written once, mapped, and checked.

Each image has a checksum (xxh3, 64 bits) beside it. Up to `WHOLE` bytes all are checked when the file is opened, which
takes less time than the digest of the encoded images does. Of a larger one each image is checked when it is first read:
training reads them in random order, so that to check them by blocks would read the whole file within a few steps.
"""

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import xxhash
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mgd_timm.data.decode import DataError
from mgd_timm.storage.atomic_write import write_atomically
from mgd_timm.storage.lock import Lock
from mgd_timm.storage.safetensors_header import read_header

FILE = "images.safetensors"
WHOLE = 1 << 30  # bytes


class DamagedStoreError(DataError):
    """A file that is not as it was written."""


class ImageStore:
    """The images of a split, uint8 [n, c, h, w], mapped from a file.

    Args:
        path: The file.
        shape: n, c, h, w.

    Raises:
        DamagedStoreError: It is not as it was written, as far as it was looked at.
        FileNotFoundError: There is none.
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
                raise ValueError("its header is of other images")
            tensors = load_file(path)
        except PermissionError:
            raise
        except (OSError, ValueError, SafetensorError) as error:
            raise DamagedStoreError(f"{path} is damaged ({error})") from error
        self.path, self.images, self._sums = path, tensors["images"], tensors["sums"].numpy()
        self._unchecked: np.ndarray | None = np.ones(len(self._sums), dtype=bool)
        if size <= WHOLE:
            self._look(np.arange(len(self._sums)))
            self._unchecked = None

    def check(self, rows: Tensor) -> None:
        """Look at those of the images that this process reads for the first time.

        Raises:
            DamagedStoreError: One was changed. The file is removed, so that the next start writes it anew.
        """
        if self._unchecked is None:
            return
        wanted = rows.cpu().numpy()
        new = np.unique(wanted[self._unchecked[wanted]])
        try:
            self._look(new)
        except DamagedStoreError as error:
            with contextlib.suppress(OSError):
                self.path.unlink()
            gone = "delete it and" if self.path.exists() else "it is removed:"
            raise DamagedStoreError(
                f"{error}: {gone} start again, a run that had begun with --resume; then it is written anew from the "
                "source."
            ) from error
        self._unchecked[new] = False

    def _look(self, rows: np.ndarray) -> None:
        pixels = self.images.numpy()
        bad = [row for row in rows.tolist() if xxhash.xxh3_64_intdigest(pixels[row]) != int(self._sums[row]) % 2**64]
        if bad:
            first = ", ".join(map(str, bad[:5])) + (f" and {len(bad) - 5} more" if len(bad) > 5 else "")
            raise DamagedStoreError(f"{self.path} is damaged (checksum of image {first})")


def stored_images(
    place: Path, shape: Sequence[int], decode_all: Callable[[], Tensor], split: str, say: Callable[[str], None]
) -> ImageStore:
    """The store in a folder: found, or written where it lacks or is damaged, by one run while others wait.

    Args:
        place: A folder of its own.
        shape: n, c, h, w.
        decode_all: Gives the images, uint8 [n, c, h, w], where they are to be written.
        split: Its name.
        say: Takes one line for the user.

    Raises:
        DataError: What `decode_all` raises; a file that does not read back as it was written.
        OSError: It cannot be written.
    """
    path = place / FILE
    try:
        return ImageStore(path, shape)
    except FileNotFoundError:
        pass
    except DamagedStoreError as error:
        say(f"warning: {error}: it is written anew from the source")
    with Lock(place, f"store of the images of {split!r} ({place})", say):
        with contextlib.suppress(FileNotFoundError, DamagedStoreError):
            return ImageStore(path, shape)  # another run's, meanwhile
        images = decode_all()
        rows = images.numpy()
        sums = np.fromiter((xxhash.xxh3_64_intdigest(row) for row in rows), dtype=np.uint64, count=len(rows)).view(
            np.int64
        )
        write_atomically(path, lambda draft: save_file({"images": images, "sums": torch.from_numpy(sums)}, draft))
        say(f"stored {len(images)} images of {split!r}, {images.numel() / 1e6:.0f} MB")
        try:
            return ImageStore(path, shape)
        except DamagedStoreError as error:
            raise DamagedStoreError(
                f"{error}, just written: choose a sound disk by the environment's MGD_TIMM_CACHE."
            ) from error
