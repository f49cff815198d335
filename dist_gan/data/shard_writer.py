"""Turns the images of one shard into a tar: the work of one job, which gives the same bytes wherever it is done."""

from __future__ import annotations

import json
import os
import uuid
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from webdataset.writer import TarWriter

from dist_gan import storage
from dist_gan.data.listing import MAX_SHOWN, Entry
from dist_gan.data.manifest import Shard, shard_from_json, shard_to_json
from dist_gan.data.processes import Tell
from dist_gan.data.sources import Reader
from dist_gan.data.tar_scan import TarScan
from dist_gan.images import BadImage, encode_png, examine, fit
from dist_gan.types import TrainingFailed, UserError

_TELL_EVERY = 64


class Bad(NamedTuple):
    """An image that cannot be packed."""

    member: str
    reason: str


@dataclass(frozen=True)
class ShardSettings:
    """What all shards of a pack have in common."""

    folder: Path
    plan: str
    """Hash of the source and all options; an index of another plan is not ours."""
    resolution: int
    channels: int
    upscale: bool
    pad: bool
    labels: bool
    skip_bad: bool


class ShardJob(NamedTuple):
    """One shard to be written."""

    number: int
    entries: tuple[Entry, ...]


class Finished(NamedTuple):
    """A shard that is whole."""

    shard: Shard | None
    """None where every image of it was skipped."""
    skipped: tuple[Bad, ...]


def shard_name(number: int) -> str:
    """File name of a shard."""
    return f"shard-{number:05d}.tar"


def index_name(number: int) -> str:
    """File name of what is known of a finished shard until the manifest is written."""
    return f".shard-{number:05d}.json"


def write_shard(settings: ShardSettings, reader: Reader, job: ShardJob, tell: Tell) -> tuple[Bad, ...]:
    """Writes a shard and its index; if bad images are not to be skipped, returns them and leaves nothing.

    Raises:
        TrainingFailed: the folder does not take the files.
    """
    name = shard_name(job.number)
    temporary = settings.folder / f".{name}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        bad, num_written = _write_tar(settings, reader, job.entries, temporary, tell)
        if bad and not settings.skip_bad:
            return bad
        shard = _scan_own(temporary, name) if num_written else None
        assert num_written == (len(shard.keys) if shard else 0)
        index = {
            "plan": settings.plan,
            "shard": None if shard is None else shard_to_json(shard),
            "skipped": [list(image) for image in bad],
        }
        storage.publish(str(settings.folder / index_name(job.number)), json.dumps(index).encode("ascii"))
        if shard is None:
            (settings.folder / name).unlink(missing_ok=True)
        else:
            os.replace(temporary, settings.folder / name)
        storage.sync_folder(settings.folder)
        return ()
    except OSError as error:
        raise TrainingFailed(f"cannot write {settings.folder / name}: {storage.why(error)}") from error
    finally:
        temporary.unlink(missing_ok=True)


def read_finished(folder: Path, number: int, *, plan: str) -> Finished | None:
    """A shard of this plan if it is whole, by its index and its size."""
    try:
        content = json.loads((folder / index_name(number)).read_bytes())
        if content["plan"] != plan:
            return None
        skipped = tuple(Bad(member, reason) for member, reason in content["skipped"])
        if content["shard"] is None:
            return Finished(None, skipped)
        shard = shard_from_json(content["shard"], place=index_name(number))
        whole = (folder / shard_name(number)).stat().st_size == shard.bytes
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return Finished(shard, skipped) if whole else None


