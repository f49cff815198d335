"""Functions that read files and list folders by URL, on disks and in object stores."""

from __future__ import annotations

import io
import os
import posixpath
import time
from collections.abc import Callable, Iterable
from typing import Any, BinaryIO, NamedTuple

from dist_gan.storage.client import asked, connect
from dist_gan.storage.errors import failure
from dist_gan.storage.patience import Patience
from dist_gan.types import TrainingFailed
from dist_gan.urls import join, local_path
from dist_gan.wording import redact, scheme_of

PART_BYTES = 2**23
"""Largest number of bytes of one request; at most this many bytes are read again after a broken connection."""
_VERSIONS = ("ETag", "etag", "md5Hash", "generation", "blob_id", "oid")
"""Keys of a store's listing whose value changes when the content of the file changes; the first one found is used."""


class FoundFile(NamedTuple):
    """A file in the listing of a folder."""

    name: str
    """Path of the file inside the folder, with `/` between its parts."""
    size: int
    """Size of the file in bytes."""
    version: str
    """Text that changes when the file's content changes; empty if the store offers none."""


def exists(url: str) -> bool:
    """Returns True if a file or folder exists. Raises the errors of `client.asked`."""
    filesystem, path = connect(url)
    if local_path(url) is not None:
        return bool(filesystem.exists(path))
    filesystem.invalidate_cache()
    try:
        # `info` instead of `exists`: some clients' `exists` returns False if the store does not answer.
        asked(url, "read", lambda: filesystem.info(path))
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def size(url: str) -> int:
    """Returns the size of a file in bytes. Raises the errors of `client.asked`."""
    filesystem, path = connect(url)
    filesystem.invalidate_cache()
    return int(asked(url, "read", lambda: filesystem.size(path)))


def list_names(url: str) -> list[str]:
    """Returns the names of files and folders in a folder, sorted; an absent folder counts as empty.

    Raises:
        OSError, UserError, TrainingFailed: as in `client.asked`.
    """
    filesystem, path = connect(url)
    filesystem.invalidate_cache()
    try:
        entries = asked(url, "list", lambda: filesystem.ls(path, detail=False))
    except FileNotFoundError:
        return []
    return sorted(name for name in (posixpath.basename(str(e).rstrip("/")) for e in entries) if name)


def open_read(url: str) -> BinaryIO:
    """Opens a file for reading, with `seek` and `tell`; reads from a store are retried.

    Raises:
        OSError, FileNotFoundError, UserError, TrainingFailed: as in `client.asked`; reads raise the same errors.
    """
    local = local_path(url)
    if local is not None:
        return open(local, "rb")
    return io.BufferedReader(_StoreFile(url), PART_BYTES)


def sizes(url: str, names: Iterable[str]) -> dict[str, int | None]:
    """Returns the size in bytes of each named file in a folder, by name; None for an absent file.

    One listing of the folder gives all sizes; only HTTP servers, which offer no listings, are asked for each file.

    Raises:
        OSError, UserError, TrainingFailed: as in `client.asked`.
    """
    if scheme_of(url) in ("http", "https"):
        return {name: _size_or_none(join(url, name)) for name in names}
    filesystem, path = connect(url)
    filesystem.invalidate_cache()
    try:
        entries = asked(url, "list", lambda: filesystem.ls(path, detail=True))
    except FileNotFoundError:
        entries = []
    found = {
        posixpath.basename(str(e["name"]).rstrip("/")): int(e["size"] or 0) for e in entries if e["type"] != "directory"
    }
    return {name: found.get(name) for name in names}


def list_files(url: str, *, patience: Patience | None = None) -> list[FoundFile]:
    """Returns all files in a folder of a store at any depth, sorted by name; an absent folder counts as empty.

    All files come from one listing. Some stores keep an empty object for each folder; such objects are left out.

    Raises:
        UserError, TrainingFailed: as in `client.asked`.
    """
    filesystem, path = connect(url)
    found = _listed(url, filesystem, lambda: filesystem.find(path, detail=True).values(), patience)
    files = (FoundFile(_inside(url, path, info), int(info["size"] or 0), _version(info)) for info in found)
    return sorted(file for file in files if file.name and not file.name.endswith("/"))


def entries(url: str, *, patience: Patience | None = None) -> dict[str, int | None]:
    """Returns the direct entries of a folder of a store by name: size of a file in bytes, None for a folder.

    An absent folder counts as empty.

    Raises:
        UserError, TrainingFailed: as in `client.asked`.
    """
    filesystem, path = connect(url)
    found = _listed(url, filesystem, lambda: filesystem.ls(path, detail=True), patience)
    names = {
        _inside(url, path, info).rstrip("/"): None if info["type"] == "directory" else int(info["size"] or 0)
        for info in found
    }
    return {name: size for name, size in names.items() if name}


