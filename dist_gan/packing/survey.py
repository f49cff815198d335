"""Determines the resolution and channels of a data set from the headers of its images, where the user gives none."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from contextlib import closing
from functools import partial
from typing import NamedTuple

import numpy as np

from dist_gan.packing.fetching import prefetch
from dist_gan.packing.image_source import UNREADABLE, ImageReader, ImageShape, ImageSource
from dist_gan.packing.listing import Entry
from dist_gan.packing.processes import Tell, Workers
from dist_gan.packing.shard_writer import ImageProblem, chunks, raise_if_problems, size_of
from dist_gan.packing.store_source import HEAD_BYTES, StoreReader, num_requests
from dist_gan.pictures import MAX_FILE_BYTES, BadImage, Header, header
from dist_gan.types import TrainingFailed, UserError

MIN_RESOLUTION, MAX_RESOLUTION = 16, 1024
_CHUNK = 1000


class HeaderCounts(NamedTuple):
    """Sizes and channels of some images, counted, and the images whose headers cannot be read."""

    sizes: Counter[tuple[int, int]]
    """Number of images by (height, width) in pixels."""
    channels: Counter[int]
    problems: tuple[ImageProblem, ...]


def is_resolution(side: int) -> bool:
    """Returns whether the networks support images of this side, in pixels: a power of two from 16 to 1024."""
    return MIN_RESOLUTION <= side <= MAX_RESOLUTION and side & (side - 1) == 0


def count_headers(reader: ImageReader, entries: tuple[Entry, ...], tell: Tell) -> HeaderCounts:
    """Reads the headers of some images of a source and counts their sizes and channels."""
    sizes: Counter[tuple[int, int]] = Counter()
    channels: Counter[int] = Counter()
    problems: list[ImageProblem] = []
    asked = prefetch(partial(_header, reader), entries, size=size_of, num_threads=num_requests(reader))
    with closing(asked) as headers:
        for _, get in headers:
            try:
                found = get()
            except BadImage as error:
                problems.append(ImageProblem(error.name, error.reason))
                continue
            sizes[found.height, found.width] += 1
            channels[found.channels] += 1
    tell(len(entries))
    return HeaderCounts(sizes, channels, tuple(problems))


def choose_shape(
    source: ImageSource,
    *,
    resolution: int | None,
    channels: int | None,
    skip_bad: bool,
    workers: Workers[ImageReader],
    tell: Tell,
) -> ImageShape:
    """Resolution and channels of the shards: those given, or else those that all images have.

    Raises:
        UserError: the images differ, or some cannot be read and `skip_bad` is False.
        TrainingFailed: a store does not answer.
    """
    if resolution is not None and channels is not None:
        return ImageShape(resolution, channels)
    jobs = chunks(source.entries, _CHUNK)
    found = sum_counts(workers.run(count_headers, jobs, tell=tell))
    if not skip_bad or not found.sizes:
        raise_if_problems(list(found.problems), place=source.place)
    if resolution is None:
        resolution = _common_resolution(found.sizes, source.place)
    if channels is None:
        channels = _common_channels(found.channels, source.place)
    return ImageShape(resolution, channels)


def sum_counts(findings: Iterable[HeaderCounts]) -> HeaderCounts:
    """Sum of the counts of several groups of images."""
    sizes: Counter[tuple[int, int]] = Counter()
    channels: Counter[int] = Counter()
    problems: list[ImageProblem] = []
    for found in findings:
        sizes.update(found.sizes)
        channels.update(found.channels)
        problems.extend(found.problems)
    return HeaderCounts(sizes, channels, tuple(sorted(problems)))


def describe_sizes(sizes: Counter[tuple[int, int]]) -> str:
    """The most frequent sizes in words, as width x height."""
    ordered = sorted(sizes.items(), key=lambda item: (-item[1], item[0]))
    shown = ", ".join(f"{width}x{height} ({count:,})" for (height, width), count in ordered[:3])
    return shown + (f" and {len(ordered) - 3:,} other sizes" if len(ordered) > 3 else "")


def _header(reader: ImageReader, entry: Entry) -> Header:
    if isinstance(reader, StoreReader) and HEAD_BYTES < entry.size <= MAX_FILE_BYTES:
        try:
            return header(reader.open_head(entry), name=entry.member)
        except BadImage:
            pass  # the header may be longer than the part that was read
    if entry.size > MAX_FILE_BYTES:
        raise BadImage(entry.member, f"{entry.size:,} bytes are more than a picture may have ({MAX_FILE_BYTES:,})")
    try:
        opened = reader.open(entry)
    except (UserError, TrainingFailed):
        raise
    except UNREADABLE as error:
        raise BadImage(entry.member, f"cannot be read ({error})") from error
    if isinstance(opened, np.ndarray):
        height, width, depth = opened.shape
        return Header(height, width, 1 if depth == 1 else 3)
    with opened as file:
        return header(file, name=entry.member)


def _common_resolution(sizes: Counter[tuple[int, int]], place: str) -> int:
    sides = {side for size in sizes for side in size}
    if len(sides) == 1 and is_resolution(next(iter(sides))):
        return sides.pop()
    smallest, largest = min(sides), max(sides)
    ways = []
    upper = 1 << (largest - 1).bit_length()
    if len(sides) == 1 and is_resolution(upper):
        ways.append(f"--resolution {upper} --pad (black border)")
    lower = min(1 << (smallest.bit_length() - 1), MAX_RESOLUTION)
    if lower >= MIN_RESOLUTION:
        ways.append(f"--resolution {lower} (cropped to squares and averaged down)")
    if not ways:
        ways.append(f"--resolution {max(MIN_RESOLUTION, min(upper, MAX_RESOLUTION))} --upscale")
    raise UserError(
        f"{place}: images must be square, of one size, and a power of two from {MIN_RESOLUTION} to "
        f"{MAX_RESOLUTION}; found {describe_sizes(sizes)}; give {' or '.join(ways)}"
    )


def _common_channels(channels: Counter[int], place: str) -> int:
    if len(channels) == 1:
        return next(iter(channels))
    raise UserError(
        f"{place}: found {channels[1]:,} grey and {channels[3]:,} RGB images; give --channels 3 (grey becomes "
        f"RGB) or --channels 1 (RGB becomes grey)"
    )
