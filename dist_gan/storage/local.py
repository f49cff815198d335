"""Files on local disks: atomic writes that survive a power cut, and descriptions of failed operations."""

from __future__ import annotations

import errno
import os
import uuid
from io import FileIO
from pathlib import Path

_WRITTEN_AT_ONCE = 2**25
"""Largest number of bytes of a local file that are in the page cache while the file is being written."""


def publish(path: Path, data: bytes | memoryview) -> None:
    """Writes a file under a temporary name, and renames the file once it is on the disk. Raises OSError."""
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
    """Writes data to a file in parts, and removes each part from the page cache once it is on the disk.

    The data are not read again soon, and would push images out of the page cache. Writing in parts is also faster, since
    the system need not find unused memory for the whole of a large file.
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
    """Flushes a local folder to the disk, so that renames in the folder survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def why(error: OSError, *, reading: bool = False) -> str:
    """Returns a plain description of a failed file operation, with a remedy if there is one.

    Args:
        error: the failure.
        reading: True if the operation read a file, False if it wrote one.
    """
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
    """Asks the kernel to read bytes [start, end) of a local file ahead of their use; errors are ignored."""
    if not hasattr(os, "posix_fadvise"):
        return
    try:
        with open(path, "rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), start, end - start, os.POSIX_FADV_WILLNEED)
    except OSError:
        return  # the later read of the same bytes reports the error
