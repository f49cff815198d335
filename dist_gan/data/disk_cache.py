"""Caches bytes read from a store on a local disk, for later passes and for all processes of the machine.

    FOLDER/3f/3fa9...            bytes of one read; the name is the hash of URL, version of the object, and byte range
    FOLDER/.bytes                total size of these files, in bytes; a process locks it while changing the folder

A file appears complete, by a rename, or not at all; a file of the wrong size counts as absent. A process that finds the
folder over its limit deletes the least recently used files. A process that dies leaves at most a temporary file, which
the next clearing removes.

If other users can write to the folder, a subfolder that only this user can write is used instead, since changes to the
cache would change the training data. No link is followed, and only files made by the cache are deleted. After the start
the cache raises no errors: problems in the folder only cost speed.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import stat
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from dist_gan.types import UserError

_BYTES = ".bytes"
_FOLDER, _READ, _TEMPORARY = (re.compile(p) for p in (r"[0-9a-f]{2}", r"[0-9a-f]{64}", r"[0-9a-f]+\.tmp"))
"""Patterns of the names of folders, cached reads and temporary files made by the cache."""
_DIGITS = 20
"""Largest number of digits of the total size stored in `.bytes`."""
_FORGOTTEN_S = 600.0
"""Age, in seconds, after which a temporary file is taken to be left by a dead process, and is deleted."""
_ROOM = 0.1
"""Fraction of the size limit that is free after a clean-up of the cache, so that clean-ups are rare."""
_OTHERS_MAY_WRITE = stat.S_IWGRP | stat.S_IWOTH


class _File(NamedTuple):
    """A cached file: time of its last use in seconds, size in bytes, and path. Sorting puts the least recently used
    first."""

    used: float
    bytes: int
    path: str


class DiskCache:
    """Caches bytes in a local folder of limited size, shared by all threads and processes of a machine.

    Args:
        folder: path of the folder, which is created if it is absent.
        limit: largest total size of the files, in bytes.

    Raises:
        UserError: the folder cannot be created or written to.
    """

    def __init__(self, folder: str, *, limit: int) -> None:
        self._folder, self._limit = Path(folder).expanduser(), limit
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not _is_ours(os.stat(self._folder)):
                self._folder /= f"dist_gan-{os.geteuid()}"
                self._folder.mkdir(mode=0o700, exist_ok=True)
                if not _is_ours(os.lstat(self._folder)):
                    raise PermissionError(f"{self._folder} can be changed by others")
            _remove_if_odd(self._folder / _BYTES)
            with self._counted() as count:
                self._clear(count, limit=limit)
        except OSError as error:
            raise UserError(
                f"data.disk_cache: {folder!r} cannot be used ({error.strerror or error}); give a folder on a local disk"
            ) from error

    def get(self, name: str, *, size: int) -> bytes | None:
        """Returns the bytes cached under a name; None if the cache has no bytes of the expected size under this name."""
        try:
            handle = _opened(self._path(name), os.O_RDONLY)
        except OSError:
            return None
        try:
            if os.fstat(handle).st_size != size:
                return None
            os.utime(handle)
            with open(handle, "rb", buffering=0, closefd=False) as file:
                data = file.read(size)
        except OSError:
            return None
        finally:
            os.close(handle)
        return data if data is not None and len(data) == size else None

    def put(self, name: str, data: bytes) -> None:
        """Stores bytes under a name; does nothing if they cannot be written, for example because the disk is full."""
        path = self._path(name)
        temporary = path.with_name(f"{uuid.uuid4().hex}.tmp")
        try:
            path.parent.mkdir(mode=0o700, exist_ok=True)
            if not _is_ours(os.lstat(path.parent)):
                return
            handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
            with open(handle, "wb", buffering=0) as file:
                at = 0
                while at < len(data):
                    at += file.write(memoryview(data)[at:])
            with self._counted() as count:
                before = _size(path)
                os.replace(temporary, path)
                count.total += len(data) - before
                if count.total > self._limit:
                    self._clear(count, limit=int(self._limit * (1 - _ROOM)))
        except OSError:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)

    def drop(self, name: str) -> None:
        """Deletes the damaged bytes cached under a name.

        Errors are ignored, since a later read detects the damage again.
        """
        path = self._path(name)
        with suppress(OSError):
            if not _is_ours(os.lstat(path.parent)):
                return
            with self._counted() as count:
                before = _size(path)
                path.unlink()
                count.total -= before

    def _path(self, name: str) -> Path:
        digest = hashlib.sha256(name.encode()).hexdigest()
        return self._folder / digest[:2] / digest

    def _clear(self, count: _Count, *, limit: int) -> None:
        """Sums the sizes of all files, and deletes the least recently used files until at most `limit` bytes are left."""
        files = sorted(self._files())
        count.total = sum(file.bytes for file in files)
        for file in files:
            if count.total <= limit:
                return
            with suppress(OSError):  # a file that cannot be deleted still counts
                os.unlink(file.path)
                count.total -= file.bytes

    def _files(self) -> Iterator[_File]:
        for folder in os.scandir(self._folder):
            if not _FOLDER.fullmatch(folder.name) or not folder.is_dir(follow_symlinks=False):
                continue
            with suppress(OSError):
                for item in os.scandir(folder.path):
                    with suppress(FileNotFoundError):  # another process has deleted it
                        facts = item.stat(follow_symlinks=False)
                        if not stat.S_ISREG(facts.st_mode):
                            continue
                        if _READ.fullmatch(item.name):
                            yield _File(facts.st_mtime, facts.st_size, item.path)
                        elif _TEMPORARY.fullmatch(item.name) and time.time() - facts.st_mtime > _FORGOTTEN_S:
                            os.unlink(item.path)

    @contextmanager
    def _counted(self) -> Iterator[_Count]:
        """Locks the total size of the files against other processes, yields it, and writes the changed size back."""
        handle = _opened(self._folder / _BYTES, os.O_RDWR | os.O_CREAT)
        with open(handle, "r+b", buffering=0) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            text = file.read(_DIGITS + 1) or b""
            count = _Count(int(text) if text.isdigit() and len(text) <= _DIGITS else 0)
            if text and not count.total and text != b"0":
                count.total = sum(found.bytes for found in self._files())
            yield count
            file.seek(0)
            file.truncate(0)
            file.write(b"%d" % max(0, count.total))


class _Count:
    """Total size of the cached files, in bytes, while the file `.bytes` is locked."""

    def __init__(self, total: int) -> None:
        self.total = total


def _opened(path: Path, flags: int) -> int:
    """Opens a regular file of this user; never follows a link, and never waits, as opening a pipe would."""
    handle = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
    facts = os.fstat(handle)
    if not stat.S_ISREG(facts.st_mode) or facts.st_uid != os.geteuid():
        os.close(handle)
        raise PermissionError(f"{path} is no file of this user")
    return handle


def _is_ours(facts: os.stat_result) -> bool:
    """Returns whether a folder belongs to this user and no other user can write to the folder."""
    return stat.S_ISDIR(facts.st_mode) and facts.st_uid == os.geteuid() and not facts.st_mode & _OTHERS_MAY_WRITE


def _size(path: Path) -> int:
    """Returns the size of a regular file, in bytes; 0 if the path is no regular file."""
    try:
        facts = os.lstat(path)
    except FileNotFoundError:
        return 0
    return facts.st_size if stat.S_ISREG(facts.st_mode) else 0


def _remove_if_odd(path: Path) -> None:
    """Removes a link, a pipe, an empty folder or another user's file from the path of a file of the cache."""
    try:
        facts = os.lstat(path)
    except FileNotFoundError:
        return
    if stat.S_ISDIR(facts.st_mode):
        path.rmdir()
    elif not stat.S_ISREG(facts.st_mode) or facts.st_uid != os.geteuid():
        path.unlink()
