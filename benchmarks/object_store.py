"""An object store on loopback for benchmarks: the part of S3's protocol that they need, with a latency for each request.

    python benchmarks/object_store.py PORT LATENCY_S

Objects stay in memory. One asyncio loop answers everybody, so that the server takes as little of the machine as it can;
a request waits the latency out before it is answered, and others go on meanwhile. Signatures are not checked.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import sys
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

_NAMESPACE = "http://s3.amazonaws.com/doc/2006-03-01/"
_DATE = "2026-01-01T00:00:00.000Z"

Answer = tuple[int, dict[str, str], bytes]


class Store:
    """Objects by path, `/bucket/key`."""

    def __init__(self, latency_s: float) -> None:
        self.latency_s = latency_s
        self.objects: dict[str, bytes] = {}
        self.etags: dict[str, str] = {}
        self.parts: dict[str, dict[int, bytes]] = {}

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answers one connection until it is closed."""
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                first, *lines = head.decode("latin-1").strip().split("\r\n")
                method, target, _ = first.split(" ", 2)
                headers = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in lines)}
                if headers.get("expect", "").lower() == "100-continue":
                    writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                await asyncio.sleep(self.latency_s)
                status, extra, data = self.answer(method, target, headers, body)
                found = "".join(f"{name}: {value}\r\n" for name, value in extra.items())
                length = "" if "Content-Length" in extra else f"Content-Length: {len(data)}\r\n"
                writer.write(f"HTTP/1.1 {status} -\r\n{found}{length}\r\n".encode() + data)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    def answer(self, method: str, target: str, headers: dict[str, str], body: bytes) -> Answer:
        """Status, headers and body for a request."""
        parts = urlsplit(target)
        path, query = unquote(parts.path), parse_qs(parts.query, keep_blank_values=True)
        if "uploads" in query or "uploadId" in query:
            return self.in_parts(method, path, query, body)
        if method == "PUT":
            self.objects[path], self.etags[path] = body, _etag(body)
            return 200, {"ETag": self.etags[path]}, b""
        if method == "DELETE":
            self.objects.pop(path, None)
            return 204, {}, b""
        if "list-type" in query:
            return 200, {"Content-Type": "application/xml"}, self.listing(path.strip("/"), query)
        if path not in self.objects:
            code = f"<Error><Code>NoSuchKey</Code><Message>{escape(path)} is not there</Message></Error>".encode()
            return 404, {"Content-Type": "application/xml"}, b"" if method == "HEAD" else code
        data = self.objects[path]
        known = {"ETag": self.etags[path], "Last-Modified": "Thu, 01 Jan 2026 00:00:00 GMT"}
        if method == "HEAD":
            return 200, {**known, "Content-Length": str(len(data))}, b""
        if wanted := re.match(r"bytes=(\d+)-(\d*)$", headers.get("range", "")):
            start, end = int(wanted[1]), min(int(wanted[2] or len(data)), len(data) - 1)
            return 206, {**known, "Content-Range": f"bytes {start}-{end}/{len(data)}"}, data[start : end + 1]
        return 200, known, data

    def in_parts(self, method: str, path: str, query: dict[str, list[str]], body: bytes) -> Answer:
        """Begins, fills, ends or forgets an upload in parts; the object is there at the end."""
        xml = {"Content-Type": "application/xml"}
        if "uploads" in query:
            self.parts[path] = {}
            answer = (
                f"<InitiateMultipartUploadResult xmlns='{_NAMESPACE}'><UploadId>{_etag(path.encode())[1:-1]}</UploadId>"
            )
            return 200, xml, f"{answer}</InitiateMultipartUploadResult>".encode()
        if method == "PUT":
            self.parts[path][int(query["partNumber"][0])] = body
            return 200, {"ETag": _etag(body)}, b""
        parts = self.parts.pop(path)
        if method == "DELETE":
            return 204, {}, b""
        self.objects[path] = b"".join(parts[number] for number in sorted(parts))
        self.etags[path] = _etag(self.objects[path])
        return 200, xml, f"<CompleteMultipartUploadResult xmlns='{_NAMESPACE}'/>".encode()

    def listing(self, bucket: str, query: dict[str, list[str]]) -> bytes:
        """A page of a thousand names, or all that begin alike up to the delimiter."""
        prefix, delimiter = query.get("prefix", [""])[0], query.get("delimiter", [""])[0]
        start = query.get("continuation-token", [""])[0]
        above = f"/{bucket}/"
        names = sorted(n for p in self.objects if p.startswith(above) and (n := p[len(above) :]).startswith(prefix))
        files, folders = [], set()
        for name in names:
            rest = name[len(prefix) :]
            if delimiter and delimiter in rest:
                folders.add(prefix + rest.split(delimiter, 1)[0] + delimiter)
            elif name > start:
                files.append(name)
        page, more = files[:1000], len(files) > 1000
        text = "".join(
            f"<Contents><Key>{escape(n)}</Key><LastModified>{_DATE}</LastModified><ETag>{self.etags[above + n]}</ETag>"
            f"<Size>{len(self.objects[above + n])}</Size></Contents>"
            for n in page
        ) + "".join(f"<CommonPrefixes><Prefix>{escape(n)}</Prefix></CommonPrefixes>" for n in sorted(folders))
        token = f"<NextContinuationToken>{escape(page[-1])}</NextContinuationToken>" if more else ""
        return (
            f"<?xml version='1.0'?><ListBucketResult xmlns='{_NAMESPACE}'><Name>{bucket}</Name><KeyCount>{len(page)}"
            f"</KeyCount><IsTruncated>{str(more).lower()}</IsTruncated>{token}{text}</ListBucketResult>"
        ).encode()


def _etag(body: bytes) -> str:
    return f'"{hashlib.md5(body).hexdigest()}"'


async def main(port: int, latency_s: float) -> None:
    store = Store(latency_s)
    server = await asyncio.start_server(store.serve, "127.0.0.1", port, limit=2**26)
    print("ready", flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), float(sys.argv[2])))
