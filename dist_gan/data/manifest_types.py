"""Types that describe a data set: its shards, and the key, position and label of every image."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import Any

FORMAT = "dist_gan.shards"
VERSION = 1


@dataclass(frozen=True)
class Shard:
    """One tar file and the samples in it, as columns of equal length in the order of the file."""

    name: str
    """Name of the tar file, in the folder of the manifest."""
    bytes: int
    sha256: str
    keys: tuple[str, ...]
    """Name of each sample, without extension; names are unique over all shards."""
    offsets: tuple[int, ...]
    """Position of each sample's image file, in bytes from the start of the tar file."""
    sizes: tuple[int, ...]
    """Size of each sample's image file, in bytes."""
    extensions: tuple[str, ...]
    """Extension of each sample's image file, in lower case, without the dot."""
    labels: tuple[int, ...] | None
    """Class of each sample, as an index; None where the data have no labels."""
    crc32: tuple[int, ...] | None = None
    """CRC-32 of each sample's image file, as computed by zlib; None in manifests that were made without CRC-32."""


@dataclass(frozen=True)
class Manifest:
    """Description of a data set: all its shards, and what their images have in common."""

    resolution: int | None
    """Width and height of every image, in pixels; None where sizes differ."""
    channels: int
    """Largest number of channels of any image: 1 or 3."""
    classes: tuple[str, ...] | None
    """Name of each class; None where the data have no labels."""
    shards: tuple[Shard, ...]
    origin: str
    """Command and source that made the data set; the fingerprint does not depend on this text."""

    @property
    def num_samples(self) -> int:
        """Number of samples in all shards."""
        return sum(len(shard.keys) for shard in self.shards)

    @cached_property
    def class_counts(self) -> tuple[int, ...] | None:
        """Number of samples of each class; None where the data have no labels."""
        if self.classes is None:
            return None
        counts = Counter(label for shard in self.shards for label in shard.labels or ())
        return tuple(counts[label] for label in range(len(self.classes)))

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256, in hex, of the manifest without `origin` and without entries derived from others."""
        content = {key: value for key, value in to_json(self).items() if key not in ("origin", "class_counts")}
        return hashlib.sha256(canonical(content)).hexdigest()


def shard_to_json(shard: Shard) -> dict[str, Any]:
    """Converts a shard to JSON columns; extensions that are all equal become one string."""
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


def to_json(manifest: Manifest) -> dict[str, Any]:
    """Converts a manifest to JSON values."""
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


def canonical(content: Any) -> bytes:
    """Returns canonical JSON as bytes, so that equal contents have equal hashes."""
    return json.dumps(content, separators=(",", ":"), sort_keys=True).encode("ascii")
