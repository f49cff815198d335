"""Reads pieces of shards before they are needed, in bounded memory, through a disk cache if one is set.

A piece is a run of neighbouring samples in one shard, read as one range of bytes. A store is read by a pool of
threads. For a local disk the kernel is asked to load the range into its page cache, and the piece is read when it is
needed, because reading threads would compete with the decoder: with such threads a third fewer images per second were
read at 32x32.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock
from typing import NamedTuple

from dist_gan import storage
from dist_gan.data.disk_cache import DiskCache
from dist_gan.data.manifest import Manifest, Shard
from dist_gan.storage.errors import failure
from dist_gan.types import TrainingFailed

_REMEMBERED = 4096
"""Number of most recent local pieces that the kernel is not asked again to load."""
READERS = 16
"""Number of threads per process that read from a store."""


class ShardFolder(NamedTuple):
    """URL of a folder of shards, and its manifest."""

    url: str
    manifest: Manifest


class Piece(NamedTuple):
    """Range of neighbouring samples of one shard, from `first` to `last`, both included; `folder` and `shard` are
    indices."""

    folder: int
    shard: int
    first: int
    last: int


class PieceBytes(NamedTuple):
    """Bytes of a piece, which is a range of neighbouring samples, and their position in the shard."""

    start: int
    """Position of the first byte, in bytes from the start of the shard."""
    data: bytes
    """Bytes of the piece; fewer than the manifest says only if the shard ends within the piece."""


class PieceReader:
    """Reads pieces (ranges of neighbouring samples) by several threads, and keeps them in bounded memory.

    Pieces in memory and pieces being read have at most `memory` bytes together.

    Args:
        folders: folders of shards.
        memory: limit in bytes; a single larger piece is read nevertheless.
        patience_s: seconds for which a store that does not answer is asked again; None for the default.
        cache: cache on a local disk; None for no cache.
    """

    def __init__(
        self, folders: Sequence[ShardFolder], *, memory: int, patience_s: float | None, cache: DiskCache | None
    ) -> None:
        self._folders, self._memory, self._cache = folders, memory, cache
        self._patience = storage.Patience(patience_s, met=True)
        self._held: OrderedDict[Piece, Future[PieceBytes]] = OrderedDict()
        """Pieces in memory or being read, the least recently requested first."""
        self._arrived: dict[Piece, PieceBytes] = {}
        """Pieces that are completely in memory, so that later calls of `get` need no lock."""
        self._bytes = 0
        self.most_bytes = 0
        """Largest number of bytes of pieces held at any time so far."""
        self._local = [
            [storage.local_path(storage.join(folder.url, shard.name)) for shard in folder.manifest.shards]
            if cache is None
            else [None] * len(folder.manifest.shards)
            for folder in folders
        ]
        self._announced: OrderedDict[Piece, None] = OrderedDict()
        self._lock = Lock()
        self._pool = ThreadPoolExecutor(READERS, thread_name_prefix="read")

    def request(self, pieces: Iterable[Piece]) -> None:
        """Starts reading pieces (ranges of neighbouring samples) that will be needed, as long as memory is free for
        them."""
        with self._lock:
            for piece in pieces:
                if piece in self._held:
                    self._held.move_to_end(piece)
                elif self._local[piece.folder][piece.shard] is not None:
                    self._announce(piece)
                elif self._make_room(self.size(piece)):
                    self._begin(piece)

    def get(self, piece: Piece) -> PieceBytes:
        """Returns the bytes of a piece, a range of neighbouring samples; waits until the piece has been read.

        Raises:
            TrainingFailed: the shard cannot be read, or the store does not answer.
        """
        arrived = self._arrived.get(piece)
        if arrived is not None:
            return arrived
        with self._lock:
            future = self._held.get(piece)
            is_first = future is None
            if future is None:
                self._make_room(self.size(piece))
                future = self._begin(piece)
        if is_first and self._local[piece.folder][piece.shard] is not None:
            _run(future, self._fetch, piece)
        try:
            fetched = future.result()
        except BaseException:
            with self._lock:
                if self._held.get(piece) is future:
                    self._forget(piece)
            raise
        with self._lock:
            if self._held.get(piece) is future:
                self._arrived[piece] = fetched
        return fetched

    def drop(self, piece: Piece) -> None:
        """Removes a piece (a range of neighbouring samples) from memory and from the disk cache.

        The next request for the piece reads it from the store.
        """
        if self._cache is not None:
            self._cache.drop(self._name(piece))
        with self._lock:
            if piece in self._held:
                self._forget(piece)

    def fetch_again(self, piece: Piece) -> PieceBytes:
        """Reads a piece, a range of neighbouring samples, from the store even if its bytes are cached.

        Raises:
            TrainingFailed: the shard cannot be read, or the store does not answer.
        """
        self.drop(piece)
        return self._fetch(piece, anew=True)

    def size(self, piece: Piece) -> int:
        """Returns the size in bytes of a piece, which is a range of neighbouring samples."""
        shard = self._shard(piece)
        return shard.offsets[piece.last] + shard.sizes[piece.last] - shard.offsets[piece.first]

    @property
    def retries(self) -> int:
        """Number of requests to the store that had to be repeated."""
        return self._patience.retries

    def stop_retrying(self) -> None:
        """Stops the repetition of failed requests, so that threads that wait for a piece end soon."""
        self._patience.stop_retrying()

    def close(self) -> None:
        """Ends the reading threads, after the requests that they are making."""
        self.stop_retrying()
        self._pool.shutdown(cancel_futures=True)
        self._held.clear()
        self._arrived.clear()
        self._bytes = 0

    def _announce(self, piece: Piece) -> None:
        path = self._local[piece.folder][piece.shard]
        if path is None or piece in self._announced:
            return
        self._announced[piece] = None
        if len(self._announced) > _REMEMBERED:
            self._announced.popitem(last=False)
        start = self._shard(piece).offsets[piece.first]
        storage.will_read(path, start, start + self.size(piece))

    def _begin(self, piece: Piece) -> Future[PieceBytes]:
        """Starts reading a piece (range of samples) in the pool of threads.

        A piece on a local disk is read by the first thread that calls `get`.
        """
        is_local = self._local[piece.folder][piece.shard] is not None
        future: Future[PieceBytes] = Future() if is_local else self._pool.submit(self._fetch, piece)
        self._held[piece] = future
        self._bytes += self.size(piece)
        self.most_bytes = max(self.most_bytes, self._bytes)
        return future

    def _forget(self, piece: Piece) -> None:
        self._bytes -= self.size(piece)
        del self._held[piece]
        self._arrived.pop(piece, None)

    def _make_room(self, size: int) -> bool:
        """Frees memory until `size` bytes are free; returns whether that was possible.

        The pieces (ranges of samples) in memory that were requested least recently are dropped first.
        """
        while self._bytes + size > self._memory:
            # The first piece has nearly always arrived. Scanning all pieces took an eighth of the time of a small image.
            unused = next((piece for piece, future in self._held.items() if future.done()), None)
            if unused is None:
                return False
            self._forget(unused)
        return True

    def _fetch(self, piece: Piece, *, anew: bool = False) -> PieceBytes:
        shard, size = self._shard(piece), self.size(piece)
        start = shard.offsets[piece.first]
        data = self._cache.get(self._name(piece), size=size) if self._cache is not None and not anew else None
        if data is None:
            url = storage.join(self._folders[piece.folder].url, shard.name)
            data = self._read(url, start, start + size)
            if self._cache is not None and len(data) == size:
                self._cache.put(self._name(piece), data)
        return PieceBytes(start, data)

    def _read(self, url: str, start: int, end: int) -> bytes:
        place = f"cannot read {storage.redact(url)}"
        try:
            return storage.read_range(url, start, end, patience=self._patience)
        except OSError as error:
            if storage.local_path(url) is not None:
                raise TrainingFailed(f"{place}: {storage.why(error, reading=True)}") from error
            found: Exception = error
        except Exception as error:
            found = error
        # Data were read with the same settings before, so the settings are not the cause.
        later = "data.patience_s says how long it is asked again"
        raise TrainingFailed(*failure(found, place, later=later).args) from found

    def _shard(self, piece: Piece) -> Shard:
        return self._folders[piece.folder].manifest.shards[piece.shard]

    def _name(self, piece: Piece) -> str:
        """Returns the name of a piece (range of samples) in the disk cache.

        The name holds the hash of the shard, so that a changed shard has other names.
        """
        shard = self._shard(piece)
        url = storage.join(self._folders[piece.folder].url, shard.name)
        start = shard.offsets[piece.first]
        return f"{url}\n{shard.sha256}\n{start}\n{self.size(piece)}"


def _run(future: Future[PieceBytes], fetch: Callable[[Piece], PieceBytes], piece: Piece) -> None:
    """Fetches a piece (range of samples) in the calling thread, and sets a future's result; other threads may wait for
    it."""
    try:
        future.set_result(fetch(piece))
    except BaseException as error:
        future.set_exception(error)
