"""`manifest.json`: what lies in a folder of shards, to the byte; written last, and all that training trusts."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import reprlib
import stat
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dist_gan import storage
from dist_gan.data.listing import parse_json
from dist_gan.types import UserError

NAME = "manifest.json"
FORMAT = "dist_gan.shards"
VERSION = 1
_LARGEST = 2**62
"""Of any number of bytes: sums of two of them are still numbers of 63 bits."""
_LARGEST_SIDE = 2**20
_ORIGIN = 4096
"""Signs of the origin."""
_LARGEST_FILE = 2**31
"""Bytes of a manifest; fifteen million images take that."""
_MAKE_ONE = "run `dist-gan pack` (from images) or `dist-gan index` (for shards that are there)"
_MAKE_AGAIN = "make it again with `dist-gan index --force`, or pack the images again"


@dataclass(frozen=True)
class Shard:
    """One tar and the samples in it, as columns of equal length in the order of the tar."""

    name: str
    """File name in the folder of the manifest."""
    bytes: int
    sha256: str
    keys: tuple[str, ...]
    """Name of each sample, without extension; unique over all shards."""
    offsets: tuple[int, ...]
    """First byte of each sample's image file, from the start of the tar."""
    sizes: tuple[int, ...]
    """Bytes of each sample's image file."""
    extensions: tuple[str, ...]
    """Of each image file, in lower case, without the dot."""
    labels: tuple[int, ...] | None
    """Class of each sample; None where the data have no labels."""
    crc32: tuple[int, ...] | None = None
    """CRC-32 of each sample's image file (as zlib's); None in manifests that were made without."""


@dataclass(frozen=True)
class Manifest:
    """All shards of a data set."""

    resolution: int | None
    """Side of every image in pixels; None where sizes differ."""
    channels: int
    """1 or 3: the most that any image has."""
    classes: tuple[str, ...] | None
    """Name of each class; None where the data have no labels."""
    shards: tuple[Shard, ...]
    origin: str
    """What made it; no part of the fingerprint."""

    @property
    def num_samples(self) -> int:
        """Samples over all shards."""
        return sum(len(shard.keys) for shard in self.shards)

    @cached_property
    def class_counts(self) -> tuple[int, ...] | None:
        """Samples of each class; None where the data have no labels."""
        if self.classes is None:
            return None
        counts = Counter(label for shard in self.shards for label in shard.labels or ())
        return tuple(counts[label] for label in range(len(self.classes)))

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 in hex over everything but `origin` and what follows from the rest."""
        content = {key: value for key, value in _to_json(self).items() if key not in ("origin", "class_counts")}
        return hashlib.sha256(_canonical(content)).hexdigest()


def read_manifest(url: str) -> Manifest:
    """The manifest of a folder of shards.

    Raises:
        UserError: there is none, it cannot be read, or it contradicts itself.
    """
    place = storage.join(url, NAME)
    shown = storage.redact(place)
    try:
        data = _bytes_of(place)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"{storage.redact(url)}: no {NAME} there; {_MAKE_ONE}") from error
    except OSError as error:
        raise UserError(f"{shown}: cannot be read: {storage.why(error, reading=True)}") from error
    try:
        content = parse_json(data)
    except ValueError as error:
        raise UserError(f"{shown}: is not JSON ({error}); {_MAKE_AGAIN}") from error
    return _Reader(shown).manifest(content)


def _bytes_of(place: str) -> bytes:
    local = storage.local_path(place)
    if local is not None and not stat.S_ISREG(os.stat(local).st_mode):  # a pipe would be waited for without end
        raise OSError(errno.EINVAL, "it is no file")
    size = storage.size(place)
    if size > _LARGEST_FILE:
        raise UserError(f"{storage.redact(place)}: {size:,} bytes are more than a manifest may have; {_MAKE_AGAIN}")
    return storage.read(place)


def write_manifest(url: str, manifest: Manifest) -> None:
    """Writes the manifest beside the shards; it is whole or not there.

    Raises:
        TrainingFailed: the store does not take it.
    """
    storage.publish(storage.join(url, NAME), _canonical(_to_json(manifest)) + b"\n")


def check_shards(url: str, manifest: Manifest, *, may_lose: int | None = None) -> list[str]:
    """Every shard is there with the stated number of bytes (contents are for `dist-gan verify`).

    Args:
        url: folder of the shards.
        manifest: what should be in it.
        may_lose: images that shards of another size may have lost, in all, without an error: those behind the end of a
            shorter file, and all of a longer one, for who knows where it grew. None: no shard may have another size,
            though it should lack nothing but the end mark of the tar.

    Returns:
        A sentence for each shard of another size.

    Raises:
        UserError: names the first shard that is not as stated, and how many are not.
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
    """Images of a shard that a file of another size cannot be trusted to have."""
    if size is None or size > shard.bytes:
        return len(shard.keys)
    return sum(offset + length > size for offset, length in zip(shard.offsets, shard.sizes, strict=True))


