"""Decodes the images of a batch from pieces of shards, and substitutes an image that is damaged.

An image is damaged if its bytes end early, do not have the manifest's CRC-32, or are no picture. It is read from the
store a second time before it is given up. Its substitute is the next sound image of its shard, with the same label if
there are labels; so the substitute depends on the data alone, and not on which rank read what and when. If the store
does not answer, no image is substituted: the run ends.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from threading import Lock
from typing import Any, NamedTuple

import numpy as np

from dist_gan import pictures, storage
from dist_gan.data.order import Integers
from dist_gan.data.pieces import Piece, PieceBytes, PieceReader, ShardFolder
from dist_gan.data.pixel_cache import PixelCache
from dist_gan.data.plan import ImageAddress
from dist_gan.pictures import Pixels
from dist_gan.types import TrainingFailed

Sample = dict[str, Any]
"""One image: `__key__`, `__url__` of its shard, `pixels` (uint8, HWC), and `label` if there are labels."""

Stage = Callable[[Iterable[Sample]], Iterator[Sample]]
"""A user's own step after decoding: yields one sample for each that it takes, in the same order."""

_TRIES = 256
"""Largest number of images that are tried as the substitute of a damaged one."""


class Damage(NamedTuple):
    """An image that cannot be used."""

    url: str
    """URL of its shard, without secrets."""
    key: str
    reason: str


class Decoder:
    """Decodes images by their addresses; may be used by several threads at a time.

    Args:
        folders: folders of shards.
        reader: reads their pieces.
        rows: rows that may be substitutes of a damaged image, by folder and shard.
        shape: HWC of the result; images of another size are cropped and reduced as in packing.
        substitute: True substitutes a damaged image; False ends the run.
        cache: memory for all decoded images, if they fit; None decodes every image anew.
    """

    def __init__(
        self,
        folders: Sequence[ShardFolder],
        reader: PieceReader,
        *,
        rows: Sequence[Sequence[Integers]],
        shape: tuple[int, int, int],
        substitute: bool,
        cache: PixelCache | None = None,
    ) -> None:
        self.reader = reader
        self._folders, self._rows, self._shape, self._cache = folders, rows, shape, cache
        self._substitute = substitute
        self._shards = [folder.manifest.shards for folder in folders]
        self._urls = [[storage.join(folder.url, s.name) for s in folder.manifest.shards] for folder in folders]
        self._lock = Lock()
        self._damaged: list[Damage] = []
        self._substitutes: dict[tuple[int, int, int], int] = {}

    def samples(self, addresses: Iterable[ImageAddress], out: Sequence[Pixels]) -> Iterator[Sample]:
        """Decoded samples of some addresses, in their order. `out` has a buffer for the pixels of each, which may be used.

        Raises:
            TrainingFailed: the store does not answer, or an image is damaged and has no substitute.
        """
        cache, substitutes = self._cache, self._substitutes
        for address, pixels in zip(addresses, out, strict=True):
            if substitutes and address[:3] in substitutes:
                address = _single(address, substitutes[address[:3]])
            if cache is None:
                address, decoded = self._decode(address, pixels)
            elif cache.copy(address, pixels):
                decoded = pixels
            else:
                address, decoded = self._decode(address, pixels)
                cache.put(address, decoded)
            folder, shard, row, _ = address
            entry = self._shards[folder][shard]
            sample: Sample = {"__key__": entry.keys[row], "__url__": self._urls[folder][shard], "pixels": decoded}
            if entry.labels is not None:
                sample["label"] = entry.labels[row]
            yield sample

    def damaged(self) -> list[Damage]:
        """Images found damaged since the last call."""
        with self._lock:
            found, self._damaged = self._damaged, []
        return found

    def _decode(self, address: ImageAddress, out: Pixels) -> tuple[ImageAddress, Pixels]:
        """Address and pixels of the image, or of its substitute."""
        try:
            return address, self._pixels(address, self.reader.get(address.piece), out)
        except pictures.BadImage:
            return self._reread_or_substitute(address, out)

    def _pixels(self, address: ImageAddress, fetched: PieceBytes, out: Pixels) -> Pixels:
        """Pixels of the image.

        Raises:
            BadImage: it is damaged.
        """
        folder, shard, row, _ = address
        entry = self._shards[folder][shard]
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

    def _reread_or_substitute(self, address: ImageAddress, out: Pixels) -> tuple[ImageAddress, Pixels]:
        """Address and pixels of the image, read from the store a second time, or of its substitute."""
        alone = _single(address, address.row)
        self.reader.drop(address.piece)
        try:
            return address, self._pixels(alone, self.reader.fetch_again(alone.piece), out)
        except pictures.BadImage as error:
            bad = error
        url = storage.redact(self._urls[address.folder][address.shard])
        if not self._substitute:
            raise TrainingFailed(
                f"{url}: {bad}; run `dist-gan verify {storage.redact(self._folders[address.folder].url)}` to find all such "
                f"images, or let data.bad_images=substitute replace them"
            ) from bad
        for row in islice(self._neighbours(address), _TRIES):
            other = _single(address, row)
            try:
                pixels = self._pixels(other, self.reader.fetch_again(other.piece), out)
            except pictures.BadImage:
                continue
            with self._lock:
                if address[:3] not in self._substitutes:
                    self._substitutes[address[:3]] = row
                    self._damaged.append(Damage(url, bad.name, bad.reason))
            return other, pixels
        raise TrainingFailed(
            f"{url}: {bad}, and nothing in the shard can take its place; copy or pack the shard again"
        ) from bad

    def _neighbours(self, address: ImageAddress) -> Iterator[int]:
        """Candidates for the substitute of an image: the rows after it, then those from the shard's start; its label first."""
        labels = self._shards[address.folder][address.shard].labels
        rows = self._rows[address.folder][address.shard]
        behind = int(np.searchsorted(rows, address.row, side="right"))
        others = [row for row in np.roll(rows, -behind).tolist() if row != address.row]
        if labels is None:
            return iter(others)
        return iter(sorted(others, key=lambda row: labels[row] != labels[address.row]))


def _single(address: ImageAddress, row: int) -> ImageAddress:
    """Address of an image of the same shard, whose piece holds nothing else."""
    return ImageAddress(address.folder, address.shard, row, Piece(address.folder, address.shard, row, row))
