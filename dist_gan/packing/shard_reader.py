"""Reads the samples of a shard written by any program, through the strict tar reader."""

from __future__ import annotations

import re
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from dist_gan import storage
from dist_gan.packing.labels import LABEL_BYTES, BadLabel, Label, from_cls
from dist_gan.packing.tar_scan import Member, TarScan

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp")
LABEL_EXTENSIONS = ("cls", "json")
_NAME = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")
_SKIPPED = re.compile(r"__[^/]*__($|/)")


@dataclass
class ShardSample:
    """The members of a tar that share a key."""

    extension: str = ""
    """Extension of the image, in lower case; empty while there is no image."""
    offset: int = 0
    size: int = 0
    crc32: int = 0
    label: Label | BadLabel | None = None
    """Label from the label file, or its mistake; None if there is no label file."""
    label_files: set[str] = field(default_factory=set)
    """Extensions of the label files that the sample has: `cls`, `json` or both."""


@dataclass(frozen=True)
class ShardScan:
    """Result of reading a whole shard."""

    bytes: int
    sha256: str
    samples: dict[str, ShardSample]
    """Samples with an image, by key, in the order of their images."""
    passed_over: Counter[str]
    """Number of members that belong to no image, by the ending of their names."""
    dotted: tuple[str, ...]
    """Names of skipped members that look like images, but hold more than one dot."""
    problems: tuple[str, ...]


def read_shard(
    url: str,
    name: str,
    *,
    see: Callable[[str, str, bytes], None],
    label_file: str = "cls",
    label_of: Callable[[bytes], Label] = from_cls,
) -> ShardScan:
    """Reads a shard once; keys and extensions are split as webdataset does, at the first dot of the base name.

    Args:
        url: folder of the shard.
        name: file name of the shard in the folder.
        see: called with key, extension and bytes of each image.
        label_file: extension of the members that hold labels.
        label_of: returns the label in the bytes of such a member; raises BadLabel.

    Raises:
        DamagedTar: the archive is damaged or incomplete.
        OSError: the archive cannot be read.
        UserError, TrainingFailed: a store refuses access, or does not answer.
    """
    place = storage.redact(storage.join(url, name))
    size = storage.size(storage.join(url, name))
    samples: dict[str, ShardSample] = {}
    endings: dict[str, list[str]] = {}
    problems: list[str] = []
    passed_over: Counter[str] = Counter()
    dotted: list[tuple[str, str]] = []
    with storage.open_read(storage.join(url, name)) as file:
        scan = TarScan(file, size=size, place=place)
        for member in scan:
            match = _NAME.match(member.name)
            ending = member.name.rpartition("/")[2].rpartition(".")[2].lower() if "." in member.name else ""
            if match is None or _SKIPPED.match(member.name):
                passed_over[ending] += 1
                continue
            key, extension = match.group(1), match.group(2).lower()
            sample = samples.setdefault(key, ShardSample())
            endings.setdefault(key, []).append(ending)
            if extension in IMAGE_EXTENSIONS:
                if sample.extension:
                    problems.append(f"{place}: {key!r} has two images (.{sample.extension} and .{extension})")
                    continue
                sample.extension, sample.offset, sample.size = extension, member.offset, member.size
                if member.data is None:
                    problems.append(f"{place}: {key!r}: {member.size:,} bytes are more than an image may have")
                    continue
                sample.crc32 = zlib.crc32(member.data)
                see(key, extension, member.data)
            elif extension in LABEL_EXTENSIONS:
                if extension in sample.label_files:
                    problems.append(f"{place}: {key!r} has two .{extension} files")
                sample.label_files.add(extension)
                if extension == label_file:
                    sample.label = _label(member, label_of)
            elif ending in IMAGE_EXTENSIONS:
                dotted.append((key, member.name))
    lonely = [key for key, sample in samples.items() if not sample.extension]
    lost = {key: member for key, member in dotted if not samples[key].extension}
    for key in lonely:
        passed_over.update(endings[key])
        if "cls" in samples[key].label_files:
            hint = f"; {split_by_webdataset(lost[key])}" if key in lost else ""
            problems.append(f"{place}: {key!r} has a .cls but no image{hint}")
    return ShardScan(
        bytes=size,
        sha256=scan.sha256,
        samples=dict(sorted(((k, s) for k, s in samples.items() if s.extension), key=lambda item: item[1].offset)),
        passed_over=passed_over,
        dotted=tuple(lost.values()),
        problems=tuple(problems),
    )


def split_by_webdataset(name: str) -> str:
    """Sentence that explains how webdataset splits a name with several dots, and the remedy."""
    folder, slash, base = name.rpartition("/")
    key, _, extension = base.partition(".")
    stem, _, ending = base.rpartition(".")
    return (
        f"webdataset splits names at the first dot, so {name!r} is the file {extension!r} of the key "
        f"{folder + slash + key!r} and no image; rename it, to {folder + slash + stem.replace('.', '_') + '.' + ending!r} for "
        f"one"
    )


def _label(member: Member, label_of: Callable[[bytes], Label]) -> Label | BadLabel:
    if member.data is None or member.size > LABEL_BYTES:
        return BadLabel(f"its label file has {member.size:,} bytes, more than a label takes")
    try:
        return label_of(member.data)
    except BadLabel as error:
        return error