def _listed(
    url: str, filesystem: Any, operation: Callable[[], Iterable[dict[str, Any]]], patience: Patience | None
) -> list[dict[str, Any]]:
    def listed() -> list[dict[str, Any]]:
        filesystem.invalidate_cache()
        try:
            return list(operation())
        except (FileNotFoundError, NotADirectoryError):
            return []
        finally:
            # fsspec keeps each listing in memory, which for a million files takes a gigabyte.
            filesystem.invalidate_cache()

    return asked(url, "list", listed, patience)


def _inside(url: str, path: str, info: dict[str, Any]) -> str:
    """Returns the path of a listed file inside the folder that was listed."""
    name, above = str(info["name"]).lstrip("/"), path.strip("/")
    if not name.startswith(above):
        raise TrainingFailed(f"cannot list {url}: the store gave {name!r}, which does not lie in it")
    return name[len(above) :].removeprefix("/")


def _version(info: dict[str, Any]) -> str:
    return next((str(info[name]) for name in _VERSIONS if info.get(name)), "")


def is_inside(url: str, folder: str) -> bool:
    """Returns True if a URL in a store names the folder `folder` itself, or something inside that folder."""
    if local_path(url) is not None or local_path(folder) is not None:
        return False
    (filesystem, path), (other, above) = connect(url), connect(folder)
    path, above = path.strip("/"), above.strip("/")
    return type(filesystem) is type(other) and (path == above or path.startswith(f"{above}/") or not above)


def _size_or_none(url: str) -> int | None:
    try:
        return size(url)
    except FileNotFoundError:
        return None


def read(url: str, start: int | None = None, end: int | None = None) -> bytes:
    """Returns bytes [start, end) of a file, by default the whole file. Raises the errors of `client.asked`."""
    filesystem, path = connect(url)
    return bytes(asked(url, "read", lambda: filesystem.cat_file(path, start=start, end=end)))


def read_in(url: str, name: str, start: int, end: int, *, patience: Patience | None = None) -> bytes:
    """Returns bytes [start, end) of the file `name` in a folder of a store.

    The name may contain characters that a URL may not, such as `?`.

    Raises:
        FileNotFoundError, UserError, TrainingFailed: as in `client.asked`.
    """
    filesystem, path = connect(url)
    file = f"{path.rstrip('/')}/{name}"
    return bytes(asked(join(url, name), "read", lambda: filesystem.cat_file(file, start=start, end=end), patience))


def read_range(url: str, start: int, end: int, *, patience: Patience) -> bytes:
    """Returns bytes [start, end) of a file, read in parts; fewer bytes only if the file ends before `end`.

    If a request fails, or returns fewer bytes than the file has there, the next request begins after the bytes that have
    arrived.

    Raises:
        OSError, or an error of the store's client: the file is absent, access is refused, or the store has not answered
            within the time limit of `patience`.
    """
    local = local_path(url)
    if local is not None:
        with open(local, "rb") as file:
            file.seek(start)
            return file.read(end - start)
    filesystem, path = connect(url)
    parts: list[bytes] = []
    at, failed_at, number = start, 0.0, 0
    while at < end:
        until = min(end, at + PART_BYTES)
        try:
            part = bytes(filesystem.cat_file(path, start=at, end=until))
            if len(part) > until - at:
                raise ConnectionError(f"{len(part):,} bytes came for {until - at:,}")
            if part:
                parts.append(part)
                at += len(part)
                number = 0
            if at < until:
                filesystem.invalidate_cache()
                if int(filesystem.size(path)) <= at:
                    break
                raise ConnectionError(f"{len(part):,} of {until - at + len(part):,} bytes came")
        except Exception as error:
            failed_at = failed_at if number else time.monotonic()
            patience.wait(number, failed_at, error, place=redact(url))
            number += 1
    return parts[0] if len(parts) == 1 else b"".join(parts)


class _StoreFile(io.RawIOBase):
    """A file in a store, read by requests for byte ranges."""

    def __init__(self, url: str) -> None:
        super().__init__()
        self._url, self._size, self._at = url, size(url), 0
        self._patience = Patience(met=True)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = max(0, offset + (0, self._at, self._size)[whence])
        return self._at

    def readinto(self, buffer: Any) -> int:
        end = min(self._size, self._at + len(buffer))
        if self._at >= end:
            return 0
        try:
            data = read_range(self._url, self._at, end, patience=self._patience)
        except Exception as error:
            raise failure(error, f"cannot read {redact(self._url)}") from error
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)
