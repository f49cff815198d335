"""Pieces of shards: which bytes, how often they are asked for, what is held, and what a disk cache may answer with."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dist_gan.data.disk_cache import DiskCache
from dist_gan.data.manifest import Manifest, Shard
from dist_gan.data.pieces import Piece, PieceBytes, PieceReader, ShardFolder
from dist_gan.types import TrainingFailed
from tests.services.own_store import Store, own_clock, own_store

SIZES = (30, 10, 20, 40, 10, 25)
OFFSETS = (512, 600, 700, 800, 900, 1000)
"""Six images of a shard of 1,100 bytes."""


def content(seed: int) -> bytes:
    return bytes((seed + byte * 7) % 251 for byte in range(1100))


def source_of(*seeds: int, url: str = "gs://b/set", sha256: str = "0" * 64) -> ShardFolder:
    shards = tuple(
        Shard(
            name=f"{seed}.tar", bytes=1100, sha256=sha256, keys=tuple(f"{seed}/{row}" for row in range(6)),
            offsets=OFFSETS, sizes=SIZES, extensions=("png",) * 6, labels=None,
        )
        for seed in seeds
    )  # fmt: skip
    return ShardFolder(url, Manifest(resolution=16, channels=3, classes=None, shards=shards, origin="by hand"))


@pytest.fixture
def store() -> Iterator[Store]:
    with own_store() as found:
        for seed in range(3):
            found.objects[f"b/set/{seed}.tar"] = content(seed)
        yield found


@pytest.fixture
def readers() -> Iterator[list[PieceReader]]:
    """Whoever is put in is closed at the end."""
    made: list[PieceReader] = []
    yield made
    for reader in made:
        reader.close()


def reader_of(
    readers: list[PieceReader], *sources: ShardFolder, memory: int = 10**6, cache: DiskCache | None = None,
    patience_s: float | None = 2.0,
) -> PieceReader:  # fmt: skip
    readers.append(PieceReader(sources, memory=memory, patience_s=patience_s, cache=cache))
    return readers[-1]


@pytest.mark.parametrize(("first", "last"), [(0, 0), (0, 5), (1, 3), (4, 5), (5, 5)])
@pytest.mark.parametrize("local", [False, True])
def test_a_piece_is_the_bytes_from_its_first_image_to_the_end_of_its_last(
    store: Store, readers: list[PieceReader], tmp_path: Path, first: int, last: int, local: bool
) -> None:
    start, end = OFFSETS[first], OFFSETS[last] + SIZES[last]
    (tmp_path / "2.tar").write_bytes(content(2))
    sources = (source_of(0, 1), source_of(2, url=str(tmp_path) if local else "gs://b/set"))
    reader = reader_of(readers, *sources)
    piece = Piece(1, 0, first, last)
    assert reader.size(piece) == end - start
    reader.request([piece])
    assert reader.get(piece) == PieceBytes(start, content(2)[start:end])
    assert reader.get(piece) == reader.fetch_again(piece)
    assert store.reads() == ([] if local else [("b/set/2.tar", start, end)] * 2), (
        "once, and once more for `fetch_again`"
    )


def test_what_was_wanted_least_recently_goes_first_and_no_more_is_held_than_was_said(
    store: Store, readers: list[PieceReader]
) -> None:
    reader = reader_of(readers, source_of(0), memory=60)
    a, b, c = Piece(0, 0, 0, 0), Piece(0, 0, 1, 1), Piece(0, 0, 2, 2)  # 30, 10 and 20 bytes
    for piece in (a, b, c):
        reader.request([piece])
        reader.get(piece)
    assert reader.most_bytes == 60
    reader.request([a])
    later = Piece(0, 0, 4, 4)  # 10 bytes: b has to go
    reader.request([later])
    reader.get(later)
    assert reader.most_bytes == 60
    asked = len(store.reads())
    for piece in (a, c, later):
        reader.get(piece)
    assert len(store.reads()) == asked
    reader.get(b)
    assert len(store.reads()) == asked + 1
    wide = Piece(0, 0, 0, 5)
    assert len(reader.get(wide).data) == 513, "a single larger piece is read all the same"


def test_what_is_on_its_way_counts_as_held(store: Store, readers: list[PieceReader]) -> None:
    go = threading.Event()

    def wait(path: str, start: int, end: int, data: bytes) -> bytes:
        go.wait(10)
        return data

    store.on_read = wait
    reader = reader_of(readers, source_of(0, 1), memory=100)
    reader.request([Piece(0, shard, row, row) for shard in range(2) for row in range(6)])
    assert reader.most_bytes <= 100
    go.set()
    for shard in range(2):
        for row in range(6):
            got = reader.get(Piece(0, shard, row, row))
            assert got.data == content(shard)[OFFSETS[row] : OFFSETS[row] + SIZES[row]]
    assert reader.most_bytes <= 100


def test_a_file_that_ends_early_gives_what_there_is_and_is_not_put_on_the_disk(
    store: Store, readers: list[PieceReader], tmp_path: Path
) -> None:
    store.objects["b/set/0.tar"] = content(0)[:820]
    cache = DiskCache(str(tmp_path), limit=10**6)
    reader = reader_of(readers, source_of(0), cache=cache)
    assert reader.get(Piece(0, 0, 2, 3)) == PieceBytes(700, content(0)[700:820])
    store.objects["b/set/0.tar"] = content(0)
    other = reader_of(readers, source_of(0), cache=cache)
    assert other.get(Piece(0, 0, 2, 3)) == PieceBytes(700, content(0)[700:840])


def test_the_disk_answers_for_the_same_url_version_and_range_and_for_no_other(
    store: Store, readers: list[PieceReader], tmp_path: Path
) -> None:
    cache = DiskCache(str(tmp_path), limit=10**6)
    piece = Piece(0, 0, 1, 1)
    first = reader_of(readers, source_of(0), cache=cache)
    assert first.get(piece).data == content(0)[600:610]
    store.objects["b/set/0.tar"] = content(9)
    assert reader_of(readers, source_of(0), cache=cache).get(piece).data == content(0)[600:610], "from the disk"
    others = {
        "version": (source_of(0, sha256="1" * 64), piece, content(9)[600:610]),
        "name": (source_of(1), piece, content(1)[600:610]),
        "folder": (source_of(0, url="gs://c/set"), piece, content(4)[600:610]),
        "range": (source_of(0), Piece(0, 0, 4, 4), content(9)[900:910]),
    }
    store.objects["c/set/0.tar"] = content(4)
    for what, (source, other, wanted) in others.items():
        assert reader_of(readers, source, cache=cache).get(other).data == wanted, what
    store.asked.clear()
    again = reader_of(readers, source_of(0), cache=cache)
    again.get(piece)
    assert store.reads() == []
    assert again.fetch_again(piece).data == content(9)[600:610], "as it is in the store now"
    assert reader_of(readers, source_of(0), cache=cache).get(piece).data == content(9)[600:610], "and so on the disk"


def test_what_is_dropped_is_forgotten_in_memory_and_on_the_disk(
    store: Store, readers: list[PieceReader], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = reader_of(readers, source_of(0), cache=DiskCache(str(tmp_path), limit=10**6))
    piece = Piece(0, 0, 0, 2)
    reader.get(piece)
    reader.get(piece)
    assert len(store.reads()) == 1
    reader.drop(piece)
    reader.get(piece)
    assert len(store.reads()) == 2

    def refuse(path: Path, missing_ok: bool = False) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "unlink", refuse)
    store.objects["b/set/0.tar"] = content(9)
    assert reader.fetch_again(piece).data == content(9)[512:720], "though the disk keeps what it had"


def test_a_store_that_cannot_be_read_is_told_in_a_sentence_and_asked_again_by_the_next_who_needs_it(
    store: Store, readers: list[PieceReader]
) -> None:
    errors: list[Exception] = [ConnectionResetError(), FileNotFoundError(2, "No such file"), RuntimeError("SECRET")]

    def fail(path: str, start: int, end: int, data: bytes) -> bytes:
        if errors:
            raise errors[0]
        return data

    store.on_read = fail
    piece = Piece(0, 0, 0, 0)
    with own_clock():
        reader = reader_of(readers, source_of(0), patience_s=3)
        for told in ("not answered for 3 s.*; data.patience_s says", "(No such file|it is not there)", "RuntimeError$"):
            with pytest.raises(TrainingFailed, match=rf"cannot read gs://b/set/0.tar: .*{told}") as caught:
                reader.get(piece)
            assert "SECRET" not in str(caught.value)
            errors.pop(0)
    assert reader.retries == 2, "after half a second and after one more; the next wait would have been two"
    assert reader.get(piece).data == content(0)[512:542]


# -- the cache itself ----------------------------------------------------------------------------------------------------


def kept(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and path.name != ".bytes"]


def test_a_clearing_frees_a_tenth_and_takes_what_was_used_longest_ago(tmp_path: Path) -> None:
    """Ten files of 100 bytes fit into 1,000; the eleventh makes room until 900 are left."""
    cache = DiskCache(str(tmp_path), limit=1000)
    for number in range(10):
        cache.put(f"n{number}", bytes([number]) * 100)
        for path in kept(tmp_path):  # put one after the other, in time
            if path.stat().st_mtime > 10**6:
                os.utime(path, (number, number))
    assert len(kept(tmp_path)) == 10, "the limit itself is allowed"
    for used in (0, 2):
        assert cache.get(f"n{used}", size=100) == bytes([used]) * 100
    cache.put("new", bytes(100))
    assert len(kept(tmp_path)) == 9
    gone = [number for number in range(10) if cache.get(f"n{number}", size=100) is None]
    assert gone == [1, 3]
    assert cache.get("new", size=100) == bytes(100)


def test_what_is_replaced_or_dropped_is_counted_once(tmp_path: Path) -> None:
    cache = DiskCache(str(tmp_path), limit=1000)
    for _ in range(30):
        cache.put("a", bytes(100))
        cache.put("b", bytes(200))
        cache.drop("b")
        cache.drop("b")
    assert (tmp_path / ".bytes").read_bytes() == b"100"
    assert cache.get("a", size=100) == bytes(100)
    assert cache.get("a", size=99) is None, "another size is another thing"
    for number in range(9):
        cache.put(f"n{number}", bytes(100))
    assert len(kept(tmp_path)) == 10


def test_a_file_appears_whole_under_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = DiskCache(str(tmp_path), limit=1000)
    replace = os.replace
    sizes = []

    def renamed(old: str | os.PathLike[str], new: str | os.PathLike[str]) -> None:
        sizes.append(os.path.getsize(old))
        assert not os.path.exists(new)
        replace(old, new)

    monkeypatch.setattr(os, "replace", renamed)
    cache.put("a", bytes(77))
    assert sizes == [77]
    monkeypatch.setattr(os, "replace", lambda old, new: (_ for _ in ()).throw(OSError(28, "No space left")))
    cache.put("b", bytes(77))
    assert cache.get("b", size=77) is None
    assert len(kept(tmp_path)) == 1, "nothing half is left"


def test_a_temporary_file_is_left_alone_while_it_may_have_a_writer(tmp_path: Path) -> None:
    DiskCache(str(tmp_path), limit=1000).put("a", bytes(10))
    folder = kept(tmp_path)[0].parent
    young, old = (folder / f"{digit * 32}.tmp" for digit in "0a")
    for path, age in ((young, 60), (old, 700)):
        path.write_bytes(b"x")
        os.utime(path, (time.time() - age,) * 2)
    DiskCache(str(tmp_path), limit=1000)
    assert [path for path in kept(tmp_path) if path.suffix == ".tmp"] == [young]
