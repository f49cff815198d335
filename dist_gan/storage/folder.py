"""A folder in an object store, for whoever reads or writes many files of it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from dist_gan import storage
from dist_gan.storage.errors import failure
from dist_gan.types import TrainingFailed

Result = TypeVar("Result")
PART_BYTES = 2**24
_UPLOAD_OPTIONS: dict[str, dict[str, int]] = {"s3": {"chunksize": PART_BYTES, "max_concurrency": 2}}
"""s3fs would hold up to ten parts of 50 MiB of a file that it uploads."""
_VERSIONS = ("ETag", "etag", "md5Hash", "generation", "blob_id", "oid")
"""Under what names listings tell what changes with a file's content."""
_TRIES = 3


class FoundFile(NamedTuple):
    """A file of a listing."""

    name: str
    """Inside the folder, with `/`."""
    size: int
    """Bytes."""
    version: str
    """Changes with the content, where the store knows such a thing; else empty."""


class StoreFolder:
    """A folder in a store that is not this machine's disk, for any number of threads: they share one client.

    Every request is made with patience. What then still fails is one sentence: TrainingFailed where the store does not
    answer, UserError where it refuses access.

    Args:
        url: of the folder; it need not be there.
    """

    def __init__(self, url: str) -> None:
        assert storage.local_path(url) is None
        self.url = url
        self._filesystem, path = storage.connect(url)
        self._path = path.rstrip("/")
        self._patience = storage.Patience(storage.PATIENCE_S)

    def files(self) -> list[FoundFile]:
        """All files at any depth, sorted, by one listing where the store can; an absent folder is empty.

        The objects without bytes that stand for folders are no files.
        """
        found = self._listed(lambda: self._filesystem.find(self._path, detail=True).values())
        files = (FoundFile(self._inside(info), int(info["size"] or 0), _version(info)) for info in found)
        return sorted(file for file in files if file.name and not file.name.endswith("/"))

    def names(self) -> dict[str, int | None]:
        """Direct entries of the folder: size of a file in bytes, None for a folder; an absent folder is empty."""
        found = self._listed(lambda: self._filesystem.ls(self._path, detail=True))
        names = {
            self._inside(info).rstrip("/"): None if info["type"] == "directory" else int(info["size"] or 0)
            for info in found
        }
        return {name: size for name, size in names.items() if name}

    def read(self, name: str, *, size: int, limit: int | None = None) -> bytes:
        """All bytes of a file whose size a listing gave, or the first `limit`, by one request.

        Raises:
            FileNotFoundError: it is not there.
            TrainingFailed: the store does not answer, or the file has another size by now.
            UserError: access is refused.
        """
        wanted = size if limit is None else min(size, limit)
        if not wanted:
            return b""
        path = f"{self._path}/{name}"
        # One byte more than there should be shows that the file has grown.
        end = wanted + 1 if wanted == size else wanted
        for _ in range(_TRIES):
            data = self._asked("read", name, lambda: bytes(self._filesystem.cat_file(path, start=0, end=end)))
            if len(data) == wanted:
                return data
        raise TrainingFailed(
            f"cannot read {storage.join(self.url, name)}: {size:,} bytes were listed, and it has "
            f"{'more' if len(data) > wanted else f'{len(data):,}'} now; it was changed in the meantime"
        )

    def upload(self, file: Path, name: str) -> None:
        """Copies a local file into the folder; it is seen there when it is whole, and its size is read back.

        Raises:
            TrainingFailed: the store does not answer or does not take it.
            UserError: access is refused.
        """
        path, expected = f"{self._path}/{name}", os.path.getsize(file)
        options = _UPLOAD_OPTIONS.get(storage.scheme_of(self.url), {})
        self._asked("write", name, lambda: self._filesystem.put_file(str(file), path, **options))
        self._filesystem.invalidate_cache()
        written = self._asked("write", name, lambda: int(self._filesystem.size(path)))
        if written != expected:
            self.remove(name)
            raise TrainingFailed(f"cannot write {storage.join(self.url, name)}: {written} of {expected} bytes arrived")

    def remove(self, name: str) -> None:
        """Removes a file; one that is not there is no error."""

        def gone() -> None:
            try:
                self._filesystem.rm_file(f"{self._path}/{name}")
            except FileNotFoundError:
                return

        self._asked("remove", name, gone)

    def _inside(self, info: dict[str, Any]) -> str:
        name, above = str(info["name"]).lstrip("/"), self._path.lstrip("/")
        if not name.startswith(above):
            raise TrainingFailed(f"cannot list {self.url}: the store gave {name!r}, which does not lie in it")
        return name[len(above) :].removeprefix("/")

    def _listed(self, operation: Callable[[], Iterable[dict[str, Any]]]) -> list[dict[str, Any]]:
        def listed() -> list[dict[str, Any]]:
            self._filesystem.invalidate_cache()
            try:
                return list(operation())
            except (FileNotFoundError, NotADirectoryError):
                return []
            finally:
                # fsspec keeps what it has listed, which for a million files is a gigabyte.
                self._filesystem.invalidate_cache()

        return self._asked("list", "", listed)

    def _asked(self, doing: str, name: str, operation: Callable[[], Result]) -> Result:
        url = storage.join(self.url, name) if name else self.url
        try:
            return storage.asked(url, doing, operation, self._patience)
        except FileNotFoundError as error:
            if doing == "read":
                raise
            raise failure(error, f"cannot {doing} {url}") from error


def is_inside(url: str, folder: str) -> bool:
    """True if a URL of a store is that of a folder there or lies below it."""
    if storage.local_path(url) is not None or storage.local_path(folder) is not None:
        return False
    (filesystem, path), (other, above) = storage.connect(url), storage.connect(folder)
    path, above = path.strip("/"), above.strip("/")
    return type(filesystem) is type(other) and (path == above or path.startswith(f"{above}/") or not above)


def _version(info: dict[str, Any]) -> str:
    return next((str(info[name]) for name in _VERSIONS if info.get(name)), "")
