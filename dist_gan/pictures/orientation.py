"""EXIF orientation: how a camera held the picture, and the picture turned upright."""

from __future__ import annotations

import io

from PIL import Image, ImageOps

SOURCES = ("exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp")
"""Names under which Pillow keeps metadata that may hold an orientation."""
_TAG = 0x0112
"""Number of the orientation among the EXIF tags (Exif 2.32, section 4.6.4)."""


def may_be_turned(image: Image.Image) -> bool:
    """Whether a picture has metadata that may hold an orientation."""
    return not image.info.keys().isdisjoint(SOURCES)


def orientation_of(image: Image.Image) -> int:
    """EXIF orientation, 1 (upright) to 8. Raises whatever Pillow raises on damaged metadata."""
    return int(image.getexif().get(_TAG, 1))


def upright(image: Image.Image) -> Image.Image:
    """The picture with its orientation applied; the same object if it is upright already."""
    if not may_be_turned(image):
        return image
    try:
        orientation = orientation_of(image)
    except Exception:
        # The pixels are whole; a damaged EXIF block says nothing about how to turn them.
        return image
    return ImageOps.exif_transpose(image) if orientation in range(2, 9) else image


def is_turned_jpeg(data: bytes | memoryview) -> bool:
    """Whether a JPEG with an application segment of kind 1 (EXIF or XMP) may have to be rotated."""
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
            return may_be_turned(image) and orientation_of(image) != 1
    except Exception:
        return True  # the caller then decodes the file by Pillow, which says what is wrong
