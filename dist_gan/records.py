"""Reads and appends to the JSON and JSONL files of the program, which may have been damaged since they were written.

A full disk leaves half a line, a power cut leaves zeros, a user may leave a folder of the same name. An unusable file
raises `Damaged`, with place and reason in one sentence; unusable lines of a log are skipped and counted. If a store does
not answer, or the machine has no file handles or memory left, no file is damaged, and TrainingFailed is raised instead.
"""

from __future__ import annotations

import errno
import json
import math
import os
import reprlib
import stat
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

from dist_gan import storage
from dist_gan.json_text import parse_json
from dist_gan.storage import errors
from dist_gan.types import TrainingFailed, UserError

LIMIT = 2**26
"""Largest size of a JSON file, in bytes; a manifest of 100,000 tensors has a third of this size."""
LINE_LIMIT = 2**20
"""Largest length of a line of a log, in bytes."""
LARGEST = 2**63 - 1
"""Default upper limit of whole numbers in a file."""
_NO_RESOURCES = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)


class Damaged(UserError):
    """Error for a file that exists but cannot be used; the message has place and reason in one sentence."""


class Record:
    """Reads the values of a JSON object, and checks their types and ranges.

    Args:
        values: the parsed JSON value.
        place: name of the file, and position in the file, for error sentences.
        remedy: end of every error sentence, which says what the user can do.

    Raises:
        Damaged: `values` is no JSON object.
    """

    def __init__(self, values: Any, *, place: str, remedy: str = "") -> None:
        if not isinstance(values, dict):
            raise Damaged(f"{place} is damaged: it holds {_shown(values)} where a JSON object is needed{remedy}")
        self.values: dict[str, Any] = values
        self.place, self.remedy, self._path = place, remedy, ""

    def __contains__(self, key: str) -> bool:
        return key in self.values

    def __iter__(self) -> Iterator[str]:
        return iter(self.values)

    def problem(self, key: str, needed: str) -> Damaged:
        """Returns the error for the value of `key`, which is not what is `needed`."""
        found = _shown(self.values[key]) if key in self.values else "missing"
        return Damaged(f"{self.place} is damaged: {self._path}{key} is {found}, not {needed}{self.remedy}")

    def whole(self, key: str, *, low: int = 0, high: int = LARGEST) -> int:
        """Returns the whole number under `key`; raises `Damaged` unless it is from `low` to `high`."""
        value = self.values.get(key)
        if type(value) is not int or not low <= value <= high:
            raise self.problem(key, f"a whole number from {low} {'on' if high == LARGEST else f'to {high}'}")
        return value

    def wholes(self, key: str, *, low: int = 0, high: int = LARGEST) -> list[int]:
        """Returns the list of whole numbers under `key`; raises `Damaged` unless each is from `low` to `high`."""
        value = self.values.get(key)
        if not isinstance(value, list) or not all(type(n) is int and low <= n <= high for n in value):
            raise self.problem(key, f"a list of whole numbers from {low} on")
        return value

    def number(self, key: str, *, low: float = -math.inf) -> float:
        """Returns the number under `key` as a float; raises `Damaged` unless it is finite and at least `low`."""
        value: Any = self.values.get(key)
        if type(value) not in (int, float) or not _finite(value) or value < low:
            raise self.problem(key, "a finite number" + (f" from {low:g} on" if math.isfinite(low) else ""))
        return float(value)

    def text(self, key: str, *, longest: int = 4096) -> str:
        """Returns the text under `key`; raises `Damaged` if it has more than `longest` characters or is no text."""
        value: Any = self.values.get(key)
        if not _is_text(value) or len(value) > longest:
            raise self.problem(key, f"text of at most {longest:,} signs")
        return str(value)

    def texts(self, key: str, *, longest: int = 4096) -> list[str]:
        """Returns the list of texts under `key`; raises `Damaged` if one has more than `longest` characters."""
        value = self.values.get(key)
        if not isinstance(value, list) or not all(_is_text(text) and len(text) <= longest for text in value):
            raise self.problem(key, f"a list of texts of at most {longest:,} signs")
        return value

    def record(self, key: str) -> Record:
        """Returns the JSON object under `key` as a `Record`; raises `Damaged` if the value is no JSON object."""
        if not isinstance(self.values.get(key), dict):
            raise self.problem(key, "a JSON object")
        inner = Record(self.values[key], place=self.place, remedy=self.remedy)
        inner._path = f"{self._path}{key if key.isprintable() else repr(key)}."
        return inner


class Lines(NamedTuple):
    """Contents of a log: the usable lines, and the number of unusable lines."""

    records: list[Record]
    """Lines of the log that are JSON objects, in their order."""
    odd: int
    """Number of lines of the log that are not JSON objects."""


# -- files --------------------------------------------------------------------------------------------------------


@contextmanager
def reading(url: str) -> Iterator[None]:
    """Turns errors raised while a file or folder is read inside the `with` block into the program's exceptions.

    Raises:
        FileNotFoundError: the file is absent; passed on unchanged.
        Damaged: the file exists and cannot be read.
        TrainingFailed: the store does not answer, or this machine has no file handles or memory left.
        UserError: the store refuses access.
    """
    place = storage.redact(url)
    is_local = storage.local_path(url) is not None
    try:
        yield
    except (UserError, TrainingFailed, FileNotFoundError):
        raise
    except MemoryError as error:
        raise TrainingFailed(f"cannot read {place}: there is not enough memory for it") from error
    except OSError as error:
        if error.errno in _NO_RESOURCES:
            raise TrainingFailed(f"cannot read {place}: {error.strerror}; start the same command again") from error
        if is_local or isinstance(error, IsADirectoryError):
            raise Damaged(
                f"{place} is damaged: it cannot be read ({error.strerror or type(error).__name__})"
            ) from error
        raise errors.failure(error, f"cannot read {place}") from error
    except Exception as error:
        if is_local:
            raise
        raise errors.failure(error, f"cannot read {place}") from error


