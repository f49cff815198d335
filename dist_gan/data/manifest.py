"""Reads and writes `manifest.json`, the description of a folder of shards: keys, byte offsets, labels and hashes. It is
written after all shards, and training takes every fact about the data from it."""

from __future__ import annotations

import errno
import os
import stat
from typing import Any

from dist_gan import storage
from dist_gan.data.manifest_reader import MAKE_AGAIN, MAKE_ONE, ManifestReader
from dist_gan.data.manifest_types import Manifest as Manifest
from dist_gan.data.manifest_types import Shard as Shard
from dist_gan.data.manifest_types import canonical, to_json
from dist_gan.data.manifest_types import shard_to_json as shard_to_json
from dist_gan.json_text import parse_json
from dist_gan.types import UserError

NAME = "manifest.json"
_LARGEST_FILE = 2**31
"""Largest size of a manifest, in bytes, which is enough for fifteen million images."""


def read_manifest(url: str) -> Manifest:
    """Reads the manifest of a folder of shards, and checks all its entries.

    Raises:
        UserError: the manifest is missing or cannot be read, or its entries contradict each other.
    """
    place = storage.join(url, NAME)
    shown = storage.redact(place)
    try:
        data = _bytes_of(place)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"{storage.redact(url)}: no {NAME} there; {MAKE_ONE}") from error
    except OSError as error:
        raise UserError(f"{shown}: cannot be read: {storage.why(error, reading=True)}") from error
    try:
        content = parse_json(data)
    except ValueError as error:
        raise UserError(f"{shown}: is not JSON ({error}); {MAKE_AGAIN}") from error
    return ManifestReader(shown).manifest(content)


def _bytes_of(place: str) -> bytes:
    local = storage.local_path(place)
    if local is not None and not stat.S_ISREG(os.stat(local).st_mode):  # reading from a pipe would block for ever
        raise OSError(errno.EINVAL, "it is no file")
    size = storage.size(place)
    if size > _LARGEST_FILE:
        raise UserError(f"{storage.redact(place)}: {size:,} bytes are more than a manifest may have; {MAKE_AGAIN}")
    return storage.read(place)


def write_manifest(url: str, manifest: Manifest) -> None:
    """Writes a manifest into the folder of its shards; the file appears complete or not at all.

    Raises:
        TrainingFailed: the file cannot be written.
    """
    storage.publish(storage.join(url, NAME), canonical(to_json(manifest)) + b"\n")


def check_shards(url: str, manifest: Manifest, *, may_lose: int | None = None) -> list[str]:
    """Checks that every shard exists and has the size in the manifest; `dist-gan verify` checks the contents.

    Args:
        url: folder of the shards.
        manifest: expected contents of the folder.
        may_lose: largest number of images that may be lost in shards of a wrong size. A file that is too short has lost
            the images behind its end; a file that is too long has lost all, since the position of the additional bytes
            is unknown. None makes every wrong size an error, even if only the end marker of the tar file is missing.

    Returns:
        A sentence for each shard of a wrong size.

    Raises:
        UserError: a shard is missing or has a wrong size; the message names the first such shard and
            the number of others.
    """
    try:
        found = storage.sizes(url, [shard.name for shard in manifest.shards])
    except OSError as error:
        raise UserError(f"{storage.redact(url)}: cannot be listed: {storage.why(error)}") from error
    wrong = [shard for shard in manifest.shards if found[shard.name] != shard.bytes]
    if not wrong:
        return []
    lost = sum(_lost(shard, found[shard.name]) for shard in wrong)
    if may_lose is not None and lost <= may_lose and all(found[shard.name] is not None for shard in wrong):
        return [
            f"{storage.redact(storage.join(url, shard.name))}: has {found[shard.name]:,} bytes, the manifest says "
            f"{shard.bytes:,}; up to {_lost(shard, found[shard.name]):,} of its images are going to be substituted"
            for shard in wrong
        ]
    first = next((shard for shard in wrong if found[shard.name] is None), wrong[0])
    size = found[first.name]
    is_there = "it is not there" if size is None else f"the file has {size:,}"
    more = f" (and {len(wrong) - 1} more shards differ)" if len(wrong) > 1 else ""
    raise UserError(
        f"{storage.redact(storage.join(url, first.name))}: the manifest says {first.bytes:,} bytes, {is_there}{more}; "
        f"is this the manifest of another data set, or a copy that was cut off? Copy the folder again, or run "
        f"`dist-gan index --force` if the shards are right"
    )


def _lost(shard: Shard, size: int | None) -> int:
    """Returns the number of images of a shard that are lost if its file has `size` bytes; None means a missing file."""
    if size is None or size > shard.bytes:
        return len(shard.keys)
    return sum(offset + length > size for offset, length in zip(shard.offsets, shard.sizes, strict=True))


def shard_from_json(content: Any, *, place: str) -> Shard:
    """Converts a JSON value written by `shard_to_json` to a shard.

    Raises:
        UserError: the entries contradict each other; `place` names the file in the message.
    """
    return ManifestReader(place).shard(content, 0)
