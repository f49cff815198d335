"""Computes the order of images from (seed, position) by integer arithmetic, without state or random generator.

A pass shows every image once. For each pass the blocks (runs of neighbouring images in one shard) are permuted and
laid end to end. This line of blocks is cut into parts of equal length, the lanes, and position i of the pass is element
i // lanes of lane i % lanes. The images inside a block are permuted too. A batch thus takes images from `lanes`
different blocks, each of which is one contiguous read, and the image at any position is found in O(log blocks) without
computing earlier positions.

Every permutation sorts words that SHAKE-128 makes of seed, pass and block, so that all machines get the same order.

A mixture divides positions among several orders by whole-numbered weights. Positions are grouped into cycles of
`sum(weights)`. Within a cycle each order gets exactly as many positions as its weight, at permuted places, and continues
its own sequence from the cycle before.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from functools import lru_cache
from math import gcd
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]


class Locations(NamedTuple):
    """Locations of the images at some positions of an order or a mixture, as columns of equal length."""

    order: Integers
    """Index of the image's order in a mixture of several orders; 0 without a mixture."""
    shard: Integers
    nth: Integers
    """Index of the image among those images of its shard that belong to the order."""
    block: Integers
    """Number of the image's block (a run of neighbouring images in one shard) in its order."""


class Order:
    """Endless sequence of the images of one data set, as a function of the position in the sequence.

    Args:
        shard_sizes: number of images of each shard that belong to the order.
        seed: seed of the run.
        lanes: number of blocks from which consecutive positions take images in turn.
        block: number of neighbouring images that are read together.
        name: name of the order; orders of different names have different permutations in one run.
    """

    def __init__(self, shard_sizes: Sequence[int], *, seed: int, lanes: int, block: int, name: str = "order") -> None:
        self.length = int(sum(shard_sizes))
        assert self.length > 0
        assert lanes > 0
        assert block > 0
        self._lanes = min(lanes, self.length)
        self._seed, self._name = seed, name
        starts, sizes, shards = [], [], []
        for shard, size in enumerate(shard_sizes):
            for start in range(0, size, block):
                shards.append(shard)
                starts.append(start)
                sizes.append(min(block, size - start))
        self._shards, self._starts, self._sizes = (np.array(x, dtype=np.int64) for x in (shards, starts, sizes))
        self._line_of_pass = lru_cache(maxsize=2)(self._permuted_blocks)
        self._inside_block = lru_cache(maxsize=4 * self._lanes + 64)(self._permuted_images)
        self.orders: tuple[Order, ...] = (self,)
        """Tuple of this order alone; `Locations.order` is an index of the tuple."""

    def locate(self, positions: Integers) -> Locations:
        """Returns shard, index and block of the images at some positions in the sequence; positions count from 0."""
        blocks, inside, passes = self._in_blocks(positions)
        rows = zip(passes.tolist(), blocks.tolist(), inside.tolist(), strict=True)
        inside = np.array([self._inside_block(number, block)[at] for number, block, at in rows], dtype=np.int64)
        return Locations(np.zeros_like(blocks), self._shards[blocks], self._starts[blocks] + inside, blocks)

    def blocks_at(self, positions: Integers) -> list[tuple[int, int]]:
        """Returns index of the order and number of the block (run of neighbouring images) at each position.

        Prefetching needs no more than the block of an image.
        """
        return [(0, block) for block in self._in_blocks(positions)[0].tolist()]

    def _in_blocks(self, positions: Integers) -> tuple[Integers, Integers, Integers]:
        """Returns, for each position, the block, the index within the permuted block, and the pass over the data."""
        passes, offsets = np.divmod(np.asarray(positions, dtype=np.int64), self.length)
        along = self._along_the_line(offsets)
        blocks = np.empty_like(along)
        inside = np.empty_like(along)
        for number in np.unique(passes):
            order, ends = self._line_of_pass(int(number))
            mine = passes == number
            slot = np.searchsorted(ends, along[mine], side="right")
            blocks[mine] = order[slot]
            inside[mine] = along[mine] - (ends[slot] - self._sizes[order[slot]])
        return blocks, inside, passes

    def block_range(self, block: int) -> tuple[int, int, int]:
        """Returns the shard of a block (run of neighbouring images), and the indices [start, end) of its images in that
        shard."""
        start = int(self._starts[block])
        return int(self._shards[block]), start, start + int(self._sizes[block])

    def _along_the_line(self, offsets: Integers) -> Integers:
        """Converts offsets in a pass to indices in the line of permuted blocks, which is cut into lanes of equal
        length.

        The length of the first lanes may be larger by one.
        """
        lanes = self._lanes
        quotient, remainder = divmod(self.length, lanes)
        lane, depth = offsets % lanes, offsets // lanes
        return lane * quotient + np.minimum(lane, remainder) + depth

    def _permuted_blocks(self, number: int) -> tuple[Integers, Integers]:
        order = _permutation(self._seed, f"{self._name}/blocks", number, 0, len(self._sizes))
        return order, np.cumsum(self._sizes[order])

    def _permuted_images(self, number: int, block: int) -> list[int]:
        order = _permutation(self._seed, f"{self._name}/images", number, block + 1, int(self._sizes[block]))
        return order.tolist()


