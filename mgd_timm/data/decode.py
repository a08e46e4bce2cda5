"""Decode images, and refuse corrupt and unsupported ones."""

import contextlib
import io
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from mgd_timm.data.image_formats import readable_formats


class DataError(ValueError):
    """Data that cannot be used. The message names the file or image, what is wrong, and what to do."""

    def __init__(self, message: str) -> None:
        super().__init__(message.replace("\n", "\\n"))  # one line, whatever a path or a class name holds


@contextlib.contextmanager
def _refuse_corrupt(name: str) -> Iterator[None]:
    """Raise what Pillow raises as a DataError that names the image."""
    try:
        yield
    except DataError:
        raise
    except FileNotFoundError as error:
        raise DataError(f"{name}: no such file: put it back, or take its row out of the table.") from error
    except UnidentifiedImageError as error:
        raise DataError(
            f"{name}: not an image of a known format ({', '.join(readable_formats())}): replace it by an intact copy, "
            "or move it out of the data."
        ) from error
    except Image.DecompressionBombError as error:
        raise DataError(f"{name}: {error}: shrink it, or move it out of the data.") from error
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(
            f"{name}: truncated or corrupt ({error}): replace it by an intact copy, or move it out of the data."
        ) from error


@dataclass
class LazyImage:
    """An image whose size is known and whose pixels are decoded when they are used.

    Grey, palette, CMYK and transparent images are converted to 3 channels (RGB) or 1 (grey). Transparency is dropped
    and EXIF rotation is not applied, as in timm and torchvision.

    Args:
        image: An opened image; its `size` is (width, height).
        in_chans: 3 or 1.
        name: Name of the image in error messages.
    """

    image: Image.Image
    in_chans: int
    name: str

    def reduce(self, factor: int) -> int:
        """Let a JPEG be decoded at 1/2, 1/4 or 1/8 of its size, which is faster; other formats are left as they are.

        Args:
            factor: Largest factor that may be taken.

        Returns:
            The factor that is taken, 1 for none.
        """
        width, height = self.image.size
        factor = max(power for power in (1, 2, 4, 8) if power <= factor)
        with _refuse_corrupt(self.name):
            drafted = self.image.draft(None, (max(width // factor, 1), max(height // factor, 1)))
        return round(width / drafted[1][2]) if drafted is not None else 1

    def load(self) -> Image.Image:
        """Return the image decoded by Pillow, in mode RGB or L.

        Raises:
            DataError: It is truncated or corrupt.
        """
        with _refuse_corrupt(self.name):
            image = self.image
            image.load()
            known = image.convert("RGBA") if image.mode == "P" and "transparency" in image.info else image
            mode = "RGB" if self.in_chans == 3 else "L"
            return known if known.mode == mode else known.convert(mode)


def open_image(content: bytes | str | os.PathLike[str], in_chans: int, name: str) -> LazyImage:
    """Open an image, and check what is known before its pixels are decoded.

    Args:
        content: An encoded image, or the path of a file.
        in_chans: 3 or 1.
        name: Name of the image in error messages.

    Raises:
        DataError: It is not an image, larger than Pillow allows, or has more than 8 bits per channel (which would be
            clipped).
    """
    if in_chans not in (1, 3):
        raise DataError(
            f"{name}: image files are read in colour or in grey, and --in-chans is {in_chans}: give 3 or 1, or npy "
            "arrays with other channels."
        )
    with _refuse_corrupt(name):
        encoded = content if isinstance(content, bytes) else Path(content).read_bytes()
        return LazyImage(_read_header(io.BytesIO(encoded), name), in_chans, name)


def _read_header(source: io.BytesIO | str | os.PathLike[str], name: str) -> Image.Image:
    image = Image.open(source, formats=list(readable_formats()))
    if image.mode.startswith(("I", "F")):
        image.close()
        raise DataError(
            f"{name}: mode {image.mode!r} has more than 8 bits per channel and no known range: convert it to 8 bits "
            "first."
        )
    return image


def decode(content: bytes | str | os.PathLike[str], in_chans: int, name: str) -> np.ndarray:
    """Return the pixels of an image, uint8 [height, width, in_chans], as `LazyImage` decodes it.

    Args:
        content: An encoded image, or the path of a file.
        in_chans: 3 or 1.
        name: Name of the image in error messages.

    Raises:
        DataError: It is truncated, not an image, larger than Pillow allows, or has more than 8 bits per channel.
    """
    pixels = np.asarray(open_image(content, in_chans, name).load())
    return pixels.reshape(*pixels.shape[:2], in_chans)


def image_size(content: bytes | str | os.PathLike[str], name: str) -> tuple[int, int]:
    """Return height and width of an encoded image from its header. Raise DataError as `open_image`."""
    source = io.BytesIO(content) if isinstance(content, bytes) else content
    with _refuse_corrupt(name), _read_header(source, name) as image:
        return image.height, image.width


def resize(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return pixels [height, width, channels] resized to (height, width): bicubic, each channel by Pillow."""
    channels = [Image.fromarray(channel) for channel in np.moveaxis(pixels, 2, 0)]
    height, width = size
    return np.stack([np.asarray(one.resize((width, height), Image.Resampling.BICUBIC)) for one in channels], 2)


def to_pil(pixels: np.ndarray) -> Image.Image:
    """Return pixels [height, width, channels] as a PIL image."""
    return Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels)


def to_tensor(image: Image.Image) -> UInt8[Tensor, "c h w"]:
    """Return the pixels of an image in mode RGB or L."""
    pixels = torch.from_numpy(np.array(image))
    return pixels.permute(2, 0, 1) if pixels.ndim == 3 else pixels[None]
