"""The order of images against its own description, written down a second time with lists and loops.

A pass permutes the blocks, lays them end to end, cuts the line into lanes, and takes one image of each lane in turn. What
follows here is that sentence and nothing else, so an error in the arithmetic of `dist_gan.data.order` cannot be in both.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from itertools import count, islice
from math import gcd

import numpy as np
import pytest

from dist_gan.data.order import Mixture, Order, holdout_mask

Image = tuple[int, int]
"""Shard and index in it."""

CASES = [
    ([10], 1, 4),
    ([10], 4, 3),
    ([7, 5], 5, 4),
    ([0, 13, 0, 4, 9], 6, 5),
    ([40, 40, 12], 8, 16),
    ([3, 1], 64, 64),
    ([9, 9], 2, 1),
]
"""Sizes of the shards, lanes, images in a block."""


def shuffled(length: int, *address: object) -> list[int]:
    """0..length-1 in the order of the 64-bit words that SHAKE-128 makes of an address."""
    digest = hashlib.shake_128("/".join(map(str, address)).encode()).digest(8 * length)
    return sorted(range(length), key=lambda at: int.from_bytes(digest[8 * at : 8 * at + 8], "little"))


def reference(sizes: list[int], lanes: int, block: int, *, seed: int, name: str = "order") -> Iterator[Image]:
    """The endless sequence of images."""
    blocks = [
        [(shard, at) for at in range(start, min(start + block, size))]
        for shard, size in enumerate(sizes)
        for start in range(0, size, block)
    ]
    lanes = min(lanes, sum(sizes))
    for number in count():
        line: list[Image] = []
        for which in shuffled(len(blocks), seed, f"{name}/blocks", number, 0):
            inside = shuffled(len(blocks[which]), seed, f"{name}/images", number, which + 1)
            line += [blocks[which][at] for at in inside]
        quotient, longer = divmod(len(line), lanes)
        lengths = [quotient + (lane < longer) for lane in range(lanes)]
        starts = [sum(lengths[:lane]) for lane in range(lanes)]
        for depth in range(max(lengths)):
            yield from (line[start + depth] for start, length in zip(starts, lengths, strict=True) if depth < length)


def reference_mixture(parts: list[Iterator[Image]], weights: list[int], *, seed: int) -> Iterator[tuple[int, Image]]:
    """Which part a position belongs to, and that part's next image."""
    dealt = [part for part, weight in enumerate(weights) for _ in range(weight // gcd(*weights))]
    for cycle in count():
        for at in shuffled(len(dealt), seed, "mixture/parts", cycle, 0):
            yield dealt[at], next(parts[dealt[at]])


def located(order: Order | Mixture, positions: range) -> list[Image]:
    places = order.locate(np.array(positions))
    return list(zip(places.shard.tolist(), places.nth.tolist(), strict=True))


@pytest.mark.parametrize(("sizes", "lanes", "block"), CASES)
@pytest.mark.parametrize("seed", [0, 2**40 + 1])
def test_every_position_of_four_passes_is_where_the_description_says(
    sizes: list[int], lanes: int, block: int, seed: int
) -> None:
    order = Order(sizes, seed=seed, lanes=lanes, block=block)
    length = sum(sizes)
    wanted = list(islice(reference(sizes, lanes, block, seed=seed), 4 * length))
    assert located(order, range(4 * length)) == wanted
    half = length // 2 + 1
    assert located(order, range(half, half + 2 * length)) == wanted[half : half + 2 * length], "across two borders"


def test_orders_of_one_run_with_different_names_follow_their_names() -> None:
    for name in ("order", "order/1", "order/class/0"):
        order = Order([20, 11], seed=5, lanes=4, block=4, name=name)
        assert located(order, range(62)) == list(islice(reference([20, 11], 4, 4, seed=5, name=name), 62))


def test_each_pass_has_its_blocks_and_the_images_of_each_block_in_an_order_of_its_own() -> None:
    """Not from the reference: of 8 passes no two may agree, in the blocks, and inside any one block."""
    order = Order([40] * 5, seed=3, lanes=1, block=20)
    blocks, insides = [], []
    for number in range(8):
        places = order.locate(np.arange(200 * number, 200 * (number + 1)))
        runs = places.block.reshape(10, 20)  # with one lane each block is a run
        assert (runs == runs[:, :1]).all()
        blocks.append(tuple(runs[:, 0].tolist()))
        insides.append(
            {int(run[0]): tuple(row % 20) for run, row in zip(runs, places.nth.reshape(10, 20), strict=True)}
        )
    assert len(set(blocks)) == 8, "10 blocks have 3,628,800 orders"
    for block in range(10):
        assert len({inside[block] for inside in insides}) == 8
    assert len(set(insides[0].values())) == 10, "blocks of one pass are not shuffled alike"


def test_blocks_to_read_ahead_are_those_of_the_positions() -> None:
    order = Order([40, 40, 12], seed=1, lanes=8, block=16)
    positions = np.array([0, 5, 91, 92, 200, 1000])
    assert order.blocks_at(positions) == [(0, block) for block in order.locate(positions).block.tolist()]


@pytest.mark.parametrize("weights", [[1, 1], [3, 1], [4, 2], [1, 5, 2], [7]])
def test_a_mixture_deals_whole_cycles_as_the_description_says(weights: list[int]) -> None:
    sizes = [[5, 6], [17], [9, 1]][: len(weights)]
    parts = [Order(some, seed=2, lanes=3, block=4, name=f"part/{k}") for k, some in enumerate(sizes)]
    references = [reference(some, 3, 4, seed=2, name=f"part/{k}") for k, some in enumerate(sizes)]
    wanted = list(islice(reference_mixture(references, weights, seed=2), 200))
    mixture = Mixture(parts, weights, seed=2)
    places = mixture.locate(np.arange(200))
    assert places.order.tolist() == [part for part, _ in wanted]
    assert located(mixture, range(200)) == [image for _, image in wanted]
    assert located(mixture, range(90, 133)) == [image for _, image in wanted[90:133]]
    assert mixture.blocks_at(np.arange(200)) == list(zip(places.order.tolist(), places.block.tolist(), strict=True))


def test_cycles_of_a_mixture_are_arranged_differently() -> None:
    """Not from the reference: two sources of weight 8 have 12,870 arrangements of a cycle."""
    parts = [Order([50], seed=0, lanes=2, block=5, name=name) for name in "ab"]
    owners = Mixture(parts, [8, 9], seed=0).locate(np.arange(17 * 20)).order.reshape(20, 17)
    assert (owners.sum(axis=1) == 9).all()
    assert len({tuple(cycle) for cycle in owners.tolist()}) == 20


@pytest.mark.parametrize("share", [0.0, 1e-3, 0.2, 0.5])
def test_a_key_is_held_out_if_the_first_64_bits_of_its_sha256_are_below_the_share(share: float) -> None:
    keys = [f"cats/{n}" for n in range(2000)] + ["größe", "a", "b"]
    wanted = [int(hashlib.sha256(key.encode()).hexdigest()[:16], 16) < share * 2**64 for key in keys]
    assert holdout_mask(keys, share=share).tolist() == wanted
    assert holdout_mask(keys[::-1], share=share).tolist() == wanted[::-1], "the same key is always on the same side"
