"""An S3 server on loopback with a proxy before it that fails as it is told to."""

from __future__ import annotations

import http.client
import itertools
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock, Thread

import boto3
from moto.server import ThreadedMotoServer

from tests.conftest import free_port

FAULTS = ("503", "429", "reset", "slow", "short", "too-much-promised", "cut")
_TOKEN_EXPIRED = b"<Error><Code>ExpiredToken</Code><Message>The provided token has expired.</Message></Error>"


class FaultyStore:
    """Forwards to a server, but for every `every`-th read of an object, which fails in the next of several ways.

    503, 429: an answer that says so. reset: the connection is broken off. slow: the bytes come one by one for a second.
    short: fewer bytes, and the header says so too. too-much-promised: the header says more. cut: the connection ends
    within the bytes.
    """

    def __init__(self, server_port: int) -> None:
        self.gone = False
        self.reads: list[str] = []
        """Path and range of every read of an object that came here."""
        self.failed: list[str] = []
        self._lock = Lock()
        self.sound()
        store = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_any(self) -> None:
                if store.gone:
                    self.close_connection = True
                    return
                length = int(self.headers.get("Content-Length") or 0)
                body = self.rfile.read(length) if length else None
                fault = store.fault_for(self.command, self.path, self.headers.get("Range", ""))
                if store.expired:
                    self.answer(403, {"Content-Type": "application/xml"}, _TOKEN_EXPIRED)
                    return
                if fault in ("503", "429"):
                    code = b"SlowDown" if fault == "503" else b"TooManyRequests"
                    self.answer(int(fault), {}, b"<Error><Code>" + code + b"</Code></Error>")
                    return
                if fault == "reset":
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    self.close_connection = True
                    self.connection.close()
                    return
                upstream = http.client.HTTPConnection("127.0.0.1", server_port)
                upstream.request(self.command, self.path, body, dict(self.headers))
                reply = upstream.getresponse()
                data = reply.read()
                headers = {k: v for k, v in reply.getheaders() if k.lower() not in ("transfer-encoding", "connection")}
                upstream.close()
                self.answer(reply.status, headers, data, fault)

            do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = handle_any

            def answer(self, status: int, headers: dict[str, str], data: bytes, fault: str = "") -> None:
                if self.command != "HEAD":
                    headers = {k: v for k, v in headers.items() if k.lower() != "content-length"}
                    promised = len(data)
                    if fault == "short":
                        data = data[: len(data) // 2]
                        promised = len(data)
                        headers = {k: v for k, v in headers.items() if not k.lower().startswith("x-amz-checksum")}
                    if fault == "too-much-promised":
                        promised += 1000
                    headers["Content-Length"] = str(promised)
                self.send_response(status)
                for name, value in headers.items():
                    if name.lower() not in ("server", "date"):
                        self.send_header(name, value)
                self.end_headers()
                if self.command == "HEAD":
                    return
                if fault == "slow":
                    for part in (data[:1], data[1:2], data[2:]):
                        self.wfile.write(part)
                        self.wfile.flush()
                        time.sleep(0.2)
                    return
                self.wfile.write(data[: len(data) // 3] if fault == "cut" else data)
                if fault in ("cut", "too-much-promised"):
                    self.close_connection = True

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_port
        self._thread = Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self._thread.start()

    def sound(self) -> None:
        """Nothing fails, and nothing has come yet."""
        self.every = 0
        self.faults: tuple[str, ...] = FAULTS
        self.expired = False
        self.reads.clear()
        self.failed.clear()
        self._next = itertools.count()

    def fault_for(self, command: str, path: str, wanted: str) -> str:
        """What is to go wrong with a request."""
        if command != "GET" or not path.split("?")[0].endswith(".tar"):
            return ""
        with self._lock:
            self.reads.append(f"{path.split('?')[0]} {wanted}")
            if not self.every or len(self.reads) % self.every:
                return ""
            fault = self.faults[next(self._next) % len(self.faults)]
            self.failed.append(fault)
            return fault

    def stop(self) -> None:
        """From now on nobody listens, nor answers on connections that are open."""
        self.gone = True
        self._server.shutdown()
        self._server.server_close()


@contextmanager
def s3_with(files: Path, bucket: str = "shards") -> Iterator[tuple[FaultyStore, dict[str, str]]]:
    """The files of a folder in a bucket; the store in front of it, and the environment that leads there."""
    port = free_port()
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=port, verbose=False)
    server.start()
    store = FaultyStore(port)
    try:
        client = boto3.client(
            "s3", endpoint_url=f"http://127.0.0.1:{port}", region_name="us-east-1",
            aws_access_key_id="canary-id", aws_secret_access_key="canary-secret-5f1e",
        )  # fmt: skip
        client.create_bucket(Bucket=bucket)
        for path in sorted(files.iterdir()):
            client.put_object(Bucket=bucket, Key=f"set/{path.name}", Body=path.read_bytes())
        yield store, {
            "AWS_ACCESS_KEY_ID": "canary-id", "AWS_SECRET_ACCESS_KEY": "canary-secret-5f1e",
            "AWS_DEFAULT_REGION": "us-east-1", "AWS_ENDPOINT_URL": f"http://127.0.0.1:{store.port}",
        }  # fmt: skip
    finally:
        store.stop()
        server.stop()
