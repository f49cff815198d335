"""Which rank reads which image from which bytes: against the order of test_order_reference, laid over manifests by hand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice

import numpy as np
import pytest

from dist_gan.config import ShardsData
from dist_gan.data.manifest import Manifest, Shard
from dist_gan.data.order import holdout_mask
from dist_gan.data.pieces import Piece, ShardFolder
from dist_gan.data.plan import Plan
from dist_gan.types import UserError
from tests.unit.test_order_reference import reference, shuffled

SIZE = 100
"""Bytes of every image; 28 more lie between two."""


def source_of(
    sizes: Sequence[int], *, url: str = "/a", classes: int = 0, large: tuple[int, int] | None = None
) -> ShardFolder:
    """A manifest with so many images in each shard. Labels run 0, 0, 1, 0, 0, 1, ...; `large` is an image of 10,000 bytes."""
    shards = []
    for number, size in enumerate(sizes):
        lengths = [10_000 if (number, row) == large else SIZE for row in range(size)]
        offsets = [512 + sum(lengths[:row]) + 28 * row for row in range(size)]
        shards.append(
            Shard(
                name=f"{number}.tar",
                bytes=10**6,
                sha256="0" * 64,
                keys=tuple(f"{url}/{number}/{row}" for row in range(size)),
                offsets=tuple(offsets),
                sizes=tuple(lengths),
                extensions=("png",) * size,
                labels=tuple(int(row % 3 == 2) for row in range(size)) if classes else None,
            )
        )
    names = tuple(map(str, range(classes))) if classes else None
    return ShardFolder(url, Manifest(resolution=16, channels=3, classes=names, shards=tuple(shards), origin="by hand"))


def plan_of(
    *sources: tuple[ShardFolder, int], batch: int = 12, rank: int = 0, world_size: int = 1, **order: object
) -> Plan:
    section = ShardsData(url="/a", **{"lanes": 4, "block": 5} | order)  # type: ignore[arg-type]
    return Plan(sources, section=section, seed=7, batch=batch, slots=np.arange(rank, batch, world_size))


def rows_of(source: ShardFolder, *, holdout: float = 0.0, label: int | None = None) -> list[list[int]]:
    """Of each shard the rows that are trained on, perhaps of one class."""
    found = []
    for shard in source.manifest.shards:
        out = holdout_mask(shard.keys, share=holdout)
        labels = shard.labels or (None,) * len(shard.keys)
        found.append([r for r in range(len(shard.keys)) if not out[r] and (label is None or labels[r] == label)])
    return found


def sequence(rows: list[list[int]], *, name: str = "order") -> Iterator[tuple[int, int]]:
    """Shard and row of every position of an order over some rows."""
    for shard, nth in reference([len(some) for some in rows], 4, 5, seed=7, name=name):
        yield shard, rows[shard][nth]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("holdout", [0.0, 0.3])
def test_a_rank_gets_of_each_batch_the_images_of_its_slots(world_size: int, holdout: float) -> None:
    source = source_of([20, 33, 8])
    rows = rows_of(source, holdout=holdout)
    line = list(islice(sequence(rows), 12 * 20))
    for rank in range(world_size):
        plan = plan_of((source, 1), rank=rank, world_size=world_size, holdout=holdout)
        assert plan.length == sum(map(len, rows))
        for draw in (0, 1, 7, 19):
            wanted = [line[draw * 12 + slot] for slot in range(rank, 12, world_size)]
            assert [(p.shard, p.row) for p in plan.of_draw(draw)] == wanted
        on = list(islice(plan.from_draw(3), 300))  # more than are looked up at once
        assert [number for number, _ in on] == list(range(3, 303))
        for number, places in on:
            assert places == plan.of_draw(number)


def test_a_piece_is_the_whole_block_from_its_first_trained_row_to_its_last() -> None:
    source = source_of([20, 33, 8])
    plan, rows = plan_of((source, 1), holdout=0.3), rows_of(source, holdout=0.3)
    for place in plan.addresses(np.arange(3 * plan.length)):
        at = rows[place.shard].index(place.row) // 5 * 5
        block = rows[place.shard][at : at + 5]
        assert place.piece == Piece(0, place.shard, block[0], block[-1])


def test_what_is_held_out_and_what_is_trained_on_are_all_rows_and_have_none_in_common() -> None:
    source, plan = source_of([200, 300]), plan_of((source_of([200, 300]), 1), holdout=0.25)
    for shard, trained, out in zip(source.manifest.shards, plan.rows[0], plan.holdout_rows[0], strict=True):
        assert sorted([*trained.tolist(), *out.tolist()]) == list(range(len(shard.keys)))
        assert out.tolist() == np.flatnonzero(holdout_mask(shard.keys, share=0.25)).tolist()
    url = next(f"/{n}" for n in range(100) if holdout_mask([f"/{n}/0/0"], share=0.5)[0])
    with pytest.raises(UserError, match=rf"data\.holdout: 0\.5 leaves no image of {url} to train on"):
        plan_of((source_of([20]), 1), (source_of([1], url=url), 1), holdout=0.5)


def test_classes_are_balanced_cycle_by_cycle_and_each_goes_through_its_own_rows() -> None:
    source = source_of([20, 33, 8], classes=2)
    plan = plan_of((source, 1), balance=True)
    places = plan.addresses(np.arange(600))
    parts = [sequence(rows_of(source, label=label), name=f"order/class/{label}") for label in (0, 1)]
    wanted = []
    for cycle in range(300):
        for label in shuffled(2, 7, "order/classes/parts", cycle, 0):
            wanted.append(next(parts[label]))
    assert [(p.shard, p.row) for p in places] == wanted
    assert all(p.piece == Piece(0, p.shard, p.row, p.row) for p in places), "a block of one class is not one run"
    with pytest.raises(UserError, match=r"data\.balance: the class '2' of /a has no image to train on"):
        plan_of((source_of([20], classes=3), 1), balance=True)
    with pytest.raises(UserError, match=r"data\.balance: the images of /a have no classes"):
        plan_of((source_of([20]), 1), balance=True)


def test_sources_are_mixed_by_their_weights_and_each_keeps_its_own_order() -> None:
    sources = [(source_of([20, 33]), 1), (source_of([40], url="/b"), 5), (source_of([9, 9], url="/c"), 2)]
    plan = plan_of(*sources)
    names = ("order", "order/1", "order/2")
    parts = [sequence(rows_of(s), name=name) for (s, _), name in zip(sources, names, strict=True)]
    owners = [part for part, (_, weight) in enumerate(sources) for _ in range(weight)]
    wanted = []
    for cycle in range(50):
        for at in shuffled(8, 7, "mixture/parts", cycle, 0):
            wanted.append((owners[at], *next(parts[owners[at]])))
    assert [(p.folder, p.shard, p.row) for p in plan.addresses(np.arange(400))] == wanted
    assert all(p.piece.folder == p.folder for p in plan.addresses(np.arange(400)))


def test_a_piece_is_announced_as_long_before_it_is_needed_as_a_lane_stays_with_a_block() -> None:
    """50 images a block and 16 lanes are 25 draws of 32."""
    source = source_of([1000] * 4)
    for rank in (0, 1):
        plan = plan_of((source, 1), batch=32, rank=rank, world_size=2, lanes=16, block=50)
        told: dict[Piece, int] = {}
        met: dict[Piece, int] = {}
        asked = 0
        for draw in range(250):
            for place in plan.of_draw(draw):
                met.setdefault(place.piece, draw)
            if plan.prefetches_at(draw):
                asked += 1
                for piece in plan.pieces_to_prefetch(draw):
                    told.setdefault(piece, draw)
        assert all(draw - told[piece] >= 25 for piece, draw in met.items() if draw)
        assert len(met) > 60
        assert asked <= 250 / 3 + 1, "a lane stays with a block for long, so not at each draw"


def test_images_that_are_read_singly_are_announced_as_many_draws_ahead_as_are_decoded() -> None:
    plan = plan_of((source_of([400], large=(0, 7)), 1), lanes=80, memory=2**20, prefetch=6)
    assert not plan.by_block
    for draw in (0, 11):
        assert plan.prefetches_at(draw)
        assert list(plan.pieces_to_prefetch(draw)) == [place.piece for place in plan.of_draw(draw + 6)]
        assert all(place.piece == Piece(0, place.shard, place.row, place.row) for place in plan.of_draw(draw))


def test_blocks_are_read_whole_as_long_as_those_of_all_lanes_fit() -> None:
    """The largest run of 5 images holds the one of 10,000 bytes; 5/2 a lane and 8 more are held at a time."""
    wide = source_of([20, 33, 8], large=(1, 4))
    largest = 10_000 + 4 * SIZE + 4 * 28
    plan = plan_of((wide, 1), lanes=80)
    assert plan.by_block
    assert plan.memory == (5 * 80 // 2 + 8) * largest
    exact = plan.memory
    assert plan_of((wide, 1), lanes=80, memory=exact).by_block
    assert not plan_of((wide, 1), lanes=80, memory=exact - 1).by_block
    assert plan_of((wide, 1), lanes=80, memory=exact - 1).memory == exact - 1
    assert plan_of((wide, 1), lanes=80, batch=80, rank=1, world_size=4).memory == (5 * 20 // 2 + 8) * largest, (
        "a rank that keeps to every fourth lane holds a quarter"
    )
