"""What really lies in a shard: its samples, found by the strict scan, whoever wrote it."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field

from dist_gan import storage
from dist_gan.data.tar_scan import TarScan

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp")
LABEL_EXTENSIONS = ("cls", "json")
_NAME = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")
_SKIPPED = re.compile(r"__[^/]*__($|/)")


@dataclass
class FoundSample:
    """The members of a tar that share a key."""

    extension: str = ""
    """Of the image in lower case; empty while there is none."""
    offset: int = 0
    size: int = 0
    crc32: int = 0
    labels: dict[str, bytes] = field(default_factory=dict)
    """Contents of `.cls` and `.json`, by extension."""


@dataclass(frozen=True)
class FoundShard:
    """A shard from end to end."""

    bytes: int
    sha256: str
    samples: dict[str, FoundSample]
    """Samples with an image, by key, in the order of their images."""
    num_passed_over: int
    """Members that belong to no image."""
    problems: tuple[str, ...]


def read_shard(url: str, name: str, *, see: Callable[[str, str, bytes], None]) -> FoundShard:
    """Reads a shard once; keys and extensions are split as webdataset does, at the first dot of the base name.

    Args:
        url: folder of the shard.
        name: of the shard in it.
        see: is given key, extension and bytes of each image.

    Raises:
        DamagedTar: the archive is not whole.
        OSError: it cannot be read.
    """
    place = storage.redact(storage.join(url, name))
    size = storage.size(storage.join(url, name))
    samples: dict[str, FoundSample] = {}
    num_members: dict[str, int] = {}
    problems: list[str] = []
    num_nameless = 0
    with storage.open_read(storage.join(url, name)) as file:
        scan = TarScan(file, size=size, place=place)
        for member in scan:
            match = _NAME.match(member.name)
            if match is None or _SKIPPED.match(member.name):
                num_nameless += 1
                continue
            key, extension = match.group(1), match.group(2).lower()
            sample = samples.setdefault(key, FoundSample())
            num_members[key] = num_members.get(key, 0) + 1
            if extension in IMAGE_EXTENSIONS:
                if sample.extension:
                    problems.append(f"{place}: {key!r} has two images (.{sample.extension} and .{extension})")
                    continue
                sample.extension, sample.offset, sample.size = extension, member.offset, member.size
                sample.crc32 = zlib.crc32(member.data)
                see(key, extension, member.data)
            elif extension in LABEL_EXTENSIONS:
                if extension in sample.labels:
                    problems.append(f"{place}: {key!r} has two .{extension} files")
                sample.labels[extension] = member.data
    lonely = [key for key, sample in samples.items() if not sample.extension]
    problems += [f"{place}: {key!r} has a .cls but no image" for key in lonely if "cls" in samples[key].labels]
    return FoundShard(
        bytes=size,
        sha256=scan.sha256,
        samples=dict(sorted(((k, s) for k, s in samples.items() if s.extension), key=lambda item: item[1].offset)),
        num_passed_over=num_nameless + sum(num_members[key] for key in lonely),
        problems=tuple(problems),
    )


def parse_cls(data: bytes) -> int | None:
    """The number in a `.cls` file; None if it is not a whole number from 0 on."""
    text = data.strip()
    return int(text) if text.isdigit() and len(text) < 16 else None
