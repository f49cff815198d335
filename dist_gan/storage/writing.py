"""Functions that write and remove files by URL, on disks and in object stores."""

from __future__ import annotations

import glob
import os
import shutil
from pathlib import Path

from dist_gan.storage import local
from dist_gan.storage.client import asked, connect
from dist_gan.storage.errors import failure
from dist_gan.storage.patience import Patience
from dist_gan.types import TrainingFailed, UserError
from dist_gan.urls import check_url, join, local_path
from dist_gan.wording import redact, scheme_of

PART_BYTES = 2**24
"""Size, in bytes, of each part of a large upload."""
_UPLOAD_OPTIONS: dict[str, dict[str, int]] = {"s3": {"chunksize": PART_BYTES, "max_concurrency": 2}}
"""Options of the stores' clients for uploads, by scheme; s3fs's defaults hold ten parts of 50 MiB in memory."""


def make_folder(url: str) -> None:
    """Creates a folder and its parents on a disk; does nothing for an object store, which has no folders."""
    check_url(url, place="url")
    if scheme_of(url) in ("file", "memory"):
        filesystem, path = connect(url)
        filesystem.makedirs(path, exist_ok=True)


def publish(url: str, data: bytes | memoryview) -> None:
    """Writes a file atomically, so that no reader ever sees an incomplete file.

    On a disk, the file is written under a temporary name and flushed, then renamed, and its folder is flushed. In an
    object store, an upload becomes visible only when it is complete; afterwards its size is compared with `data`.

    Raises:
        TrainingFailed: the disk is full or the store does not accept the file; no incomplete file is left behind.
    """
    about = f" ({len(data):,} bytes)"
    place = f"cannot write {redact(url)}{about}"
    path_here = local_path(url)
    if path_here is not None:
        try:
            local.publish(path_here, data)
        except OSError as error:
            raise TrainingFailed(f"{place}: {local.why(error)}") from error
        return
    filesystem, path = connect(url)
    patience = Patience(met=True)
    try:
        asked(url, "write", lambda: filesystem.pipe_file(path, bytes(data)), patience, about=about)
        filesystem.invalidate_cache()
        written = int(asked(url, "write", lambda: filesystem.size(path), patience, about=about))
    except FileNotFoundError as error:
        raise TrainingFailed(f"{place}: it is not there after it was written") from error
    except UserError as error:  # a write happens during a run, which cannot continue without it
        raise TrainingFailed(*error.args) from error
    if written != len(data):
        remove(url)
        raise TrainingFailed(f"{place}: {written} of {len(data)} bytes arrived")


def upload(file: Path, url: str, name: str, *, patience: Patience | None = None) -> None:
    """Copies a local file into a folder of a store, where the copy becomes visible once it is complete.

    Args:
        file: path of the local file.
        url: URL of the folder.
        name: path of the copy inside the folder.
        patience: time limit, which may be shared with other operations; a new `Patience` by default.

    Raises:
        TrainingFailed: the store does not answer, or the copy has another size than the file.
        UserError: access is refused.
    """
    filesystem, folder = connect(url)
    path, place = f"{folder.rstrip('/')}/{name}", join(url, name)
    expected = os.path.getsize(file)
    options = _UPLOAD_OPTIONS.get(scheme_of(url), {})
    try:
        asked(place, "write", lambda: filesystem.put_file(str(file), path, **options), patience)
        filesystem.invalidate_cache()
        written = int(asked(place, "write", lambda: filesystem.size(path), patience))
    except FileNotFoundError as error:
        raise failure(error, f"cannot write {redact(place)}") from error
    if written != expected:
        remove_in(url, name, patience=patience)
        raise TrainingFailed(f"cannot write {redact(place)}: {written} of {expected} bytes arrived")


def remove(url: str) -> None:
    """Removes a file; an absent file is no error. Raises the errors of `client.asked`."""
    filesystem, path = connect(url)
    try:
        asked(url, "remove", lambda: filesystem.rm_file(path))
    except FileNotFoundError:
        return


def remove_in(url: str, name: str, *, patience: Patience | None = None) -> None:
    """Removes the file `name` in a folder of a store; an absent file is no error. Raises the errors of `client.asked`."""
    filesystem, folder = connect(url)
    path = f"{folder.rstrip('/')}/{name}"
    try:
        asked(join(url, name), "remove", lambda: filesystem.rm_file(path), patience)
    except FileNotFoundError:
        return


def remove_folder(url: str) -> None:
    """Removes a folder and its content; an absent folder is no error. Raises the errors of `client.asked`."""
    filesystem, path = connect(url)
    try:
        if local_path(url) is not None:
            shutil.rmtree(path)
        else:
            # fsspec would interpret the name as a glob pattern.
            asked(url, "remove", lambda: filesystem.rm(glob.escape(path), recursive=True))
    except FileNotFoundError:
        return
