"""The only importer of Pillow and simplejpeg: pictures as bytes become arrays of one shape, and arrays become PNG files.

Rules, the same wherever a picture comes from:

- 8 bits a value, HWC, 1 channel (grey) or 3 (RGB). Grey is what the file stores as grey; palettes become RGB.
- An EXIF orientation is applied. Colour profiles are ignored.
- Transparency is composited on white. CMYK and YCbCr become RGB.
- 16-bit grey is scaled by 255/65535 and rounded; of 16-bit RGB Pillow keeps the high byte. Floating-point pixels are
  refused: their range is not known.
- Of an animation or a multi-picture file the first picture is taken.
- More than 2**26 pixels are refused before anything is decompressed.
- Pixels are averaged as stored (no linear light).

Plain JPEG files are decoded by simplejpeg, in half of Pillow's time and to the same bytes; whatever it does not like is
Pillow's to judge.
"""

from __future__ import annotations

import io
import math
from typing import BinaryIO, Literal, NamedTuple

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError, features

from dist_gan import storage

Pixels = NDArray[np.uint8]

MAX_PIXELS = 2**26
_OPTIONAL = {"AVIF": ("avif", ("avif",)), "JPEG2000": ("jpg_2000", ("jp2", "j2k"))}
"""Formats missing in some builds of Pillow: Pillow's name of the feature, and the file extensions."""
_BUILT = tuple(name for name, (feature, _) in _OPTIONAL.items() if features.check(feature))
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", *_BUILT)
"""Formats that are opened. Other formats start programs or fetch files (such as PostScript), accept any bytes as an
image (TGA has no signature), or hold one image in several sizes (ICO)."""
EXTENSIONS = (
    "jpg", "jpeg", "jpe", "jfif", "pjpeg", "pjp", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm", "pgm",
    *(ending for name in _BUILT for ending in _OPTIONAL[name][1]),
)  # fmt: skip
"""File name endings that are taken for pictures, in lower case."""
MAX_FILE_BYTES = 2**28 + 2**16
"""Largest image file, in bytes: `MAX_PIXELS` uncompressed pixels with transparency, and a header."""

_SMALL = 4096
"""Bytes up to which a file is sooner searched than understood."""
_CHANNELS_OF_JPEG = {"Gray": 1, "YCbCr": 3, "RGB": 3}
_GREY_MODES = frozenset({"1", "L", "LA", "La", "I", "F", "I;16", "I;16L", "I;16B", "I;16N"})
_WIDE_MODES = frozenset({"I", "I;16", "I;16L", "I;16B", "I;16N"})
_ORIENTATION_SOURCES = ("exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp")
_ORIENTATION = 0x0112


class BadImage(ValueError):
    """A picture that cannot be used.

    Attributes:
        name: of the picture, as the caller gave it.
        reason: what is wrong with it, without the name.
    """

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)
        self.name = name
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


class Header(NamedTuple):
    """Facts in the header of a picture, known before it is decoded."""

    height: int
    width: int
    channels: Literal[1, 3]


class Picture(NamedTuple):
    """A decoded picture."""

    pixels: Pixels
    """HWC, 1 or 3 channels; may be read-only."""
    extension: str | None
    """`jpg` or `png` if every decoder gets these pixels from the file, None if one of the rules was needed."""


def decode(data: bytes | memoryview, *, name: str, out: Pixels | None = None, reduce_to: int | None = None) -> Pixels:
    """Pixels of a picture file, HWC uint8 with 1 or 3 channels, by the module's rules; may be read-only.

    Args:
        data: the file.
        name: name of the picture, for errors.
        out: buffer for the pixels, HWC; used and returned if the picture has its shape.
        reduce_to: side, in pixels, to which the picture will be reduced. A JPEG of four times that side or more is
            decoded at the smallest scale in eighths that gives at least twice the side; the result then differs
            slightly from that of decoding in full size.

    Raises:
        BadImage: not a picture, cut off, damaged, too large, or of a kind that has no rule.
    """
    pixels = _decode_plain_jpeg(data, name=name, out=out, reduce_to=reduce_to)
    return examine(data, name=name).pixels if pixels is None else pixels


