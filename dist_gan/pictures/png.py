"""Writes PNG files, and arranges several pictures in a grid."""

from __future__ import annotations

import io
import math

import numpy as np

from dist_gan import storage
from dist_gan.pictures.formats import Pixels, as_picture


def encode_png(image: Pixels) -> bytes:
    """Encodes a picture, HWC uint8 with 1 or 3 channels, as the bytes of a PNG file.

    Equal pixels give equal bytes as long as the version of zlib is the same.
    """
    file = io.BytesIO()
    as_picture(image).save(file, format="PNG")
    return file.getvalue()


def grid(images: Pixels, *, columns: int, border: int = 2) -> Pixels:
    """Arranges pictures, NHWC uint8, row by row in one picture, HWC, with black borders and black unused cells."""
    assert images.ndim == 4
    assert columns > 0
    number, height, width, channels = images.shape
    rows = math.ceil(number / columns)
    sheet = np.zeros((rows * (height + border) + border, columns * (width + border) + border, channels), np.uint8)
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        top, left = border + row * (height + border), border + column * (width + border)
        sheet[top : top + height, left : left + width] = image
    return sheet


def write_png(path: str, image: Pixels) -> None:
    """Writes a picture, HWC uint8, to a path or URL; the file appears complete or not at all.

    Raises:
        TrainingFailed: the file cannot be written.
    """
    storage.publish(path, encode_png(image))
