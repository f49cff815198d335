"""Whatever a store refuses is one sentence with a remedy, at once; a store that is silent is waited for, and that is said."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import pytest

from dist_gan import cli, storage
from dist_gan.config.reader import load_config
from dist_gan.data.manifest import Manifest, Shard, check_shards, read_manifest
from dist_gan.data.pieces import Piece, PieceReader, ShardFolder
from dist_gan.packing.fetching import prefetch
from dist_gan.packing.indexing import index, verify
from dist_gan.packing.sources import open_source
from dist_gan.run_data import prepare_data
from dist_gan.storage.folder import StoreFolder
from dist_gan.types import TrainingFailed, UserError
from tests.conftest import ROOT, free_port

URL = "s3://bucket/set"
SECRET = "canary-secret"
SHARD = Shard("a.tar", 1024, "0" * 64, ("k",), (512,), (10,), ("png",), None, None)
MANIFEST = Manifest(16, 3, None, (SHARD,), "test")


class Refusing:
    """A server that answers every request with one error of S3."""

    def __init__(self) -> None:
        self.status, self.code, self.asked = 403, "AccessDenied", 0
        store = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self) -> None:
                store.asked += 1
                if length := int(self.headers.get("Content-Length") or 0):
                    self.rfile.read(length)
                body = f"<Error><Code>{store.code}</Code><Message>{SECRET}</Message></Error>".encode()
                self.send_response(store.status)
                self.send_header("Content-Type", "application/xml")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = answer

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture(scope="module")
def refusing() -> Iterator[Refusing]:
    server = Refusing()
    yield server
    server.close()


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {
        "AWS_ACCESS_KEY_ID": "canary-id", "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true", "AWS_CONFIG_FILE": "/nonexistent",
        "AWS_SHARED_CREDENTIALS_FILE": "/nonexistent",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(storage.patience, "PATIENCE_S", 60.0)
    fsspec.filesystem("s3").clear_instance_cache()
    yield
    fsspec.filesystem("s3").clear_instance_cache()


def read_piece(url: str) -> None:
    reader = PieceReader([ShardFolder(url, MANIFEST)], memory=2**20, patience_s=None, cache=None)
    try:
        reader.get(Piece(0, 0, 0, 0))
    finally:
        reader.close()


def prepared(url: str) -> None:
    config = load_config(
        str(ROOT / "configs" / "dcgan-cifar10.yaml"), [f"data.url={url}", "networks.resolution=16"], world_size=1
    )
    prepare_data(config)


READS: dict[str, Callable[[str], object]] = {
    "read": lambda url: storage.read(f"{url}/x"),
    "part": lambda url: storage.read(f"{url}/x", 0, 10),
    "size": lambda url: storage.size(f"{url}/x"),
    "sizes": lambda url: storage.sizes(url, ["x"]),
    "list": storage.list_names,
    "exists": lambda url: storage.exists(f"{url}/x"),
    "open": lambda url: storage.open_read(f"{url}/x"),
    "remove": storage.remove_folder,
    "manifest": read_manifest,
    "check": lambda url: check_shards(url, MANIFEST),
    "index": lambda url: index(url, workers=1),
    "verify": lambda url: verify(url, workers=1),
    "folder": lambda url: StoreFolder(url).read("x", size=3),
    "training": prepared,
}
WRITES: dict[str, Callable[[str], object]] = {
    "publish": lambda url: storage.publish(f"{url}/x", b"123"),
    "piece": read_piece,
}
ANSWERS = {
    "AccessDenied": (403, "the store refuses access; check the credentials"),
    "InvalidAccessKeyId": (403, "the store refuses access; check the credentials"),
    "SignatureDoesNotMatch": (403, "the store refuses access; check the credentials"),
    "ExpiredToken": (400, "the store refuses access; check the credentials in the environment"),
    "NoSuchBucket": (404, "the bucket does not exist; check its name"),
    "PermanentRedirect": (301, "AWS_DEFAULT_REGION"),
    "AuthorizationHeaderMalformed": (400, "set AWS_DEFAULT_REGION to the bucket's region"),
}


def in_one_sentence(call: Callable[[str], object], url: str, kind: type[Exception]) -> str:
    began = time.monotonic()
    with pytest.raises(kind) as caught:
        call(url)
    assert time.monotonic() - began < 20, "what waiting cannot mend is not waited for"
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert url in sentence
    assert "canary" not in sentence
    return sentence


@pytest.mark.parametrize("code", ANSWERS)
def test_every_reader_and_writer_says_in_one_sentence_why_a_store_refuses(
    code: str, refusing: Refusing, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusing.status, words = ANSWERS[code]
    refusing.code = code
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{refusing.port}")
    for name, call in {**READS, **WRITES}.items():
        if refusing.status == 400 and name in ("read", "size", "exists", "open", "manifest", "verify", "training"):
            continue  # they begin with a HEAD, whose answer has no body that could say more than 400
        said = in_one_sentence(call, URL, TrainingFailed if name in WRITES else UserError)
        assert words in said, name
    assert refusing.asked
    refusing.asked = 0


def no_credentials(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    return "the store refuses access; check the credentials in the environment (none that can be used were found)"


def half_of_the_credentials(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    return "check the credentials in the environment (none that can be used were found)"


def unknown_profile(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("AWS_PROFILE", "canary-profile")
    return "check the credentials in the environment (none that can be used were found)"


def endpoint_without_a_scheme(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "canary-host")
    return "the endpoint is no URL; give one such as http://localhost:9000"


def name_that_is_not_known(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://no-such-host.invalid")
    return "the name of no-such-host.invalid:80 cannot be resolved; check the endpoint (AWS_ENDPOINT_URL"


@pytest.mark.parametrize(
    "mistake",
    [
        no_credentials, half_of_the_credentials, unknown_profile, endpoint_without_a_scheme, name_that_is_not_known,
    ],
)  # fmt: skip
def test_settings_that_lead_to_no_store_are_a_users_mistake_everywhere(
    mistake: Callable[[pytest.MonkeyPatch], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = mistake(monkeypatch)
    fsspec.filesystem("s3").clear_instance_cache()
    for call in (*READS.values(), open_source):
        assert words in in_one_sentence(call, URL, UserError)


def test_a_name_that_was_known_before_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://no-such-host.invalid")
    monkeypatch.setattr(storage.patience, "PATIENCE_S", 2.0)
    with pytest.raises(TrainingFailed, match="has not answered for 2 s .the name of .* cannot be resolved"):
        read_piece(URL)


def test_names_that_no_bucket_can_have_are_told(refusing: Refusing, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{refusing.port}")
    assert "no name that a bucket" in in_one_sentence(read_manifest, "s3://BAD_bucket!/x", UserError)


def test_an_endpoint_that_does_not_speak_tls_is_told(refusing: Refusing, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"https://127.0.0.1:{refusing.port}")
    assert "does not speak https" in in_one_sentence(read_manifest, URL, UserError)


def test_a_web_server_that_refuses_or_is_away_has_not_merely_no_such_file(
    refusing: Refusing, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusing.status = 403
    url = f"http://127.0.0.1:{refusing.port}/set"
    for name in ("read", "size", "exists", "manifest"):
        assert "the store refuses access" in in_one_sentence(READS[name], url, UserError)
    refusing.status = 404
    assert not storage.exists(f"{url}/x")
    with pytest.raises(UserError, match=r"no manifest.json there"):
        read_manifest(url)
    monkeypatch.setattr(storage.patience, "PATIENCE_S", 1.0)
    for name in ("read", "size", "exists", "manifest"):
        with pytest.raises(TrainingFailed, match="has not answered for 1 s"):
            READS[name](f"http://127.0.0.1:{free_port()}/set")


# -- waiting ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["list", "exists", "training", "publish", "piece"])
def test_who_waits_for_a_closed_port_says_so_at_once_and_once(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    port = free_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    monkeypatch.setattr(storage.patience, "PATIENCE_S", 1.4)
    call = {**READS, **WRITES}[name]
    ended: list[Exception] = []

    def run() -> None:
        try:
            call(URL)
        except Exception as error:
            ended.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    until, said = time.monotonic() + 20, ""
    while "waiting" not in said and time.monotonic() < until:
        time.sleep(0.02)
        said += capsys.readouterr().err
    assert not ended, "it is said while it waits, not afterwards"
    thread.join()
    said += capsys.readouterr().err
    (line,) = said.splitlines()
    assert line.startswith(URL)
    assert f"the store does not answer (127.0.0.1:{port} refuses the connection); waiting" in line
    assert "for up to 1 s" in line
    assert isinstance(ended[0], TrainingFailed)


def test_threads_and_later_files_of_one_folder_say_it_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setattr(storage.patience, "PATIENCE_S", 1.5)
    folder = StoreFolder(URL)
    failed = 0
    for _, get in prefetch(
        lambda name: folder.read(name, size=3), [str(n) for n in range(20)], size=lambda _: 3, num_threads=8
    ):
        try:
            get()
        except TrainingFailed:
            failed += 1
    assert failed == 20
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize("command", ["inspect", "verify", "index"])
def test_a_command_waits_aloud_and_ends_in_one_sentence(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setattr(storage.patience, "PATIENCE_S", 1.5)
    assert cli.main([command, URL]) == 3
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2, said
    assert "waiting" in said[0]
    assert said[1].startswith("dist-gan: cannot ")
    assert "start the same command again when it does" in said[1]


def test_a_file_in_a_store_is_read_through_a_break(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A server that drops every second connection: the bytes come all the same, and nobody is told of each."""
    data = bytes(range(256)) * 4096
    (tmp_path / "x").write_bytes(data)
    server = socket.create_server(("127.0.0.1", 0))
    broken = 0

    def serve() -> None:
        nonlocal broken
        number = 0
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            number += 1
            with connection:
                request = connection.recv(65536).decode()
                if number % 2 and request.startswith("GET"):
                    broken += 1
                    continue
                start, end = 0, len(data)
                for line in request.splitlines():
                    if line.lower().startswith("range: bytes="):
                        first, last = line.split("=")[1].split("-")
                        start, end = int(first), int(last) + 1
                body = data[start:end]
                head = (
                    f"HTTP/1.1 206 Partial Content\r\nContent-Length: {len(body)}\r\nAccept-Ranges: bytes\r\n"
                    f"Content-Range: bytes {start}-{end - 1}/{len(data)}\r\nConnection: close\r\n\r\n"
                )
                connection.sendall(head.encode() + (b"" if request.startswith("HEAD") else body))

    threading.Thread(target=serve, daemon=True).start()
    url = f"http://127.0.0.1:{server.getsockname()[1]}/x"
    with storage.open_read(url) as file:
        file.seek(10)
        assert file.read(20) == data[10:30]
        file.seek(0)
        assert file.read() == data
    server.close()
    assert broken