def shard_to_json(shard: Shard) -> dict[str, Any]:
    """A shard as JSON columns; extensions that are all equal are one string."""
    same = len(set(shard.extensions)) == 1
    content: dict[str, Any] = {
        "name": shard.name,
        "bytes": shard.bytes,
        "sha256": shard.sha256,
        "keys": shard.keys,
        "offsets": shard.offsets,
        "sizes": shard.sizes,
        "extensions": shard.extensions[0] if same else shard.extensions,
    }
    if shard.labels is not None:
        content["labels"] = shard.labels
    if shard.crc32 is not None:
        content["crc32"] = shard.crc32
    return content


def shard_from_json(content: Any, *, place: str) -> Shard:
    """The shard that `shard_to_json` wrote.

    Raises:
        UserError: it contradicts itself; `place` says where it came from.
    """
    return _Reader(place).shard(content, 0)


def _to_json(manifest: Manifest) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "version": VERSION,
        "resolution": manifest.resolution,
        "channels": manifest.channels,
        "classes": manifest.classes,
        "class_counts": manifest.class_counts,
        "origin": manifest.origin,
        "shards": [shard_to_json(shard) for shard in manifest.shards],
    }


def _canonical(content: Any) -> bytes:
    return json.dumps(content, separators=(",", ":"), sort_keys=True).encode("ascii")


