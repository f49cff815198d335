"""URLs and paths as text: check of allowed schemes, and normal spelling of local paths. No file is opened here."""

from __future__ import annotations

import os
import posixpath
import re
from pathlib import Path

from dist_gan.mistakes import UserError
from dist_gan.wording import redact, scheme_of, unprintable

ALLOWED_SCHEMES = ("file", "memory", "s3", "gs", "az", "abfs", "http", "https", "hf")
HAS_SECRET = (
    "came with a user part or a query, which would end up in logs and checkpoints; give the bare URL, and credentials by "
    "the environment"
)
_FILE = re.compile(r"file:(//)?", re.IGNORECASE)


def normal(url: str) -> str:
    """Returns a store's URL unchanged, or a local path in normal spelling: without `file://`, and with `~` expanded.

    Percent signs are part of the path and are not decoded; a relative path stays relative.
    """
    if scheme_of(url) != "file":
        return url
    match = _FILE.match(url)
    path = url[match.end() :] if match else url
    if match and match[1] and re.match(r"localhost(/|$)", path, re.IGNORECASE):
        path = path[len("localhost") :]
    return os.path.expanduser(path)


def is_homeless(url: str) -> bool:
    """True if a path begins with the home folder of an unknown user, so that `~name` would be taken for a folder's name."""
    return scheme_of(url) == "file" and normal(url).startswith("~")


def is_elsewhere(url: str) -> bool:
    """True if a `file://` URL names another host, whose name would otherwise be taken for a local folder."""
    match = _FILE.match(url)
    return bool(match and match[1]) and re.match(r"(?:/|~|\.|localhost(?:/|$)|$)", url[7:], re.IGNORECASE) is None


def check_url(url: str, *, place: str) -> str:
    """Returns the URL if its scheme is allowed.

    Raises:
        UserError: the scheme is not allowed, or the URL holds a secret or unprintable characters; `place` names the
            source of the URL.
    """
    scheme = scheme_of(url)
    if unprintable(url):
        raise UserError(f"{place}: {redact(url)!r} holds a sign that does not print; give another name")
    if "::" in url:
        raise UserError(
            f"{place}: {redact(url)!r} chains file systems with '::', which is not allowed; give one plain URL"
        )
    if scheme not in ALLOWED_SCHEMES:
        why = "it would run a shell command" if scheme == "pipe" else "it is not on the list of allowed schemes"
        raise UserError(
            f"{place}: the scheme {scheme!r} of {redact(url)!r} is refused, {why}; "
            f"use a path or one of {', '.join(s + '://' for s in ALLOWED_SCHEMES)}"
        )
    if redact(url) != url:
        raise UserError(f"{place}: {redact(url)!r} {HAS_SECRET}")
    return url


def place_of(url: str, *, place: str) -> str:
    """Returns an allowed URL, or a local path in normal spelling.

    Raises:
        UserError: as in `check_url`, or the text is empty.
    """
    found = normal(check_url(url, place=place))
    if not found:
        raise UserError(f"{place}: {url!r} names no file or folder; give a path or a URL")
    if is_elsewhere(url):
        raise UserError(
            f"{place}: {redact(url)!r} names a file of another host; write file:/// before a path of this one"
        )
    if is_homeless(url):
        raise UserError(
            f"{place}: {url!r} is in the home folder of nobody who is known here; begin it with ./~ if so named"
        )
    return found


def local_place_of(url: str, *, place: str) -> str:
    """Returns a local path in normal spelling.

    Raises:
        UserError: the text is a URL of a store.
    """
    found = place_of(url, place=place)
    if scheme_of(found) != "file":
        raise UserError(f"{place}: {redact(url)!r} is no local path; give a path on a disk")
    return found


def join(url: str, *names: str) -> str:
    """Returns the URL of a file or subfolder in the folder at a URL."""
    return posixpath.join(url.rstrip("/") or "/", *names)


def local_path(url: str) -> Path | None:
    """Returns the path of a local file or folder; None for a URL of a store."""
    return Path(normal(url)) if scheme_of(url) == "file" else None
