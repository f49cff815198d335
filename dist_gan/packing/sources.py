"""Image sources by path or URL: files in a local folder, a zip or a store, or the arrays of an npz."""

from __future__ import annotations

import hashlib
import os
import stat
import zipfile
from pathlib import Path
from typing import Any, BinaryIO, cast

from dist_gan import storage
from dist_gan.packing.array_sources import NpzSource
from dist_gan.packing.image_source import UNREADABLE, ImageReader, ImageSource
from dist_gan.packing.listing import Entry, File, folders_of, list_images
from dist_gan.packing.store_source import StoreSource
from dist_gan.packing.walking import walk
from dist_gan.types import UserError

_UNIX = 3
"""Value of `create_system` in a zip written on Unix; only such zips mark symbolic links."""


def open_source(path: str) -> ImageSource:
    """The source at a local path (a folder, a `.zip` or an `.npz`), or a folder in a store.

    Raises:
        UserError: the path does not exist, is of another kind, or its contents have mistakes.
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
    """Image files in a local folder, with a folder for each class, or without classes.

    Args:
        path: path of the folder.

    Raises:
        UserError: there are no images, or the folders contain mistakes.
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
        self.reader: ImageReader = _FolderReader(str(root.absolute()))


class ZipSource:
    """Image files in a zip, with a folder for each class, with StyleGAN's `dataset.json`, or without labels.

    Args:
        path: path of the zip.

    Raises:
        UserError: the file is no zip, is damaged or encrypted, holds no images, or its folders contain mistakes.
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
        self.reader: ImageReader = _ZipReader(str(Path(path).absolute()))


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


def _is_link(member: zipfile.ZipInfo) -> bool:
    return member.create_system == _UNIX and stat.S_ISLNK(member.external_attr >> 16)


def _read_file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {storage.why(error, reading=True)}") from error