def examine(data: bytes | memoryview, *, name: str) -> Picture:
    """As `decode`, and whether the file itself is plain: an 8-bit grey or RGB JPEG or PNG, upright and opaque.

    Raises:
        BadImage: as `decode`.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _check_size(image, name=name)
            image.load()
            # After load: a PNG may carry its EXIF behind the pixels.
            if image.mode in ("L", "RGB") and image.info.keys().isdisjoint(("transparency", *_ORIENTATION_SOURCES)):
                return Picture(_array(image), _plain_extension(image, data))
            upright = _upright(image, name=name)
            pixels = _array(_to_grey_or_rgb(upright, name=name))
            plain = upright is image and image.mode in ("L", "RGB") and "transparency" not in image.info
            return Picture(pixels, _plain_extension(image, data) if plain else None)
    except BadImage:
        raise
    except Exception as error:
        # Pillow's decoders raise nearly anything on damaged bytes (OSError, SyntaxError, struct.error, IndexError).
        raise BadImage(name, _reason(error, data)) from error


def header(file: BinaryIO, *, name: str) -> Header:
    """Size and channels of a picture from its first bytes; the size is that of the upright picture.

    Raises:
        BadImage: not a picture, or too large.
    """
    try:
        with Image.open(file, formats=FORMATS) as image:
            _check_size(image, name=name)
            height, width = image.height, image.width
            if not image.info.keys().isdisjoint(_ORIENTATION_SOURCES) and _orientation(image) in (5, 6, 7, 8):
                height, width = width, height
            return Header(height, width, 1 if image.mode in _GREY_MODES else 3)
    except BadImage:
        raise
    except Exception as error:
        raise BadImage(name, _reason(error, None)) from error


def fit(
    image: Pixels,
    *,
    resolution: int,
    channels: int | None,
    upscale: bool = False,
    pad: bool = False,
    name: str = "image",
) -> Pixels:
    """A square picture of the given size.

    A picture that is not square is cropped around its centre. A larger one is reduced: each new pixel is the exact
    average of the area under it. A smaller one is enlarged (bicubic) with `upscale`; with `pad` it is centred on black, and
    only what is longer than `resolution` is cropped. Grey becomes RGB by repeating, RGB becomes grey by ITU-R 601.

    Args:
        image: HWC uint8, 1 or 3 channels.
        resolution: side of the result in pixels.
        channels: 1 or 3; None keeps what the picture has.
        upscale: allows enlarging.
        pad: allows a black border.
        name: of the picture, for the error.

    Raises:
        BadImage: smaller than `resolution`, and neither `upscale` nor `pad`.
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


def encode_png(image: Pixels) -> bytes:
    """PNG file of a picture HWC uint8 with 1 or 3 channels; equal pixels give equal bytes with one version of zlib."""
    file = io.BytesIO()
    _picture(image).save(file, format="PNG")
    return file.getvalue()


def grid(images: Pixels, *, columns: int, border: int = 2) -> Pixels:
    """Pictures NHWC uint8 as one picture HWC: row by row, black between them, around them and in places left over."""
    assert images.ndim == 4
    assert columns > 0
    number, height, width, channels = images.shape
    rows = math.ceil(number / columns)
    sheet = np.zeros((rows * (height + border) + border, columns * (width + border) + border, channels), np.uint8)
    for place, image in enumerate(images):
        row, column = divmod(place, columns)
        top, left = border + row * (height + border), border + column * (width + border)
        sheet[top : top + height, left : left + width] = image
    return sheet


def write_png(path: str, image: Pixels) -> None:
    """Writes a picture HWC uint8 to a path or URL; the file is whole or not there.

    Raises:
        TrainingFailed: the store does not take it.
    """
    storage.publish(path, encode_png(image))


def _decode_plain_jpeg(
    data: bytes | memoryview, *, name: str, out: Pixels | None, reduce_to: int | None
) -> Pixels | None:
    """As `decode`, or None for what needs one of the rules, or may be damaged."""
    if data[:2] != b"\xff\xd8" or (_has_app1(data) and _is_turned(data)):
        return None
    if out is not None and out.shape[2] == 3:
        try:
            if simplejpeg.decode_jpeg(data, buffer=out).shape == out.shape:
                return out
        except ValueError:
            pass  # it may only be of another size
    try:
        height, width, stored, _ = simplejpeg.decode_jpeg_header(data)
        if height * width > MAX_PIXELS:
            raise _too_large(name, width=width, height=height)
        if stored not in _CHANNELS_OF_JPEG:
            return None
        smallest = 2 * reduce_to if reduce_to is not None and min(height, width) >= 4 * reduce_to else 0
        colours = "GRAY" if stored == "Gray" else "RGB"
        pixels: Pixels = simplejpeg.decode_jpeg(data, colours, min_height=smallest, min_width=smallest)
    except BadImage:
        raise
    except ValueError:
        return None
    return pixels


