"""Decodes plain JPEG files by simplejpeg, in half of Pillow's time and to the same bytes.

Training decodes a picture for every image that it shows, so speed matters more here than short code: pixels are decoded
straight into the batch, and EXIF metadata is looked for without parsing the file. Files that may be damaged, or that
need one of the rules of `dist_gan.pictures`, are left to Pillow.
"""

from __future__ import annotations

import simplejpeg

from dist_gan.pictures.formats import MAX_PIXELS, BadImage, Pixels, too_large
from dist_gan.pictures.orientation import is_turned_jpeg

_CHANNELS_OF_JPEG = {"Gray": 1, "YCbCr": 3, "RGB": 3}
_SEARCHED_BYTES = 4096
"""File size, in bytes, below which searching the whole file for the EXIF marker is faster than walking over its
segments."""


def decode_plain_jpeg(
    data: bytes | memoryview, *, name: str, out: Pixels | None, reduce_to: int | None
) -> Pixels | None:
    """Decodes a plain JPEG file; returns None if the file may be damaged or needs a rule of `dist_gan.pictures`.

    Args:
        data: bytes of a file of any format.
        name: name of the picture, for errors.
        out: buffer for the pixels, HWC; used and returned if the picture has its shape.
        reduce_to: as in `decode`.

    Raises:
        BadImage: the picture is too large.
    """
    if data[:2] != b"\xff\xd8" or (_has_app1(data) and is_turned_jpeg(data)):
        return None
    if out is not None and out.shape[2] == 3:
        try:
            if simplejpeg.decode_jpeg(data, buffer=out).shape == out.shape:
                return out
        except ValueError:
            pass  # the buffer has another size than the picture, or the file is damaged
    try:
        height, width, stored, _ = simplejpeg.decode_jpeg_header(data)
        if height * width > MAX_PIXELS:
            raise too_large(name, width=width, height=height)
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
    """Returns whether a JPEG may have an APP1 segment, which holds EXIF or XMP and comes before the image data.

    A small file is searched for the marker FF E1. If the marker occurs by chance in the image data, the file is only
    decoded more slowly. In a larger file the segments are walked over, from marker to marker.
    """
    if len(data) < _SEARCHED_BYTES:
        file = bytes(data)
        at = file.find(b"\xe1")  # finding E1 and checking the byte before it takes half the time of finding FF E1
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
        pass  # the file was cut off; the decoder raises the error
    return True