def size(url: str) -> int:
    """Returns the size of a file, in bytes.

    Raises:
        FileNotFoundError, Damaged, TrainingFailed, UserError: as in `reading`.
    """
    with reading(url):
        local = storage.local_path(url)
        if local is None:
            return storage.size(url)
        facts = os.stat(local)
        if not stat.S_ISREG(facts.st_mode):  # reading from a pipe would block for ever
            kind = "a folder" if stat.S_ISDIR(facts.st_mode) else "no regular file"
            raise Damaged(f"{storage.redact(url)} is damaged: it is {kind}")
        return facts.st_size


def names_in(url: str, wanted: Collection[str]) -> set[str]:
    """Returns which of the `wanted` names exist in a folder; an empty set for an absent folder.

    Raises:
        Damaged, TrainingFailed, UserError: as in `reading`.
    """
    with reading(url):
        if storage.scheme_of(url) in ("http", "https"):  # web servers may offer no listing of a folder
            return {name for name in wanted if storage.exists(storage.join(url, name))}
        return set(wanted) & set(storage.list_names(url))


def read(url: str, start: int | None = None, end: int | None = None, *, limit: int = LIMIT) -> bytes:
    """Reads bytes [start, end) of a file, by default the whole file; refuses to read more than `limit` bytes.

    Raises:
        FileNotFoundError, Damaged, TrainingFailed, UserError: as in `reading`.
    """
    found = size(url)
    wanted = found if end is None else min(end, found) - (start or 0)
    if wanted > limit:
        raise Damaged(f"{storage.redact(url)} is damaged: {found:,} bytes are more than it can have ({limit:,})")
    with reading(url):
        return storage.read(url, start, end)


def parse(data: bytes, *, place: str) -> Any:
    """Returns the value of a JSON text; duplicate keys are errors.

    Raises:
        Damaged: the text is not JSON; `place` names the file.
    """
    try:
        return parse_json(data, unique_names=True)
    except ValueError as error:  # includes invalid UTF-8
        raise Damaged(f"{place} is damaged: it is no JSON ({error})") from error


def load(url: str, *, remedy: str = "", limit: int = LIMIT) -> Record:
    """Reads the JSON object in a file.

    Raises:
        FileNotFoundError, Damaged, TrainingFailed, UserError: as in `reading`.
    """
    place = storage.redact(url)
    return Record(parse(read(url, limit=limit), place=place), place=place, remedy=remedy)


# -- logs ---------------------------------------------------------------------------------------------------------


def raw_lines(file: IO[bytes]) -> Iterator[bytes]:
    """Yields the lines of a log with their line ends.

    A line longer than `LINE_LIMIT` is yielded in parts, each of which is no JSON object and thus counts as unusable.
    """
    while line := file.readline(LINE_LIMIT):
        yield line


def sound_line(line: bytes, *, place: str) -> Record | None:
    """Returns the record in a line of a log; None for an unusable line, such as a line cut short by a full disk."""
    try:
        return Record(parse(line, place=place), place=place)
    except Damaged:
        return None


def read_lines(path: Path, *, limit: int = LIMIT) -> Lines:
    """Reads all lines of a log; an absent log has no lines.

    Raises:
        Damaged: the log cannot be read, or is larger than `limit` bytes.
    """
    found, odd = [], 0
    try:
        if size(str(path)) > limit:
            raise Damaged(f"{path} is damaged: it has more than {limit:,} bytes")
        with reading(str(path)), open(path, "rb") as file:
            for line in raw_lines(file):
                record = sound_line(line, place=str(path))
                odd += record is None
                found += [] if record is None else [record]
    except FileNotFoundError:
        return Lines([], 0)
    return Lines(found, odd)


def last_line(url: str) -> Record | None:
    """Returns the last usable line of a log, searching from the end; None if no line is usable.

    Raises:
        Damaged, TrainingFailed, UserError: as in `reading`.
    """
    place = storage.redact(url)
    try:
        end = size(url)
        data = read(url, max(0, end - LINE_LIMIT), end) if end else b""
    except FileNotFoundError:
        return None
    found = (sound_line(line, place=place) for line in reversed(data.splitlines()))
    return next((record for record in found if record is not None), None)


def open_log(path: Path) -> IO[str]:
    """Opens a log for appending, and ends an incomplete last line, so that the next record begins on a new line.

    Raises:
        UserError: the path is not a regular file.
        TrainingFailed: the file cannot be written.
    """
    if path.exists() and not path.is_file():
        raise UserError(f"run.dir: {path} is no regular file, and a log has to be written there; move it away")
    try:
        with open(path, "a+b") as file:
            if file.seek(0, os.SEEK_END):
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    file.write(b"\n")
        return open(path, "a", encoding="utf-8")
    except OSError as error:
        raise TrainingFailed(f"cannot write {path}: {storage.why(error)}") from error


def append(path: Path, record: dict[str, Any]) -> None:
    """Appends a record to a log as one line, and waits until the line is on the disk.

    Raises:
        UserError: the path is not a regular file.
        TrainingFailed: the file cannot be written.
    """
    try:
        with open_log(path) as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise TrainingFailed(f"cannot write {path}: {storage.why(error)}") from error


# -- values -------------------------------------------------------------------------------------------------------


def _is_text(value: Any) -> bool:
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:  # a lone surrogate, which cannot be encoded
        return False
    return True


def _finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number of hundreds of digits
        return False


def _shown(value: Any) -> str:
    return repr(value) if isinstance(value, str) and len(value) < 80 else reprlib.repr(value)
