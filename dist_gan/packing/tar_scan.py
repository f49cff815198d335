"""Strict reader of tar archives: anything but a complete and valid archive raises an error with its byte offset.

`tarfile` and webdataset stop without an error at a damaged header or a block of zeros, and so lose the samples behind
it. This reader raises an error for a truncated archive, a wrong checksum, zeros in the middle, and a missing end marker.
"""

from __future__ import annotations

import hashlib
import re
import reprlib
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from dist_gan.pictures import MAX_FILE_BYTES

BLOCK = 512
_CHUNK = 2**20
_EXTENDED = 2**20
"""Largest size of an extended header or a long name, in bytes; it is held in memory as a whole."""
_DIGITS = 20
"""Largest number of digits of a size in an extended header: more than any file system allows."""
_ZEROS = bytes(BLOCK)
_CHECKSUM_AS_SPACES = 8 * 32
_REGULAR = (b"0", b"\0", b"7")
_LONG_NAME, _LONG_LINK, _PAX, _PAX_GLOBAL, _FOLDER = b"L", b"K", b"x", b"g", b"5"
_KINDS = {b"1": "hard link", b"2": "symbolic link", b"S": "sparse file"}
_OCTAL = re.compile(rb"[0-7]+")
_MAGIC = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"PK": "zip", b"\x28\xb5": "zstd"}


class DamagedTar(ValueError):
    """Damage in an archive: name of the archive, byte offset and reason."""

    def __init__(self, place: str, offset: int, reason: str) -> None:
        super().__init__(place, offset, reason)
        self.place, self.offset, self.reason = place, offset, reason

    def __str__(self) -> str:
        return f"{self.place} at byte {self.offset:,}: {self.reason}"


class Member(NamedTuple):
    """A regular file of an archive."""

    name: str
    offset: int
    """Position of the first byte of the data, in bytes from the start of the archive."""
    size: int
    data: bytes | None
    """Contents of the member; None if it is larger than `hold` of the scan."""


