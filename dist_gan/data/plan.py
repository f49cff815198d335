"""Maps positions in the order of images to images in shards, and to the pieces (ranges of bytes) to be read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from dist_gan import storage
from dist_gan.config import DataOrder
from dist_gan.data.order import Integers, Mixture, Order, holdout_mask
from dist_gan.data.pieces import READERS, Piece, ShardFolder
from dist_gan.types import UserError

_AT_ONCE = 512
"""Number of positions that are looked up in one call, because numpy has a fixed cost per call."""


class ImageAddress(NamedTuple):
    """Address of an image: indices of its folder, its shard and its row, and the piece that it is read with.

    A piece is a range of neighbouring samples of one shard that is read in one request.
    """

    folder: int
    shard: int
    row: int
    piece: Piece


class _Leaf(NamedTuple):
    """Images of one folder of shards that one order shows."""

    folder: int
    rows: tuple[Integers, ...]
    """Indices of the images that belong to the order, for each shard of the folder."""


class Plan:
    """Computes which images each batch holds, and which pieces have to be read for them; reads nothing.

    A piece is a range of neighbouring samples of one shard. With `balance` each class has an order of its own, and all
    classes have the same weight. The order takes images in turn from `section.lanes` parallel lanes, each a sequence of
    blocks of `section.block` images. A piece is a whole block if two and a half blocks per lane fit into
    `section.memory`; otherwise, and with `balance`, a piece is a single image.

    Args:
        folders: folders of shards with their mixing weights.
        section: settings of the order and of the split.
        seed: seed of the run.
        batch: number of images of a global batch.
        slots: positions in the global batch that this rank owns.

    Attributes:
        rows: rows that are trained on, by folder and shard.
        holdout_rows: rows that are held out of training, by folder and shard.
        by_block: whether whole blocks are read.
        memory: bytes of pieces that have to be held in memory at a time.

    Raises:
        UserError: no image is left to train on, or a class to be balanced has no images.
    """

    def __init__(
        self, folders: Sequence[tuple[ShardFolder, int]], *, section: DataOrder, seed: int, batch: int, slots: Integers
    ) -> None:
        self._section, self._batch, self._slots = section, batch, slots
        masks = [[holdout_mask(s.keys, share=section.holdout) for s in folder.manifest.shards] for folder, _ in folders]
        self.rows = [[np.flatnonzero(~mask) for mask in shards] for shards in masks]
        self.holdout_rows = [[np.flatnonzero(mask) for mask in shards] for shards in masks]
        for (folder, _), shards in zip(folders, self.rows, strict=True):
            if not sum(map(len, shards)):
                raise UserError(
                    f"data.holdout: {section.holdout} leaves no image of {storage.redact(folder.url)} to train on; "
                    f"choose a smaller share"
                )
        self._leaves: list[_Leaf] = []
        parts = [self._part(folder, number, seed) for number, (folder, _) in enumerate(folders)]
        self._order = parts[0] if len(parts) == 1 else Mixture(parts, [weight for _, weight in folders], seed=seed)
        # With n ranks, a rank owns every n-th position of the batch. It reads every n-th lane alone if the batch, the lanes
        # and n divide one another.
        ranks, lanes = batch // len(slots), section.lanes
        if len(parts) == 1 and lanes % ranks == 0 and (batch % lanes == 0 or lanes % batch == 0):
            lanes //= ranks
        self._block = lru_cache(maxsize=4 * lanes * len(parts) + 64)(self._piece_of_block)
        self._look_every = max(1, section.block * section.lanes // (8 * batch))
        # Each lane needs memory for its current and its next block, and some lanes for the block after that.
        blocks = (5 * lanes * len(parts) // 2 + 8) * self._largest_block(folders)
        self.by_block = not section.balance and blocks <= section.memory
        self.memory = blocks if self.by_block else section.memory

    @property
    def length(self) -> int:
        """Number of images that the run trains on."""
        return self._order.length

    def addresses(self, positions: Integers) -> list[ImageAddress]:
        """Returns the addresses of the images at some positions of the order."""
        found = self._order.locate(positions)
        addresses = []
        for order, shard, nth, block in zip(*(column.tolist() for column in found), strict=True):
            folder, rows = self._leaves[order]
            row = rows[shard].item(nth)
            piece = self._block(order, block) if self.by_block else Piece(folder, shard, row, row)
            addresses.append(ImageAddress(folder, shard, row, piece))
        return addresses

    def of_draw(self, draw: int) -> list[ImageAddress]:
        """Returns the addresses of this rank's images in global batch number `draw`."""
        return self.addresses(draw * self._batch + self._slots)

    def from_draw(self, draw: int) -> Iterator[tuple[int, list[ImageAddress]]]:
        """Yields number and addresses of this rank's images for each global batch from `draw` on, without end."""
        size, count = len(self._slots), 1  # one batch at first, since training waits for it
        while True:
            draws = np.arange(draw, draw + count)
            addresses = self.addresses((draws[:, None] * self._batch + self._slots).reshape(-1))
            yield from ((int(number), addresses[at * size : (at + 1) * size]) for at, number in enumerate(draws))
            draw, count = draw + count, max(1, _AT_ONCE // size)

    def prefetches_at(self, draw: int) -> bool:
        """Returns whether pieces are requested in advance at global batch number `draw`.

        Consecutive batches read the same blocks for a long time, so blocks are requested at few batches only.
        """
        return not self.by_block or draw % self._look_every == 0

    def pieces_to_prefetch(self, draw: int) -> Iterator[Piece]:
        """Yields the pieces that this rank needs some time after global batch number `draw`.

        These are the next block of each lane, or the single images of a later batch.
        """
        if self.by_block:
            draws = np.arange(draw, draw + self._look_every, max(1, self._look_every // 2))
            starts = draws * self._batch + self._section.block * self._section.lanes
            later = (starts[:, None] + self._slots).reshape(-1)
            for order, block in dict.fromkeys(self._order.blocks_at(later)):
                yield self._block(order, block)
        else:
            distance = max(self._section.prefetch, -(-4 * READERS // len(self._slots)))
            yield from (address.piece for address in self.of_draw(draw + distance))

    def _piece_of_block(self, order: int, block: int) -> Piece:
        leaf = self._leaves[order]
        shard, start, end = self._order.orders[order].block_range(block)
        return Piece(leaf.folder, shard, int(leaf.rows[shard][start]), int(leaf.rows[shard][end - 1]))

    def _part(self, folder: ShardFolder, number: int, seed: int) -> Order | Mixture:
        name, rows = f"order/{number}" if number else "order", self.rows[number]
        if not self._section.balance:
            return self._leaf(number, rows, seed, name)
        shards, classes = folder.manifest.shards, folder.manifest.classes
        if classes is None:
            raise UserError(
                f"data.balance: the images of {storage.redact(folder.url)} have no classes; set data.balance=false"
            )
        labels = [np.array(shard.labels)[trained] for shard, trained in zip(shards, rows, strict=True)]
        parts = []
        for label, class_name in enumerate(classes):
            mine = [trained[these == label] for trained, these in zip(rows, labels, strict=True)]
            if not sum(map(len, mine)):
                raise UserError(
                    f"data.balance: the class {class_name!r} of {storage.redact(folder.url)} has no image to train on; set "
                    f"data.balance=false"
                )
            parts.append(self._leaf(number, mine, seed, f"{name}/class/{label}"))
        return Mixture(parts, [1] * len(parts), seed=seed, name=f"{name}/classes")

    def _leaf(self, folder: int, rows: Sequence[Integers], seed: int, name: str) -> Order:
        self._leaves.append(_Leaf(folder, tuple(rows)))
        sizes = [len(trained) for trained in rows]
        return Order(sizes, seed=seed, lanes=self._section.lanes, block=self._section.block, name=name)

    def _largest_block(self, folders: Sequence[tuple[ShardFolder, int]]) -> int:
        """Returns the largest size, in bytes, of a block of `section.block` images in any shard."""
        largest, block = 0, self._section.block
        for (folder, _), shards in zip(folders, self.rows, strict=True):
            for shard, rows in zip(folder.manifest.shards, shards, strict=True):
                if len(rows):
                    offsets, sizes = np.array(shard.offsets), np.array(shard.sizes)
                    first = rows[::block]
                    last = rows[np.minimum(np.arange(len(first)) * block + block, len(rows)) - 1]
                    largest = max(largest, int((offsets[last] + sizes[last] - offsets[first]).max()))
        return largest
