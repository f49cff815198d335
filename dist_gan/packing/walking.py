"""Lists all files below a local folder. Links that lead out of it are followed, and no folder is visited twice."""

from __future__ import annotations

import errno
import os
import stat
from collections import defaultdict
from typing import NamedTuple

from dist_gan import storage
from dist_gan.packing.listing import File
from dist_gan.types import UserError

BROKEN = "broken links"
LOOPS = "links to folders that are read already"
ODD = "neither files nor folders"
_GONE = (errno.ENOENT, errno.ELOOP, errno.ENOTDIR, errno.ENAMETOOLONG)
"""Error numbers for a link whose target is absent, or that leads to itself."""


class FolderTree(NamedTuple):
    """Files and folders below a folder, and the paths that were skipped."""

    files: list[File]
    folders: list[str]
    left_out: dict[str, list[str]]
    """Skipped paths, by reason."""


def walk(root: str) -> FolderTree:
    """Files and folders below a folder, as relative paths with `/`, sorted within each folder.

    A link to a file counts as the file. A link to a folder is followed once, and only if it leads out of the tree; one
    that leads back into the tree would repeat its images, and one to a parent of the tree would never end.

    Raises:
        UserError: a folder cannot be read.
    """
    found = FolderTree([], [], defaultdict(list))
    top = os.path.realpath(root)
    followed: set[str] = set()
    waiting = [(root, "", False)]
    while waiting:
        folder, prefix, is_outside = waiting.pop()
        below: list[tuple[str, str, bool]] = []
        for item in _items(folder):
            path = f"{prefix}{item.name}"
            try:
                kind = item.stat().st_mode
                is_link = item.is_symlink()
            except OSError as error:
                if error.errno not in _GONE:
                    raise UserError(f"{item.path}: cannot be read: {storage.why(error, reading=True)}") from error
                found.left_out[BROKEN].append(path)
                continue
            if stat.S_ISREG(kind):
                found.files.append(File(path, item.stat().st_size))
            elif not stat.S_ISDIR(kind):
                found.left_out[ODD].append(path)
            elif is_link or is_outside:
                real = os.path.realpath(item.path)
                if real in followed or _holds(top, real) or _holds(real, top):
                    found.left_out[LOOPS].append(path)
                else:
                    followed.add(real)
                    found.folders.append(path)
                    below.append((item.path, f"{path}/", True))
            else:
                found.folders.append(path)
                below.append((item.path, f"{path}/", False))
        waiting += reversed(below)
    return found


def _items(folder: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda item: item.name)
    except OSError as error:
        raise UserError(f"{folder}: cannot be read: {storage.why(error, reading=True)}") from error


def _holds(folder: str, path: str) -> bool:
    return path == folder or path.startswith(folder.rstrip("/") + "/")
