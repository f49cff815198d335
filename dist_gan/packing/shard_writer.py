"""Writes the images of one shard into a tar. A shard is one job of a worker; its bytes do not depend on the worker."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from webdataset.writer import TarWriter

from dist_gan import storage
from dist_gan.data.manifest import Shard, shard_from_json, shard_to_json
from dist_gan.json_text import parse_json
from dist_gan.packing.destinations import Destination
from dist_gan.packing.fetching import prefetch
from dist_gan.packing.image_source import UNREADABLE, ImageReader
from dist_gan.packing.listing import MAX_SHOWN, Entry
from dist_gan.packing.processes import Tell
from dist_gan.packing.store_source import num_requests
from dist_gan.packing.tar_scan import TarScan
from dist_gan.pictures import MAX_FILE_BYTES, BadImage, encode_png, examine, fit
from dist_gan.types import TrainingFailed, UserError

_TELL_EVERY = 64


class ImageProblem(NamedTuple):
    """An image that cannot be packed, and the reason."""

    member: str
    reason: str


@dataclass(frozen=True)
class ShardSettings:
    """Settings of a pack that are the same for all its shards."""

    folder: Destination
    plan: str
    """Hash of the source and of all options; a shard index with another plan belongs to another pack."""
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


class ShardResult(NamedTuple):
    """Contents of a completely written shard."""

    shard: Shard | None
    """None where every image of it was skipped."""
    skipped: tuple[ImageProblem, ...]


def shard_name(number: int) -> str:
    """File name of a shard."""
    return f"shard-{number:05d}.tar"


def index_name(number: int) -> str:
    """Name of the hidden file that describes a finished shard until the manifest is written."""
    return f".shard-{number:05d}.json"


def write_shard(settings: ShardSettings, reader: ImageReader, job: ShardJob, tell: Tell) -> tuple[ImageProblem, ...]:
    """Writes a shard and its index file, and returns an empty tuple.

    Without `skip_bad`, a shard with unusable images is not written, and their problems are returned.

    Raises:
        TrainingFailed: the files cannot be written, or a store does not answer.
        UserError: a store refuses access.
    """
    name, folder = shard_name(job.number), settings.folder
    try:
        with folder.new_file(name) as file:
            problems, num_written = _write_tar(settings, reader, job.entries, file, tell)
            if problems and not settings.skip_bad:
                return problems
            shard = _scan_own(file, name) if num_written else None
            num_read = len(shard.keys) if shard else 0
            if num_read != num_written:
                raise TrainingFailed(
                    f"cannot write {folder.describe_file(name)}: {num_written} images went in, {num_read} are there"
                )
            index = {
                "plan": settings.plan,
                "shard": None if shard is None else shard_to_json(shard),
                "skipped": [list(problem) for problem in problems],
            }
            storage.publish(storage.join(folder.url, index_name(job.number)), json.dumps(index).encode("ascii"))
            if shard is None:
                folder.remove([name])
            else:
                folder.publish(file, name)
        return ()
    except OSError as error:
        raise TrainingFailed(f"cannot write {folder.describe_file(name)}: {storage.why(error)}") from error


def read_finished_shards(folder: Destination, numbers: range, *, plan: str) -> Iterator[tuple[int, ShardResult]]:
    """Number and contents of each finished shard with this plan: its index file exists and states the size of its tar.

    Raises:
        UserError, TrainingFailed: the folder cannot be listed or read.
    """
    names = folder.names()
    by_index = {index_name(number): number for number in numbers}
    there = {name: size for name in by_index if (size := names.get(name)) is not None}
    for name, data in folder.read_each(there):
        number = by_index[name]
        result = None if data is None else _parse_index(data, number, names, plan=plan)
        if result is not None:
            yield number, result


def _parse_index(index: bytes, number: int, names: Mapping[str, int | None], *, plan: str) -> ShardResult | None:
    try:
        content = parse_json(index)
        if content["plan"] != plan:
            return None
        skipped = tuple(ImageProblem(str(member), str(reason)) for member, reason in content["skipped"])
        if content["shard"] is None:
            return ShardResult(None, skipped)
        shard = shard_from_json(content["shard"], place=index_name(number))
    except (ValueError, KeyError, TypeError):
        return None
    return ShardResult(shard, skipped) if names.get(shard_name(number)) == shard.bytes else None


def _write_tar(
    settings: ShardSettings, reader: ImageReader, entries: tuple[Entry, ...], path: Path, tell: Tell
) -> tuple[tuple[ImageProblem, ...], int]:
    """Writes the tar; returns the problems of unusable images, and the number of images written."""
    problems: list[ImageProblem] = []
    num_written = 0
    fetched = prefetch(partial(read_entry, reader), entries, size=size_of, num_threads=num_requests(reader))
    with (
        open(path, "wb") as file,
        # No encoder: webdataset would convert values by their extension. PAX headers appear only for long or non-ASCII names.
        TarWriter(file, encoder=False, mtime=0, user="dist_gan", group="dist_gan", format="PAX_FORMAT") as tar,
        closing(fetched) as images,
    ):
        for position, (entry, get) in enumerate(images, start=1):
            try:
                data, extension = _prepared(settings, get(), entry)
            except BadImage as error:
                problems.append(ImageProblem(error.name, error.reason))
            else:
                if not problems or settings.skip_bad:
                    sample = {"__key__": entry.key, extension: data}
                    if settings.labels and entry.label is not None:
                        sample["cls"] = str(entry.label).encode("ascii")
                    tar.write(sample)
                    num_written += 1
            if position % _TELL_EVERY == 0 or position == len(entries):
                tell(position % _TELL_EVERY or _TELL_EVERY)
    return tuple(problems), num_written


def _prepared(settings: ShardSettings, raw: bytes | np.ndarray, entry: Entry) -> tuple[bytes, str]:
    """Bytes and extension of an image in the tar: those of the file if it needs no change, otherwise those of a PNG."""
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


def read_entry(reader: ImageReader, entry: Entry) -> bytes | np.ndarray:
    """The bytes of an image file, or the pixels of an image, uint8 HWC.

    Raises:
        BadImage: the image cannot be read, or is too large.
        UserError, TrainingFailed: a store refuses access, or does not answer.
    """
    if entry.size > MAX_FILE_BYTES:
        raise BadImage(entry.member, f"{entry.size:,} bytes are more than a picture may have ({MAX_FILE_BYTES:,})")
    try:
        opened = reader.open(entry)
        if isinstance(opened, np.ndarray):
            return opened
        with opened as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except (UserError, TrainingFailed):
        raise
    except UNREADABLE as error:
        raise BadImage(entry.member, f"cannot be read ({error})") from error
    if len(data) > MAX_FILE_BYTES:
        raise BadImage(entry.member, f"it has more than {MAX_FILE_BYTES:,} bytes")
    return data


def size_of(entry: Entry) -> int:
    """Size of an image in its source, in bytes."""
    return entry.size


def _scan_own(path: Path, name: str) -> Shard:
    """Index of a shard, read back from its file, so that a write error of the disk is found here."""
    keys, offsets, sizes, extensions, labels, sums = [], [], [], [], [], []
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        scan = TarScan(file, size=size, place=str(path))
        for member in scan:
            key, _, extension = member.name.rpartition(".")
            if extension == "cls":
                labels.append(int(member.data or b""))
                continue
            keys.append(key)
            offsets.append(member.offset)
            sizes.append(member.size)
            extensions.append(extension)
            sums.append(zlib.crc32(member.data or b""))
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


def raise_if_problems(problems: list[ImageProblem], *, place: str, seen: int | None = None) -> None:
    """Raises UserError, with the first unusable images of a source, if there are any.

    Args:
        problems: all unusable images that were found.
        place: name of the source.
        seen: number of images that have been examined; None if all have.
    """
    if not problems:
        return
    first = sorted(problems)[:MAX_SHOWN]
    among = "" if seen is None else f" among the {seen:,} images that were looked at; there may be others behind them"
    more = [f"and {len(problems) - MAX_SHOWN:,} more{among}"] if len(problems) > MAX_SHOWN else []
    more += [f"({among[1:]})"] if among and not more else []
    raise UserError(
        f"{place}: images that cannot be packed:",
        *(f"- {problem.member}: {problem.reason}" for problem in first),
        *more,
        "Repair or remove them, or give --skip-bad to leave such images out.",
    )


def chunks(entries: tuple[Entry, ...], size: int) -> Iterator[tuple[Entry, ...]]:
    """Consecutive groups of `size` entries; the last group may be shorter."""
    for start in range(0, len(entries), size):
        yield entries[start : start + size]
