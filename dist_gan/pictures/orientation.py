"""Reads the EXIF orientation of a picture, which says how the camera was held, and turns the picture upright."""

from __future__ import annotations

import io

from PIL import Image, ImageOps

SOURCES = ("exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp")
"""Names of the entries of `Image.info` in which Pillow keeps metadata that may hold an orientation."""
_TAG = 0x0112
"""Number of the orientation among the EXIF tags (Exif 2.32, section 4.6.4)."""


def may_be_turned(image: Image.Image) -> bool:
    """Returns whether a picture has metadata that may hold an orientation."""
    return not image.info.keys().isdisjoint(SOURCES)


def orientation_of(image: Image.Image) -> int:
    """Returns the EXIF orientation of a picture, 1 (upright) to 8. Raises whatever Pillow raises on damaged metadata."""
    return int(image.getexif().get(_TAG, 1))


def upright(image: Image.Image) -> Image.Image:
    """Turns a picture upright by its EXIF orientation; returns the same object if the picture is upright already."""
    if not may_be_turned(image):
        return image
    try:
        orientation = orientation_of(image)
    except Exception:
        # The pixels are intact, and a damaged EXIF block does not tell how to turn them.
        return image
    return ImageOps.exif_transpose(image) if orientation in range(2, 9) else image


def is_turned_jpeg(data: bytes | memoryview) -> bool:
    """Returns whether a JPEG with an APP1 segment (EXIF or XMP metadata) may have to be rotated."""
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
            return may_be_turned(image) and orientation_of(image) != 1
    except Exception:
        return True  # the caller then decodes the file by Pillow, which says what is wrong
