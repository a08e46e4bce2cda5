"""The image formats that are read, by the ending of a file's name."""

from functools import cache

from PIL import features

NOT_AN_IMAGE = "not an image"

_ENDINGS = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "PNG": (".png",),
    "WEBP": (".webp",),
    "BMP": (".bmp", ".dib"),
    "DIB": (),
    "GIF": (".gif",),
    "TIFF": (".tif", ".tiff"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
}
_OTHER_IMAGES = frozenset(
    {
        *(".arw", ".cr2", ".cr3", ".dng", ".nef", ".orf", ".raf", ".raw", ".rw2"),  # raw photographs
        *(".dcm", ".fits", ".nii"),  # medicine and astronomy
        *(
            ".dds",
            ".emf",
            ".eps",
            ".exr",
            ".hdr",
            ".icns",
            ".ico",
            ".jxl",
            ".pcx",
            ".psd",
            ".sgi",
            ".svg",
            ".tga",
            ".xcf",
        ),
    }
)
"""Endings of images in formats that are not read."""


def _register_heif() -> bool:
    """Make Pillow read HEIC where the package pillow-heif is installed. Return whether it is."""
    try:
        from pillow_heif import register_heif_opener  # type: ignore[import-not-found]  # an extra
    except ImportError:
        return False
    register_heif_opener()
    return True


@cache
def readable_formats() -> dict[str, tuple[str, ...]]:
    """Return the formats that this Pillow reads, and the endings of each, in lower case."""
    formats = dict(_ENDINGS)
    if not features.check("webp"):
        del formats["WEBP"]
    if features.check("avif"):
        formats["AVIF"] = (".avif",)
    if features.check("jpg_2000"):
        formats["JPEG2000"] = (".jp2", ".j2k")
    if _register_heif():
        formats["HEIF"] = (".heic", ".heif", ".hif")
    return formats


@cache
def readable_endings() -> frozenset[str]:
    """Return the endings of images that this Pillow reads, in lower case."""
    return frozenset(ending for endings in readable_formats().values() for ending in endings)


@cache
def why_not_read(ending: str) -> str | None:
    """Return why files with an ending (in lower case, "" for none) are not read as images, or None if they are."""
    if ending in readable_endings():
        return None
    if not ending:
        return "no ending in the file name"
    if ending in (".heic", ".heif", ".hif"):
        return f"an image format that Pillow reads only with a plugin ({ending}): pip install mgd-timm[heic]"
    if ending in (".avif", ".webp", ".jp2", ".j2k"):
        return f"an image format that this Pillow was built without ({ending}): pip install --upgrade pillow"
    if ending in _OTHER_IMAGES:
        return f"an image format that is not read ({ending}): convert it"
    return f"{NOT_AN_IMAGE} ({ending})"


def is_image_format(ending: str) -> bool:
    """Return whether files with an ending are images, read or not."""
    why = why_not_read(ending)
    return why is None or why.startswith("an image format")