def _write_tar(
    settings: ShardSettings, reader: Reader, entries: tuple[Entry, ...], path: Path, tell: Tell
) -> tuple[tuple[Bad, ...], int]:
    """Bad images, and the number of those written."""
    bad: list[Bad] = []
    num_written = 0
    with open(path, "wb") as file:
        # Encoding off, since it would choose by extension; PAX only shows where a name is long or not ASCII.
        with TarWriter(file, encoder=False, mtime=0, user="dist_gan", group="dist_gan", format="PAX_FORMAT") as tar:
            for position, entry in enumerate(entries, start=1):
                try:
                    data, extension = _prepared(settings, reader, entry)
                except BadImage as error:
                    bad.append(Bad(error.name, error.reason))
                    if not settings.skip_bad and len(bad) == MAX_SHOWN:
                        break
                else:
                    if not bad or settings.skip_bad:
                        sample = {"__key__": entry.key, extension: data}
                        if settings.labels and entry.label is not None:
                            sample["cls"] = str(entry.label).encode("ascii")
                        tar.write(sample)
                        num_written += 1
                if position % _TELL_EVERY == 0 or position == len(entries):
                    tell(position % _TELL_EVERY or _TELL_EVERY)
        file.flush()
        os.fsync(file.fileno())
    return tuple(bad), num_written


def _prepared(settings: ShardSettings, reader: Reader, entry: Entry) -> tuple[bytes, str]:
    """Bytes and extension of an image file as it will lie in the tar."""
    raw = read_entry(reader, entry)
    if isinstance(raw, bytes):
        picture = examine(raw, name=entry.member)
        if picture.extension and picture.pixels.shape == (settings.resolution, settings.resolution, settings.channels):
            return raw, picture.extension
        pixels = picture.pixels
    else:
        pixels = raw
    fitted = fit(
        pixels,
        resolution=settings.resolution,
        channels=settings.channels,
        upscale=settings.upscale,
        pad=settings.pad,
        name=entry.member,
    )
    return encode_png(fitted), "png"


def read_entry(reader: Reader, entry: Entry) -> bytes | np.ndarray:
    """An image file's bytes, or pixels HWC.

    Raises:
        BadImage: the source does not give it.
    """
    try:
        opened = reader.open(entry)
        if isinstance(opened, np.ndarray):
            return opened
        with opened as file:
            return file.read()
    except UNREADABLE as error:
        raise BadImage(entry.member, f"cannot be read ({error})") from error


UNREADABLE = (OSError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError, KeyError)
"""What sources raise on an image that they cannot give."""


def _scan_own(path: Path, name: str) -> Shard:
    """The shard's index from what lies on the disk, not from what was meant to be written."""
    keys, offsets, sizes, extensions, labels, sums = [], [], [], [], [], []
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        scan = TarScan(file, size=size, place=str(path))
        for member in scan:
            key, _, extension = member.name.rpartition(".")
            if extension == "cls":
                labels.append(int(member.data))
                continue
            keys.append(key)
            offsets.append(member.offset)
            sizes.append(member.size)
            extensions.append(extension)
            sums.append(zlib.crc32(member.data))
    return Shard(
        name=name,
        bytes=size,
        sha256=scan.sha256,
        keys=tuple(keys),
        offsets=tuple(offsets),
        sizes=tuple(sizes),
        extensions=tuple(extensions),
        labels=tuple(labels) if labels else None,
        crc32=tuple(sums),
    )


def raise_if_bad(bad: list[Bad], *, place: str) -> None:
    """Raises: UserError that lists the first bad images of a source."""
    if not bad:
        return
    first = sorted(bad)[:MAX_SHOWN]
    lines = "".join(f"\n  - {image.member}: {image.reason}" for image in first)
    more = "" if len(bad) <= MAX_SHOWN else f"\n  and more ({len(bad)} seen until the pack stopped)"
    raise UserError(
        f"{place}: images that cannot be packed:{lines}{more}\n"
        f"Repair or remove them, or give --skip-bad to leave such images out."
    )


def chunks(entries: tuple[Entry, ...], size: int) -> Iterator[tuple[Entry, ...]]:
    """Runs of entries of a given length, the last one perhaps shorter."""
    for start in range(0, len(entries), size):
        yield entries[start : start + size]
