"""Clients of stores, made from URLs by fsspec, and requests that are retried while a store does not answer.

Before a client is created, the module `urls` refuses all schemes that are not on its list, since fsspec has schemes that
run commands or read from other machines.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, TypeVar

import fsspec
from fsspec.core import url_to_fs

from dist_gan.storage.errors import failure, refusal
from dist_gan.storage.patience import Patience
from dist_gan.types import TrainingFailed, UserError
from dist_gan.urls import check_url, local_path
from dist_gan.wording import redact, scheme_of

Result = TypeVar("Result")
CONNECTIONS = 32
"""Number of connections to one store; botocore's default, ten, allows 200 requests a second if each takes 50 ms."""
_CLIENT_OPTIONS: dict[str, dict[str, Any]] = {
    "s3": {
        "config_kwargs": {
            "max_pool_connections": CONNECTIONS,
            # One attempt a request, since `Patience` makes and counts the retries.
            "retries": {"total_max_attempts": 1},
            "connect_timeout": 10,
            "read_timeout": 30,
        }
    }
}
_PACKAGES = {
    "s3": ("s3fs", "s3"), "gs": ("gcsfs", "gs"), "az": ("adlfs", "azure"), "abfs": ("adlfs", "azure"),
    "http": ("aiohttp", "http"), "https": ("aiohttp", "http"), "hf": ("huggingface_hub", "hf"),
}  # fmt: skip
"""Package that each URL scheme needs, and the extra of this project (as in `pip install .[s3]`) that installs it."""


def connect(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """Connects to the store or disk of a URL; returns fsspec's file system, and the path of the URL in it.

    Raises:
        UserError: the scheme is not allowed, its package is not installed, or the store refuses access.
        TrainingFailed: the client cannot be created for another reason.
    """
    check_url(url, place="url")
    local = local_path(url)
    if local is not None:
        return fsspec.filesystem("file"), str(local.absolute())
    try:
        filesystem, path = url_to_fs(url, **_CLIENT_OPTIONS.get(scheme_of(url), {}))
        if scheme_of(url) == "s3":
            filesystem.retries = 1
    except ImportError as error:
        package, extra = _PACKAGES[scheme_of(url)]
        raise UserError(
            f"the scheme {scheme_of(url)!r} of {redact(url)!r} needs the package {package}, which is not installed; run: "
            f"pip install {package} (in a checkout: pip install -e '.[{extra}]')"
        ) from error
    except Exception as error:  # some clients look up credentials and addresses on creation
        raise failure(error, f"cannot use {redact(url)}") from error
    return filesystem, path


def asked(
    url: str, doing: str, operation: Callable[[], Result], patience: Patience | None = None, *, about: str = ""
) -> Result:
    """Runs an operation on a store, again and again while the store does not answer; returns the operation's result.

    An operation on a local disk runs once.

    Args:
        url: URL of the file or folder.
        doing: name of the operation in one word (read, list, write, remove).
        operation: function that does the work.
        patience: time limit, which may be shared with other operations; a new `Patience` by default.
        about: text that follows the URL in error sentences.

    Raises:
        OSError: the operation failed on a local disk.
        FileNotFoundError: the store has no such file or folder.
        UserError: the store refuses access, or its name cannot be resolved.
        TrainingFailed: the store has not answered within the time limit, or failed in another way.
    """
    if local_path(url) is not None:
        return operation()
    patience, failed_at, number = patience or Patience(), 0.0, 0
    while True:
        try:
            result = operation()
        except (UserError, TrainingFailed):
            raise
        except Exception as error:
            failed_at = failed_at if number else time.monotonic()
            try:
                patience.wait(number, failed_at, error, place=redact(url))
            except Exception as last:
                if isinstance(last, FileNotFoundError | NotADirectoryError) and refusal(last) is None:
                    raise
                raise failure(last, f"cannot {doing} {redact(url)}{about}") from last
            number += 1
        else:
            patience.met = True
            return result