class Mixture:
    """Endless sequence of several orders or mixtures, among which positions are divided by weight.

    Args:
        parts: orders and mixtures to be mixed.
        weights: number of positions that each part gets of every `sum(weights)`; whole numbers from 1 on.
        seed: seed of the run.
        name: name of the mixture; mixtures of one run with different names have different arrangements.
    """

    def __init__(
        self, parts: Sequence[Order | Mixture], weights: Sequence[int], *, seed: int, name: str = "mixture"
    ) -> None:
        assert len(parts) == len(weights) > 0
        assert min(weights) > 0
        common = gcd(*weights)
        self._parts = tuple(parts)
        self._weights = np.array([w // common for w in weights], dtype=np.int64)
        self._ends = np.cumsum(self._weights)
        self._cycle = int(self._ends[-1])
        self._seed, self._name = seed, name
        self._arrangement = lru_cache(maxsize=64)(self._arranged)
        self.orders: tuple[Order, ...] = tuple(order for part in parts for order in part.orders)
        """Tuple of the orders in all parts; `Locations.order` is an index of the tuple."""
        sizes = [len(part.orders) for part in parts]
        self._first_order = [sum(sizes[:number]) for number in range(len(parts))]
        self.length = sum(order.length for order in self.orders)

    def locate(self, positions: Integers) -> Locations:
        """Returns order, shard, index and block of the images at some positions in the sequence; positions count from
        0."""
        columns = np.empty((4, len(positions)), dtype=np.int64)
        for part, rows, inner in self._dealt(positions):
            locations = self._parts[part].locate(inner)
            columns[:, rows] = (locations.order + self._first_order[part], *locations[1:])
        return Locations(*columns)

    def blocks_at(self, positions: Integers) -> list[tuple[int, int]]:
        """Returns index of the order and number of the block (run of neighbouring images) at each position."""
        found: list[tuple[int, int]] = [(0, 0)] * len(positions)
        for part, rows, inner in self._dealt(positions):
            for row, (order, block) in zip(rows.tolist(), self._parts[part].blocks_at(inner), strict=True):
                found[row] = (order + self._first_order[part], block)
        return found

    def _dealt(self, positions: Integers) -> Iterator[tuple[int, Integers, Integers]]:
        """Yields, for each part, its index, the indices of the given positions that belong to it, and the positions
        within the part."""
        cycles, offsets = np.divmod(np.asarray(positions, dtype=np.int64), self._cycle)
        owners, inner = np.empty_like(offsets), np.empty_like(offsets)
        for cycle in np.unique(cycles):
            owner, nth = self._arrangement(int(cycle))
            mine = cycles == cycle
            owners[mine] = owner[offsets[mine]]
            inner[mine] = int(cycle) * self._weights[owners[mine]] + nth[offsets[mine]]
        for part in np.unique(owners):
            rows = np.flatnonzero(owners == part)
            yield int(part), rows, inner[rows]

    def _arranged(self, cycle: int) -> tuple[Integers, Integers]:
        """Returns the part of each offset in a cycle of `sum(weights)` positions, and the number of earlier offsets of
        that part."""
        order = _permutation(self._seed, f"{self._name}/parts", cycle, 0, self._cycle)
        owner = np.searchsorted(self._ends, order, side="right")
        nth = np.empty_like(owner)
        for part in range(len(self._parts)):
            rows = np.flatnonzero(owner == part)
            nth[rows] = np.arange(len(rows))
        return owner.astype(np.int64), nth.astype(np.int64)


def _permutation(seed: int, purpose: str, number: int, slot: int, length: int) -> Integers:
    """Returns a permutation of 0..length-1, by sorting 64-bit words that SHAKE-128 makes of the other arguments."""
    words = hashlib.shake_128(f"{seed}/{purpose}/{number}/{slot}".encode()).digest(8 * length)
    return np.argsort(np.frombuffer(words, "<u8"), kind="stable").astype(np.int64)


def holdout_mask(keys: Sequence[str], *, share: float) -> NDArray[np.bool_]:
    """Returns a mask of the images that are held out from training, as a function of their keys alone.

    An image is held out if the hash of its key, as a fraction of the largest hash, is below `share`.
    """
    if share <= 0:
        return np.zeros(len(keys), dtype=bool)
    limit = int(share * 2**64)
    return np.array([int.from_bytes(hashlib.sha256(k.encode()).digest()[:8], "big") < limit for k in keys], dtype=bool)
