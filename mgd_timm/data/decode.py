"""Decode images, and refuse corrupt and unsupported ones."""

import contextlib
import io
import os
from collections.abc import Iterator

import numpy as np
from PIL import Image, UnidentifiedImageError

from mgd_timm.data.image_formats import readable_formats


class DataError(ValueError):
    """Data that cannot be used. The message names the file or image, what is wrong, and what to do."""

    def __init__(self, message: str) -> None:
        super().__init__(message.replace("\n", "\\n"))  # one line, whatever a path or a class name holds


def decode(content: bytes | str | os.PathLike[str], in_chans: int, name: str) -> np.ndarray:
    """Return the pixels of an image, uint8 [height, width, in_chans].

    Grey, palette, CMYK and transparent images are converted to 3 channels (RGB) or 1 (grey). Transparency is dropped
    and EXIF rotation is not applied, as in timm and torchvision.

    Args:
        content: An encoded image, or the path of a file.
        in_chans: 3 or 1.
        name: Name of the image in error messages.

    Raises:
        DataError: It is truncated, not an image, larger than Pillow allows, or has more than 8 bits per channel (which
            would be clipped).
    """
    if in_chans not in (1, 3):
        raise DataError(
            f"{name}: image files are read in colour or in grey, and --in-chans is {in_chans}: give 3 or 1, or npy "
            "arrays with other channels."
        )
    with _opened(content, name) as image:
        image.load()
        known = image.convert("RGBA") if image.mode == "P" and "transparency" in image.info else image
        pixels = np.asarray(known.convert("RGB" if in_chans == 3 else "L"))
    return pixels.reshape(*pixels.shape[:2], in_chans)


def image_size(content: bytes | str | os.PathLike[str], name: str) -> tuple[int, int]:
    """Return height and width of an encoded image from its header. Raise DataError as `decode` where it is corrupt."""
    with _opened(content, name) as image:
        return image.height, image.width


@contextlib.contextmanager
def _opened(content: bytes | str | os.PathLike[str], name: str) -> Iterator[Image.Image]:
    """Open an image whose header was read. Errors of Pillow, inside the context too, become DataErrors."""
    try:
        source = io.BytesIO(content) if isinstance(content, bytes) else content
        with Image.open(source, formats=list(readable_formats())) as image:
            if image.mode.startswith(("I", "F")):
                raise DataError(
                    f"{name}: mode {image.mode!r} has more than 8 bits per channel and no known range: convert it to "
                    "8 bits first."
                )
            yield image
    except DataError:
        raise
    except FileNotFoundError as error:
        raise DataError(f"{name}: no such file: put it back or remove its row.") from error
    except UnidentifiedImageError as error:
        raise DataError(
            f"{name}: not an image of a known format ({', '.join(readable_formats())}): remove or replace it."
        ) from error
    except Image.DecompressionBombError as error:
        raise DataError(f"{name}: {error}: remove or shrink it.") from error
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(f"{name}: truncated or corrupt ({error}): remove or replace it.") from error


def resize(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return pixels [height, width, channels] resized to (height, width): bicubic, each channel by Pillow."""
    channels = [Image.fromarray(channel) for channel in np.moveaxis(pixels, 2, 0)]
    height, width = size
    return np.stack([np.asarray(one.resize((width, height), Image.Resampling.BICUBIC)) for one in channels], 2)


def to_pil(pixels: np.ndarray) -> Image.Image:
    """Return pixels [height, width, channels] as a PIL image."""
    return Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels)
