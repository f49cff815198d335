"""Decodes the images of a batch from bytes of shards, and replaces each damaged image by a substitute.

An image is damaged if its bytes end early, do not have the manifest's CRC-32, or are no picture. A damaged image is
read from the store a second time. If that fails, its substitute is the next sound image of its shard, with the same
label if there are labels. The substitute thus depends on the data alone, and not on which rank read which image when.
If the store does not answer, no image is substituted and the run ends.
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
"""One image as a dictionary: `__key__`, `__url__` of its shard, `pixels` (uint8, HWC), and `label` if there are labels."""

Stage = Callable[[Iterable[Sample]], Iterator[Sample]]
"""Step of the user's own after decoding: takes samples, and yields one sample per sample taken, in the same order."""

_TRIES = 256
"""Largest number of images that are tried as the substitute of a damaged image."""


class Damage(NamedTuple):
    """Description of a damaged image: its shard, its key and the reason."""

    url: str
    """URL of the image's shard, without secrets."""
    key: str
    reason: str


class Decoder:
    """Decodes images by their addresses; several threads may use one decoder at a time.

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
        """Yields the decoded sample at each address, in the order of `addresses`.

        `out` has one buffer per address, which the pixels of its sample may be written to.

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
        """Returns the images found damaged since the last call."""
        with self._lock:
            found, self._damaged = self._damaged, []
        return found

    def _decode(self, address: ImageAddress, out: Pixels) -> tuple[ImageAddress, Pixels]:
        """Decodes the image at an address, or its substitute; returns the address and the pixels of the decoded image."""
        try:
            return address, self._pixels(address, self.reader.get(address.piece), out)
        except pictures.BadImage:
            return self._reread_or_substitute(address, out)

    def _pixels(self, address: ImageAddress, fetched: PieceBytes, out: Pixels) -> Pixels:
        """Decodes an image from the bytes of its piece (range of bytes read at once); returns the pixels.

        Raises:
            BadImage: the image is damaged.
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
        """Reads a damaged image from the store a second time, or decodes a substitute; returns address and pixels."""
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
        """Returns the rows of the images that may be substitutes of an image, in the order in which they are tried.

        The order is: the images after it in the shard, then those from the shard's start; images with the same label
        come first.
        """
        labels = self._shards[address.folder][address.shard].labels
        rows = self._rows[address.folder][address.shard]
        behind = int(np.searchsorted(rows, address.row, side="right"))
        others = [row for row in np.roll(rows, -behind).tolist() if row != address.row]
        if labels is None:
            return iter(others)
        return iter(sorted(others, key=lambda row: labels[row] != labels[address.row]))


def _single(address: ImageAddress, row: int) -> ImageAddress:
    """Returns the address of an image of the same shard, with a piece (range of bytes to be read) of this image alone."""
    return ImageAddress(address.folder, address.shard, row, Piece(address.folder, address.shard, row, row))
