"""Files on local disks: atomic writes that survive a power cut, and the reason of a failure in words."""

from __future__ import annotations

import errno
import os
import uuid
from io import FileIO
from pathlib import Path

_WRITTEN_AT_ONCE = 2**25
"""Bytes of a local file that are in the page cache at a time while it is being written."""


def publish(path: Path, data: bytes | memoryview) -> None:
    """Writes a file under a temporary name, and renames it once it is on the disk. Raises OSError."""
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


def will_read(path: Path, start: int, end: int) -> None:
    """Tells the kernel which bytes of a local file are going to be read, so that they are there by then."""
    if not hasattr(os, "posix_fadvise"):
        return
    try:
        with open(path, "rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), start, end - start, os.POSIX_FADV_WILLNEED)
    except OSError:
        return  # whoever reads them will say what is wrong
