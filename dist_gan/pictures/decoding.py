"""Decodes picture files by the rules in the docstring of `dist_gan.pictures`."""

from __future__ import annotations

import io
from typing import BinaryIO, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from dist_gan.pictures.formats import FORMATS, MAX_PIXELS, BadImage, Pixels, as_array, too_large
from dist_gan.pictures.orientation import may_be_turned, orientation_of, upright
from dist_gan.pictures.plain_jpeg import decode_plain_jpeg

_GREY_MODES = frozenset({"1", "L", "LA", "La", "I", "F", "I;16", "I;16L", "I;16B", "I;16N"})
_WIDE_MODES = frozenset({"I", "I;16", "I;16L", "I;16B", "I;16N"})


class Header(NamedTuple):
    """Height, width and number of channels in the header of a picture file, known before the picture is decoded."""

    height: int
    width: int
    channels: Literal[1, 3]


class Picture(NamedTuple):
    """Pixels of a decoded picture, and the extension of its file if the file is plain."""

    pixels: Pixels
    """Pixels, uint8, HWC with 1 or 3 channels; the array may be read-only."""
    extension: str | None
    """`jpg` or `png` if every decoder gets these pixels from the file; None if a rule of `dist_gan.pictures` was
    needed."""


def decode(data: bytes | memoryview, *, name: str, out: Pixels | None = None, reduce_to: int | None = None) -> Pixels:
    """Decodes a picture file by the rules of `dist_gan.pictures`; returns pixels, uint8, HWC with 1 or 3 channels.

    The returned array may be read-only.

    Args:
        data: bytes of the file.
        name: name of the picture, for errors.
        out: buffer for the pixels, HWC; used and returned if the picture has its shape.
        reduce_to: side, in pixels, to which the picture will be reduced. A JPEG of four times that side or more is
            decoded at the smallest scale in eighths that gives at least twice that side; the pixels then differ
            slightly from those of decoding in full size.

    Raises:
        BadImage: the file is no picture, is cut off, damaged or too large, or no rule covers its kind.
    """
    pixels = decode_plain_jpeg(data, name=name, out=out, reduce_to=reduce_to)
    return examine(data, name=name).pixels if pixels is None else pixels


def examine(data: bytes | memoryview, *, name: str) -> Picture:
    """Decodes a picture file as `decode` does, and tests whether the file is plain.

    A plain file is an 8-bit JPEG or PNG, grey or RGB, upright and opaque.

    Raises:
        BadImage: as in `decode`.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _check_size(image, name=name)
            image.load()
            # EXIF is read after `load`, because a PNG may hold it behind the pixels.
            if image.mode in ("L", "RGB") and "transparency" not in image.info and not may_be_turned(image):
                return Picture(as_array(image), _plain_extension(image, data))
            turned = upright(image)
            pixels = as_array(_to_grey_or_rgb(turned, name=name))
            plain = turned is image and image.mode in ("L", "RGB") and "transparency" not in image.info
            return Picture(pixels, _plain_extension(image, data) if plain else None)
    except BadImage:
        raise
    except Exception as error:
        # Pillow's decoders raise nearly anything on damaged bytes (OSError, SyntaxError, struct.error, IndexError).
        raise BadImage(name, _reason(error, data)) from error


def header(file: BinaryIO, *, name: str) -> Header:
    """Reads height, width and number of channels of a picture from its first bytes; height and width are of the upright
    picture.

    Raises:
        BadImage: the file is no picture, or is too large.
    """
    try:
        with Image.open(file, formats=FORMATS) as image:
            _check_size(image, name=name)
            height, width = image.height, image.width
            if may_be_turned(image) and orientation_of(image) in (5, 6, 7, 8):
                height, width = width, height
            return Header(height, width, 1 if image.mode in _GREY_MODES else 3)
    except BadImage:
        raise
    except Exception as error:
        raise BadImage(name, _reason(error, None)) from error


def _check_size(image: Image.Image, *, name: str) -> None:
    if image.width * image.height > MAX_PIXELS:
        raise too_large(name, width=image.width, height=image.height)


def _reason(error: Exception, data: bytes | memoryview | None) -> str:
    if data is not None and not data:
        return "the file is empty"
    if isinstance(error, Image.DecompressionBombError):
        return f"more than {MAX_PIXELS:,} pixels"
    if isinstance(error, UnidentifiedImageError):
        return f"not a picture in one of the formats {', '.join(FORMATS)}"
    return f"cannot be decoded ({error})"


def _plain_extension(image: Image.Image, data: bytes | memoryview) -> str | None:
    if image.format == "JPEG":
        return "jpg"
    # Byte 24 of a PNG is its bit depth: Pillow shows 2, 4 and 16 bits under the modes of 8.
    if image.format == "PNG" and data[24] == 8 and getattr(image, "n_frames", 1) == 1:
        return "png"
    return None


def _to_grey_or_rgb(image: Image.Image, *, name: str) -> Image.Image:
    if image.mode in _WIDE_MODES:
        return _from_wide(np.asarray(image), name=name)
    if image.mode == "F":
        raise BadImage(name, "floating-point pixels, whose range is not known; convert the file to 8 bits")
    if image.has_transparency_data:
        grey = image.mode in _GREY_MODES
        layers = image.convert("RGBA")
        white = Image.new("RGBA", layers.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, layers).convert("L" if grey else "RGB")
    return image.convert("L" if image.mode in _GREY_MODES else "RGB")


def _from_wide(values: NDArray[np.generic], *, name: str) -> Image.Image:
    wide = values.astype(np.int64)
    if wide.min() < 0 or wide.max() > 65535:
        raise BadImage(name, "grey values outside 0..65535; convert the file to 8 or 16 bits")
    return Image.fromarray(((wide * 255 + 32767) // 65535).astype(np.uint8))
