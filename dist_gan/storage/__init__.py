"""Access to files by URL, and atomic writes; the only module that imports fsspec.

A plain path is a URL of the scheme `file`. The module `urls` refuses schemes that are not allowed before a file system
is created: fsspec has schemes that run commands or read other machines.
"""

from __future__ import annotations

import errno
import glob
import io
import os
import posixpath
import shutil
import time
import uuid
from collections.abc import Callable, Iterable
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import fsspec
from fsspec.core import url_to_fs

from dist_gan.storage.errors import failure, refusal
from dist_gan.storage.patience import Patience as Patience
from dist_gan.types import TrainingFailed, UserError
from dist_gan.urls import ALLOWED_SCHEMES as ALLOWED_SCHEMES
from dist_gan.urls import check_url as check_url
from dist_gan.urls import join as join
from dist_gan.urls import local_path as local_path
from dist_gan.wording import redact as redact
from dist_gan.wording import scheme_of as scheme_of

Result = TypeVar("Result")
PATIENCE_S = 120.0
"""Default time limit, in seconds, for a store that does not answer; below every collective's timeout."""
CONNECTIONS = 32
"""To one store; botocore's own ten are 200 requests a second at 50 ms each, whatever asks for them."""
_CLIENT_OPTIONS: dict[str, dict[str, Any]] = {
    "s3": {
        "config_kwargs": {
            "max_pool_connections": CONNECTIONS,
            # One try a request: asking again, and for how long, is for Patience to decide and to count.
            "retries": {"total_max_attempts": 1},
            "connect_timeout": 10,
            "read_timeout": 30,
        }
    }
}
_PART = 2**23
"""Bytes of one request; what a broken one costs."""
_WRITTEN_AT_ONCE = 2**25
"""Bytes of a local file that are in the page cache at a time while it is being written."""
_PACKAGES = {
    "s3": ("s3fs", "s3"), "gs": ("gcsfs", "gs"), "az": ("adlfs", "azure"), "abfs": ("adlfs", "azure"),
    "http": ("aiohttp", "http"), "https": ("aiohttp", "http"), "hf": ("huggingface_hub", "hf"),
}  # fmt: skip
"""Package that each scheme needs, and the extra of this project that installs it."""


