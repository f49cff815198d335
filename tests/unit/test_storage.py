"""Bytes by URL: whole or not there, only by schemes that are allowed, and never with a secret in a message."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from dist_gan import storage
from dist_gan.storage import is_inside
from dist_gan.storage.folder import StoreFolder
from dist_gan.types import TrainingFailed, UserError
from tests.conftest import environment


@pytest.fixture(params=["local path", "file://", "memory://"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """An empty folder of each store that a test can have."""
    if request.param == "memory://":
        url = f"memory://{uuid.uuid4().hex}"
        storage.make_folder(url)
        yield url
        storage.remove_folder(url)
    else:
        yield str(tmp_path) if request.param == "local path" else f"file://{tmp_path}"


# -- what every store does --------------------------------------------------------------------------------------------


def test_what_is_published_is_read_back(folder: str) -> None:
    url = storage.join(folder, "a.bin")
    data = bytes(range(256)) * 100
    assert not storage.exists(url)
    storage.publish(url, data)
    assert storage.exists(url)
    assert storage.size(url) == len(data)
    assert storage.read(url) == data
    assert storage.read(url, 10, 20) == data[10:20]
    assert storage.read(url, 25_000) == data[25_000:]
    with storage.open_read(url) as file:
        file.seek(300)
        assert file.read(5) == data[300:305]
        assert file.tell() == 305


@pytest.mark.parametrize("data", [b"", b"x", b"\0" * 70_000])
def test_publishing_again_replaces_the_whole(folder: str, data: bytes) -> None:
    url = storage.join(folder, "a.bin")
    storage.publish(url, b"old and longer than some")
    storage.publish(url, data)
    assert storage.read(url) == data
    assert storage.size(url) == len(data)
    assert storage.list_names(folder) == ["a.bin"]


def test_names_are_listed_sorted_and_an_absent_folder_is_empty(folder: str) -> None:
    for name in ("b", "a.tar", "c.json"):
        storage.publish(storage.join(folder, name), b"1")
    inner = storage.join(folder, "sub")
    storage.make_folder(inner)
    storage.publish(storage.join(inner, "x"), b"1")
    assert storage.list_names(folder) == ["a.tar", "b", "c.json", "sub"]
    assert storage.list_names(inner) == ["x"]
    assert storage.list_names(folder + "/") == ["a.tar", "b", "c.json", "sub"]
    assert storage.list_names(storage.join(folder, "absent")) == []


def test_sizes_by_one_listing_have_none_for_what_is_absent_or_a_folder(folder: str) -> None:
    storage.publish(storage.join(folder, "a"), b"123")
    storage.publish(storage.join(folder, "empty"), b"")
    storage.make_folder(storage.join(folder, "sub"))
    storage.publish(storage.join(folder, "sub/x"), b"1")
    found = storage.sizes(folder, ["a", "empty", "absent", "sub"])
    assert found == {"a": 3, "empty": 0, "absent": None, "sub": None}
    assert storage.sizes(storage.join(folder, "nowhere"), ["a"]) == {"a": None}


def test_removing_removes_and_what_is_not_there_is_no_error(folder: str) -> None:
    url = storage.join(folder, "a")
    storage.publish(url, b"1")
    storage.remove(url)
    assert not storage.exists(url)
    storage.remove(url)
    inner = storage.join(folder, "sub")
    storage.make_folder(storage.join(inner, "deep"))
    storage.publish(storage.join(inner, "deep", "x"), b"1")
    storage.remove_folder(inner)
    assert not storage.exists(inner)
    assert storage.list_names(folder) == []
    storage.remove_folder(inner)


def test_a_file_that_is_absent_is_filenotfound(folder: str) -> None:
    url = storage.join(folder, "absent")
    for call in (storage.size, storage.read, storage.open_read):
        with pytest.raises(FileNotFoundError):
            call(url)


def test_names_with_spaces_hashes_and_percent_signs_are_plain_names(folder: str) -> None:
    for name in ("a b", "50%", "é.bin", "[x]", "a*"):
        storage.publish(storage.join(folder, name), name.encode())
    assert storage.list_names(folder) == sorted(["a b", "50%", "é.bin", "[x]", "a*"])
    for name in storage.list_names(folder):
        assert storage.read(storage.join(folder, name)) == name.encode()
    storage.remove(storage.join(folder, "a*"))
    assert "a b" in storage.list_names(folder)


def test_a_folder_whose_name_looks_like_a_pattern_is_removed_alone() -> None:
    top = f"memory://{uuid.uuid4().hex}"
    for name in ("exp[1]", "exp1"):
        storage.publish(storage.join(top, name, "x"), b"1")
    storage.remove_folder(storage.join(top, "exp[1]"))
    left = storage.list_names(top)
    storage.remove_folder(top)
    assert left == ["exp1"]


# -- whole or not there -----------------------------------------------------------------------------------------------


def limited(code: str, *, limit: int) -> str:
    """Runs code in a process whose files may not grow beyond `limit` bytes, as on a disk that fills up."""
    prologue = f"""
        import resource, sys
        resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
        from dist_gan import storage
        from dist_gan.types import TrainingFailed
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(prologue) + textwrap.dedent(code)],
        env=environment(), capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_disk_that_fills_up_leaves_neither_a_new_name_nor_a_piece_nor_harms_the_old_file(tmp_path: Path) -> None:
    (tmp_path / "old").write_bytes(b"precious")
    said = limited(
        f"""
        for name in ("new", "old"):
            try:
                storage.publish({str(tmp_path)!r} + "/" + name, b"x" * 1_000_000)
            except TrainingFailed as error:
                print(error)
        storage.publish({str(tmp_path)!r} + "/small", b"fits")
        """,
        limit=100_000,
    )
    assert len(said.splitlines()) == 2, "the fault did not fire"
    for name, line in zip(("new", "old"), said.splitlines(), strict=True):
        assert line.startswith(f"cannot write {tmp_path}/{name} (1,000,000 bytes): ")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["old", "small"]
    assert (tmp_path / "old").read_bytes() == b"precious"


