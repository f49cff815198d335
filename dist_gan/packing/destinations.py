"""Where shards go: a folder on a disk, or one in an object store. Both give files that are whole or not there."""

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
"""In a store, which has no locks: which pack has begun last. All others stop."""


class Destination(Protocol):
    """The folder of a pack; small to pickle, for every worker writes its own shards."""

    url: str

    def names(self) -> dict[str, int | None]:
        """Bytes of each file there, None for folders; empty if it is not there. Raises: UserError, TrainingFailed."""
        ...

    def create(self) -> None:
        """Makes the folder. Raises: UserError."""
        ...

    def claim(self, is_stray: Callable[[str], bool]) -> AbstractContextManager[None]:
        """Keeps other packs out, and removes what a kill has left half. Raises: UserError."""
        ...

    def check_claim(self) -> None:
        """Raises: TrainingFailed: another pack has begun here in spite of `claim`."""
        ...

    def describe_file(self, name: str) -> str:
        """A file that is written, for messages."""
        ...

    def new_file(self, name: str) -> AbstractContextManager[Path]:
        """An empty file for what will have the name; it is gone at the end, `publish` or not."""
        ...

    def publish(self, file: Path, name: str) -> None:
        """Makes a new file appear under its name, whole. Raises: OSError, UserError, TrainingFailed."""
        ...

    def read_each(self, sizes: dict[str, int]) -> Iterator[tuple[str, bytes | None]]:
        """Bytes of some small files by name; None for one that is not there. Raises: TrainingFailed."""
        ...

    def remove(self, names: Iterable[str]) -> None:
        """Removes files that may be there or not."""
        ...


def open_destination(dest: str, source: ImageSource) -> Destination:
    """The destination at a path or URL; nothing is made or asked yet.

    Raises:
        UserError: nothing can be written there, or it lies in the source.
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
    """A folder on a disk of this machine."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.url = str(folder)

    def names(self) -> dict[str, int | None]:
        """As the protocol says."""
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
        """As the protocol says."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"destination {self.url}: cannot be made: {storage.why(error)}; give another folder"
            ) from error

    @contextlib.contextmanager
    def claim(self, is_stray: Callable[[str], bool]) -> Iterator[None]:
        """As the protocol says; the lock goes with the process."""
        handle = os.open(self._folder, os.O_RDONLY)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                # A file system without locks is no reason not to pack.
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
        """As the protocol says; the lock sees to it."""

    def describe_file(self, name: str) -> str:
        """As the protocol says."""
        return str(self._folder / name)

    @contextlib.contextmanager
    def new_file(self, name: str) -> Iterator[Path]:
        """As the protocol says: beside the others, under a hidden name."""
        path = self._folder / f".{name}.{uuid.uuid4().hex[:8]}.tmp"
        try:
            yield path
        finally:
            path.unlink(missing_ok=True)

    def publish(self, file: Path, name: str) -> None:
        """As the protocol says: by a rename."""
        with open(file, "rb") as written:
            os.fsync(written.fileno())
        os.replace(file, self._folder / name)
        storage.sync_folder(self._folder)

    def read_each(self, sizes: dict[str, int]) -> Iterator[tuple[str, bytes | None]]:
        """As the protocol says."""
        for name in sizes:
            try:
                yield name, (self._folder / name).read_bytes()
            except OSError:
                yield name, None

    def remove(self, names: Iterable[str]) -> None:
        """As the protocol says; a disk that is read-only by now keeps them."""
        for name in names:
            try:
                (self._folder / name).unlink(missing_ok=True)
            except OSError as error:
                if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
                    raise


class StoreDestination:
    """A folder in an object store.

    A shard is written to a local file without a name, which goes with the process even if that is killed, and sent from
    there. There is no lock: of two packs in one folder the later one goes on, the earlier one stops before its next
    shard. Should both send the same shard, they send the same bytes.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self._store: StoreFolder | None = None
        self._token = uuid.uuid4().hex.encode("ascii")

    def names(self) -> dict[str, int | None]:
        """As the protocol says."""
        return self._connected().names()

    def create(self) -> None:
        """As the protocol says: object stores have no folders."""

    @contextlib.contextmanager
    def claim(self, is_stray: Callable[[str], bool]) -> Iterator[None]:
        """As the protocol says: leaves the sign that this pack has begun."""
        storage.publish(storage.join(self.url, OWNER), self._token)
        yield

    def check_claim(self) -> None:
        """As the protocol says."""
        try:
            ours = self._connected().read(OWNER, size=len(self._token)) == self._token
        except FileNotFoundError:
            ours = False
        if not ours:
            raise TrainingFailed(
                f"destination {self.url}: another pack has begun there, and this one stops; wait for the other"
            )

    def describe_file(self, name: str) -> str:
        """As the protocol says."""
        return f"{storage.join(self.url, name)} by way of {tempfile.gettempdir()} (TMPDIR says where)"

    @contextlib.contextmanager
    def new_file(self, name: str) -> Iterator[Path]:
        """As the protocol says: where `TMPDIR` says, without a name where the system has such files."""
        own_files = Path("/proc/self/fd")
        if own_files.is_dir():
            with tempfile.TemporaryFile() as nameless:
                yield own_files / str(nameless.fileno())
        else:
            with tempfile.NamedTemporaryFile(prefix="dist-gan-pack-") as named:
                yield Path(named.name)

    def publish(self, file: Path, name: str) -> None:
        """As the protocol says: sent, and its size read back."""
        self._connected().upload(file, name)

    def read_each(self, sizes: dict[str, int]) -> Iterator[tuple[str, bytes | None]]:
        """As the protocol says, several at once."""
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
        """As the protocol says, several at once."""
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
