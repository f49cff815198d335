"""Picture formats that can be read, the limits of their size, and the error for a picture that cannot be used."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image, features

Pixels = NDArray[np.uint8]
"""Pixels of a picture, HWC, with 1 channel (grey) or 3 (RGB)."""

MAX_PIXELS = 2**26
"""Largest number of pixels of a picture."""
_OPTIONAL = {"AVIF": ("avif", ("avif",)), "JPEG2000": ("jpg_2000", ("jp2", "j2k"))}
"""Formats that some builds of Pillow lack: name of the Pillow feature, and the file extensions of the format."""
_BUILT = tuple(name for name, (feature, _) in _OPTIONAL.items() if features.check(feature))
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", *_BUILT)
"""Names of the picture formats that are opened.

All other formats are refused because they start programs or fetch files (such as PostScript), accept any bytes as an
image (TGA has no signature), or hold one image in several sizes (ICO).
"""
EXTENSIONS = (
    "jpg", "jpeg", "jpe", "jfif", "pjpeg", "pjp", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm", "pgm",
    *(ending for name in _BUILT for ending in _OPTIONAL[name][1]),
)  # fmt: skip
"""Extensions of the files that are taken for pictures, in lower case."""
MAX_FILE_BYTES = 2**28 + 2**16
"""Largest size of a picture file, in bytes: `MAX_PIXELS` uncompressed pixels with transparency, and a header."""


class BadImage(ValueError):
    """Error for a picture that cannot be used.

    Attributes:
        name: name of the picture, as the caller gave it.
        reason: reason for which the picture cannot be used, without the name.
    """

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)
        self.name = name
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


def too_large(name: str, *, width: int, height: int) -> BadImage:
    """Returns the error for a picture of more than `MAX_PIXELS` pixels."""
    return BadImage(name, f"{width}x{height} is more than {MAX_PIXELS:,} pixels")


def as_array(image: Image.Image) -> Pixels:
    """Returns the pixels of a grey or RGB picture of Pillow, uint8, HWC; the array may be read-only."""
    pixels = np.asarray(image)
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


def as_picture(pixels: Pixels) -> Image.Image:
    """Converts pixels, uint8, HWC, to a picture of Pillow."""
    assert pixels.ndim == 3
    assert pixels.dtype == np.uint8
    return Image.fromarray(np.ascontiguousarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels))
