"""Sanitised text for terminals and logs: without secrets in URLs, and without control characters.

All text that is printed or stored passes through `safe` (one line) or `report` (several lines). Exceptions for users
call them on creation; the tracker, the command line and `outcome.json` call them on writing.
"""

from __future__ import annotations

import os
import re
import sys
import traceback
from collections.abc import Iterable
from io import TextIOWrapper
from typing import Any

_SCHEME = re.compile(r"(pipe|data|file):(?://)?|([^/:]+)://", re.IGNORECASE)
_KNOWN = "file|memory|s3|s3a|s3n|gs|gcs|az|abfs|abfss|adl|https?|hf|ftp|sftp|ssh|git|github|webdav|hdfs"
_START = re.compile(
    r"(?<![^\W_])pipe:(?!\.\.\.)"  # webdataset's command, up to the end of the text
    r"|(?<![^\W_])data:(?=[^\s'\".])"
    r"|(?<![\w+.\-])[\w+.\-]*:/+"  # a scheme, with one slash or more; looked for once in a word, which may be long
    rf"|(?<![^\W_])(?:{_KNOWN}):(?=[^\s'\"])"  # a scheme without any
    r"|(?<![\w/.~:\-])//"  # a URL that leaves its scheme out
    r"|(?:(?<=[\s'\"`(\[{{=,])|^)[^\s:/'\"`(\[{{=,]+:(?=[^\s'\"][^\s@]{0,4096}@)",  # user:secret@ alone, no longer than any is
    re.IGNORECASE,
)
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_CHAIN = re.compile(r"(?:\w+::)+")
"""Chained file systems before a URL, in fsspec's notation (`filecache::`)."""
_OPENED = re.compile(r"(['\"`])(?:[\w.\-]+=)?$")
"""Quotation mark before a URL, with an optional key of an override in between."""
_CLOSING = re.compile(r"[\])}>,;:.'\"`!]*$")
_AUTHORITY_START = re.compile(r"(pipe|data):|(?:[^/:]*:)?/{2,}|[^/:]*:/?", re.IGNORECASE)
_PORT = re.compile(r"(?:localhost|[^/?#:@]*\.[^/?#:@]*|\[[0-9a-fA-F:.]*\]):\d{1,5}(?:[/?#]|$)")
"""Host with a port, so that the text after the colon is not a secret."""
_USER = re.compile(r"^[^/?#]*@")
_INNER = re.compile(r":/|(?<!/)//")


TRACEBACK = "DIST_GAN_TRACEBACK"
"""Environment variable that turns on tracebacks of unforeseen errors, if it is neither empty nor 0."""


def safe(text: object) -> str:
    """Returns the text on one line, without secrets in URLs, and with unprintable characters as escapes.

    Safe text is returned unchanged. Secrets of a URL are its user part, query and fragment, and the command of `pipe:`.
    A URL ends at a blank, or at the quotation mark before it.
    """
    printable = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))
    parts: list[str] = []
    at = 0
    while (match := _START.search(printable, at)) is not None:
        start = match.start()
        end = _end_of_url(printable, at, match)
        parts += [printable[at:start], _shown(printable[start:end])]
        at = end
    return "".join([*parts, printable[at:]])


def report(text: str) -> str:
    """Returns a text of several lines, each safe; lines after the first cannot be mistaken for messages of the program."""
    return lines(text.split("\n"))


def lines(parts: Iterable[object]) -> str:
    """Joins lines to one message, each line safe; lines after the first are indented."""
    first, *rest = (safe(part) for part in parts)
    return "\n".join([first, *(line if line[:1] in ("", " ") else f"  {line}" for line in rest)])


def unprintable(text: str) -> bool:
    """True if a name holds control characters, line breaks, bidirectional controls or lone surrogates."""
    return _UNPRINTABLE.search(text) is not None


