"""Draw a contact sheet: images of each class as a network is shown them."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from mgd_timm.data.dataset import Images
from mgd_timm.data.sources import Source
from mgd_timm.storage.atomic_write import write_atomically

_ROWS, _COLUMNS, _MARGIN, _LABEL = 40, 8, 4, 16
_SIDE = (64, 160)
"""Smallest and largest side of an image on the sheet, in pixels."""


def draw_contact_sheet(images: Images, path: Path) -> None:
    """Write a PNG with a row for each class, of the first 40 classes, and up to 8 images in each.

    The images are those of the first epoch: cropped, flipped and resized as in training.

    Args:
        images: The data set.
        path: File to write.
    """
    labels = images.trained_labels()
    assert labels is not None
    names = images.class_names[:_ROWS]
    chosen = [(labels == label).nonzero().flatten()[:_COLUMNS] for label in range(len(names))]
    pictures = _pictures(images, images.train, torch.cat(chosen))
    height, width = pictures.shape[1:3]
    scale = min(max(1.0, _SIDE[0] / max(height, width)), _SIDE[1] / max(height, width))
    size = round(width * scale), round(height * scale)
    cell = size[0] + _MARGIN, size[1] + _MARGIN + _LABEL
    sheet = Image.new("RGB", (_MARGIN + _COLUMNS * cell[0], _MARGIN + len(names) * cell[1]), "white")
    draw = ImageDraw.Draw(sheet)
    drawn = iter(pictures)
    for row, (name, ids) in enumerate(zip(names, chosen, strict=True)):
        top = _MARGIN + row * cell[1]
        draw.text((_MARGIN, top), name, fill="black")
        for column in range(len(ids)):
            image = Image.fromarray(next(drawn)).resize(size, Image.Resampling.NEAREST if scale > 1 else None)
            sheet.paste(image, (_MARGIN + column * cell[0], top + _LABEL))
    write_atomically(path, lambda draft: sheet.save(draft, "PNG"))


def _pictures(images: Images, source: Source, ids: torch.Tensor) -> np.ndarray:
    """Return training images of the first epoch, uint8 [n, height, width, 3]; the first channel where there are not
    three."""
    batches = source.batches(list(ids.split(64)), 0, torch.device("cpu"))
    mean, std = (torch.tensor(values)[:, None, None] for values in (images.mean, images.std))
    pixels = torch.cat([batch.images.float().cpu() for batch in batches]) * std + mean
    pixels = pixels if pixels.shape[1] == 3 else pixels[:, :1].expand(-1, 3, -1, -1)
    return (pixels.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).contiguous().numpy()
