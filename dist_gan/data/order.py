"""Which image comes at which place: integer arithmetic from (seed, position), with no state and no generator.

A pass shows every image once. For each pass the blocks (runs of neighbouring images in one shard) are permuted and
laid end to end; that line is cut into equal lanes; position i of the pass is place i // lanes of lane i % lanes; and
inside a block the images are permuted too. A batch thus draws from `lanes` different blocks, each of which is one
contiguous read, and any position is found in O(log blocks) without replaying what came before.

All permutations are orders of words that a hash makes of seed, pass and block (SHAKE-128): no generator, no state, and
the same on every machine.

A mixture deals positions to several orders by whole-numbered weights: of every `sum(weights)` positions in a row that
begin at a multiple of it, each order gets exactly its weight, in a permuted arrangement, and goes on where it was.
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


class Places(NamedTuple):
    """Where the images of some positions are; columns of equal length."""

    order: Integers
    """Which of the orders of a mixture; 0 without one."""
    shard: Integers
    nth: Integers
    """Among the shard's images that take part."""
    block: Integers
    """Number of the block in its order."""


class Order:
    """The endless sequence of images.

    Args:
        shard_sizes: images of each shard that take part.
        seed: of the run.
        lanes: images that come from different blocks at any moment.
        block: neighbouring images read together.
        name: sets the permutations of several orders of one run apart.
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
        """What `Places.order` counts."""

    def locate(self, positions: Integers) -> Places:
        """Where the images of some positions are (any position from 0 on)."""
        blocks, inside, passes = self._in_blocks(positions)
        rows = zip(passes.tolist(), blocks.tolist(), inside.tolist(), strict=True)
        inside = np.array([self._inside_block(number, block)[at] for number, block, at in rows], dtype=np.int64)
        return Places(np.zeros_like(blocks), self._shards[blocks], self._starts[blocks] + inside, blocks)

    def blocks_at(self, positions: Integers) -> list[tuple[int, int]]:
        """Order and block of each position: all that is needed to read ahead."""
        return [(0, block) for block in self._in_blocks(positions)[0].tolist()]

    def _in_blocks(self, positions: Integers) -> tuple[Integers, Integers, Integers]:
        """Block, place in its permuted run, and pass of each position."""
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
        return blocks, inside, passes

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
        order = _permutation(self._seed, f"{self._name}/blocks", number, 0, len(self._sizes))
        return order, np.cumsum(self._sizes[order])

    def _permuted_images(self, number: int, block: int) -> list[int]:
        order = _permutation(self._seed, f"{self._name}/images", number, block + 1, int(self._sizes[block]))
        return order.tolist()


class Mixture:
    """Several orders, or mixtures, dealt by weight; the endless sequence of all of them.

    Args:
        parts: what is mixed.
        weights: positions that each gets of every `sum(weights)`; whole numbers from 1 on.
        seed: of the run.
        name: sets the arrangements of several mixtures of one run apart.
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
        """What `Places.order` counts."""
        sizes = [len(part.orders) for part in parts]
        self._first_order = [sum(sizes[:number]) for number in range(len(parts))]
        self.length = sum(order.length for order in self.orders)

    def locate(self, positions: Integers) -> Places:
        """Where the images of some positions are (any position from 0 on)."""
        columns = np.empty((4, len(positions)), dtype=np.int64)
        for part, rows, inner in self._dealt(positions):
            places = self._parts[part].locate(inner)
            columns[:, rows] = (places.order + self._first_order[part], *places[1:])
        return Places(*columns)

    def blocks_at(self, positions: Integers) -> list[tuple[int, int]]:
        """Order and block of each position."""
        found: list[tuple[int, int]] = [(0, 0)] * len(positions)
        for part, rows, inner in self._dealt(positions):
            for row, (order, block) in zip(rows.tolist(), self._parts[part].blocks_at(inner), strict=True):
                found[row] = (order + self._first_order[part], block)
        return found

    def _dealt(self, positions: Integers) -> Iterator[tuple[int, Integers, Integers]]:
        """Each part that gets some of the positions, which of them, and their positions in the part."""
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
        """Part of each offset in a cycle, and how many of that part came before it in the cycle."""
        order = _permutation(self._seed, f"{self._name}/parts", cycle, 0, self._cycle)
        owner = np.searchsorted(self._ends, order, side="right")
        nth = np.empty_like(owner)
        for part in range(len(self._parts)):
            rows = np.flatnonzero(owner == part)
            nth[rows] = np.arange(len(rows))
        return owner.astype(np.int64), nth.astype(np.int64)


def _permutation(seed: int, purpose: str, number: int, slot: int, length: int) -> Integers:
    """A permutation of 0..length-1: the order of as many 64-bit words of SHAKE-128 over what names it."""
    words = hashlib.shake_128(f"{seed}/{purpose}/{number}/{slot}".encode()).digest(8 * length)
    return np.argsort(np.frombuffer(words, "<u8"), kind="stable").astype(np.int64)


def held_out(keys: Sequence[str], *, share: float) -> NDArray[np.bool_]:
    """Which images are kept from training: those whose key hashes below `share`, whatever shard they are in."""
    if share <= 0:
        return np.zeros(len(keys), dtype=bool)
    limit = int(share * 2**64)
    return np.array([int.from_bytes(hashlib.sha256(k.encode()).digest()[:8], "big") < limit for k in keys], dtype=bool)
