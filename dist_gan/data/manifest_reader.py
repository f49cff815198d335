"""Converts the JSON of a manifest to shards; every value is checked before its use."""

from __future__ import annotations

import reprlib
from collections import Counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dist_gan.data.manifest_types import FORMAT, VERSION, Manifest, Shard
from dist_gan.types import UserError

_LARGEST = 2**62
"""Largest number of bytes accepted in a manifest; the sum of two such numbers still fits a signed 64-bit integer."""
_LARGEST_SIDE = 2**20
_ORIGIN = 4096
"""Largest length of the manifest's entry `origin`, in characters."""
MAKE_ONE = "run `dist-gan pack` (from images) or `dist-gan index` (for shards that are there)"
MAKE_AGAIN = "make it again with `dist-gan index --force`, or pack the images again"


class ManifestReader:
    """Converts JSON values to a manifest, and reports invalid values.

    Args:
        place: name of the source, for errors.
    """

    def __init__(self, place: str) -> None:
        self._place = place

    def manifest(self, content: Any) -> Manifest:
        """Converts a JSON value to a manifest.

        Raises:
            UserError: an entry is invalid, or contradicts another.
        """
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            found = content.get("format") if isinstance(content, dict) else type(content).__name__
            raise self._error(f"the format is {_shown(found)}, not {FORMAT!r}", remedy=MAKE_ONE)
        if content.get("version") != VERSION:
            raise self._error(
                f"version {_shown(content.get('version'))}, and this program reads version {VERSION}",
                remedy=f"install the dist-gan that wrote it, or {MAKE_AGAIN}",
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
        """Converts a JSON value to the shard with index `number`.

        Raises:
            UserError: an entry is invalid, or contradicts another.
        """
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

    def _error(self, what: str, *, remedy: str = MAKE_AGAIN) -> UserError:
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
        # offsets + sizes is not computed, because the sum of two 64-bit numbers may overflow and be negative.
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
    """Returns whether `values` is a list of texts that can be encoded as UTF-8; JSON can hold texts that cannot."""
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
