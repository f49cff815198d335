"""Image sources of arrays: in memory, or in an `.npz` file."""

from __future__ import annotations

import hashlib
import math
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dist_gan import storage
from dist_gan.packing.image_source import UNREADABLE, ImageReader, Pixels
from dist_gan.packing.labels import MAX_CLASSES, numbered_classes
from dist_gan.packing.listing import Entry
from dist_gan.types import UserError


class ArraySource:
    """Images in an array in memory.

    Args:
        images: uint8, NHWC with 1 or 3 channels, or NHW for grey images.
        labels: class number of each image, N; None for images without labels.
        class_names: name of each class; None names the classes by their numbers.
        place: name of the source in messages.

    Raises:
        UserError: the shape or type of an array is wrong, or a label is out of range.
    """

    def __init__(
        self,
        images: ArrayLike,
        labels: ArrayLike | None = None,
        *,
        class_names: Sequence[str] | None = None,
        place: str = "arrays",
    ) -> None:
        self.place = place
        self.notes: tuple[str, ...] = ()
        pixels = _check_pixels(np.asarray(images), place)
        names = None if class_names is None else tuple(class_names)
        numbers = None if labels is None else _check_labels(np.asarray(labels), len(pixels), names, place)
        self.classes = None if numbers is None else names or numbered_classes(numbers)
        size = pixels[0].nbytes
        self.entries = tuple(
            Entry(key=f"{row:08d}", label=None if numbers is None else numbers[row], member=str(row), size=size)
            for row in range(len(pixels))
        )
        self.identity = hashlib.sha256(np.ascontiguousarray(pixels).data).hexdigest()
        self.reader: ImageReader = _ArrayReader(pixels)


class NpzSource(ArraySource):
    """An `.npz` file with `images`, uint8 NHW or NHWC, and optionally `labels`, N. Pickled objects are refused.

    Args:
        path: path of the file.

    Raises:
        UserError: the file is no complete npz, an array is missing, or its shape or type is wrong.
    """

    def __init__(self, path: str) -> None:
        try:
            with open(path, "rb") as file:
                if file.read(6) == b"\x93NUMPY":
                    raise UserError(f"{path}: holds one bare array; write it with numpy.savez(path, images=...)")
            with zipfile.ZipFile(path) as archive:
                _check_headers(archive, path)
            with np.load(path, allow_pickle=False) as arrays:
                images = arrays["images"]
                labels = arrays.get("labels")
        except UserError:
            raise
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {storage.why(error, reading=True)}") from error
        except MemoryError as error:
            raise UserError(f"{path}: its images do not fit into memory; give them as files in a folder") from error
        except (*UNREADABLE, SyntaxError, TypeError) as error:
            raise UserError(f"{path}: is not a whole npz of plain numbers ({error}); write it again") from error
        super().__init__(images, labels, place=path)
        self.reader = _NpzReader(str(Path(path).absolute()))


class _ArrayReader:
    def __init__(self, images: Pixels) -> None:
        self._images = images

    def open(self, entry: Entry) -> Pixels:
        return self._images[int(entry.member)]


class _NpzReader:
    def __init__(self, path: str) -> None:
        self._path = path
        self._images: Pixels | None = None

    def open(self, entry: Entry) -> Pixels:
        if self._images is None:
            with np.load(self._path, allow_pickle=False) as arrays:
                self._images = _with_channel_axis(arrays["images"])
        return self._images[int(entry.member)]

    def __getstate__(self) -> dict[str, Any]:
        return {"_path": self._path, "_images": None}


def _check_headers(archive: zipfile.ZipFile, place: str) -> None:
    """Compares the headers of an npz with its members, before memory is allocated.

    Raises:
        UserError: an array is missing, has another type or shape, or does not fit its member's size.
        ValueError: a header is damaged.
    """
    names = [name.removesuffix(".npy") for name in archive.namelist()]
    if "images" not in names:
        found = ", ".join(names[:10]) or "nothing"
        raise UserError(f"{place}: no array 'images' in it (found: {found}); rename the array of pixels")
    images = _announced(archive, "images", place)
    _check_pixels(images, place)
    if "labels" in names:
        _check_label_shape(_announced(archive, "labels", place), len(images), place)


def _announced(archive: zipfile.ZipFile, name: str, place: str) -> NDArray[Any]:
    """An array of the shape and type in a header, whose elements share one memory location."""
    member = archive.getinfo(f"{name}.npy" if f"{name}.npy" in archive.namelist() else name)
    with archive.open(member) as file:
        try:
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, dtype = read(file)
        except OSError:
            raise
        except Exception as error:  # a header is a Python literal, and numpy passes on any exception of its parser
            raise ValueError(f"the header of the array {name!r} is damaged: {type(error).__name__}") from error
        if dtype.hasobject:
            raise ValueError(f"the array {name!r} holds Python objects")
        if any(type(extent) is not int or extent < 0 for extent in shape):
            raise ValueError(f"the array {name!r} has the shape {shape}")
        needed = math.prod(shape) * dtype.itemsize
        there = member.file_size - file.tell()
    if needed != there:
        raise ValueError(f"the array {name!r} is announced with {needed:,} bytes and has {there:,}")
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > memory:
        raise UserError(
            f"{place}: the array {name!r} takes {needed:,} bytes, and this machine has {memory:,} of memory; give the "
            f"images as files in a folder"
        )
    return np.broadcast_to(np.zeros((), dtype), shape)


def _with_channel_axis(images: NDArray[Any]) -> NDArray[Any]:
    return images[..., None] if images.ndim == 3 else images


def _check_pixels(images: NDArray[Any], place: str) -> Pixels:
    wanted = "it must be uint8 with shape (N, H, W), (N, H, W, 1) or (N, H, W, 3)"
    if images.dtype != np.uint8:
        raise UserError(f"{place}: 'images' has the type {images.dtype}; {wanted}")
    pixels = _with_channel_axis(images)
    if pixels.ndim != 4 or pixels.shape[3] not in (1, 3):
        hint = "; the channels come last" if images.ndim == 4 and images.shape[1] in (1, 3) else ""
        raise UserError(f"{place}: 'images' has the shape {images.shape}; {wanted}{hint}")
    if not pixels.size:
        raise UserError(f"{place}: 'images' has the shape {images.shape}, so there are no images; {wanted}")
    return pixels


def _check_labels(labels: NDArray[Any], count: int, classes: tuple[str, ...] | None, place: str) -> list[int]:
    _check_label_shape(labels, count, place)
    low, high = int(labels.min()), int(labels.max())
    limit = len(classes) if classes is not None else MAX_CLASSES
    if low < 0 or high >= limit:
        raise UserError(f"{place}: 'labels' reaches from {low} to {high}; labels are numbers from 0 to {limit - 1:,}")
    return [int(label) for label in labels.reshape(-1)]


def _check_label_shape(labels: NDArray[Any], count: int, place: str) -> None:
    if labels.shape not in ((count,), (count, 1)) or not np.issubdtype(labels.dtype, np.integer):
        raise UserError(
            f"{place}: 'labels' has the shape {labels.shape} and the type {labels.dtype}; it must hold one whole "
            f"number for each of the {count:,} images"
        )