def connect(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of an allowed URL, and the path there."""
    check_url(url, place="url")
    local = local_path(url)
    if local is not None:
        return fsspec.filesystem("file"), str(local.absolute())
    try:
        filesystem, path = url_to_fs(url, **_CLIENT_OPTIONS.get(scheme_of(url), {}))
        if scheme_of(url) == "s3":
            filesystem.retries = 1
    except ImportError as error:
        package, extra = _PACKAGES[scheme_of(url)]
        raise UserError(
            f"the scheme {scheme_of(url)!r} of {redact(url)!r} needs the package {package}, which is not installed; run: "
            f"pip install {package} (in a checkout: pip install -e '.[{extra}]')"
        ) from error
    except Exception as error:  # some clients look up credentials and addresses on creation
        raise failure(error, f"cannot use {redact(url)}") from error
    return filesystem, path


def asked(
    url: str, doing: str, operation: Callable[[], Result], patience: Patience | None = None, *, about: str = ""
) -> Result:
    """The result of an operation on a store, which is retried while the store does not answer. Disks are not retried.

    Args:
        url: URL of the file or folder.
        doing: name of the operation in one word (read, list, write, remove).
        operation: called to do the work.
        patience: time limit shared with other operations; a new one by default.
        about: text that follows the URL in error sentences.

    Raises:
        OSError: the operation failed on a local disk.
        FileNotFoundError: the store has no such file or folder.
        UserError: the store refuses access, or its name cannot be resolved.
        TrainingFailed: the store has not answered within the time limit, or failed in another way.
    """
    if local_path(url) is not None:
        return operation()
    patience, failed_at, number = patience or Patience(PATIENCE_S), 0.0, 0
    while True:
        try:
            result = operation()
        except (UserError, TrainingFailed):
            raise
        except Exception as error:
            failed_at = failed_at if number else time.monotonic()
            try:
                patience.wait(number, failed_at, error, place=redact(url))
            except Exception as last:
                if isinstance(last, FileNotFoundError | NotADirectoryError) and refusal(last) is None:
                    raise
                raise failure(last, f"cannot {doing} {redact(url)}{about}") from last
            number += 1
        else:
            patience.met = True
            return result


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
    return io.BufferedReader(_StoreFile(url), _PART)


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


def _size_or_none(url: str) -> int | None:
    try:
        return size(url)
    except FileNotFoundError:
        return None


def read(url: str, start: int | None = None, end: int | None = None) -> bytes:
    """Bytes [start, end) of a file, by default the whole file. Raises the errors of `asked`."""
    filesystem, path = connect(url)
    return bytes(asked(url, "read", lambda: filesystem.cat_file(path, start=start, end=end)))


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
        until = min(end, at + _PART)
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


def will_read(path: Path, start: int, end: int) -> None:
    """Tells the kernel which bytes of a local file are going to be read, so that they are there by then."""
    if not hasattr(os, "posix_fadvise"):
        return
    try:
        with open(path, "rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), start, end - start, os.POSIX_FADV_WILLNEED)
    except OSError:
        return  # whoever reads them will say what is wrong


def make_folder(url: str) -> None:
    """Makes a folder and its parents; object stores have none and do nothing."""
    check_url(url, place="url")
    if scheme_of(url) in ("file", "memory"):
        filesystem, path = connect(url)
        filesystem.makedirs(path, exist_ok=True)


def publish(url: str, data: bytes | memoryview) -> None:
    """Writes a file so that nobody ever sees half of it.

    Locally: a temporary name beside it, fsync, rename, fsync of the folder. On an object store an upload becomes
    visible when it is complete; its size is read back.

    Raises:
        TrainingFailed: the disk is full or the store does not take the file; nothing is left under the name.
    """
    about = f" ({len(data):,} bytes)"
    place = f"cannot write {redact(url)}{about}"
    local = local_path(url)
    if local is not None:
        try:
            _publish_local(local, data)
        except OSError as error:
            raise TrainingFailed(f"{place}: {why(error)}") from error
        return
    filesystem, path = connect(url)
    patience = Patience(PATIENCE_S, met=True)
    try:
        asked(url, "write", lambda: filesystem.pipe_file(path, bytes(data)), patience, about=about)
        filesystem.invalidate_cache()
        written = int(asked(url, "write", lambda: filesystem.size(path), patience, about=about))
    except FileNotFoundError as error:
        raise TrainingFailed(f"{place}: it is not there after it was written") from error
    except UserError as error:  # writes happen while a program runs, which cannot continue
        raise TrainingFailed(*error.args) from error
    if written != len(data):
        remove(url)
        raise TrainingFailed(f"{place}: {written} of {len(data)} bytes arrived")


def _publish_local(path: Path, data: bytes | memoryview) -> None:
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with open(temporary, "wb", buffering=0) as file:
            _write_through(file, memoryview(data))
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def _write_through(file: FileIO, data: memoryview) -> None:
    """Writes to the disk in parts and lets the page cache forget each: what is written once must not push out images.

    It is faster, too, where memory that was not used before has to be found for all of a large file.
    """
    at = 0
    while at < len(data):
        begin = at
        while at < min(len(data), begin + _WRITTEN_AT_ONCE):
            at += file.write(data[at : begin + _WRITTEN_AT_ONCE])
        if len(data) > _WRITTEN_AT_ONCE and hasattr(os, "posix_fadvise"):
            os.fdatasync(file.fileno())
            os.posix_fadvise(file.fileno(), begin, at - begin, os.POSIX_FADV_DONTNEED)
    os.fsync(file.fileno())


def sync_file(path: Path) -> None:
    """Flushes a local file to the disk, whichever process wrote it; an absent file is no error."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except FileNotFoundError:
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Makes renames in a local folder survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def why(error: OSError, *, reading: bool = False) -> str:
    """A failed file operation in the words of a person, with a remedy where there is one."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "the disk is full; free some space or choose another folder, then start the same command again"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        if reading:
            return "no permission to read it; ask for the right, or give another place"
        return "no write permission; choose a folder you may write to, or ask for the right"
    if error.errno in (errno.EEXIST, errno.ENOTDIR):
        return f"{error.strerror}, a file is where a folder should be; choose another folder"
    return f"{error.strerror or error}"


def remove(url: str) -> None:
    """Removes a file; an absent file is no error. Raises the errors of `asked`."""
    filesystem, path = connect(url)
    try:
        asked(url, "remove", lambda: filesystem.rm_file(path))
    except FileNotFoundError:
        return


def remove_folder(url: str) -> None:
    """Removes a folder and its content; an absent folder is no error. Raises the errors of `asked`."""
    filesystem, path = connect(url)
    try:
        if local_path(url) is not None:
            shutil.rmtree(path)
        else:
            # fsspec would interpret the name as a glob pattern.
            asked(url, "remove", lambda: filesystem.rm(glob.escape(path), recursive=True))
    except FileNotFoundError:
        return


class _StoreFile(io.RawIOBase):
    """A file in a store, read by requests for byte ranges."""

    def __init__(self, url: str) -> None:
        super().__init__()
        self._url, self._size, self._at = url, size(url), 0
        self._patience = Patience(PATIENCE_S, met=True)

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