def _has_app1(data: bytes | memoryview) -> bool:
    """True if a JPEG has a segment that may hold EXIF or XMP; such segments come before the image data."""
    if len(data) < _SMALL:
        file = bytes(data)
        at = file.find(b"\xe1")  # looking for one byte and at the one before takes half of the time of looking for two
        while at > 0 and file[at - 1] != 0xFF:
            at = file.find(b"\xe1", at + 1)
        return at > 0
    at = 2
    try:
        while data[at] == 0xFF:
            kind = data[at + 1]
            if kind == 0xDA:
                return False
            if kind == 0xE1:
                return True
            at += 2 + (data[at + 2] << 8 | data[at + 3])
    except IndexError:
        pass  # cut off, for the decoder to say
    return True


def _is_turned(data: bytes | memoryview) -> bool:
    """True if a JPEG with an application segment of kind 1 (EXIF or XMP) may have to be rotated."""
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
            return not image.info.keys().isdisjoint(_ORIENTATION_SOURCES) and _orientation(image) != 1
    except Exception:
        return True  # whatever is wrong, Pillow says it where it decodes


def _too_large(name: str, *, width: int, height: int) -> BadImage:
    return BadImage(name, f"{width}x{height} is more than {MAX_PIXELS:,} pixels")


def _check_size(image: Image.Image, *, name: str) -> None:
    if image.width * image.height > MAX_PIXELS:
        raise _too_large(name, width=image.width, height=image.height)


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


def _orientation(image: Image.Image) -> int:
    return int(image.getexif().get(_ORIENTATION, 1))


def _upright(image: Image.Image, *, name: str) -> Image.Image:
    if image.info.keys().isdisjoint(_ORIENTATION_SOURCES):
        return image
    try:
        orientation = _orientation(image)
    except Exception:
        # The pixels are whole; a damaged EXIF block says nothing about how to turn them.
        return image
    return ImageOps.exif_transpose(image) if orientation in range(2, 9) else image


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


def _array(image: Image.Image) -> Pixels:
    pixels = np.asarray(image)
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


def _picture(image: Pixels) -> Image.Image:
    assert image.ndim == 3
    assert image.dtype == np.uint8
    return Image.fromarray(np.ascontiguousarray(image[:, :, 0] if image.shape[2] == 1 else image))


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
    return _array(_picture(image).resize((resolution, resolution), Image.Resampling.BICUBIC))


def _reduce(image: Pixels, resolution: int) -> Pixels:
    """Area average in integers, so that every machine gets the same bytes: sums over cells, then one rounding."""
    side = image.shape[0]
    if side == resolution:
        return image
    sums = _cell_sums(_cell_sums(image.astype(np.int64), resolution, axis=0), resolution, axis=1)
    area = side * side
    return ((sums + area // 2) // area).astype(np.uint8)


def _cell_sums(values: NDArray[np.int64], resolution: int, *, axis: int) -> NDArray[np.int64]:
    """Sums over `resolution` equal cells along an axis, times `resolution`, which makes fractions whole."""
    side = values.shape[axis]
    whole, rest = np.divmod(np.arange(resolution + 1, dtype=np.int64) * side, resolution)
    moved = np.moveaxis(values, axis, 0)
    running = np.zeros((side + 1, *moved.shape[1:]), np.int64)
    np.cumsum(moved, axis=0, out=running[1:])
    # The last edge has no pixel behind it and no rest either; any index does.
    partial = moved[np.minimum(whole, side - 1)] * rest.reshape(-1, *(1,) * (moved.ndim - 1))
    edges = running[whole] * resolution + partial
    return np.moveaxis(np.diff(edges, axis=0), 0, axis)


def _with_channels(image: Pixels, channels: int | None) -> Pixels:
    if channels is None or channels == image.shape[2]:
        return image
    if channels == 3:
        return np.repeat(image, 3, axis=2)
    return _array(_picture(image).convert("L"))
