"""Reads picture files as arrays of one layout, and writes arrays as PNG files. No other package imports Pillow or
simplejpeg.

These rules hold for all pictures, whatever they are read for:

- Arrays are uint8, HWC, with 1 channel (grey) or 3 (RGB). A picture is grey if its file stores grey values; palettes
  become RGB.
- An EXIF orientation is applied. Colour profiles are ignored.
- Transparency is composited on white. CMYK and YCbCr become RGB.
- 16-bit grey is scaled by 255/65535 and rounded; of 16-bit RGB Pillow keeps the high byte. Floating-point pixels are
  refused, because their range is not known.
- The first picture of an animation or of a file with several pictures is taken.
- Pictures of more than 2**26 pixels are refused before anything is decompressed.
- Pixels are averaged as stored, without conversion to linear light.
"""

from dist_gan.pictures.decoding import Header, Picture, decode, examine, header
from dist_gan.pictures.formats import EXTENSIONS, FORMATS, MAX_FILE_BYTES, MAX_PIXELS, BadImage, Pixels
from dist_gan.pictures.png import encode_png, grid, write_png
from dist_gan.pictures.resizing import fit

__all__ = [
    "EXTENSIONS",
    "FORMATS",
    "MAX_FILE_BYTES",
    "MAX_PIXELS",
    "BadImage",
    "Header",
    "Picture",
    "Pixels",
    "decode",
    "encode_png",
    "examine",
    "fit",
    "grid",
    "header",
    "write_png",
]