def test_a_full_disk_is_named_with_its_remedy() -> None:
    """/dev/full is a disk without a single free byte."""
    with pytest.raises(OSError) as caught, open("/dev/full", "wb", buffering=0) as file:
        file.write(b"x")
    assert "the disk is full; free some space" in storage.why(caught.value)


def test_a_process_killed_while_it_writes_leaves_no_half_file_under_the_name(tmp_path: Path) -> None:
    """The write is stopped by the kernel's signal in the middle."""
    code = f"""
        import resource, signal
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        from dist_gan import storage
        storage.publish({str(tmp_path / "a")!r}, b"x" * 1_000_000)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], env=environment(), capture_output=True, check=False, timeout=120
    )
    assert done.returncode < 0, "it was not killed"
    assert not (tmp_path / "a").exists()
    assert "a" not in storage.list_names(str(tmp_path))
    storage.publish(str(tmp_path / "a"), b"later")
    assert storage.read(str(tmp_path / "a")) == b"later"


def test_a_reader_beside_a_writer_sees_the_old_or_the_new_and_nothing_else(tmp_path: Path) -> None:
    url, size = str(tmp_path / "a"), 200_000
    storage.publish(url, b"0" * size)
    code = f"""
        from dist_gan import storage
        for i in range(40):
            storage.publish({url!r}, str(i % 10).encode() * {size})
    """
    writer = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], env=environment())
    seen = set()
    while writer.poll() is None:
        data = storage.read(url)
        assert len(data) == size
        assert len(set(data)) == 1
        seen.add(data[:1])
    assert writer.returncode == 0
    assert len(seen) > 1, "nothing was written while it was read"


def test_a_folder_that_is_absent_or_forbidden_fails_in_words(tmp_path: Path) -> None:
    with pytest.raises(TrainingFailed, match=r"cannot write .*absent/a \(1 bytes\): No such file or directory"):
        storage.publish(str(tmp_path / "absent" / "a"), b"1")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(TrainingFailed, match="Not a directory"):
        storage.publish(str(tmp_path / "file" / "a"), b"1")
    if os.geteuid() == 0:
        assert "no write permission; choose a folder" in storage.why(PermissionError(13, "x"))
        return
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(TrainingFailed, match="no write permission; choose a folder"):
        storage.publish(str(tmp_path / "locked" / "a"), b"1")


def test_a_url_that_carries_a_secret_is_refused_by_every_call_and_not_shown() -> None:
    for url in ("s3://KEY:SECRET@b/x", "https://h/x?X-Amz-Signature=SECRET"):
        for call in (storage.exists, storage.read, storage.list_names, lambda u: storage.publish(u, b"")):
            with pytest.raises(UserError, match="credentials by the environment") as caught:
                call(url)
            assert "SECRET" not in str(caught.value)


# -- schemes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    ["pipe:cat x", "PIPE:cat x", "ssh://h/x", "sftp://h/x", "ftp://h/x", "smb://h/x", "zip://x", "tar://x", "github://o/r",
     "git://x", "local://x", "dask://x", "jupyter://h/x", "cached://x", "simplecache://x", "reference://x", "data://x",
     "SSH://h/x", "hdfs://h/x", "webhdfs://h/x", "dir://x", "nonsense://x"],
)  # fmt: skip
def test_a_scheme_that_is_not_on_the_list_is_refused_before_any_file_system_is_made(url: str) -> None:
    with pytest.raises(UserError, match=r"^data\.url: the scheme .* is refused"):
        storage.check_url(url, place="data.url")
    for call in (storage.exists, storage.size, storage.read, storage.list_names, storage.open_read, storage.remove):
        with pytest.raises(UserError, match="refused"):
            call(url)
    for write in (
        lambda: storage.publish(url, b""),
        lambda: storage.make_folder(url),
        lambda: storage.remove_folder(url),
    ):
        with pytest.raises(UserError, match="refused"):
            write()


@pytest.mark.parametrize("url", ["simplecache::s3://b/x", "zip://a::file:///x.zip", "memory://a::b", "a::b"])
def test_chains_of_file_systems_are_refused(url: str) -> None:
    with pytest.raises(UserError, match="chains file systems"):
        storage.check_url(url, place="data.url")
    with pytest.raises(UserError, match="chains file systems"):
        storage.read(url)


@pytest.mark.parametrize("scheme", storage.ALLOWED_SCHEMES)
def test_the_allowed_schemes_pass_in_small_and_capital_letters(scheme: str) -> None:
    for url in (f"{scheme}://b/x", f"{scheme.upper()}://b/x"):
        assert storage.check_url(url, place="p") == url
        assert storage.scheme_of(url) == scheme


def test_plain_paths_are_files() -> None:
    for path in ("/a/b", "a/b", "./x", "a b", "C:x", "http:/x"):
        assert storage.scheme_of(path) == "file"
        assert storage.check_url(path, place="p") == path
        assert storage.local_path(path) == Path(path)
    assert storage.local_path("file:///a/b") == Path("/a/b")
    assert storage.local_path("s3://b/x") is None


def test_the_refusal_of_a_pipe_says_why() -> None:
    with pytest.raises(UserError, match="it would run a shell command"):
        storage.check_url("pipe:cat x", place="p")


def test_the_refusal_of_a_pipe_with_a_url_in_it_says_why_too() -> None:
    with pytest.raises(UserError, match="it would run a shell command"):
        storage.check_url("pipe:curl -s https://h/x.tar", place="p")


def test_a_data_url_is_refused_like_any_other_scheme() -> None:
    with pytest.raises(UserError, match="refused"):
        storage.read("data:,abc")


def test_azures_own_form_of_a_url_is_no_secret() -> None:
    url = "abfs://container@account.dfs.core.windows.net/folder"
    assert storage.check_url(url, place="data.url") == url


@pytest.mark.parametrize("prefix", ["~/", "file:{}/", "FILE://{}/"])
def test_what_is_published_under_any_spelling_of_a_local_path_is_found_under_it(
    prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (home := tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(tmp_path)
    folder = prefix.format(home) + "runs"
    storage.make_folder(folder)
    storage.publish(storage.join(folder, "a"), b"1")
    assert storage.exists(storage.join(folder, "a"))
    assert (home / "runs" / "a").exists()


# -- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("s3://bucket/a/b", "s3://bucket/a/b"),
        ("https://h/x?X-Amz-Signature=SECRET&b=c", "https://h/x"),
        ("https://user:SECRET@h:8080/x", "https://h:8080/x"),
        ("https://SECRET@h/x", "https://h/x"),
        ("s3://KEY:SEC@RET@bucket/x", "s3://bucket/x"),
        ("https://user:SECRET@h", "https://h"),
        ("https://h/users/@me/x", "https://h/users/@me/x"),
        ("/data/a@b/x", "/data/a@b/x"),
        ("az://SECRET@container/x?sig=SECRET", "az://container/x"),
    ],
)
def test_what_may_be_a_secret_is_never_shown(url: str, shown: str) -> None:
    assert storage.redact(url) == shown


@pytest.mark.parametrize(
    "url",
    [
        "https://user:SEC/RET@h/x", "https://user:SEC?RET@h/x", "s3://a@b::https://u:SECRET@h/x",
        "https://h/x#access_token=SECRET",
    ],
)  # fmt: skip
def test_no_part_of_an_odd_secret_is_shown(url: str) -> None:
    assert "SEC" not in storage.redact(url)


def test_refusals_are_redacted() -> None:
    for url in ("ftp://user:SECRET@h/x?sig=SECRET", "simplecache::https://user:SECRET@h/x"):
        with pytest.raises(UserError) as caught:
            storage.check_url(url, place="data.url")
        assert "SECRET" not in str(caught.value)


@pytest.mark.parametrize(
    ("folder_url", "names", "joined"),
    [
        ("s3://b/x", ("a",), "s3://b/x/a"),
        ("s3://b/x/", ("a", "b"), "s3://b/x/a/b"),
        ("memory://b", ("a",), "memory://b/a"),
        ("/", ("a",), "/a"),
        ("runs/x", ("a",), "runs/x/a"),
    ],
)
def test_names_are_joined_with_one_slash(folder_url: str, names: tuple[str, ...], joined: str) -> None:
    assert storage.join(folder_url, *names) == joined


# -- a folder in an object store --------------------------------------------------------------------------------------


@pytest.fixture
def store() -> Iterator[StoreFolder]:
    folder = StoreFolder(f"memory://{uuid.uuid4().hex}/photos")
    yield folder
    storage.remove_folder(folder.url)


def put(folder: StoreFolder, name: str, data: bytes) -> None:
    filesystem, path = storage.connect(folder.url)
    filesystem.pipe_file(f"{path}/{name}", data)


def test_a_folder_in_a_store_lists_its_files_at_any_depth_and_what_lies_directly_in_it(
    store: StoreFolder,
) -> None:
    assert store.files() == []
    assert store.names() == {}
    for name, data in {"b/c/2": b"22", "a?b#c@d.jpg": b"1", "b/3": b""}.items():
        put(store, name, data)
    put(StoreFolder(f"{store.url}2"), "other", b"1")
    assert [(file.name, file.size) for file in store.files()] == [("a?b#c@d.jpg", 1), ("b/3", 0), ("b/c/2", 2)]
    assert store.names() == {"a?b#c@d.jpg": 1, "b": None}
    assert store.read("a?b#c@d.jpg", size=1) == b"1"
    storage.remove_folder(f"{store.url}2")


def test_a_file_is_read_as_it_was_listed_or_not_at_all(store: StoreFolder) -> None:
    put(store, "x", bytes(range(100)))
    assert store.read("x", size=100) == bytes(range(100))
    assert store.read("x", size=100, limit=10) == bytes(range(10))
    assert store.read("x", size=100, limit=1000) == bytes(range(100))
    with pytest.raises(TrainingFailed, match=r"photos/x: 101 bytes were listed, and it has 100 now; it was changed"):
        store.read("x", size=101)
    with pytest.raises(TrainingFailed, match=r"99 bytes were listed, and it has more now"):
        store.read("x", size=99)
    with pytest.raises(FileNotFoundError):
        store.read("y", size=1)
    put(store, "a?b#c", b"12")
    with pytest.raises(TrainingFailed, match=r"photos/a\?b#c: 1 bytes"):
        store.read("a?b#c", size=1)


def test_an_upload_is_whole_or_an_error_and_gone(
    store: StoreFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(b"x" * 1000)
    store.upload(tmp_path / "file", "a.tar")
    assert store.names() == {"a.tar": 1000}
    store.remove("a.tar")
    store.remove("a.tar")
    assert store.names() == {}
    client = type(storage.connect(store.url)[0])
    put_file = client.put_file

    def cut(self: object, local: str, *arguments: object, **options: object) -> None:
        os.truncate(local, 400)
        put_file(self, local, *arguments, **options)

    monkeypatch.setattr(client, "put_file", cut)
    with pytest.raises(TrainingFailed, match=r"cannot write memory://.*/b.tar: 400 of 1000 bytes arrived"):
        store.upload(tmp_path / "file", "b.tar")
    assert store.names() == {}


def test_a_folder_inside_another_is_seen_and_a_neighbour_with_a_longer_name_is_not() -> None:
    for url, folder in (
        ("s3://b/x", "s3://b/x"),
        ("s3://b/x/", "s3://b/x"),
        ("s3://b/x/y", "s3://b/x/"),
        ("s3://b/x", "s3://b"),
    ):
        assert is_inside(url, folder)
    for url, folder in (
        ("s3://b/xy", "s3://b/x"),
        ("s3://c/x", "s3://b"),
        ("s3://b", "s3://b/x"),
        ("memory://b/x", "s3://b"),
        ("/b/x", "/b"),
    ):
        assert not is_inside(url, folder)
