"""The only importer of fsspec: bytes by URL, and files that are either whole or not there.

A plain path is a URL of the scheme `file`. Which schemes are allowed is decided here, before any file system is
made: fsspec knows schemes that run commands or read other people's machines.
"""

from __future__ import annotations

import errno
import glob
import os
import posixpath
import random
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterable
from io import FileIO
from pathlib import Path
from threading import Event
from typing import Any, BinaryIO, TypeVar, cast

import fsspec
from fsspec.core import url_to_fs

from dist_gan.types import TrainingFailed, UserError
from dist_gan.wording import redact as redact
from dist_gan.wording import scheme_of as scheme_of

Result = TypeVar("Result")
PATIENCE_S = 120.0
"""How long a store may stay silent before an operation on it fails; below every collective's timeout."""
_TRANSIENT = (errno.EIO, errno.ETIMEDOUT, errno.ECONNRESET, errno.ECONNREFUSED, errno.EBUSY, errno.EAGAIN)
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
ALLOWED_SCHEMES = ("file", "memory", "s3", "gs", "az", "abfs", "http", "https", "hf")
_EXTRAS = {"s3": "s3", "gs": "gs", "az": "azure", "abfs": "azure", "http": "http", "https": "http", "hf": "hf"}
"""What to install for a scheme."""
_SCHEME = re.compile(r"(pipe|data|file):(?://)?|([^/:]+)://", re.IGNORECASE)


def check_url(url: str, *, place: str) -> str:
    """The URL itself if its scheme is allowed.

    Raises:
        UserError: the scheme is not on the list; `place` says where the URL came from.
    """
    scheme = scheme_of(url)
    if "::" in url:
        raise UserError(
            f"{place}: {redact(url)!r} chains file systems with '::', which is not allowed; give one plain URL"
        )
    if scheme not in ALLOWED_SCHEMES:
        why = "it would run a shell command" if scheme == "pipe" else "it is not on the list of allowed schemes"
        raise UserError(
            f"{place}: the scheme {scheme!r} of {redact(url)!r} is refused, {why}; "
            f"use a path or one of {', '.join(s + '://' for s in ALLOWED_SCHEMES)}"
        )
    if redact(url) != url:
        raise UserError(
            f"{place}: {redact(url)!r} came with a user part or a query, which would end up in logs and checkpoints; "
            f"give the bare URL, and credentials by the environment"
        )
    return url


def join(url: str, *names: str) -> str:
    """URL of a name inside a folder URL."""
    return posixpath.join(url.rstrip("/") or "/", *names)


def local_path(url: str) -> Path | None:
    """The path of a `file` URL, None for any other store."""
    if scheme_of(url) != "file":
        return None
    match = _SCHEME.match(url)
    return Path(url[match.end() :] if match else url).expanduser()


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
        raise UserError(
            f"the scheme {scheme_of(url)!r} of {redact(url)!r} needs a package that is not installed; "
            f"run: pip install 'dist-gan[{_EXTRAS[scheme_of(url)]}]'"
        ) from error
    return filesystem, path


class Patience:
    """How long a store may stay silent before an operation on it fails, and how often it was asked again.

    Args:
        seconds: for one operation, from its first failure on; `PATIENCE_S` by default.
    """

    def __init__(self, seconds: float | None = None) -> None:
        self.seconds = PATIENCE_S if seconds is None else seconds
        self.retries = 0
        self._over = Event()

    def give_up(self) -> None:
        """Ends all waiting: what fails from now on is not asked for again."""
        self._over.set()

    def wait(self, number: int, since: float, error: Exception) -> None:
        """Sleeps before try `number` + 1 of an operation that began at `since`, or raises its error.

        Waits grow from half a second to ten, each by chance between half and the whole, so that many ranks do not
        come back at once.
        """
        longest = min(10.0, 0.5 * 2**number)
        if not is_transient(error):
            raise error
        if time.monotonic() + longest > since + self.seconds:
            raise ConnectionError(f"the store has not answered for {self.seconds:.0f} s ({_kind(error)})") from error
        self.retries += 1
        if self._over.wait(longest * random.uniform(0.5, 1.0)):
            raise error


def patiently(url: str, operation: Callable[[], Result], patience: Patience | None = None) -> Result:
    """Does something to a store, again and again while it is merely not answering. A disk of this machine is asked once."""
    if local_path(url) is not None:
        return operation()
    patience, began, number = patience or Patience(), time.monotonic(), 0
    while True:
        try:
            return operation()
        except Exception as error:
            patience.wait(number, began, error)
        number += 1


def _kind(error: BaseException) -> str:
    """What went wrong in a word; what a store's client says beyond that may hold a secret."""
    return type(error.__cause__ or error).__name__


