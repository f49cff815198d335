"""Keeps all decoded images of a small data set in memory, so that every image is decoded once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dist_gan.data.pieces import ShardFolder
from dist_gan.data.plan import ImageAddress
from dist_gan.pictures import Pixels


class PixelCache:
    """Keeps the decoded images of all folders, at the networks' resolution.

    Memory for all images is reserved at once.

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
        """Copies a stored image into `out`; returns False if the image has not been stored yet."""
        number = self._first[address.folder][address.shard] + address.row
        if self._is_there[number]:
            out[...] = self._pixels[number]
            return True
        return False

    def put(self, address: ImageAddress, pixels: Pixels) -> None:
        """Stores the pixels of a decoded image."""
        number = self._first[address.folder][address.shard] + address.row
        self._pixels[number] = pixels
        self._is_there[number] = True
