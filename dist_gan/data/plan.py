"""From positions to images and to the pieces that hold them: the order laid over the shards of one or several sources."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from dist_gan import storage
from dist_gan.config import DataOrder
from dist_gan.data.order import Integers, Mixture, Order, held_out
from dist_gan.data.pieces import READERS, Piece, Source
from dist_gan.types import UserError

_AT_ONCE = 512
"""Positions that are looked up together: of a few, numpy's calls take longer than their work."""


class Place(NamedTuple):
    """One image: which source, shard and row; and the piece that is read with it."""

    source: int
    shard: int
    row: int
    piece: Piece


class _Leaf(NamedTuple):
    """What an order runs over."""

    source: int
    rows: tuple[Integers, ...]
    """Of each shard, those that take part."""


class Plan:
    """Which images come where, and what is to be read for them. No reading happens here.

    With `balance` each class is an order of its own, and all have the same weight. Blocks are read whole where two of
    them for every lane fit into `section.memory`; otherwise, and with `balance`, images are read singly.

    Args:
        sources: folders of shards with their weights.
        section: order and split.
        seed: of the run.
        batch: images of a global batch.
        slots: places in it that this rank owns.

    Attributes:
        rows: of each shard of each source, those that are trained on.
        held_out: the same, those that are not.
        memory: bytes of pieces that have to be held at a time.

    Raises:
        UserError: there is nothing to train on, or a class without images is to be balanced.
    """

    def __init__(
        self, sources: Sequence[tuple[Source, int]], *, section: DataOrder, seed: int, batch: int, slots: Integers
    ) -> None:
        self._section, self._batch, self._slots = section, batch, slots
        masks = [[held_out(s.keys, share=section.holdout) for s in source.manifest.shards] for source, _ in sources]
        self.rows = [[np.flatnonzero(~mask) for mask in shards] for shards in masks]
        self.held_out = [[np.flatnonzero(mask) for mask in shards] for shards in masks]
        for (source, _), shards in zip(sources, self.rows, strict=True):
            if not sum(map(len, shards)):
                raise UserError(
                    f"data.holdout: {section.holdout} leaves no image of {storage.redact(source.url)} to train on; "
                    f"choose a smaller share"
                )
        self._leaves: list[_Leaf] = []
        parts = [self._part(source, number, seed) for number, (source, _) in enumerate(sources)]
        self._order = parts[0] if len(parts) == 1 else Mixture(parts, [weight for _, weight in sources], seed=seed)
        # A rank that takes every n-th slot keeps to every n-th lane, if these numbers go into each other.
        ranks, lanes = batch // len(slots), section.lanes
        if len(parts) == 1 and lanes % ranks == 0 and (batch % lanes == 0 or lanes % batch == 0):
            lanes //= ranks
        self._block = lru_cache(maxsize=4 * lanes * len(parts) + 64)(self._piece_of_block)
        self._look_every = max(1, section.block * section.lanes // (8 * batch))
        # Each lane's block, the next one, and for some lanes the one after that; what was used up goes first.
        blocks = (5 * lanes * len(parts) // 2 + 8) * self._largest_block(sources)
        self.by_block = not section.balance and blocks <= section.memory
        self.memory = blocks if self.by_block else section.memory

    @property
    def length(self) -> int:
        """Images that are trained on."""
        return self._order.length

    def places(self, positions: Integers) -> list[Place]:
        """Where the images of some positions are."""
        found = self._order.locate(positions)
        places = []
        for order, shard, nth, block in zip(*(column.tolist() for column in found), strict=True):
            source, rows = self._leaves[order]
            row = rows[shard].item(nth)
            piece = self._block(order, block) if self.by_block else Piece(source, shard, row, row)
            places.append(Place(source, shard, row, piece))
        return places

    def of_draw(self, draw: int) -> list[Place]:
        """This rank's images of a global batch."""
        return self.places(draw * self._batch + self._slots)

    def from_draw(self, draw: int) -> Iterator[tuple[int, list[Place]]]:
        """This rank's images of a global batch and of all after it, with their numbers; endless."""
        size, count = len(self._slots), 1  # the first batch is wanted soon
        while True:
            draws = np.arange(draw, draw + count)
            places = self.places((draws[:, None] * self._batch + self._slots).reshape(-1))
            yield from ((int(number), places[at * size : (at + 1) * size]) for at, number in enumerate(draws))
            draw, count = draw + count, max(1, _AT_ONCE // size)

    def looks_ahead_at(self, draw: int) -> bool:
        """Whether `ahead_of` is to be asked at a draw: a lane stays with a block for long, so not at each."""
        return not self.by_block or draw % self._look_every == 0

    def ahead_of(self, draw: int) -> Iterator[Piece]:
        """What this rank is going to need some time after a draw: each lane's next block, or later draws' images."""
        if self.by_block:
            draws = np.arange(draw, draw + self._look_every, max(1, self._look_every // 2))
            starts = draws * self._batch + self._section.block * self._section.lanes
            later = (starts[:, None] + self._slots).reshape(-1)
            for order, block in dict.fromkeys(self._order.blocks_at(later)):
                yield self._block(order, block)
        else:
            ahead = max(self._section.prefetch, -(-4 * READERS // len(self._slots)))
            yield from (place.piece for place in self.of_draw(draw + ahead))

    def _piece_of_block(self, order: int, block: int) -> Piece:
        leaf = self._leaves[order]
        shard, start, end = self._order.orders[order].block_range(block)
        return Piece(leaf.source, shard, int(leaf.rows[shard][start]), int(leaf.rows[shard][end - 1]))

    def _part(self, source: Source, number: int, seed: int) -> Order | Mixture:
        name, rows = f"order/{number}" if number else "order", self.rows[number]
        if not self._section.balance:
            return self._leaf(number, rows, seed, name)
        shards, classes = source.manifest.shards, source.manifest.classes
        if classes is None:
            raise UserError(
                f"data.balance: the images of {storage.redact(source.url)} have no classes; set data.balance=false"
            )
        labels = [np.array(shard.labels)[kept] for shard, kept in zip(shards, rows, strict=True)]
        parts = []
        for label, class_name in enumerate(classes):
            mine = [kept[these == label] for kept, these in zip(rows, labels, strict=True)]
            if not sum(map(len, mine)):
                raise UserError(
                    f"data.balance: the class {class_name!r} of {storage.redact(source.url)} has no image to train on; set "
                    f"data.balance=false"
                )
            parts.append(self._leaf(number, mine, seed, f"{name}/class/{label}"))
        return Mixture(parts, [1] * len(parts), seed=seed, name=f"{name}/classes")

    def _leaf(self, source: int, rows: Sequence[Integers], seed: int, name: str) -> Order:
        self._leaves.append(_Leaf(source, tuple(rows)))
        sizes = [len(kept) for kept in rows]
        return Order(sizes, seed=seed, lanes=self._section.lanes, block=self._section.block, name=name)

    def _largest_block(self, sources: Sequence[tuple[Source, int]]) -> int:
        """Bytes of the longest run of `block` images in any shard."""
        largest, block = 0, self._section.block
        for (source, _), shards in zip(sources, self.rows, strict=True):
            for shard, rows in zip(source.manifest.shards, shards, strict=True):
                if len(rows):
                    offsets, sizes = np.array(shard.offsets), np.array(shard.sizes)
                    first = rows[::block]
                    last = rows[np.minimum(np.arange(len(first)) * block + block, len(rows)) - 1]
                    largest = max(largest, int((offsets[last] + sizes[last] - offsets[first]).max()))
        return largest
