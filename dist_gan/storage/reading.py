"""Reading of files and folders by URL, on disks and in stores."""

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
"""Size of one request, in bytes; a broken request repeats at most this much."""
_VERSIONS = ("ETag", "etag", "md5Hash", "generation", "blob_id", "oid")
"""Keys under which listings of stores give a value that changes with a file's content."""


class FoundFile(NamedTuple):
    """A file of a listing."""

    name: str
    """Path inside the folder, with `/`."""
    size: int
    """Bytes."""
    version: str
    """Value that changes with the content, where the store has one; else empty."""


def exists(url: str) -> bool:
    """True if a file or folder exists. Raises the errors of `asked`."""
    filesystem, path = connect(url)
    if local_path(url) is not None:
        return bool(filesystem.exists(path))
    filesystem.invalidate_cache()
    try:
        # Not the clients' own `exists`: some return False if the store does not answer.
        asked(url, "read", lambda: filesystem.info(path))
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def size(url: str) -> int:
    """Size of a file, in bytes. Raises the errors of `asked`."""
    filesystem, path = connect(url)
    return int(asked(url, "read", lambda: filesystem.size(path)))


def list_names(url: str) -> list[str]:
    """Names of files and folders in a folder, sorted; an absent folder is empty. Raises the errors of `asked`."""
    filesystem, path = connect(url)
    filesystem.invalidate_cache()
    try:
        entries = asked(url, "list", lambda: filesystem.ls(path, detail=False))
    except FileNotFoundError:
        return []
    return sorted(name for name in (posixpath.basename(str(e).rstrip("/")) for e in entries) if name)


def open_read(url: str) -> BinaryIO:
    """Opens a file for reading, with seek and tell; reads from a store are retried.

    Raises:
        OSError, FileNotFoundError, UserError, TrainingFailed: as in `asked`, here and while reading.
    """
    local = local_path(url)
    if local is not None:
        return open(local, "rb")
    return io.BufferedReader(_StoreFile(url), PART_BYTES)


def sizes(url: str, names: Iterable[str]) -> dict[str, int | None]:
    """Size of each named file in a folder, in bytes, None for an absent file; by one listing if the store has listings.

    Raises:
        OSError, UserError, TrainingFailed: as in `asked`.
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
    """All files in a folder of a store at any depth, sorted, by one listing; an absent folder is empty.

    The objects without bytes that stand for folders in some stores are no files.

    Raises:
        UserError, TrainingFailed: as in `asked`.
    """
    filesystem, path = connect(url)
    found = _listed(url, filesystem, lambda: filesystem.find(path, detail=True).values(), patience)
    files = (FoundFile(_inside(url, path, info), int(info["size"] or 0), _version(info)) for info in found)
    return sorted(file for file in files if file.name and not file.name.endswith("/"))


def entries(url: str, *, patience: Patience | None = None) -> dict[str, int | None]:
    """Direct entries of a folder of a store: size of a file in bytes, None for a folder; an absent folder is empty.

    Raises:
        UserError, TrainingFailed: as in `asked`.
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
            # fsspec keeps what it has listed, which for a million files is a gigabyte.
            filesystem.invalidate_cache()

    return asked(url, "list", listed, patience)


def _inside(url: str, path: str, info: dict[str, Any]) -> str:
    """Path of a listed file inside the folder that was listed."""
    name, above = str(info["name"]).lstrip("/"), path.strip("/")
    if not name.startswith(above):
        raise TrainingFailed(f"cannot list {url}: the store gave {name!r}, which does not lie in it")
    return name[len(above) :].removeprefix("/")


def _version(info: dict[str, Any]) -> str:
    return next((str(info[name]) for name in _VERSIONS if info.get(name)), "")


def is_inside(url: str, folder: str) -> bool:
    """True if a URL of a store is that of a folder there or lies below it."""
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
    """Bytes [start, end) of a file, by default the whole file. Raises the errors of `asked`."""
    filesystem, path = connect(url)
    return bytes(asked(url, "read", lambda: filesystem.cat_file(path, start=start, end=end)))


def read_in(url: str, name: str, start: int, end: int, *, patience: Patience | None = None) -> bytes:
    """Bytes [start, end) of the file `name` in a folder of a store; the name may hold characters that no URL may.

    Raises:
        FileNotFoundError, UserError, TrainingFailed: as in `asked`.
    """
    filesystem, path = connect(url)
    file = f"{path.rstrip('/')}/{name}"
    return bytes(asked(join(url, name), "read", lambda: filesystem.cat_file(file, start=start, end=end), patience))


def read_range(url: str, start: int, end: int, *, patience: Patience) -> bytes:
    """Bytes [start, end) of a file, in parts; fewer only if the file really ends before.

    What has arrived is kept: a part that failed, or came short though the file is long enough, is asked for again from
    where it broke off.

    Raises:
        OSError and what the store's client raises: it has no such file, refuses, or has been silent for too long.
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