class TarScan:
    """Iterator over the regular files of an archive, in order, with their data. It can be iterated once.

    Args:
        file: open archive, positioned at its first byte.
        size: size of the archive, in bytes.
        place: name of the archive, for errors.
        hold: size, in bytes, of the largest member whose data are read into memory; larger ones are yielded without data.

    Attributes:
        sha256: SHA-256 of the whole archive, in hex; set after the last member.

    Raises:
        DamagedTar: while iterating, at the first damage.
    """

    def __init__(self, file: BinaryIO, *, size: int, place: str, hold: int = MAX_FILE_BYTES) -> None:
        self.sha256 = ""
        self._file = file
        self._size = size
        self._place = place
        self._hold = hold
        self._position = 0
        self._digest = hashlib.sha256()

    def __iter__(self) -> Iterator[Member]:
        long_name: str | None = None
        pax: dict[str, str] = {}
        while True:
            start = self._position
            block = self._read(BLOCK, what="a header")
            if block == _ZEROS:
                if long_name is not None or pax:
                    raise self._damage(start, "the archive ends where a file was announced")
                self._read_end(start)
                self.sha256 = self._digest.hexdigest()
                return
            size, kind = self._check_header(block, start)
            if "size" in pax:
                size = self._pax_size(pax["size"], start)
            if self._position + size > self._size:
                missing = self._position + size - self._size
                raise self._damage(
                    start, f"{missing:,} bytes of a file of {size:,} are missing; the archive was cut off"
                )
            if kind in (_LONG_NAME, _LONG_LINK, _PAX, _PAX_GLOBAL):
                if size > _EXTENDED:
                    raise self._damage(start, f"an extended header of {size:,} bytes; no name or number needs so many")
                data = self._read_data(size)
                if kind == _LONG_NAME:
                    long_name = self._text(data.rstrip(b"\0"), start)
                elif kind == _PAX:
                    pax = self._read_pax(data, start)
                continue
            name = pax.get("path") or long_name or self._header_name(block, start)
            long_name, sparse, pax = None, any(key.startswith("GNU.sparse") for key in pax), {}
            if kind == _FOLDER:
                self._pass(size)
                continue
            if kind not in _REGULAR or sparse:
                what = "sparse file" if sparse else _KINDS.get(kind, f"special file (type {kind!r})")
                raise self._damage(start, f"{name!r} is a {what}; only regular files hold samples")
            offset = self._position
            if size > self._hold:
                self._pass(size)
                yield Member(name, offset, size, None)
            else:
                yield Member(name, offset, size, self._read_data(size))

    def _damage(self, offset: int, reason: str) -> DamagedTar:
        return DamagedTar(self._place, offset, reason)

    def _read(self, count: int, *, what: str) -> bytes:
        data = self._file.read(count)
        if len(data) != count:
            packed = _MAGIC.get(data[:2]) if self._position == 0 else None
            if packed:
                raise self._damage(0, f"this is a {packed} file, not a plain tar; unpack it first")
            found = f"only {len(data)} of the {count} bytes of {what}" if data else f"nothing where {what} was expected"
            raise self._damage(self._position, f"{found}; the archive was cut off or its end marker is missing")
        self._position += count
        self._digest.update(data)
        return data

    def _read_data(self, size: int) -> bytes:
        data = self._read(size, what="a file") if size else b""
        padding = -size % BLOCK
        if padding:
            self._read(padding, what="the padding of a file")
        return data

    def _pass(self, size: int) -> None:
        """Skips the data of a member and its padding; they are read for the hash of the archive only."""
        end = self._position + size + -size % BLOCK
        while self._position < end:
            self._read(min(_CHUNK, end - self._position), what="a file")

    def _read_end(self, start: int) -> None:
        """Checks the end of the archive: two blocks of zeros, and only zeros behind them."""
        if self._position == self._size:
            raise self._damage(start, "one block of zeros at the end instead of two; the archive was cut off")
        while self._position < self._size:
            position = self._position
            data = self._read(min(_CHUNK, self._size - position), what="the end")
            if data.strip(b"\0"):
                inside = len(data) - len(data.lstrip(b"\0"))
                raise self._damage(
                    start, f"a block of zeros with more data behind it (from byte {position + inside:,})"
                )

    def _check_header(self, block: bytes, start: int) -> tuple[int, bytes]:
        stated = _octal(block[148:156])
        rest = block[:148] + block[156:]
        unsigned = sum(rest) + _CHECKSUM_AS_SPACES
        if stated != unsigned:
            # Some old programs computed the checksum with signed bytes.
            signed = unsigned - 256 * sum(byte > 127 for byte in rest)
            if stated != signed:
                raise self._damage(start, self._bad_header(block, start))
        size = _number(block[124:136])
        if size is None or size < 0:
            raise self._damage(start, f"the size field {block[124:136]!r} is no number")
        return size, block[156:157]

    def _bad_header(self, block: bytes, start: int) -> str:
        packed = _MAGIC.get(block[:2]) if start == 0 else None
        if packed:
            return f"this is a {packed} file, not a plain tar; unpack it first"
        return "the checksum of a header is wrong; the archive is damaged"

    def _header_name(self, block: bytes, start: int) -> str:
        name = block[:100].split(b"\0", 1)[0]
        prefix = block[345:500].split(b"\0", 1)[0] if block[257:263] == b"ustar\0" else b""
        return self._text(prefix + b"/" + name if prefix else name, start)

    def _pax_size(self, text: str, start: int) -> int:
        if not (text.isascii() and text.isdigit() and len(text) <= _DIGITS):
            raise self._damage(start, f"the size {reprlib.repr(text)} is no number of bytes")
        return int(text)

    def _text(self, raw: bytes, start: int) -> str:
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self._damage(start, f"the file name {raw!r} is not UTF-8") from error

    def _read_pax(self, data: bytes, start: int) -> dict[str, str]:
        records: dict[str, str] = {}
        at = 0
        while at < len(data):
            space = data.find(b" ", at, at + _DIGITS)
            digits = data[at : max(at, space)]
            end = at + int(digits) if digits.isdigit() else at
            record = data[space + 1 : end]
            if end <= space + 1 or end > len(data) or not record.endswith(b"\n") or b"=" not in record:
                raise self._damage(start, "an extended header is damaged")
            keyword, _, value = record[:-1].partition(b"=")
            # Other keywords, such as owner and times, may have binary values and do not concern the data.
            if keyword in (b"path", b"size") or keyword.startswith(b"GNU.sparse"):
                records[keyword.decode("ascii", "replace")] = self._text(value, start)
            at = end
        return records


def _octal(field: bytes) -> int | None:
    text = field.split(b"\0", 1)[0].strip()
    return int(text, 8) if _OCTAL.fullmatch(text) else None


def _number(field: bytes) -> int | None:
    if field[0] in (0x80, 0xFF):
        return int.from_bytes(field[1:], "big", signed=field[0] == 0xFF)
    return _octal(field)