def shown(value: object, *, limit: int = 200) -> str:
    """Returns a value as text for a message: safe, and at most `limit` characters long."""
    text = safe(repr(value))
    return text if len(text) <= limit else f"{text[:limit]}... ({len(text):,} characters)"


def safe_values(value: Any) -> Any:
    """Returns a copy of a JSON value in which all texts are safe."""
    if isinstance(value, str):
        return safe(value)
    if isinstance(value, dict):
        return {safe(k): safe_values(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [safe_values(v) for v in value]
    return value


def last_resort(error: BaseException) -> str:
    """Returns one sentence for an unforeseen error, with its traceback if DIST_GAN_TRACEBACK is set."""
    text = safe(f"{type(error).__name__}: {error}")
    if os.environ.get(TRACEBACK, "0") not in ("", "0"):
        return report("".join(traceback.format_exception(error)).rstrip()) + "\n" + text
    return f"{text[:500]}: not foreseen by this program; {TRACEBACK}=1 in the environment shows where it happened"


def print_anything() -> None:
    """Makes standard output write characters that its encoding lacks as escapes, so that printing does not raise."""
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def scheme_of(url: str) -> str:
    """Returns the scheme of a URL in lower case; a plain path is `file`, webdataset's `pipe:` is `pipe`."""
    match = _SCHEME.match(url)
    return (match[1] or match[2]).lower() if match else "file"


def redact(url: str) -> str:
    """Returns the URL without possible secrets (user part, query, fragment, a pipe's command); a path is left
    unchanged.
    """
    chain = _CHAIN.match(url)
    begin = chain.end() if chain else 0
    return url[:begin] + _redacted(url[begin:]) if _START.match(url, begin) else url


def _end_of_url(text: str, begin: int, match: re.Match[str]) -> int:
    opened, has_blanks = _OPENED.search(text, begin, match.start()), match[0].lower() == "pipe:"
    at = match.end()
    while opened is not None and at < len(text):
        if text[at] == opened[1]:
            end = _next_blank(text, at)
            if _CLOSING.match(text, at, end):
                return at
            if not has_blanks:
                return end  # the quotation mark belongs to the URL
        at += 2 if text[at] == "\\" else 1
    return len(text) if has_blanks else _next_blank(text, match.end())


def _next_blank(text: str, at: int) -> int:
    blank = text.find(" ", at)
    return blank if blank >= 0 else len(text)


def _shown(url: str) -> str:
    """Returns a URL inside a text in redacted form; closing brackets and punctuation after it are kept."""
    clean = _redacted(url)
    if clean == url:
        return url
    closing = _CLOSING.search(url)
    tail = closing[0] if closing else ""
    return clean if clean.endswith(tail) else clean + tail


def _redacted(url: str) -> str:
    start = _AUTHORITY_START.match(url)
    if start is None:
        return url
    if start[1]:
        return f"{start[1].lower()}:..."
    scheme, rest = start[0].partition(":")[0].lower(), url[start.end() :]
    if scheme in ("file", "memory") and not rest.partition("/")[0].count("@"):
        # A path may hold any character; in a text without blanks a URL may follow it.
        return start[0] + safe(rest) if _INNER.search(rest) else url
    if not _PORT.match(rest) and not rest.startswith("["):
        user, colon, _ = rest.partition(":")
        if colon and "@" in rest[len(user) :]:  # up to the last @, since a secret may hold any character
            secret, _, rest = rest.rpartition("@")
            if re.search("[?#]", secret):
                return start[0] + "..."  # the last @ may be in the query
    port = re.split("[/?#]", rest, maxsplit=1)[0].partition(":")[2] if "//" in start[0] and rest[:1] != "[" else ""
    if _CLOSING.sub("", port).strip("0123456789"):
        return start[0] + "..."  # the @ is missing or was cut off
    if scheme != "abfs":  # in abfs the container stands before the @
        rest = _USER.sub("", rest)
    return start[0] + re.split("[?#]", rest, maxsplit=1)[0]
