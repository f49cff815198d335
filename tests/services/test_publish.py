"""What is written is read back, what fails for a while is asked again for as long as was said, and what is seen is whole."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dist_gan import storage
from dist_gan.packing.destinations import LocalDestination, StoreDestination
from dist_gan.storage import Patience
from dist_gan.storage.client import connect
from dist_gan.storage.folder import StoreFolder
from dist_gan.types import TrainingFailed
from tests.services.own_store import Store, own_clock, own_store


@pytest.fixture
def store() -> Iterator[Store]:
    with own_store() as found:
        yield found


# -- writing to a store -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arrived", [0, 99, 101])
def test_an_object_of_another_size_than_what_was_written_is_an_error_and_gone(
    store: Store, arrived: int, tmp_path: Path
) -> None:
    """The client believes that all has arrived, and says so until it is told to forget."""
    store.on_write = lambda path, data: (data + b"?")[:arrived]
    with pytest.raises(TrainingFailed, match=rf"cannot write gs://b/a \(100 bytes\): {arrived} of 100 bytes arrived"):
        storage.publish("gs://b/a", bytes(100))
    (tmp_path / "file").write_bytes(bytes(100))
    with pytest.raises(TrainingFailed, match=rf"cannot write gs://b/c: {arrived} of 100 bytes arrived"):
        StoreFolder("gs://b").upload(tmp_path / "file", "c")
    with pytest.raises(TrainingFailed, match=rf"{arrived} of 100 bytes arrived"):
        StoreDestination("gs://b").publish(tmp_path / "file", "d")
    assert store.objects == {}
    assert [what for what, *_ in store.asked if what != "size"] == ["write", "remove"] * 3
    store.on_write = lambda path, data: data
    storage.publish("gs://b/a", bytes(100))
    StoreDestination("gs://b").publish(tmp_path / "file", "d")
    assert store.objects == {"b/a": bytes(100), "b/d": bytes(100)}


def test_a_write_that_fails_for_a_while_is_made_again_and_one_that_is_refused_is_not(store: Store) -> None:
    failures: list[Exception] = [ConnectionResetError(), TimeoutError(), OSError(errno.EIO, "x")]

    def fail(path: str, data: bytes) -> bytes:
        if failures:
            raise failures.pop(0)
        return data

    store.on_write = fail
    with own_clock() as clock:
        storage.publish("gs://b/a", b"123")
    assert len(clock.waits) == 3
    assert store.objects == {"b/a": b"123"}
    failures.append(PermissionError("no"))
    with own_clock() as clock, pytest.raises(TrainingFailed, match="cannot write gs://b/a"):
        storage.publish("gs://b/a", b"4567")
    assert clock.waits == []
    assert store.objects == {"b/a": b"123"}


# -- patience -----------------------------------------------------------------------------------------------------------


class Refused(Exception):
    """As the clients of stores answer: with a status, or botocore's dictionary."""

    def __init__(self, status: int | None = None, code: str = "") -> None:
        super().__init__("SECRET")
        if status is not None and not code:
            self.status = status
        else:
            self.response = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}


class NoCredentialsError(Exception):
    """As botocore's."""


PASSING = [
    ConnectionError(), ConnectionResetError(), TimeoutError(), OSError(errno.EIO, "x"), OSError(errno.ETIMEDOUT, "x"),
    OSError(errno.EBUSY, "x"), OSError(errno.EAGAIN, "x"), Refused(500), Refused(503), Refused(429),
    Refused(503, "SlowDown"), Refused(400, "RequestTimeout"), Refused(500, "InternalError"), Refused(429, "Other"),
]  # fmt: skip
LASTING = [
    FileNotFoundError(), PermissionError(), FileExistsError(), IsADirectoryError(), OSError(errno.ENOSPC, "x"),
    OSError(errno.EROFS, "x"), Refused(400), Refused(403), Refused(404), Refused(403, "ExpiredToken"),
    Refused(404, "NoSuchKey"), ValueError(), NoCredentialsError(),
]  # fmt: skip


def wrapped(error: Exception) -> OSError:
    """As s3fs makes an EIO of whatever it does not know."""
    found = OSError(errno.EIO, "x")
    found.__cause__ = error
    return found


@pytest.mark.parametrize("error", [*PASSING, *map(wrapped, PASSING)], ids=repr)
def test_what_may_pass_is_asked_again(error: Exception, store: Store) -> None:
    store.objects["b/a"] = b"123"
    errors = [error]

    def fail(path: str, start: int, end: int, data: bytes) -> bytes:
        if errors:
            raise errors.pop()
        return data

    store.on_read = fail
    with own_clock() as clock:
        assert storage.read("gs://b/a") == b"123"
    assert clock.waits == [0.5]


