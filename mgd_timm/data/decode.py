"""Encoded images as pixels, what is refused of them, and how many of them are told apart from others."""

import hashlib
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

EVAL_SPLITS = ("test", "validation", "valid", "val")
ENDINGS = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"}
HASHED = 1 << 30  # bytes: larger splits are told apart by a part of their images
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")


def cache_folder() -> Path:
    """Where stores and fitted heads are kept: $MGD_TIMM_CACHE, else mgd_timm in the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "mgd_timm"
    return Path(os.environ.get("MGD_TIMM_CACHE") or default)


class DataError(ValueError):
    """Data that cannot be used: names what and where, and the way out."""


def decode(content: bytes | str | os.PathLike[str], in_chans: int, name: str) -> np.ndarray:
    """Pixels of an encoded image or an image file, uint8 [height, width, channels].

    Grey, palette, CMYK and transparent images are converted to what `in_chans` asks for. Transparency is dropped and
    EXIF rotation is not applied, as in timm and torchvision.

    Raises:
        DataError: Truncated, not an image, too large to be one, or of more than 8 bits a channel (which would be
            clipped).
    """
    try:
        with Image.open(io.BytesIO(content) if isinstance(content, bytes) else content, formats=_FORMATS) as image:
            if image.mode.startswith(("I", "F")):
                raise DataError(
                    f"{name}: mode {image.mode!r} has more than 8 bits a channel and no known range: convert it to 8 "
                    "bits first."
                )
            image.load()
            known = image.convert("RGBA") if image.mode == "P" and "transparency" in image.info else image
            pixels = np.asarray(known.convert("RGB" if in_chans == 3 else "L"))
    except DataError:
        raise
    except FileNotFoundError as error:
        raise DataError(f"{name}: no such file: put it back or remove its row.") from error
    except UnidentifiedImageError as error:
        raise DataError(
            f"{name}: not an image of a known format ({', '.join(_FORMATS)}): remove or replace it."
        ) from error
    except Image.DecompressionBombError as error:
        raise DataError(f"{name}: {error}: remove or shrink it.") from error
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(f"{name}: truncated or damaged ({error}): remove or replace it.") from error
    return pixels.reshape(*pixels.shape[:2], in_chans)


def spaced_digest(total: Any, sizes: np.ndarray, content: Callable[[int], bytes | str]) -> str:
    """The hex digest of a begun sha256 and of encoded images: all up to `HASHED` bytes, of more evenly spaced ones.

    Args:
        total: The sha256.
        sizes: Bytes of each image, int [n].
        content: Gives an encoded image, or its path.
    """
    for row in range(0, len(sizes), 1 + int(sizes.sum()) // HASHED):
        found = content(row)
        total.update(hashlib.sha256(found if isinstance(found, bytes) else Path(found).read_bytes()).digest())
    return str(total.hexdigest())
