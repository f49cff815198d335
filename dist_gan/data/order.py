"""Order of the images: integer arithmetic from (seed, position), without state and without a random generator.

A pass shows every image once. For each pass the blocks (runs of neighbouring images in one shard) are permuted and
laid end to end. This line is cut into equal lanes, and position i of the pass is element i // lanes of lane i % lanes.
The images inside a block are permuted too. A batch thus draws from `lanes` different blocks, each of which is one
contiguous read, and any position is found in O(log blocks) without replaying earlier ones.

Every permutation sorts words that SHAKE-128 makes of seed, pass and block, so it is the same on every machine.

A mixture deals positions to several orders by whole-numbered weights: of every `sum(weights)` positions in a row that
begin at a multiple of it, each order gets exactly its weight, in a permuted arrangement, and continues where it stopped.
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
    """Locations of the images at some positions; columns of equal length."""

    order: Integers
    """Index of the order in a mixture; 0 without a mixture."""
    shard: Integers
    nth: Integers
    """Index among those images of the shard that belong to the order."""
    block: Integers
    """Number of the block in its order."""


class Order:
    """The endless sequence of the images of one data set.

    Args:
        shard_sizes: number of images of each shard that belong to the order.
        seed: seed of the run.
        lanes: number of blocks from which images come at any moment.
        block: number of neighbouring images that are read together.
        name: name of the order; orders of one run with different names have different permutations.
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
        """The orders that `Locations.order` is an index of."""

    def locate(self, positions: Integers) -> Locations:
        """Locations of the images at some positions, each from 0 on."""
        blocks, inside, passes = self._in_blocks(positions)
        rows = zip(passes.tolist(), blocks.tolist(), inside.tolist(), strict=True)
        inside = np.array([self._inside_block(number, block)[at] for number, block, at in rows], dtype=np.int64)
        return Locations(np.zeros_like(blocks), self._shards[blocks], self._starts[blocks] + inside, blocks)

    def blocks_at(self, positions: Integers) -> list[tuple[int, int]]:
        """Order and block of each position, which is all that prefetching needs."""
        return [(0, block) for block in self._in_blocks(positions)[0].tolist()]

    def _in_blocks(self, positions: Integers) -> tuple[Integers, Integers, Integers]:
        """Block, index within the permuted block, and pass of each position."""
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
        """Shard of a block, and the indices [start, end) of its images there."""
        start = int(self._starts[block])
        return int(self._shards[block]), start, start + int(self._sizes[block])

    def _along_the_line(self, offsets: Integers) -> Integers:
        """Index in the line of permuted blocks. Lanes have equal lengths, except that the first ones may be longer by one."""
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
    """The endless sequence of several orders or mixtures, in which positions are dealt by weight.

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
        """The orders that `Locations.order` is an index of."""
        sizes = [len(part.orders) for part in parts]
        self._first_order = [sum(sizes[:number]) for number in range(len(parts))]
        self.length = sum(order.length for order in self.orders)

    def locate(self, positions: Integers) -> Locations:
        """Locations of the images at some positions, each from 0 on."""
        columns = np.empty((4, len(positions)), dtype=np.int64)
        for part, rows, inner in self._dealt(positions):
            locations = self._parts[part].locate(inner)
            columns[:, rows] = (locations.order + self._first_order[part], *locations[1:])
        return Locations(*columns)

    def blocks_at(self, positions: Integers) -> list[tuple[int, int]]:
        """Order and block of each position."""
        found: list[tuple[int, int]] = [(0, 0)] * len(positions)
        for part, rows, inner in self._dealt(positions):
            for row, (order, block) in zip(rows.tolist(), self._parts[part].blocks_at(inner), strict=True):
                found[row] = (order + self._first_order[part], block)
        return found

    def _dealt(self, positions: Integers) -> Iterator[tuple[int, Integers, Integers]]:
        """Yields each part that gets some of the positions, their indices, and their positions in the part."""
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
        """Part of each offset in a cycle, and the number of earlier offsets of the same part in the cycle."""
        order = _permutation(self._seed, f"{self._name}/parts", cycle, 0, self._cycle)
        owner = np.searchsorted(self._ends, order, side="right")
        nth = np.empty_like(owner)
        for part in range(len(self._parts)):
            rows = np.flatnonzero(owner == part)
            nth[rows] = np.arange(len(rows))
        return owner.astype(np.int64), nth.astype(np.int64)


def _permutation(seed: int, purpose: str, number: int, slot: int, length: int) -> Integers:
    """A permutation of 0..length-1: the order of 64-bit words of SHAKE-128 over the arguments."""
    words = hashlib.shake_128(f"{seed}/{purpose}/{number}/{slot}".encode()).digest(8 * length)
    return np.argsort(np.frombuffer(words, "<u8"), kind="stable").astype(np.int64)


def holdout_mask(keys: Sequence[str], *, share: float) -> NDArray[np.bool_]:
    """Mask of the images held out of training: those whose key has a hash below `share`, whatever shard they are in."""
    if share <= 0:
        return np.zeros(len(keys), dtype=bool)
    limit = int(share * 2**64)
    return np.array([int.from_bytes(hashlib.sha256(k.encode()).digest()[:8], "big") < limit for k in keys], dtype=bool)
