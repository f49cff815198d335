"""What images are packed from: a source lists its images, and its reader opens each of them in any process."""

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
        """The image file at its first byte, to be closed by the caller; or its pixels, HWC.

        Raises:
            Exception: one of `UNREADABLE` if the image cannot be read.
            UserError, TrainingFailed: a store refuses access, or does not answer.
        """
        ...


class ImageSource(Protocol):
    """Images with keys, and with labels or without."""

    place: str
    """Path or URL of the source, for messages."""
    entries: tuple[Entry, ...]
    """The images, sorted by key."""
    classes: tuple[str, ...] | None
    """Name of each class; None if there are no labels."""
    notes: tuple[str, ...]
    """Sentences about files that were skipped."""
    identity: str
    """Hash of the contents if it is cheap to obtain, in addition to names and sizes; empty otherwise."""
    reader: ImageReader
