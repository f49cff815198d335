"""From pieces of shards to pixels: checked, decoded, and replaced where an image is damaged.

An image is damaged if its bytes end early, do not have the manifest's CRC-32, or are no picture. It is read from the
store once more before that is believed. What then takes its place is the next sound image of its shard (with the same
label where there are labels), so it depends on the data alone and not on who read what and when. A store that does not
answer is another matter: nothing takes the place of an image that could not be read.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dist_gan import pictures, storage
from dist_gan.data.order import Integers
from dist_gan.data.pieces import Fetched, Piece, PieceReader, Source
from dist_gan.data.plan import Place
from dist_gan.types import TrainingFailed

Pixels = NDArray[np.uint8]
Sample = dict[str, Any]
"""`__key__`, `__url__` of the shard, `pixels` (uint8 HWC), and `label` where there are labels."""

Stage = Callable[[Iterable[Sample]], Iterator[Sample]]
"""A user's own step after decoding: yields one sample for each that it takes, in their order."""

_TRIES = 256
"""Neighbours that are tried in place of a damaged image."""


class Damage(NamedTuple):
    """An image that cannot be used."""

    url: str
    """Of its shard, without secrets."""
    key: str
    reason: str


class Decoder:
    """Samples by place. For any number of threads.

    Args:
        sources: folders of shards.
        reader: of their pieces.
        rows: rows that may take the place of a damaged one, by source and shard.
        shape: HWC that images are brought to, by the rules of packing.
        substitute: whether a damaged image is replaced; otherwise it ends the run.
        kept: what has been decoded already, where all of it fits into memory.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        reader: PieceReader,
        *,
        rows: Sequence[Sequence[Integers]],
        shape: tuple[int, int, int],
        substitute: bool,
        kept: Kept | None = None,
    ) -> None:
        self.reader = reader
        self._sources, self._rows, self._shape, self._kept = sources, rows, shape, kept
        self._substitute = substitute
        self._shards = [source.manifest.shards for source in sources]
        self._urls = [[storage.join(source.url, s.name) for s in source.manifest.shards] for source in sources]
        self._lock = Lock()
        self._damaged: list[Damage] = []
        self._in_place_of: dict[tuple[int, int, int], int] = {}

    def samples(self, places: Iterable[Place], out: Sequence[Pixels]) -> Iterator[Sample]:
        """Decoded samples of some places; `out` is where the pixels of each may go.

        Raises:
            TrainingFailed: the store does not give an image, or one is damaged and nothing may take its place.
        """
        kept, instead = self._kept, self._in_place_of
        for place, pixels in zip(places, out, strict=True):
            if instead and place[:3] in instead:
                place = _alone(place, instead[place[:3]])
            if kept is None:
                place, decoded = self._decoded(place, pixels)
            elif kept.take(place, pixels):
                decoded = pixels
            else:
                place, decoded = self._decoded(place, pixels)
                kept.put(place, decoded)
            source, shard, row, _ = place
            entry = self._shards[source][shard]
            sample: Sample = {"__key__": entry.keys[row], "__url__": self._urls[source][shard], "pixels": decoded}
            if entry.labels is not None:
                sample["label"] = entry.labels[row]
            yield sample

    def damaged(self) -> list[Damage]:
        """Images found damaged since the last call."""
        with self._lock:
            found, self._damaged = self._damaged, []
        return found

    def _decoded(self, place: Place, out: Pixels) -> tuple[Place, Pixels]:
        """The image, or the one that takes its place."""
        try:
            return place, self._pixels(place, self.reader.get(place.piece), out)
        except pictures.BadImage:
            return self._again_or_instead(place, out)

    def _pixels(self, place: Place, fetched: Fetched, out: Pixels) -> Pixels:
        """The decoded image.

        Raises:
            BadImage: it is damaged.
        """
        source, shard, row, _ = place
        entry = self._shards[source][shard]
        name, size, start = entry.keys[row], entry.sizes[row], entry.offsets[row] - fetched.start
        data = fetched.data[start : start + size]
        if len(data) != size:
            raise pictures.BadImage(name, f"{len(data):,} of its {size:,} bytes are there")
        if entry.crc32 is not None and zlib.crc32(data) != entry.crc32[row]:
            raise pictures.BadImage(name, "its bytes do not have the CRC-32 of the manifest")
        side, _, channels = self._shape
        pixels = pictures.decode(data, name=name, out=out, reduce_to=side)
        if pixels is not out and pixels.shape != self._shape:
            pixels = pictures.fit(pixels, resolution=side, channels=channels, name=name)
        return pixels

    def _again_or_instead(self, place: Place, out: Pixels) -> tuple[Place, Pixels]:
        """The image after all, read from the store once more; or the one that takes its place."""
        alone = _alone(place, place.row)
        self.reader.drop(place.piece)
        try:
            return place, self._pixels(alone, self.reader.fresh(alone.piece), out)
        except pictures.BadImage as error:
            bad = error
        url = storage.redact(self._urls[place.source][place.shard])
        if not self._substitute:
            raise TrainingFailed(
                f"{url}: {bad}; run `dist-gan verify {storage.redact(self._sources[place.source].url)}` to find all such "
                f"images, or let data.bad_images=substitute replace them"
            ) from bad
        for row in islice(self._neighbours(place), _TRIES):
            other = _alone(place, row)
            try:
                pixels = self._pixels(other, self.reader.fresh(other.piece), out)
            except pictures.BadImage:
                continue
            with self._lock:
                if place[:3] not in self._in_place_of:
                    self._in_place_of[place[:3]] = row
                    self._damaged.append(Damage(url, bad.name, bad.reason))
            return other, pixels
        raise TrainingFailed(
            f"{url}: {bad}, and nothing in the shard can take its place; copy or pack the shard again"
        ) from bad

    def _neighbours(self, place: Place) -> Iterator[int]:
        """Rows that may take an image's place: those behind it, then from the shard's beginning; of its label first."""
        labels = self._shards[place.source][place.shard].labels
        rows = self._rows[place.source][place.shard]
        behind = int(np.searchsorted(rows, place.row, side="right"))
        others = [row for row in np.roll(rows, -behind).tolist() if row != place.row]
        if labels is None:
            return iter(others)
        return iter(sorted(others, key=lambda row: labels[row] != labels[place.row]))


def _alone(place: Place, row: int) -> Place:
    """An image of the same shard, to be read by itself."""
    return Place(place.source, place.shard, row, Piece(place.source, place.shard, row, row))


class Kept:
    """All images of all sources, as far as they have been decoded.

    Args:
        sources: folders of shards.
        shape: HWC of each image.
    """

    def __init__(self, sources: Sequence[Source], *, shape: tuple[int, int, int]) -> None:
        self._first: list[list[int]] = []
        count = 0
        for source in sources:
            self._first.append([])
            for shard in source.manifest.shards:
                self._first[-1].append(count)
                count += len(shard.keys)
        self._pixels = np.empty((count, *shape), np.uint8)
        self._is_there = np.zeros(count, dtype=bool)

    def take(self, place: Place, out: Pixels) -> bool:
        """Puts an image into `out` if it is there."""
        number = self._first[place.source][place.shard] + place.row
        if self._is_there[number]:
            out[...] = self._pixels[number]
            return True
        return False

    def put(self, place: Place, pixels: Pixels) -> None:
        """Keeps an image."""
        number = self._first[place.source][place.shard] + place.row
        self._pixels[number] = pixels
        self._is_there[number] = True
