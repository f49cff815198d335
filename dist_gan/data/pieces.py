"""Reads pieces of shards ahead of need, in bounded memory, through a disk cache if there is one.

A piece is a run of neighbouring samples in one shard, fetched by one range of bytes that the manifest gives. From a
store it is fetched by threads of ours. On a local disk the kernel is told of it instead, and it is read when it is
needed: threads that read small files stand in the decoder's way (a third of the images a second at 32x32, measured).
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
"""Pieces that the kernel was told of and is not told of again."""
READERS = 16
"""Threads of a process that wait for a store."""


class Source(NamedTuple):
    """A folder of shards."""

    url: str
    manifest: Manifest


class Piece(NamedTuple):
    """Samples of one shard, from the first to the last."""

    source: int
    shard: int
    first: int
    last: int


class Fetched(NamedTuple):
    """The bytes of a piece."""

    start: int
    """Position of the first byte in the shard."""
    data: bytes
    """Shorter than asked for only where the shard really ends before."""


class PieceReader:
    """Pieces by several threads; what is held at a time, and what is on its way, is at most `memory` bytes.

    Args:
        sources: folders of shards.
        memory: bytes of pieces to hold; a single larger piece is read all the same.
        patience_s: seconds that a store may stay silent.
        cache: on a local disk.
    """

    def __init__(
        self, sources: Sequence[Source], *, memory: int, patience_s: float | None, cache: DiskCache | None
    ) -> None:
        self._sources, self._memory, self._cache = sources, memory, cache
        self._patience = storage.Patience(patience_s, met=True)
        self._held: OrderedDict[Piece, Future[Fetched]] = OrderedDict()
        """Least recently wanted first."""
        self._arrived: dict[Piece, Fetched] = {}
        """Held pieces that have been waited for already."""
        self._bytes = 0
        self.most_bytes = 0
        """The most that was held so far."""
        self._local = [
            [storage.local_path(storage.join(source.url, shard.name)) for shard in source.manifest.shards]
            if cache is None
            else [None] * len(source.manifest.shards)
            for source in sources
        ]
        self._announced: OrderedDict[Piece, None] = OrderedDict()
        self._lock = Lock()
        self._pool = ThreadPoolExecutor(READERS, thread_name_prefix="read")

    def want(self, pieces: Iterable[Piece]) -> None:
        """Begins to fetch what will be needed, as far as there is room."""
        with self._lock:
            for piece in pieces:
                if piece in self._held:
                    self._held.move_to_end(piece)
                elif self._local[piece.source][piece.shard] is not None:
                    self._announce(piece)
                elif self._make_room(self.size(piece)):
                    self._begin(piece)

    def get(self, piece: Piece) -> Fetched:
        """The bytes of a piece, waited for.

        Raises:
            TrainingFailed: the store does not give them.
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
        if is_first and self._local[piece.source][piece.shard] is not None:
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
        """Forgets a piece, in memory and on the disk: it is read anew when it is needed again."""
        if self._cache is not None:
            self._cache.drop(self._name(piece))
        with self._lock:
            if piece in self._held:
                self._forget(piece)

    def fresh(self, piece: Piece) -> Fetched:
        """The bytes of a piece as they are in the store now.

        Raises:
            TrainingFailed: the store does not give them.
        """
        self.drop(piece)
        return self._fetch(piece, anew=True)

    def size(self, piece: Piece) -> int:
        """Bytes of a piece."""
        shard = self._shard(piece)
        return shard.offsets[piece.last] + shard.sizes[piece.last] - shard.offsets[piece.first]

    @property
    def retries(self) -> int:
        """Requests that had to be made again."""
        return self._patience.retries

    def give_up(self) -> None:
        """Makes no failed request again, so that nobody who waits for one waits for long."""
        self._patience.give_up()

    def close(self) -> None:
        """Ends the threads; a request that is being answered is waited for."""
        self.give_up()
        self._pool.shutdown(cancel_futures=True)
        self._held.clear()
        self._arrived.clear()
        self._bytes = 0

    def _announce(self, piece: Piece) -> None:
        path = self._local[piece.source][piece.shard]
        if path is None or piece in self._announced:
            return
        self._announced[piece] = None
        if len(self._announced) > _REMEMBERED:
            self._announced.popitem(last=False)
        start = self._shard(piece).offsets[piece.first]
        storage.will_read(path, start, start + self.size(piece))

    def _begin(self, piece: Piece) -> Future[Fetched]:
        """Hands a piece to the threads; a local one is left to whoever waits for it."""
        is_local = self._local[piece.source][piece.shard] is not None
        future: Future[Fetched] = Future() if is_local else self._pool.submit(self._fetch, piece)
        self._held[piece] = future
        self._bytes += self.size(piece)
        self.most_bytes = max(self.most_bytes, self._bytes)
        return future

    def _forget(self, piece: Piece) -> None:
        self._bytes -= self.size(piece)
        del self._held[piece]
        self._arrived.pop(piece, None)

    def _make_room(self, size: int) -> bool:
        """Lets go of what was not used for longest and has arrived; whether there is room then."""
        while self._bytes + size > self._memory:
            # Nearly always the first one; to ask all of them took an eighth of the time to read a small image.
            unused = next((piece for piece, future in self._held.items() if future.done()), None)
            if unused is None:
                return False
            self._forget(unused)
        return True

    def _fetch(self, piece: Piece, *, anew: bool = False) -> Fetched:
        shard, size = self._shard(piece), self.size(piece)
        start = shard.offsets[piece.first]
        data = self._cache.get(self._name(piece), size=size) if self._cache is not None and not anew else None
        if data is None:
            url = storage.join(self._sources[piece.source].url, shard.name)
            data = self._read(url, start, start + size)
            if self._cache is not None and len(data) == size:
                self._cache.put(self._name(piece), data)
        return Fetched(start, data)

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
        # Data were read with the same settings before, so this failure is no mistake in the settings.
        later = "data.patience_s says how long it is asked again"
        raise TrainingFailed(*failure(found, place, later=later).args) from found

    def _shard(self, piece: Piece) -> Shard:
        return self._sources[piece.source].manifest.shards[piece.shard]

    def _name(self, piece: Piece) -> str:
        """Cache name of a piece; the hash of the whole shard stands for the version of the object."""
        shard = self._shard(piece)
        url = storage.join(self._sources[piece.source].url, shard.name)
        start = shard.offsets[piece.first]
        return f"{url}\n{shard.sha256}\n{start}\n{self.size(piece)}"


def _run(future: Future[Fetched], fetch: Callable[[Piece], Fetched], piece: Piece) -> None:
    """Keeps a promise in the thread that is at it; others may be waiting for it too."""
    try:
        future.set_result(fetch(piece))
    except BaseException as error:
        future.set_exception(error)
