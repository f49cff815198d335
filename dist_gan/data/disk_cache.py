"""What was read from a store, kept on a local disk for the next pass and for the other processes of the machine.

    FOLDER/3f/3fa9...            one read, named by the hash of URL, version of the object, and range
    FOLDER/.bytes                what all of them take together; locked while it is changed

A file appears whole, by a rename, or not at all; one of the wrong size counts as absent. Whoever finds the folder over
its limit deletes what was not used for longest. A process that dies leaves at most a temporary file, which the next
clearing removes.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from dist_gan.types import UserError

_BYTES = ".bytes"
_TEMPORARY = ".tmp"
_FORGOTTEN_S = 600.0
"""Age from which a temporary file has no writer any more."""
_ROOM = 0.1
"""Share of the limit that a clearing frees, so that it is rare."""


class _File(NamedTuple):
    used: float
    bytes: int
    path: str


class DiskCache:
    """A folder of reads, at most so many bytes of them; for any number of threads and processes of one machine.

    Args:
        folder: it is made if it is not there.
        limit: bytes that the files may take.

    Raises:
        UserError: the folder cannot be made or written.
    """

    def __init__(self, folder: str, *, limit: int) -> None:
        self._folder, self._limit = Path(folder).expanduser(), limit
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with self._counted() as count:
                self._clear(count, limit=limit)
        except OSError as error:
            raise UserError(
                f"data.disk_cache: {folder!r} cannot be used ({error.strerror or error}); give a folder on a local disk"
            ) from error

    def get(self, name: str, *, size: int) -> bytes | None:
        """What was put under a name, if it is there and has the size."""
        path = self._path(name)
        try:
            data = path.read_bytes()
            os.utime(path)
        except OSError:
            return None
        return data if len(data) == size else None

    def put(self, name: str, data: bytes) -> None:
        """Keeps bytes under a name; a disk that takes nothing more is no error, only slower."""
        path = self._path(name)
        temporary = path.with_name(f"{uuid.uuid4().hex}{_TEMPORARY}")
        try:
            path.parent.mkdir(exist_ok=True)
            temporary.write_bytes(data)
            with self._counted() as count:
                before = path.stat().st_size if path.exists() else 0
                os.replace(temporary, path)
                count.total += len(data) - before
                if count.total > self._limit:
                    self._clear(count, limit=int(self._limit * (1 - _ROOM)))
        except OSError:
            temporary.unlink(missing_ok=True)

    def drop(self, name: str) -> None:
        """Forgets what turned out to be damaged; what cannot be removed is found damaged again."""
        path = self._path(name)
        with suppress(OSError), self._counted() as count:
            if path.exists():
                count.total -= path.stat().st_size
                path.unlink()

    def _path(self, name: str) -> Path:
        digest = hashlib.sha256(name.encode()).hexdigest()
        return self._folder / digest[:2] / digest

    def _clear(self, count: _Count, *, limit: int) -> None:
        """Counts what is there and deletes the least recently used beyond a limit."""
        files = sorted(self._files())
        count.total = sum(file.bytes for file in files)
        for file in files:
            if count.total <= limit:
                return
            os.unlink(file.path)
            count.total -= file.bytes

    def _files(self) -> Iterator[_File]:
        for folder in os.scandir(self._folder):
            if not folder.is_dir():
                continue
            for item in os.scandir(folder.path):
                facts = item.stat()
                if not item.name.endswith(_TEMPORARY):
                    yield _File(facts.st_mtime, facts.st_size, item.path)
                elif time.time() - facts.st_mtime > _FORGOTTEN_S:
                    os.unlink(item.path)

    @contextmanager
    def _counted(self) -> Iterator[_Count]:
        """The number of bytes in the folder, for this process alone while it is being changed."""
        with open(self._folder / _BYTES, "a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            text = file.read()
            count = _Count(int(text) if text.isdigit() else 0)
            yield count
            file.truncate(0)
            file.write(b"%d" % count.total)


class _Count:
    def __init__(self, total: int) -> None:
        self.total = total