@pytest.mark.parametrize("error", [*LASTING, *(wrapped(e) for e in LASTING if hasattr(e, "response"))], ids=repr)
def test_what_stays_wrong_is_not_asked_again(error: Exception, store: Store) -> None:
    store.objects["b/a"] = b"123"

    def fail(path: str, start: int, end: int, data: bytes) -> bytes:
        raise error

    store.on_read = fail
    with own_clock() as clock:
        with pytest.raises(Exception):  # noqa: B017 # which one is for others to say
            storage.read("gs://b/a")
        with pytest.raises(Exception):  # noqa: B017
            storage.read_range("gs://b/a", 0, 3, patience=Patience(100))
    assert clock.waits == []
    assert len(store.reads()) == 2


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("seconds", [1, 60, 200])
def test_waits_grow_from_half_a_second_to_ten_and_end_with_the_patience(
    store: Store, share: float, seconds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wait number n lasts by chance from half of to all of min(10, 2**n / 2) seconds."""
    store.objects["b/a"] = b"123"
    monkeypatch.setattr(storage.patience, "PATIENCE_S", float(seconds))

    def silent(path: str, start: int, end: int, data: bytes) -> bytes:
        raise ConnectionResetError("SECRET")

    store.on_read = silent
    patience = Patience(seconds)
    for read in (
        lambda: storage.read_range("gs://b/a", 0, 3, patience=patience),
        lambda: storage.read("gs://b/a"),
    ):
        with own_clock(share) as clock, pytest.raises(Exception, match=rf"not answered for {seconds} s") as caught:
            read()
        assert "SECRET" not in str(caught.value)
        longest = [min(10.0, 0.5 * 2**number) for number in range(len(clock.waits))]
        assert clock.waits == pytest.approx([(0.5 + share / 2) * most for most in longest])
        assert patience.retries == len(clock.waits)
        assert seconds - 10 <= clock.now - clock.began <= seconds, "one more wait might have been too long"


def test_a_store_that_answers_a_little_now_and_then_is_asked_for_as_long_as_it_takes(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Patience is with silence: every byte that arrives renews it, and the waits begin anew."""
    monkeypatch.setattr(storage.reading, "PART_BYTES", 10)
    store.objects["b/a"] = bytes(range(200))
    turn = [0]

    with own_clock() as clock:

        def slow(path: str, start: int, end: int, data: bytes) -> bytes:
            clock.pass_by(1.0)
            turn[0] += 1
            if turn[0] % 4:
                raise TimeoutError
            return data

        store.on_read = slow
        assert storage.read_range("gs://b/a", 0, 200, patience=Patience(12)) == bytes(range(200))
    assert clock.now - clock.began > 10 * 12, "one patience would have been too little"
    assert clock.waits == pytest.approx([0.5, 1.0, 2.0] * 20)


def test_a_read_that_broke_off_asks_only_for_what_is_missing(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage.reading, "PART_BYTES", 40)
    store.objects["b/a"] = bytes(range(100))
    cuts = [17, 0, 40]

    def cut(path: str, start: int, end: int, data: bytes) -> bytes:
        return data[: cuts.pop(0)] if cuts else data

    store.on_read = cut
    with own_clock() as clock:
        assert storage.read_range("gs://b/a", 5, 95, patience=Patience(5)) == bytes(range(5, 95))
    assert store.reads() == [("b/a", 5, 45), ("b/a", 22, 62), ("b/a", 22, 62), ("b/a", 62, 95)]
    assert len(clock.waits) == 2


def test_a_file_that_ends_early_is_short_at_once_and_one_that_gives_too_much_is_not_believed(store: Store) -> None:
    store.objects["b/a"] = bytes(range(50))
    patience = Patience(5)
    with own_clock() as clock:
        assert storage.read_range("gs://b/a", 10, 90, patience=patience) == bytes(range(10, 50))
        assert storage.read_range("gs://b/a", 50, 90, patience=patience) == b""
    assert clock.waits == []
    store.on_read = lambda path, start, end, data: store.objects[path]
    with own_clock(), pytest.raises(ConnectionError):
        storage.read_range("gs://b/a", 10, 20, patience=Patience(2))
    with own_clock() as clock, pytest.raises(FileNotFoundError):
        storage.read_range("gs://b/other", 0, 3, patience=patience)
    assert clock.waits == []


def test_whoever_gives_up_waits_no_more(store: Store) -> None:
    store.objects["b/a"] = b"123"

    def silent(path: str, start: int, end: int, data: bytes) -> bytes:
        raise ConnectionResetError

    store.on_read = silent
    patience = Patience(100)
    patience.stop_retrying()
    with own_clock() as clock, pytest.raises(ConnectionResetError):
        storage.read_range("gs://b/a", 0, 3, patience=patience)
    assert len(clock.waits) == 1
    assert len(store.reads()) == 1


# -- listing ------------------------------------------------------------------------------------------------------------


def test_listings_are_sorted_whatever_the_store_says_first(store: Store) -> None:
    for name in ("z", "a", "m/1", "b", "m/0/x"):
        store.objects[f"b/f/{name}"] = bytes(len(name))
    assert storage.list_names("gs://b/f") == ["a", "b", "m", "z"]
    assert storage.list_names("gs://b/none") == []
    assert [(f.name, f.size) for f in StoreFolder("gs://b/f").files()] == [
        ("a", 1), ("b", 1), ("m/0/x", 5), ("m/1", 3), ("z", 1),
    ]  # fmt: skip
    store.asked.clear()
    assert storage.sizes("gs://b/f", ["z", "m", "none"]) == {"z": 1, "m": None, "none": None}
    assert store.asked == [("list", "b/f")], "one request, however many names"


def test_a_listing_that_fails_for_a_while_is_asked_for_again(store: Store) -> None:
    store.objects["b/f/a"] = b"1"
    failures = [ConnectionResetError(), TimeoutError()]

    def fail(path: str) -> None:
        if failures:
            raise failures.pop()

    store.on_list = fail
    with own_clock() as clock:
        assert storage.list_names("gs://b/f") == ["a"]
    assert len(clock.waits) == 2


def test_a_store_is_asked_anew_for_a_listing_and_not_its_memory(store: Store, tmp_path: Path) -> None:
    folder = StoreFolder("gs://b/f")
    (tmp_path / "file").write_bytes(b"1")
    folder.upload(tmp_path / "file", "a")
    store.objects["b/f/a"] = b"12345"
    assert folder.names() == {"a": 5}
    folder.upload(tmp_path / "file", "a")
    store.objects["b/f/a"] = b"123"
    assert [file.size for file in folder.files()] == [3]
    client, path = connect("gs://b/f")
    client.ls(path)  # whoever shares the client leaves a listing in its memory
    store.objects["b/f/a"] = b"1234"
    assert folder.names() == {"a": 4}


@pytest.mark.parametrize(
    ("ask", "expected"),
    [
        pytest.param(lambda: storage.exists("gs://b/f/new"), True, id="exists"),
        pytest.param(lambda: storage.list_names("gs://b/f"), ["a", "new"], id="names"),
        pytest.param(lambda: storage.sizes("gs://b/f", ["a", "new"]), {"a": 3, "new": 4}, id="sizes"),
        pytest.param(lambda: storage.size("gs://b/f/a"), 3, id="size"),
    ],
)
def test_what_a_shared_client_remembers_of_a_store_is_not_believed(
    store: Store, ask: Callable[[], object], expected: object
) -> None:
    store.objects["b/f/a"] = b"12345"
    client, path = connect("gs://b/f")
    client.ls(path)
    store.objects |= {"b/f/a": b"123", "b/f/new": b"1234"}
    assert ask() == expected


# -- writing to a disk --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("large", [False, True])
def test_a_file_on_a_disk_is_safe_before_it_has_its_name_and_its_name_is_safe_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, large: bool
) -> None:
    """What a power cut leaves is what was synced: the bytes, then the rename, then the folder."""
    if large:
        monkeypatch.setattr(storage.local, "_WRITTEN_AT_ONCE", 1000)
    steps: list[tuple[str, object]] = []
    fsync, replace = os.fsync, os.replace

    def synced(handle: int) -> None:
        facts = os.fstat(handle)
        steps.append(("synced", "folder" if facts.st_ino == tmp_path.stat().st_ino else facts.st_size))
        fsync(handle)

    def renamed(old: os.PathLike[str], new: os.PathLike[str]) -> None:
        assert Path(old).parent == Path(new).parent == tmp_path, "a rename between disks is a copy"
        assert Path(old).name.startswith(".")
        assert Path(old).name.endswith(".tmp")
        assert Path(old).read_bytes() == data
        steps.append(("renamed", Path(new).name))
        replace(old, new)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    data = os.urandom(4321)
    storage.publish(str(tmp_path / "a"), data)
    assert steps == [("synced", 4321), ("renamed", "a"), ("synced", "folder")]
    assert (tmp_path / "a").read_bytes() == data
    steps.clear()
    folder = LocalDestination(tmp_path)
    with folder.new_file("b") as file:
        file.write_bytes(data)
        assert not (tmp_path / "b").exists()
        folder.publish(file, "b")
    assert steps == [("synced", 4321), ("renamed", "b"), ("synced", "folder")]
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


def test_a_rename_that_fails_leaves_the_old_file_and_no_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.publish(str(tmp_path / "a"), b"old")

    def refuse(old: object, new: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(TrainingFailed, match=r"cannot write .*/a \(3 bytes\): Input/output error"):
        storage.publish(str(tmp_path / "a"), b"new")
    assert os.listdir(tmp_path) == ["a"]
    assert (tmp_path / "a").read_bytes() == b"old"
