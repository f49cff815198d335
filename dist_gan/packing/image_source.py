"""Interfaces of image sources: a source lists its images, and its reader opens each of them, in any process."""

from __future__ import annotations

import lzma
import struct
import zipfile
import zlib
from typing import BinaryIO, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from dist_gan.packing.listing import Entry

Pixels = NDArray[np.uint8]

UNREADABLE = (
    OSError, EOFError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, NotImplementedError, KeyError,
    RuntimeError, ValueError, IndexError, OverflowError,
)  # fmt: skip
"""Exceptions raised when a file in a folder or zip cannot be read."""


class ImageShape(NamedTuple):
    """Shape of every image of a data set after packing; an interrupted pack keeps it in the folder's plan file."""

    resolution: int
    """Side of the square images, in pixels."""
    channels: int
    """1 (grey) or 3 (RGB)."""


class ImageReader(Protocol):
    """Opens the images of a source. It is sent to worker processes by pickle, so it opens files only when first used."""

    def open(self, entry: Entry) -> BinaryIO | Pixels:
        """An open image file, to be closed by the caller, or the pixels of the image, uint8 HWC.

        Raises:
            Exception: one of `UNREADABLE` if the image cannot be read.
            UserError, TrainingFailed: a store refuses access, or does not answer.
        """
        ...


class ImageSource(Protocol):
    """A set of images to be packed, with or without labels."""

    place: str
    """Path or URL of the source, for messages."""
    entries: tuple[Entry, ...]
    """The images, sorted by key."""
    classes: tuple[str, ...] | None
    """Name of each class; None if there are no labels."""
    notes: tuple[str, ...]
    """Sentences about files that were skipped."""
    identity: str
    """Hash of the images' contents if it can be computed without reading all of them; otherwise empty. A pack recognises a
    changed source by it, in addition to names and sizes."""
    reader: ImageReader
