"""Destinations of a pack: a local folder, or a folder in an object store. A file appears there complete or not at all."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from dist_gan import storage
from dist_gan.packing import fetching
from dist_gan.packing.image_source import ImageSource
from dist_gan.storage.folder import StoreFolder
from dist_gan.types import TrainingFailed, UserError

OWNER = ".pack-owner"
"""Name of the file with the token of the latest pack in a folder of a store, which has no locks; other packs stop."""


class Destination(Protocol):
    """The folder that a pack writes to. It is sent to worker processes by pickle, since every worker writes its own shards."""

    url: str

    def names(self) -> dict[str, int | None]:
        """Size, in bytes, of each file in the folder by its name, None for a folder in it; empty if the folder is absent.

        Raises:
            UserError: access is refused.
            TrainingFailed: the store does not answer.
        """
        ...

    def create(self) -> None:
        """Creates the folder unless it exists. Raises UserError if it cannot be created."""
        ...

    def claim(self, is_stray: Callable[[str], bool]) -> AbstractContextManager[None]:
        """Context of a pack: keeps other packs out of the folder, and removes the temporary files of a killed pack.

        Args:
            is_stray: tells whether a file name is that of a temporary file.

        Raises:
            UserError: another pack is at work in the folder.
        """
        ...

    def check_claim(self) -> None:
        """Raises TrainingFailed if another pack has claimed the folder since."""
        ...

    def describe_file(self, name: str) -> str:
        """Path or URL of a file that is being written, for error messages."""
        ...

    def new_file(self, name: str) -> AbstractContextManager[Path]:
        """Context with the path of a new empty file, to be published as `name`; the file is deleted at the end."""
        ...

    def publish(self, file: Path, name: str) -> None:
        """Makes a complete file appear in the folder under its name.

        Raises:
            OSError: the disk does not take the file.
            UserError: the store refuses access.
            TrainingFailed: the store does not answer.
        """
        ...

    def read_each(self, sizes: dict[str, int]) -> Iterator[tuple[str, bytes | None]]:
        """Name and bytes of each of some small files, given with their sizes; None as bytes of an absent file.

        Raises:
            TrainingFailed: the store does not answer.
        """
        ...

    def remove(self, names: Iterable[str]) -> None:
        """Deletes files; names of absent files are ignored."""
        ...


def open_destination(dest: str, source: ImageSource) -> Destination:
    """The destination at a path or URL; nothing is created, and no store is contacted.

    Raises:
        UserError: the destination cannot be written to, or lies inside the source.
    """
    storage.check_url(dest, place="destination")
    if storage.scheme_of(dest) in ("http", "https"):
        raise UserError(f"destination {dest}: an HTTP server takes no files; give a local folder or a bucket")
    folder = storage.local_path(dest)
    if folder is None:
        inside = storage.is_inside(dest, source.place)
    else:
        above = Path(source.place)
        inside = above.is_dir() and folder.resolve().is_relative_to(above.resolve())
    if inside:
        raise UserError(f"destination {dest}: lies inside the source {source.place}; give a folder outside of it")
    return StoreDestination(dest) if folder is None else LocalDestination(folder)


class LocalDestination:
    """A folder in the file system of this machine."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.url = str(folder)

    def names(self) -> dict[str, int | None]:
        """Size of each file in the folder by its name; None for a folder in it."""
        try:
            with os.scandir(self._folder) as found:
                return {item.name: None if item.is_dir() else _size_of(item) for item in found}
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise UserError(
                f"destination {self.url}: cannot be used: {storage.why(error)}; give another folder"
            ) from error

    def create(self) -> None:
        """Creates the folder and its parents. Raises UserError if that fails."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"destination {self.url}: cannot be made: {storage.why(error)}; give another folder"
            ) from error

    @contextlib.contextmanager
    def claim(self, is_stray: Callable[[str], bool]) -> Iterator[None]:
        """Locks the folder by `flock`; the system releases the lock when the process ends, even if it is killed."""
        handle = os.open(self._folder, os.O_RDONLY)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                # Other errors mean that the file system has no locks; packing is allowed there too.
                if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                    raise UserError(f"destination {self.url}: another pack is at work there; wait for it") from error
            self.remove(filter(is_stray, os.listdir(self._folder)))
            try:
                yield
            finally:
                self.remove(filter(is_stray, os.listdir(self._folder)))
        finally:
            os.close(handle)

    def check_claim(self) -> None:
        """Does nothing: the lock that `claim` holds keeps other packs out."""

    def describe_file(self, name: str) -> str:
        """Path of a file in the folder, for error messages."""
        return str(self._folder / name)

    @contextlib.contextmanager
    def new_file(self, name: str) -> Iterator[Path]:
        """Context with the path of a hidden temporary file in the same folder, so that `publish` can rename it."""
        path = self._folder / f".{name}.{uuid.uuid4().hex[:8]}.tmp"
        try:
            yield path
        finally:
            path.unlink(missing_ok=True)

    def publish(self, file: Path, name: str) -> None:
        """Writes the file through to the disk and renames it, so that it appears complete."""
        with open(file, "rb") as written:
            os.fsync(written.fileno())
        os.replace(file, self._folder / name)
        storage.sync_folder(self._folder)

    def read_each(self, sizes: dict[str, int]) -> Iterator[tuple[str, bytes | None]]:
        """Name and bytes of each file; None as bytes of a file that cannot be read."""
        for name in sizes:
            try:
                yield name, (self._folder / name).read_bytes()
            except OSError:
                yield name, None

    def remove(self, names: Iterable[str]) -> None:
        """Deletes files; those on a disk that has become read-only stay."""
        for name in names:
            try:
                (self._folder / name).unlink(missing_ok=True)
            except OSError as error:
                if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
                    raise


class StoreDestination:
    """A folder in an object store.

    A shard is written to an anonymous local file, which the system deletes when the process ends, and is uploaded from
    there. There is no lock: of two packs in one folder the later one goes on, and the earlier one stops before its next
    shard. If both upload the same shard, the bytes are the same.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self._store: StoreFolder | None = None
        self._token = uuid.uuid4().hex.encode("ascii")

    def names(self) -> dict[str, int | None]:
        """Size of each object below the URL by its name; None for a folder in it."""
        return self._connected().names()

    def create(self) -> None:
        """Does nothing, because object stores have no folders."""

    @contextlib.contextmanager
    def claim(self, is_stray: Callable[[str], bool]) -> Iterator[None]:
        """Writes this pack's token into `.pack-owner`; an earlier pack finds it by `check_claim` and stops."""
        storage.publish(storage.join(self.url, OWNER), self._token)
        yield

    def check_claim(self) -> None:
        """Compares `.pack-owner` with this pack's token. Raises TrainingFailed if another pack has replaced it."""
        try:
            ours = self._connected().read(OWNER, size=len(self._token)) == self._token
        except FileNotFoundError:
            ours = False
        if not ours:
            raise TrainingFailed(
                f"destination {self.url}: another pack has begun there, and this one stops; wait for the other"
            )

    def describe_file(self, name: str) -> str:
        """URL of a file and the local folder that it is sent from, for error messages."""
        return f"{storage.join(self.url, name)} by way of {tempfile.gettempdir()} (TMPDIR says where)"

    @contextlib.contextmanager
    def new_file(self, name: str) -> Iterator[Path]:
        """Context with the path of a temporary file in `TMPDIR`; on Linux it is anonymous, so that a kill leaves nothing."""
        own_files = Path("/proc/self/fd")
        if own_files.is_dir():
            with tempfile.TemporaryFile() as nameless:
                yield own_files / str(nameless.fileno())
        else:
            with tempfile.NamedTemporaryFile(prefix="dist-gan-pack-") as named:
                yield Path(named.name)

    def publish(self, file: Path, name: str) -> None:
        """Uploads the file, and compares its size in the store with that on the disk."""
        self._connected().upload(file, name)

    def read_each(self, sizes: dict[str, int]) -> Iterator[tuple[str, bytes | None]]:
        """Name and bytes of each object, read with several requests at a time; None as bytes of an absent one."""
        store = self._connected()

        def read(name: str) -> bytes:
            return store.read(name, size=sizes[name])

        asked = fetching.prefetch(read, sizes, size=sizes.__getitem__, num_threads=fetching.MAX_REQUESTS)
        with contextlib.closing(asked):
            for name, get in asked:
                try:
                    yield name, get()
                except FileNotFoundError:
                    yield name, None

    def remove(self, names: Iterable[str]) -> None:
        """Deletes objects with several requests at a time."""
        asked = fetching.prefetch(self._connected().remove, names, size=lambda _: 0, num_threads=fetching.MAX_REQUESTS)
        with contextlib.closing(asked):
            for _, get in asked:
                get()

    def _connected(self) -> StoreFolder:
        if self._store is None:
            self._store = StoreFolder(self.url)
        return self._store

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_store": None}


def _size_of(item: os.DirEntry[str]) -> int:
    try:
        return item.stat().st_size
    except FileNotFoundError:
        return 0
