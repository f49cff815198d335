"""The folder of a pack: whose it is, how far it has come, and what a kill has left there."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from dist_gan import storage
from dist_gan.data import manifest as manifests
from dist_gan.data.manifest import Manifest, check_shards, read_manifest
from dist_gan.types import UserError

PLAN = ".pack-plan.json"
SKIPPED = "skipped.txt"


class Settled(NamedTuple):
    """What a pack has found out about its images, so that it need not look twice."""

    resolution: int
    channels: int


def already_packed(folder: Path, plan: str, say: Callable[[str], None]) -> Manifest | None:
    """The manifest of a finished pack of this plan."""
    if not (folder / manifests.NAME).exists():
        return None
    found = read_manifest(str(folder))
    if not found.origin.endswith(f"(plan {plan})"):
        raise UserError(
            f"destination {folder}: holds {found.num_samples:,} images from another pack ({found.origin}), or the "
            f"source or an option has changed since; choose another folder, or empty this one first"
        )
    check_shards(str(folder), found)
    # A kill may have come between the manifest and the end.
    remove_leftovers(folder)
    left_out = f" (without the images in {SKIPPED})" if (folder / SKIPPED).exists() else ""
    say(f"{folder}: already packed: {found.num_samples:,} images in {len(found.shards)} shards{left_out}")
    return found


def begun(folder: Path, plan: str) -> Settled | None:
    """What an interrupted pack of this plan had settled; None for a folder that is empty or not there.

    Raises:
        UserError: the folder holds something else.
    """
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"destination {folder}: cannot be used: {storage.why(error)}; give another folder") from error
    if PLAN not in names:
        foreign = sorted(name for name in names if not _is_stray(name))
        if foreign:
            raise UserError(
                f"destination {folder}: is not empty ({', '.join(foreign[:3])}{', ...' if foreign[3:] else ''}) and "
                f"no pack was begun there; choose another folder, empty this one, or run `dist-gan index` if these "
                f"are shards already"
            )
        return None
    try:
        content = json.loads((folder / PLAN).read_bytes())
        same = content["plan"] == plan
        settled = Settled(content["resolution"], content["channels"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"destination {folder}: {PLAN} cannot be read ({error}); empty the folder first") from error
    if not same:
        raise UserError(
            f"destination {folder}: holds an unfinished pack of another source or with other options; give the same "
            f"as then to finish it, choose another folder, or empty this one"
        )
    return settled


def make_folder(folder: Path) -> None:
    """Makes the destination. Raises: UserError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"destination {folder}: cannot be made: {storage.why(error)}; give another folder") from error


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Keeps a second pack out of a folder; the lock goes with the process."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            # A file system without locks is no reason not to pack.
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise UserError(f"destination {folder}: another pack is at work there; wait for it") from error
        _remove_strays(folder)
        try:
            yield
        finally:
            _remove_strays(folder)
    finally:
        os.close(handle)


def write_plan(folder: Path, plan: str, settled: Settled) -> None:
    """From here on the folder belongs to this pack."""
    content = {"plan": plan, **settled._asdict()}
    storage.publish(str(folder / PLAN), json.dumps(content).encode("ascii"))


def _is_stray(name: str) -> bool:
    ours = name.startswith((".shard-", f".{PLAN}.", f".{manifests.NAME}.", f".{SKIPPED}.", "..shard-"))
    return ours and name.endswith(".tmp")


def _remove_strays(folder: Path) -> None:
    for name in os.listdir(folder):
        if _is_stray(name):
            (folder / name).unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> None:
    """Removes what only an unfinished pack needs; the plan goes last."""
    try:
        for name in os.listdir(folder):
            if _is_stray(name) or (name.startswith(".shard-") and name.endswith(".json")):
                (folder / name).unlink(missing_ok=True)
        (folder / PLAN).unlink(missing_ok=True)
    except OSError as error:
        # A finished pack may lie on a read-only disk by now.
        if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise
