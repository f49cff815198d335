"""Pictures: files become arrays of one shape, and arrays become PNG files. No other folder imports Pillow or simplejpeg.

Rules, the same wherever a picture comes from:

- 8 bits a value, HWC, 1 channel (grey) or 3 (RGB). Grey is what the file stores as grey; palettes become RGB.
- An EXIF orientation is applied. Colour profiles are ignored.
- Transparency is composited on white. CMYK and YCbCr become RGB.
- 16-bit grey is scaled by 255/65535 and rounded; of 16-bit RGB Pillow keeps the high byte. Floating-point pixels are
  refused: their range is not known.
- Of an animation or a multi-picture file the first picture is taken.
- More than 2**26 pixels are refused before anything is decompressed.
- Pixels are averaged as stored (no linear light).
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
