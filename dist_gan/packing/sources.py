"""Sources of images to be packed: a local folder or one in a store, a zip, an npz, or arrays in memory."""

from __future__ import annotations

import hashlib
import lzma
import math
import os
import stat
import struct
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dist_gan import storage
from dist_gan.data.labels import MAX_CLASSES, numbered_classes
from dist_gan.packing.listing import Entry, File, folders_of, list_images
from dist_gan.packing.store_source import StoreSource
from dist_gan.packing.walking import walk
from dist_gan.types import UserError

Pixels = NDArray[np.uint8]
UNREADABLE = (
    OSError, EOFError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, NotImplementedError, KeyError,
    RuntimeError, ValueError, IndexError, OverflowError,
)  # fmt: skip
"""Exceptions raised when a file in a folder or zip cannot be read."""
_UNIX = 3
"""Number of Unix among the `create_system` values of a zip; only there are symbolic links marked."""


class Reader(Protocol):
    """Gets at images in any process: small to pickle, opened when first used."""

    def open(self, entry: Entry) -> BinaryIO | Pixels:
        """The image file at its first byte, to be closed; or pixels HWC. Raises OSError or zipfile.BadZipFile."""
        ...


class Source(Protocol):
    """Images with keys, and with labels or without."""

    place: str
    """Path or URL of the source, for messages."""
    entries: tuple[Entry, ...]
    """Sorted by key."""
    classes: tuple[str, ...] | None
    """Names by label; None where there are no labels."""
    notes: tuple[str, ...]
    """Sentences about files that were skipped."""
    identity: str
    """Hash of the contents if it is cheap to obtain, in addition to names and sizes; empty otherwise."""
    reader: Reader


def open_source(path: str) -> Source:
    """The source at a local path (a folder, a `.zip` or an `.npz`), or a folder in a store.

    Raises:
        UserError: nothing there, something else there, or mistakes inside.
        TrainingFailed: the store does not answer.
    """
    local = storage.local_path(path)
    if local is None:
        if path.lower().endswith((".zip", ".npz")):
            raise UserError(
                f"{storage.redact(path)}: a .zip and an .npz are packed from local files only; copy them to a disk first, "
                f"or give a folder of images in the store"
            )
        return StoreSource(path)
    if local.is_dir():
        return FolderSource(str(local))
    if not local.exists():
        raise UserError(f"{path}: not there; give a folder of images, a .zip or an .npz (now in {Path.cwd()})")
    if local.suffix.lower() == ".zip":
        return ZipSource(str(local))
    if local.suffix.lower() == ".npz":
        return NpzSource(str(local))
    raise UserError(f"{path}: a file of this kind cannot be packed; give a folder of images, a .zip or an .npz")


class FolderSource:
    """Image files in a folder, with a folder for each class or none.

    Raises:
        UserError: no images, or mistakes in the tree.
    """

    def __init__(self, path: str) -> None:
        self.place = path
        root = Path(path)
        found = walk(path)
        listing = list_images(
            found.files,
            found.folders,
            place=path,
            read=lambda name: _read_file(root / name),
            left_out=found.left_out,
        )
        self.entries, self.classes, self.notes = listing.entries, listing.classes, listing.notes
        self.identity = ""
        self.reader: Reader = _FolderReader(str(root.absolute()))


class ZipSource:
    """Image files in a zip, with a folder for each class, StyleGAN's `dataset.json`, or neither.

    Raises:
        UserError: no zip, a damaged or encrypted one, no images, or mistakes in the tree.
    """

    def __init__(self, path: str) -> None:
        self.place = path
        try:
            with zipfile.ZipFile(path) as archive:
                members = [member for member in archive.infolist() if not _is_link(member)]
                links = [member.filename for member in archive.infolist() if _is_link(member)]
                locked = next((m.filename for m in members if m.flag_bits & 1), None)
                if locked is not None:
                    raise UserError(f"{path}: {locked!r} is encrypted; unpack the zip and give the folder")
                listing = list_images(
                    [File(m.filename, m.file_size) for m in members if not m.is_dir()],
                    sorted(folders_of((m.filename for m in members), place=path)),
                    place=path,
                    read=archive.read,
                    left_out={"links": links},
                )
        except UserError:
            raise
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {storage.why(error, reading=True)}") from error
        except UNREADABLE as error:
            raise UserError(f"{path}: is not a whole zip ({error}); download or copy it again") from error
        self.entries, self.classes, self.notes = listing.entries, listing.classes, listing.notes
        self.identity = hashlib.sha256(repr(sorted((m.filename, m.CRC) for m in members)).encode()).hexdigest()
        self.reader: Reader = _ZipReader(str(Path(path).absolute()))


class ArraySource:
    """Images in memory.

    Args:
        images: NHWC uint8, 1 or 3 channels; or NHW for grey.
        labels: whole numbers, N, or None.
        class_names: name of each class; numbers where not given.
        place: name for messages.

    Raises:
        UserError: shapes, types or labels that do not fit together.
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
        self.reader: Reader = _ArrayReader(pixels)


class NpzSource(ArraySource):
    """An `.npz` with `images` (N, H, W) or (N, H, W, C) uint8, and perhaps `labels` (N); nothing is unpickled.

    Raises:
        UserError: no whole npz, or arrays that are not these.
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


class _FolderReader:
    def __init__(self, root: str) -> None:
        self._root = root

    def open(self, entry: Entry) -> BinaryIO:
        return open(os.path.join(self._root, entry.member), "rb")


class _ZipReader:
    def __init__(self, path: str) -> None:
        self._path = path
        self._archive: zipfile.ZipFile | None = None

    def open(self, entry: Entry) -> BinaryIO:
        if self._archive is None:
            self._archive = zipfile.ZipFile(self._path)
        return cast(BinaryIO, self._archive.open(entry.member))

    def __getstate__(self) -> dict[str, Any]:
        return {"_path": self._path, "_archive": None}


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


def _is_link(member: zipfile.ZipInfo) -> bool:
    return member.create_system == _UNIX and stat.S_ISLNK(member.external_attr >> 16)


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


def _read_file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {storage.why(error, reading=True)}") from error


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
