"""Brings a picture to the resolution and the number of channels of a data set."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dist_gan.pictures.formats import BadImage, Pixels, as_array, as_picture


def fit(
    image: Pixels,
    *,
    resolution: int,
    channels: int | None,
    upscale: bool = False,
    pad: bool = False,
    name: str = "image",
) -> Pixels:
    """Crops, resizes and converts a picture to a square of the given resolution and number of channels.

    A picture that is not square is cropped around its centre. A larger picture is reduced: each new pixel is the exact
    average of the area that it covers. A smaller picture is enlarged by bicubic interpolation with `upscale`; with `pad` it
    is centred on black, and only sides longer than `resolution` are cropped. Grey becomes RGB by repeating the channel, RGB
    becomes grey by ITU-R 601.

    Args:
        image: pixels, HWC uint8 with 1 or 3 channels.
        resolution: width and height of the result, in pixels.
        channels: number of channels of the result, 1 or 3; None keeps the number of the picture.
        upscale: whether a smaller picture may be enlarged.
        pad: whether a smaller picture may get a black border.
        name: name of the picture, for the error.

    Raises:
        BadImage: the picture is smaller than `resolution`, and neither `upscale` nor `pad` is set.
    """
    assert image.ndim == 3
    assert image.dtype == np.uint8
    assert image.shape[2] in (1, 3)
    assert channels in (None, 1, 3)
    height, width = image.shape[:2]
    if (height, width) != (resolution, resolution):
        side = min(height, width)
        if side >= resolution:
            image = _reduce(_centre(image, height=side, width=side), resolution)
        elif pad:
            image = _pad(_centre(image, height=min(height, resolution), width=min(width, resolution)), resolution)
        elif upscale:
            image = _enlarge(_centre(image, height=side, width=side), resolution)
        else:
            raise BadImage(
                name,
                f"{width}x{height} is smaller than {resolution}x{resolution}; give a smaller --resolution, "
                f"--pad (black border) or --upscale",
            )
    return _with_channels(image, channels)


def _centre(image: Pixels, *, height: int, width: int) -> Pixels:
    top, left = (image.shape[0] - height) // 2, (image.shape[1] - width) // 2
    return image[top : top + height, left : left + width]


def _pad(image: Pixels, resolution: int) -> Pixels:
    height, width, channels = image.shape
    sheet = np.zeros((resolution, resolution, channels), np.uint8)
    top, left = (resolution - height) // 2, (resolution - width) // 2
    sheet[top : top + height, left : left + width] = image
    return sheet


def _enlarge(image: Pixels, resolution: int) -> Pixels:
    return as_array(as_picture(image).resize((resolution, resolution), Image.Resampling.BICUBIC))


def _reduce(image: Pixels, resolution: int) -> Pixels:
    """Reduces a square picture by averaging the area under each new pixel.

    The averages are computed in integers and rounded once, so that every machine gets the same bytes.
    """
    side = image.shape[0]
    if side == resolution:
        return image
    sums = _cell_sums(_cell_sums(image.astype(np.int64), resolution, axis=0), resolution, axis=1)
    area = side * side
    return ((sums + area // 2) // area).astype(np.uint8)


def _cell_sums(values: NDArray[np.int64], resolution: int, *, axis: int) -> NDArray[np.int64]:
    """Sums values over `resolution` equal cells along an axis.

    The sums are multiplied by `resolution`, so that pixels divided between two cells contribute whole numbers.
    """
    side = values.shape[axis]
    whole, rest = np.divmod(np.arange(resolution + 1, dtype=np.int64) * side, resolution)
    moved = np.moveaxis(values, axis, 0)
    running = np.zeros((side + 1, *moved.shape[1:]), np.int64)
    np.cumsum(moved, axis=0, out=running[1:])
    # No pixel follows the last edge, and its fraction is 0, so any index may stand there.
    partial = moved[np.minimum(whole, side - 1)] * rest.reshape(-1, *(1,) * (moved.ndim - 1))
    edges = running[whole] * resolution + partial
    return np.moveaxis(np.diff(edges, axis=0), 0, axis)


def _with_channels(image: Pixels, channels: int | None) -> Pixels:
    if channels is None or channels == image.shape[2]:
        return image
    if channels == 3:
        return np.repeat(image, 3, axis=2)
    return as_array(as_picture(image).convert("L"))