class _Reader:
    """Turns JSON into a manifest and doubts everything."""

    def __init__(self, place: str) -> None:
        self._place = place

    def manifest(self, content: Any) -> Manifest:
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            found = content.get("format") if isinstance(content, dict) else type(content).__name__
            raise self._error(f"the format is {_shown(found)}, not {FORMAT!r}", remedy=_MAKE_ONE)
        if content.get("version") != VERSION:
            raise self._error(
                f"version {_shown(content.get('version'))}, and this program reads version {VERSION}",
                remedy=f"install the dist-gan that wrote it, or {_MAKE_AGAIN}",
            )
        resolution, channels, classes = (content.get(name) for name in ("resolution", "channels", "classes"))
        if resolution is not None and not _is_positive(resolution, _LARGEST_SIDE):
            raise self._error(f"resolution is {_shown(resolution)}, not a positive number of pixels or null")
        if type(channels) is not int or channels not in (1, 3):
            raise self._error(f"channels is {_shown(channels)}, not 1 or 3")
        if classes is not None and not (_are_texts(classes) and classes):
            raise self._error("classes is neither null nor a list of names")
        shards = content.get("shards")
        if not isinstance(shards, list) or not shards:
            raise self._error("it lists no shards")
        manifest = Manifest(
            resolution=resolution,
            channels=channels,
            classes=None if classes is None else tuple(classes),
            shards=tuple(self.shard(shard, number) for number, shard in enumerate(shards)),
            origin=_text_of(content.get("origin", "")),
        )
        self._check_together(manifest)
        return manifest

    def shard(self, content: Any, number: int) -> Shard:
        where = f"shard {number}"
        if not isinstance(content, dict):
            raise self._error(f"{where} is no JSON object")
        fields: dict[str, Any] = content
        name: Any = fields.get("name")
        size: Any = fields.get("bytes")
        sha256: Any = fields.get("sha256")
        if not _are_texts([name]) or not name or name.startswith(".") or any(c in name for c in "/\\:\0"):
            raise self._error(f"{where} has the name {_shown(name)}, which is not a plain file name in the folder")
        where = f"shard {name!r}"
        if not _is_positive(size, _LARGEST):
            raise self._error(f"{where} has {_shown(size)} bytes")
        if not isinstance(sha256, str) or len(sha256) != 64 or set(sha256) - set("0123456789abcdef"):
            raise self._error(f"{where} has the sha256 {_shown(sha256)}, which is not 64 hexadecimal digits")
        keys: Any = fields.get("keys")
        if not _are_texts(keys) or not keys or "" in keys:
            raise self._error(f"{where} has no list of keys")
        extensions: Any = fields.get("extensions")
        if isinstance(extensions, str):
            extensions = [extensions] * len(keys)
        if not _are_texts(extensions):
            raise self._error(f"{where} has extensions that are no names")
        offsets, sizes = (self._integers(content.get(column), where, column) for column in ("offsets", "sizes"))
        labels, crc32 = (
            None if content.get(column) is None else self._integers(content[column], where, column)
            for column in ("labels", "crc32")
        )
        columns = {"keys": keys, "offsets": offsets, "sizes": sizes, "extensions": extensions}
        columns |= {name: values for name, values in (("labels", labels), ("crc32", crc32)) if values is not None}
        lengths = {column: len(values) for column, values in columns.items()}
        if len(set(lengths.values())) != 1:
            raise self._error(f"{where} has columns of different lengths: {lengths}")
        self._check_places(offsets, sizes, keys, where, size)
        return Shard(
            name=name,
            bytes=size,
            sha256=sha256,
            keys=tuple(keys),
            offsets=tuple(offsets.tolist()),
            sizes=tuple(sizes.tolist()),
            extensions=tuple(extensions),
            labels=None if labels is None else tuple(labels.tolist()),
            crc32=None if crc32 is None else tuple(crc32.tolist()),
        )

    def _error(self, what: str, *, remedy: str = _MAKE_AGAIN) -> UserError:
        return UserError(f"{self._place}: {what}; {remedy}")

    def _integers(self, values: Any, where: str, column: str) -> NDArray[np.int64]:
        whole = isinstance(values, list) and set(map(type, values)) == {int}
        array = np.array(values if whole else [""])
        if array.dtype != np.int64:
            raise self._error(f"{where}: the column {column} is not a list of whole numbers of at most 63 bits")
        if array.min() < 0:
            raise self._error(f"{where}: {column} holds {array.min()}, a negative number")
        return array

    def _check_places(
        self, offsets: NDArray[np.int64], sizes: NDArray[np.int64], keys: list[str], where: str, size: int
    ) -> None:
        # Not offsets + sizes: the sum of two numbers of 63 bits may be negative.
        outside = np.flatnonzero((sizes > size) | (offsets > size - np.minimum(sizes, size)))
        if len(outside):
            raise self._error(
                f"{where}: the image of {keys[outside[0]]!r} would lie outside the file of {size:,} bytes"
            )
        unsorted = np.flatnonzero(offsets[1:] < offsets[:-1])
        if len(unsorted):
            raise self._error(f"{where}: {keys[unsorted[0]]!r} is listed before what lies in front of it")
        overlaps = np.flatnonzero((offsets + sizes)[:-1] > offsets[1:])
        if len(overlaps):
            first, second = (keys[overlaps[0] + step] for step in (0, 1))
            raise self._error(f"{where}: the images of {first!r} and {second!r} overlap")

    def _check_together(self, manifest: Manifest) -> None:
        names = Counter(shard.name for shard in manifest.shards)
        twice = next((name for name, count in names.items() if count > 1), None)
        if twice is not None:
            raise self._error(f"the shard {twice!r} is listed twice")
        if len({key for shard in manifest.shards for key in shard.keys}) != manifest.num_samples:
            keys = Counter(key for shard in manifest.shards for key in shard.keys)
            key, count = keys.most_common(1)[0]
            raise self._error(f"the key {key!r} appears {count} times; keys must be unique over all shards")
        for shard in manifest.shards:
            if (shard.labels is None) != (manifest.classes is None):
                has = "has no labels" if shard.labels is None else "has labels"
                raise self._error(f"shard {shard.name!r} {has}, which contradicts the list of classes")
            if shard.labels is not None and manifest.classes is not None:
                highest = max(shard.labels)
                if highest >= len(manifest.classes):
                    raise self._error(
                        f"shard {shard.name!r} has the label {highest}, and there are {len(manifest.classes)} classes"
                    )


def _is_positive(value: Any, limit: int) -> bool:
    return type(value) is int and 0 < value <= limit


def _are_texts(values: Any) -> bool:
    """Whether it is a list of texts that can be written: JSON can hold halves of signs."""
    if not isinstance(values, list) or not all(type(value) is str for value in values):
        return False
    try:
        "".join(values).encode()
    except UnicodeEncodeError:
        return False
    return True


def _text_of(value: Any) -> str:
    return str(value).encode("utf-8", "replace").decode()[:_ORIGIN] if isinstance(value, str | int) else ""


def _shown(value: Any) -> str:
    return reprlib.repr(value)
