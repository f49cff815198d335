"""Which image comes at which place: integer arithmetic from (seed, position), with no state and no generator.

A pass shows every image once. For each pass the blocks (runs of neighbouring images in one shard) are permuted and
laid end to end; that line is cut into equal lanes; position i of the pass is place i // lanes of lane i % lanes; and
inside a block the images are permuted too. A batch thus draws from `lanes` different blocks, each of which is one
contiguous read, and any position is found in O(log blocks) without replaying what came before.

All permutations are orders of counter-based random words (dist_gan.draws), keyed by the pass and the block.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray

from dist_gan.draws import Draws

Integers = NDArray[np.int64]


class Order:
    """The endless sequence of images.

    Args:
        shard_sizes: images of each shard that take part.
        seed: of the run.
        lanes: images that come from different blocks at any moment.
        block: neighbouring images read together.
    """

    def __init__(self, shard_sizes: Sequence[int], *, seed: int, lanes: int, block: int) -> None:
        self.length = int(sum(shard_sizes))
        assert self.length > 0
        assert lanes > 0
        assert block > 0
        self._lanes = min(lanes, self.length)
        self._draws = Draws(seed)
        starts, sizes, shards = [], [], []
        for shard, size in enumerate(shard_sizes):
            for start in range(0, size, block):
                shards.append(shard)
                starts.append(start)
                sizes.append(min(block, size - start))
        self._shards, self._starts, self._sizes = (np.array(x, dtype=np.int64) for x in (shards, starts, sizes))
        self._line_of_pass = lru_cache(maxsize=2)(self._permuted_blocks)
        self._inside_block = lru_cache(maxsize=4 * self._lanes + 64)(self._permuted_images)

    def locate(self, positions: Integers) -> tuple[Integers, Integers, Integers]:
        """Shard, index among the shard's images, and block of each position (any position from 0 on)."""
        passes, places = np.divmod(np.asarray(positions, dtype=np.int64), self.length)
        along = self._along_the_line(places)
        blocks = np.empty_like(along)
        inside = np.empty_like(along)
        for number in np.unique(passes):
            order, ends = self._line_of_pass(int(number))
            mine = passes == number
            slot = np.searchsorted(ends, along[mine], side="right")
            blocks[mine] = order[slot]
            inside[mine] = along[mine] - (ends[slot] - self._sizes[order[slot]])
        for row in range(len(blocks)):
            inside[row] = self._inside_block(int(passes[row]), int(blocks[row]))[inside[row]]
        return self._shards[blocks], self._starts[blocks] + inside, blocks

    def block_range(self, block: int) -> tuple[int, int, int]:
        """Shard of a block, and the indices [start, end) of its images there."""
        start = int(self._starts[block])
        return int(self._shards[block]), start, start + int(self._sizes[block])

    def _along_the_line(self, places: Integers) -> Integers:
        """Place in the line of permuted blocks: the lanes are its equal cuts, the first ones longer by one."""
        lanes = self._lanes
        quotient, remainder = divmod(self.length, lanes)
        lane, depth = places % lanes, places // lanes
        return lane * quotient + np.minimum(lane, remainder) + depth

    def _permuted_blocks(self, number: int) -> tuple[Integers, Integers]:
        order = self._permutation("order/blocks", number, 0, len(self._sizes))
        return order, np.cumsum(self._sizes[order])

    def _permuted_images(self, number: int, block: int) -> Integers:
        return self._permutation("order/images", number, block + 1, int(self._sizes[block]))

    def _permutation(self, purpose: str, number: int, slot: int, length: int) -> Integers:
        """A permutation of 0..length-1: the order of as many random numbers of 64 bits."""
        words = self._draws.words(purpose, draw=number, slots=torch.tensor([slot]), count=2 * length)[0].numpy()
        keys = (words[:length].astype(np.uint64) << np.uint64(32)) | words[length:].astype(np.uint64)
        return np.argsort(keys, kind="stable").astype(np.int64)


def held_out(keys: Sequence[str], *, share: float) -> NDArray[np.bool_]:
    """Which images are kept from training: those whose key hashes below `share`, whatever shard they are in."""
    if share <= 0:
        return np.zeros(len(keys), dtype=bool)
    limit = int(share * 2**64)
    return np.array([int.from_bytes(hashlib.sha256(k.encode()).digest()[:8], "big") < limit for k in keys], dtype=bool)
