"""Every mode of PIL becomes colour or grey, and what cannot be decoded is named."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from image_files import collect, encoded, folder, noise, read
from PIL import Image, ImageOps

from mgd_timm.data.decode import DataError, decode, open_image

COLOUR, GREY = (200, 100, 50), 124  # ITU-R 601: 0.299 R + 0.587 G + 0.114 B


def palette(transparency: int | bytes | None) -> bytes:
    image = Image.new("P", (5, 4), 1)
    image.putpalette([9, 9, 9, *COLOUR, 8, 8, 8])
    return encoded(image) if transparency is None else encoded(image, transparency=transparency)


@pytest.mark.parametrize(
    ("content", "colour", "grey"),
    [
        pytest.param(encoded(Image.new("RGB", (5, 4), COLOUR)), COLOUR, GREY, id="RGB"),
        pytest.param(
            encoded(Image.new("RGB", (5, 4), COLOUR), transparency=COLOUR), COLOUR, GREY, id="RGB transparent colour"
        ),
        pytest.param(encoded(Image.new("RGBA", (5, 4), (*COLOUR, 0))), COLOUR, GREY, id="RGBA"),
        pytest.param(encoded(Image.new("L", (5, 4), 77)), (77,) * 3, 77, id="L"),
        pytest.param(encoded(Image.new("L", (5, 4), 77), transparency=77), (77,) * 3, 77, id="L transparent grey"),
        pytest.param(encoded(Image.new("LA", (5, 4), (77, 3))), (77,) * 3, 77, id="LA"),
        pytest.param(encoded(Image.new("1", (5, 4), 1)), (255,) * 3, 255, id="1"),
        pytest.param(encoded(Image.new("CMYK", (5, 4), (55, 155, 205, 0)), "TIFF"), COLOUR, GREY, id="CMYK"),
        pytest.param(palette(None), COLOUR, GREY, id="P"),
        pytest.param(palette(1), COLOUR, GREY, id="P transparent index"),
        pytest.param(palette(b"\xff\x40\xff"), COLOUR, GREY, id="P transparent bytes"),
        pytest.param(encoded(Image.new("RGB", (5, 4), COLOUR), "GIF"), COLOUR, GREY, id="GIF"),
        pytest.param(encoded(Image.new("RGB", (5, 4), COLOUR), "WEBP", lossless=True), COLOUR, GREY, id="WEBP"),
        pytest.param(encoded(Image.new("RGB", (5, 4), COLOUR), "BMP"), COLOUR, GREY, id="BMP"),
    ],
)
def test_every_mode_becomes_colour_and_grey(content: bytes, colour: tuple[int, ...], grey: int) -> None:
    expected = np.broadcast_to(np.array(colour, np.uint8), (4, 5, 3))
    np.testing.assert_array_equal(decode(content, 3, "x"), expected)
    got = decode(content, 1, "x")
    assert got.shape == (4, 5, 1)
    np.testing.assert_allclose(got.astype(int), grey, atol=1)


def test_exif_rotation_is_not_applied() -> None:
    image = Image.fromarray(noise(0))
    exif = Image.Exif()
    exif[0x0112] = 6
    content = encoded(image, exif=exif)
    with Image.open(io.BytesIO(content)) as opened:
        assert ImageOps.exif_transpose(opened).size == (12, 10)
    np.testing.assert_array_equal(decode(content, 3, "x"), noise(0))


def bomb() -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("factor", range(1, 12))
@pytest.mark.parametrize("size", [(801, 603), (97, 120)])
def test_a_jpeg_is_reduced_by_no_more_than_was_asked_for(factor: int, size: tuple[int, int]) -> None:
    width, height = size
    image = open_image(encoded(noise(0, height, width), "JPEG"), 3, "x")
    taken = image.reduce(factor)
    assert taken == max(power for power in (1, 2, 4, 8) if power <= factor)
    assert image.load().size == (-(-width // taken), -(-height // taken))
    other = open_image(encoded(noise(0, height, width)), 3, "x")
    assert other.reduce(factor) == 1
    assert other.load().size == size


@pytest.mark.parametrize("channels", [1, 3])
def test_a_reduced_jpeg_shows_the_same(channels: int) -> None:
    smooth = Image.fromarray(noise(0, 8, 8)).resize((256, 256), Image.Resampling.BICUBIC)
    content = encoded(smooth, "JPEG", quality=95)
    image = open_image(content, channels, "x")
    assert image.reduce(4) == 4
    whole = open_image(content, channels, "x").load()
    means = np.asarray(whole.reduce(4)).astype(int)
    assert image.load().mode == whole.mode == ("L" if channels == 1 else "RGB")
    assert np.abs(np.asarray(image.load()) - means).mean() < 1


def test_a_truncated_jpeg_is_refused_at_a_reduced_size_too() -> None:
    image = open_image(encoded(noise(0, 400, 400), "JPEG")[:-3000], 3, "some name")
    assert image.reduce(4) == 4
    with pytest.raises(
        DataError,
        match=r"^some name: truncated or corrupt \(.*\): replace it by an intact copy, or move it out of the data",
    ):
        image.load()


CORRUPT = [
    pytest.param(
        encoded(noise(0, 60, 60), "JPEG")[:-300],
        r"truncated or corrupt \(.*\): replace it by an intact copy, or move it out of the data",
        id="JPEG cut",
    ),
    pytest.param(
        encoded(noise(0, 60, 60))[:-300],
        r"truncated or corrupt \(.*\): replace it by an intact copy, or move it out of the data",
        id="PNG cut",
    ),
    pytest.param(encoded(noise(0))[:20], r"truncated or corrupt|not an image", id="PNG cut in its header"),
    pytest.param(
        b"not an image\n",
        r"not an image of a known format \(JPEG, PNG, .*\): replace it by an intact copy, or move it out of the data",
        id="text",
    ),
    pytest.param(b"%!PS-Adobe-3.0 EPSF-3.0\n", "not an image of a known format", id="PostScript"),
    pytest.param(
        bomb(),
        "exceeds limit of .* pixels, could be decompression bomb DOS attack.: shrink it, or move it out of the data",
        id="bomb",
    ),
    pytest.param(
        encoded(Image.fromarray(np.full((4, 5), 40_000, np.uint16))),
        "mode 'I;16' has more than 8 bits .* convert it to 8",
        id="16 bit",
    ),
    pytest.param(encoded(Image.new("I", (5, 4), 70_000), "TIFF"), "mode 'I' has more than 8 bits", id="32 bit"),
    pytest.param(encoded(Image.new("F", (5, 4), 0.5), "TIFF"), "mode 'F' has more than 8 bits", id="float"),
]


@pytest.mark.parametrize(("content", "message"), CORRUPT)
def test_corrupt_images_are_named_and_refused(content: bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"^some name: .*{message}"):
        decode(content, 3, "some name")
    place = folder(tmp_path, {"train/cat": [noise(0), noise(1)], "train/dog": [noise(2), content]}, ending="jpg")
    with pytest.raises(DataError, match=rf"^train image 3 \({place}/train/dog/1.jpg\): .*{message}"):
        read(place)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_corrupt_large_image_is_named_when_it_is_reached(tmp_path: Path, workers: int) -> None:
    bad = encoded(noise(2, 120, 120), "JPEG")[:-4000]
    place = folder(tmp_path, {"cat": [noise(0, 120, 120)], "dog": [noise(1, 120, 120), bad]}, ending="jpg")
    data = read(place, img_size=32, workers=workers)
    with pytest.raises(DataError, match=rf"train image 2 \({place}/dog/1.jpg\): truncated or corrupt"):
        collect(data.train)
