"""Memory for all decoded images of small data sets, so that every image is decoded once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dist_gan.data.pieces import ShardFolder
from dist_gan.data.plan import ImageAddress
from dist_gan.pictures import Pixels


class PixelCache:
    """Decoded images of all folders, at the network's resolution. Memory for all of them is reserved at once.

    Args:
        folders: folders of shards.
        shape: HWC of each image.
    """

    def __init__(self, folders: Sequence[ShardFolder], *, shape: tuple[int, int, int]) -> None:
        self._first: list[list[int]] = []
        count = 0
        for folder in folders:
            self._first.append([])
            for shard in folder.manifest.shards:
                self._first[-1].append(count)
                count += len(shard.keys)
        self._pixels = np.empty((count, *shape), np.uint8)
        self._is_there = np.zeros(count, dtype=bool)

    def copy(self, address: ImageAddress, out: Pixels) -> bool:
        """Copies an image into `out`; returns False if the image has not been decoded yet."""
        number = self._first[address.folder][address.shard] + address.row
        if self._is_there[number]:
            out[...] = self._pixels[number]
            return True
        return False

    def put(self, address: ImageAddress, pixels: Pixels) -> None:
        """Stores a decoded image."""
        number = self._first[address.folder][address.shard] + address.row
        self._pixels[number] = pixels
        self._is_there[number] = True
