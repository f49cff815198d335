"""The order of images: a pure function of seed and position, the same whoever reads it, every image once a pass."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import stats

from dist_gan.data.order import Mixture, Order, holdout_mask
from dist_gan.runtime import Runtime

Pairs = list[tuple[int, int]]

shards = st.lists(st.integers(0, 40), min_size=1, max_size=8).filter(lambda sizes: sum(sizes) > 0)
lanes_and_block = {"lanes": st.integers(1, 90), "block": st.integers(1, 50)}
quick = settings(max_examples=60, deadline=None)


def located(order: Order, positions: np.ndarray | range) -> Pairs:
    """(shard, index) of each position."""
    _, shard, index, _ = order.locate(np.asarray(positions, dtype=np.int64))
    return list(zip(shard.tolist(), index.tolist(), strict=True))


def everything(sizes: list[int]) -> Pairs:
    return [(shard, index) for shard, size in enumerate(sizes) for index in range(size)]


# -- every image once -------------------------------------------------------------------------------------------------


@quick
@given(sizes=shards, seed=st.integers(0, 2**63 - 1), number=st.integers(0, 5), **lanes_and_block)
@example(sizes=[1, 1, 1], seed=0, number=0, lanes=64, block=64)
@example(sizes=[40], seed=0, number=1, lanes=7, block=9)
@example(sizes=[0, 3, 0, 0, 5, 0], seed=0, number=0, lanes=2, block=2)
@example(sizes=[1], seed=3, number=4, lanes=5, block=1)
def test_a_pass_shows_every_image_exactly_once(
    sizes: list[int], seed: int, number: int, lanes: int, block: int
) -> None:
    order = Order(sizes, seed=seed, lanes=lanes, block=block)
    assert order.length == sum(sizes)
    got = located(order, range(number * order.length, (number + 1) * order.length))
    assert sorted(got) == everything(sizes)


@quick
@given(sizes=shards, start=st.integers(0, 1000), **lanes_and_block)
def test_any_window_of_a_passs_length_shows_no_image_more_than_twice(
    sizes: list[int], start: int, lanes: int, block: int
) -> None:
    order = Order(sizes, seed=1, lanes=lanes, block=block)
    got = located(order, range(start, start + order.length))
    assert max(got.count(pair) for pair in set(got)) <= 2


@quick
@given(sizes=shards, **lanes_and_block)
def test_the_block_of_a_position_is_the_run_of_neighbours_its_image_lies_in(
    sizes: list[int], lanes: int, block: int
) -> None:
    order = Order(sizes, seed=1, lanes=lanes, block=block)
    _, shard, index, blocks = order.locate(np.arange(order.length))
    for s, i, b in zip(shard.tolist(), index.tolist(), blocks.tolist(), strict=True):
        in_shard, start, end = order.block_range(b)
        assert in_shard == s
        assert start <= i < end <= sizes[s]
        assert end - start <= block
        assert start % block == 0


# -- pure -------------------------------------------------------------------------------------------------------------


@quick
@given(
    sizes=shards, seed=st.integers(0, 99), positions=st.lists(st.integers(0, 400), min_size=1, max_size=20),
    **lanes_and_block,
)  # fmt: skip
def test_a_position_gives_the_same_image_alone_in_any_company_and_after_any_reading(
    sizes: list[int], seed: int, positions: list[int], lanes: int, block: int
) -> None:
    used = Order(sizes, seed=seed, lanes=lanes, block=block)
    used.locate(np.arange(max(positions) + 1))
    together = located(used, np.array(positions))
    fresh = Order(sizes, seed=seed, lanes=lanes, block=block)
    assert [located(fresh, np.array([p]))[0] for p in positions] == together


@quick
@given(
    sizes=shards, batches=st.integers(1, 6), share=st.integers(1, 5), ranks=st.integers(1, 4),
    begin=st.integers(0, 500), **lanes_and_block,
)  # fmt: skip
def test_ranks_that_take_strided_slots_read_together_the_single_sequence(
    sizes: list[int], batches: int, share: int, ranks: int, begin: int, lanes: int, block: int
) -> None:
    batch = share * ranks
    alone = Order(sizes, seed=4, lanes=lanes, block=block)
    single = located(alone, range(begin * batch, (begin + batches) * batch))
    readers = [Order(sizes, seed=4, lanes=lanes, block=block) for _ in range(ranks)]
    together: Pairs = []
    for draw in range(begin, begin + batches):
        rows: list[tuple[int, int] | None] = [None] * batch
        for rank, reader in enumerate(readers):
            slots = np.arange(rank, batch, ranks)
            for slot, pair in zip(slots.tolist(), located(reader, draw * batch + slots), strict=True):
                rows[slot] = pair
        together += [row for row in rows if row is not None]
    assert together == single


def test_the_runtime_deals_the_slots_that_the_order_is_read_by() -> None:
    class Rank:
        """Of a runtime only what `slots` reads: it needs no process group."""

        def __init__(self, rank: int) -> None:
            self.rank, self.world_size = rank, 4

    dealt = [Runtime.slots(Rank(rank), 12) for rank in range(4)]  # type: ignore[arg-type]
    assert torch.equal(torch.stack(dealt, dim=1).flatten(), torch.arange(12))
    assert dealt[1].tolist() == [1, 5, 9]


@quick
@given(sizes=shards, stops=st.lists(st.integers(1, 60), min_size=1, max_size=6), **lanes_and_block)
def test_a_run_stopped_anywhere_goes_on_with_the_next_image_and_repeats_none(
    sizes: list[int], stops: list[int], lanes: int, block: int
) -> None:
    pieces: Pairs = []
    position = 0
    for length in stops:  # each leg is a new process that knows the position alone
        leg = Order(sizes, seed=6, lanes=lanes, block=block)
        pieces += located(leg, range(position, position + length))
        position += length
    whole = Order(sizes, seed=6, lanes=lanes, block=block)
    assert pieces == located(whole, range(position))


# -- mixed ------------------------------------------------------------------------------------------------------------


def test_passes_seeds_and_settings_differ() -> None:
    sizes = [50, 50, 20]
    base = {"seed": 0, "lanes": 8, "block": 10}
    first = located(Order(sizes, **base), range(120))
    others = [
        located(Order(sizes, **base), range(120, 240)),
        located(Order(sizes, **base), range(240, 360)),
        located(Order(sizes, **base | {"seed": 1}), range(120)),
        located(Order(sizes, **base | {"lanes": 9}), range(120)),
        located(Order(sizes, **base | {"block": 11}), range(120)),
    ]
    for other in others:
        assert sum(a == b for a, b in zip(first, other, strict=True)) < 30


def test_neighbouring_passes_are_independent_and_their_border_is_seamless() -> None:
    """The place of an image in one pass says nothing about its place in the next."""
    order = Order([200] * 5, seed=2, lanes=16, block=20)
    places = []
    for number in range(3):
        rank = {pair: i for i, pair in enumerate(located(order, range(1000 * number, 1000 * (number + 1))))}
        places.append([rank[pair] for pair in everything([200] * 5)])
    for a, b in ((0, 1), (1, 2), (0, 2)):
        # Images of a block move together, so 1000 images carry about as much as their 50 blocks.
        assert abs(stats.spearmanr(places[a], places[b]).statistic) < 4 / np.sqrt(50)
    across = located(order, range(990, 1010))
    assert across == located(order, range(990, 1000)) + located(order, range(1000, 1010))


def test_even_a_single_shard_and_a_single_block_are_shuffled() -> None:
    order = Order([30], seed=0, lanes=1, block=64)
    first, second = located(order, range(30)), located(order, range(30, 60))
    assert sorted(first) == sorted(second) == everything([30])
    assert first != sorted(first)
    assert first != second


def test_every_image_comes_first_about_equally_often() -> None:
    counts = np.zeros(12)
    for seed in range(1200):
        ((_, index),) = located(Order([12], seed=seed, lanes=3, block=4), range(1))
        counts[index] += 1
    assert stats.chisquare(counts).pvalue > 1e-3


def test_batches_of_class_sorted_data_have_all_classes_in_nearly_even_numbers() -> None:
    """Ten classes one after the other, as folders are packed: the worst that a reader meets."""
    sizes, classes, batch = [500] * 20, 10, 64
    labels = np.repeat(np.arange(classes), 1000)
    order = Order(sizes, seed=0, lanes=64, block=50)
    _, shard, index, _ = order.locate(np.arange(order.length))
    drawn = labels[shard * 500 + index]
    histograms = np.array(
        [np.bincount(drawn[i : i + batch], minlength=classes) for i in range(0, 10_000 - batch, batch)]
    )
    # A fair draw gives each class 6.4 with a standard deviation of 2.4.
    assert histograms.max() <= 20
    assert (histograms > 0).sum(axis=1).min() >= 7
    assert (histograms > 0).sum(axis=1).mean() > 9.3
    spread = histograms.std(axis=0).mean()
    assert spread < 1.5 * np.sqrt(batch * 0.1 * 0.9)


def test_a_batch_draws_from_as_many_blocks_as_there_are_lanes() -> None:
    order = Order([400] * 10, seed=0, lanes=32, block=25)
    *_, blocks = order.locate(np.arange(4000))
    per_batch = [len(set(blocks[i : i + 32].tolist())) for i in range(0, 4000, 32)]
    assert min(per_batch) >= 30
    # ... and each lane stays in its block: reading on needs few new blocks.
    fresh = [len(set(blocks[i + 32 : i + 64].tolist()) - set(blocks[i : i + 32].tolist())) for i in range(0, 3900, 32)]
    assert np.mean(fresh) < 3


def test_a_lane_stays_with_its_rank_where_the_lanes_divide() -> None:
    """64 lanes over 4 ranks and a batch of 64: each block is read by one rank, but where two lanes meet in a block."""
    order = Order([1000] * 4, seed=0, lanes=64, block=50)
    *_, blocks = order.locate(np.arange(64 * 60))
    readers: dict[int, set[int]] = {}
    for position, block in enumerate(blocks.tolist()):
        readers.setdefault(block, set()).add(position % 64 % 4)
    assert np.mean([len(ranks) for ranks in readers.values()]) < 2.0


# -- far away ---------------------------------------------------------------------------------------------------------


def test_a_position_a_million_million_images_away_is_found_at_once() -> None:
    order = Order([10_000] * 100, seed=0, lanes=64, block=64)
    order.locate(np.arange(2))
    begin = time.perf_counter()
    far = 10**12
    got = located(order, range(far, far + 64))
    assert time.perf_counter() - begin < 2.0
    assert len(set(got)) == 64
    assert got == [located(Order([10_000] * 100, seed=0, lanes=64, block=64), np.array([far]))[0], *got[1:]]


@pytest.mark.parametrize("number", [2**31, 2**32 - 1, 2**32, 2**33 + 7])
def test_passes_far_beyond_32_bits_are_passes_too(number: int) -> None:
    order = Order([7, 5], seed=0, lanes=4, block=3)
    got = located(order, range(number * 12, number * 12 + 36))
    for begin in (0, 12, 24):
        assert sorted(got[begin : begin + 12]) == everything([7, 5])
    assert got[:12] != located(order, range((number & 0xFFFFFFFF) * 12, (number & 0xFFFFFFFF) * 12 + 12)) or (
        number < 2**32
    )


def test_reading_on_costs_little() -> None:
    order = Order([1000] * 50, seed=0, lanes=64, block=64)
    order.locate(np.arange(64))
    begin = time.perf_counter()
    for draw in range(100):
        order.locate(np.arange(draw * 64, draw * 64 + 64))
    assert time.perf_counter() - begin < 2.0


# -- the held-out split -----------------------------------------------------------------------------------------------

KEYS = [f"n{i:08d}" for i in range(20_000)]


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5])
def test_the_held_out_share_is_near_what_was_asked_for(share: float) -> None:
    found = holdout_mask(KEYS, share=share).mean()
    assert found == pytest.approx(share, abs=4.5 * np.sqrt(share * (1 - share) / len(KEYS)))


def test_what_is_held_out_does_not_depend_on_the_packing() -> None:
    out = {k for k, is_out in zip(KEYS, holdout_mask(KEYS, share=0.1), strict=True) if is_out}
    shuffled = np.random.default_rng(0).permutation(KEYS).tolist()
    again = set()
    for begin in range(0, len(shuffled), 777):
        part = shuffled[begin : begin + 777]
        again |= {k for k, is_out in zip(part, holdout_mask(part, share=0.1), strict=True) if is_out}
    assert again == out


def test_a_larger_share_holds_out_the_same_images_and_more() -> None:
    small, large = holdout_mask(KEYS, share=0.05), holdout_mask(KEYS, share=0.2)
    assert not (small & ~large).any()
    assert large.sum() > small.sum()


def test_a_share_of_zero_holds_out_none() -> None:
    assert not holdout_mask(KEYS, share=0).any()
    assert holdout_mask([], share=0.5).shape == (0,)
    assert holdout_mask([], share=0).dtype == holdout_mask(KEYS[:1], share=0.5).dtype == np.bool_


# -- mixtures ---------------------------------------------------------------------------------------------------------


def part_orders(sizes: list[int], *, seed: int) -> list[Order]:
    return [Order([size], seed=seed, lanes=4, block=5, name=f"part-{k}") for k, size in enumerate(sizes)]


mixtures = st.lists(st.tuples(st.integers(1, 30), st.integers(1, 9)), min_size=1, max_size=5)


@quick
@given(parts=mixtures, seed=st.integers(0, 99), cycles=st.integers(1, 20), first=st.integers(0, 50))
def test_of_every_cycle_each_part_of_a_mixture_gets_exactly_its_weight(
    parts: list[tuple[int, int]], seed: int, cycles: int, first: int
) -> None:
    sizes, weights = [size for size, _ in parts], [weight for _, weight in parts]
    mixture = Mixture(part_orders(sizes, seed=seed), weights, seed=seed)
    cycle = sum(weights)
    positions = np.arange(first * cycle, (first + cycles) * cycle)
    owner = mixture.locate(positions).order.reshape(cycles, cycle)
    for part, weight in enumerate(weights):
        assert ((owner == part).sum(axis=1) == weight).all()


@quick
@given(parts=mixtures, seed=st.integers(0, 99), count=st.integers(1, 300))
def test_each_part_of_a_mixture_goes_through_its_own_order_without_gap_or_repeat(
    parts: list[tuple[int, int]], seed: int, count: int
) -> None:
    sizes, weights = [size for size, _ in parts], [weight for _, weight in parts]
    places = Mixture(part_orders(sizes, seed=seed), weights, seed=seed).locate(np.arange(count))
    for part, order in enumerate(part_orders(sizes, seed=seed)):
        mine = places.order == part
        alone = order.locate(np.arange(int(mine.sum())))
        assert np.array_equal(places.nth[mine], alone.nth)
        assert np.array_equal(places.block[mine], alone.block)


@quick
@given(parts=mixtures, positions=st.lists(st.integers(0, 10**9), min_size=1, max_size=20))
def test_a_place_in_a_mixture_needs_no_history(parts: list[tuple[int, int]], positions: list[int]) -> None:
    sizes, weights = [size for size, _ in parts], [weight for _, weight in parts]
    together = Mixture(part_orders(sizes, seed=1), weights, seed=1).locate(np.array(positions))
    blocks = Mixture(part_orders(sizes, seed=1), weights, seed=1).blocks_at(np.array(positions))
    for row, position in enumerate(positions):
        alone = Mixture(part_orders(sizes, seed=1), weights, seed=1).locate(np.array([position]))
        assert [column[0] for column in alone] == [column[row] for column in together]
        assert blocks[row] == (together.order[row], together.block[row])


def test_a_mixture_of_mixtures_numbers_the_orders_through() -> None:
    inner = Mixture(part_orders([6, 6], seed=1), [1, 1], seed=1, name="classes")
    mixture = Mixture([inner, Order([10], seed=1, lanes=2, block=2)], [1, 1], seed=1)
    assert len(mixture.orders) == 3
    counts = np.bincount(mixture.locate(np.arange(400)).order)
    assert counts.tolist() == [100, 100, 200]


def test_parts_of_a_mixture_are_not_in_step() -> None:
    places = Mixture(part_orders([50, 50], seed=3), [1, 1], seed=3).locate(np.arange(100))
    one, other = (places.nth[places.order == part] for part in (0, 1))
    assert (one == other).sum() < 10