def is_transient(error: BaseException) -> bool:
    """Whether the same request may succeed later: no answer, a broken connection, an overloaded server."""
    if isinstance(error, FileNotFoundError | PermissionError | FileExistsError | IsADirectoryError):
        return False
    if "Credential" in type(error).__name__:  # as botocore and google.auth say that there are none
        return False
    if isinstance(error, OSError) and error.__cause__ is not None and hasattr(error.__cause__, "response"):
        return is_transient(error.__cause__)  # s3fs makes an EIO of whatever it does not know
    if isinstance(error, ConnectionError | TimeoutError):
        return True
    if isinstance(error, OSError) and error.errno in _TRANSIENT:
        return True
    status = getattr(error, "status", None)
    answer = getattr(error, "response", None)
    if isinstance(answer, dict) and "Error" in answer:  # botocore's
        if answer["Error"].get("Code") in ("RequestTimeout", "SlowDown", "Throttling", "ThrottlingException"):
            return True
        status = answer.get("ResponseMetadata", {}).get("HTTPStatusCode")
    if isinstance(status, int):
        return status >= 500 or status == 429
    origin = type(error).__module__.split(".")[0]
    if origin in ("aiohttp", "botocore", "aiobotocore", "requests", "urllib3"):
        return True
    cause = error.__cause__ or error.__context__
    return cause is not None and cause is not error and is_transient(cause)


def exists(url: str) -> bool:
    """Whether a file or folder is there."""
    filesystem, path = connect(url)
    return bool(patiently(url, lambda: filesystem.exists(path)))


def size(url: str) -> int:
    """Bytes of a file. Raises FileNotFoundError."""
    filesystem, path = connect(url)
    return int(patiently(url, lambda: filesystem.size(path)))


def list_names(url: str) -> list[str]:
    """Names of files and folders in a folder, sorted; an absent folder is empty."""
    filesystem, path = connect(url)
    filesystem.invalidate_cache()
    try:
        entries = patiently(url, lambda: filesystem.ls(path, detail=False))
    except FileNotFoundError:
        return []
    return sorted(name for name in (posixpath.basename(str(e).rstrip("/")) for e in entries) if name)


def open_read(url: str) -> BinaryIO:
    """A file open for reading, with seek and tell. Raises FileNotFoundError."""
    filesystem, path = connect(url)
    return cast(BinaryIO, filesystem.open(path, "rb"))


def sizes(url: str, names: Iterable[str]) -> dict[str, int | None]:
    """Bytes of each named file in a folder, None for one that is not there; by one listing where there are listings."""
    if scheme_of(url) in ("http", "https"):
        return {name: _size_or_none(join(url, name)) for name in names}
    filesystem, path = connect(url)
    filesystem.invalidate_cache()
    try:
        entries = patiently(url, lambda: filesystem.ls(path, detail=True))
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
    """Bytes [start, end) of a file, all of it by default."""
    filesystem, path = connect(url)
    return bytes(patiently(url, lambda: filesystem.cat_file(path, start=start, end=end)))


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
    at, began, number = start, time.monotonic(), 0
    while at < end:
        until = min(end, at + _PART)
        try:
            part = bytes(filesystem.cat_file(path, start=at, end=until))
            if len(part) > until - at:
                raise ConnectionError(f"{len(part):,} bytes came for {until - at:,}")
            if part:
                parts.append(part)
                at += len(part)
                began, number = time.monotonic(), 0
            if at < until:
                filesystem.invalidate_cache()
                if int(filesystem.size(path)) <= at:
                    break
                raise ConnectionError(f"{len(part):,} of {until - at + len(part):,} bytes came")
        except Exception as error:
            patience.wait(number, began, error)
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
    local = local_path(url)
    try:
        if local is not None:
            _publish_local(local, data)
            return
        filesystem, path = connect(url)
        patiently(url, lambda: filesystem.pipe_file(path, bytes(data)))
        filesystem.invalidate_cache()
        written = int(patiently(url, lambda: filesystem.size(path)))
        if written != len(data):
            filesystem.rm_file(path)
            raise OSError(errno.EIO, f"{written} of {len(data)} bytes arrived")
    except OSError as error:
        raise TrainingFailed(f"cannot write {redact(url)} ({len(data):,} bytes): {why(error)}") from error


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


def sync_folder(folder: Path) -> None:
    """Makes renames in a local folder survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def why(error: OSError) -> str:
    """A failed file operation in the words of a person, with a remedy where there is one."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "the disk is full; free some space or choose another folder, then start the same command again"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "no write permission; choose a folder you may write to, or ask for the right"
    return f"{error.strerror or error}"


def remove(url: str) -> None:
    """Removes a file; one that is not there is no error."""
    filesystem, path = connect(url)
    try:
        filesystem.rm_file(path)
    except FileNotFoundError:
        return


def remove_folder(url: str) -> None:
    """Removes a folder with all that is in it; one that is not there is no error."""
    filesystem, path = connect(url)
    try:
        if local_path(url) is not None:
            shutil.rmtree(path)
        else:
            filesystem.rm(glob.escape(path), recursive=True)  # fsspec would read the name as a pattern
    except FileNotFoundError:
        return
