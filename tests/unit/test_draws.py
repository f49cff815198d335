"""Random numbers by address: the published function, pure, and as good as random numbers have to be."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from dist_gan.draws import Draws, philox

SLOTS = torch.arange(64)


def words_of(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


# -- the function ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        (
            "00000000 00000000 00000000 00000000",
            "00000000 00000000",
            "6627e8d5 e169c58d bc57ac4c 9b00dbd8",
        ),
        (
            "ffffffff ffffffff ffffffff ffffffff",
            "ffffffff ffffffff",
            "408f276d 41c83b0e a20bc7c6 6d5451fd",
        ),
        (
            "243f6a88 85a308d3 13198a2e 03707344",
            "a4093822 299f31d0",
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_philox_gives_the_known_answers_of_random123(counter: str, key: str, answer: str) -> None:
    first, second = words_of(key)
    got = philox(torch.tensor(words_of(counter)).unsqueeze(1), (first, second))
    assert got[:, 0].tolist() == words_of(answer)


def philox_in_plain_integers(counter: list[int], key: tuple[int, int]) -> list[int]:
    """The algorithm of the paper, figure 2, in Python's unbounded integers."""
    x0, x1, x2, x3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = x0 * 0xD2511F53, x2 * 0xCD9E8D57
        x0, x1, x2, x3 = (p1 >> 32) ^ x1 ^ k0, p1 & 0xFFFFFFFF, (p0 >> 32) ^ x3 ^ k1, p0 & 0xFFFFFFFF
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return [x0, x1, x2, x3]


def test_many_counters_at_once_give_what_each_gives_alone() -> None:
    rng = np.random.default_rng(1)
    counters = rng.integers(0, 2**32, (4, 300), dtype=np.int64)
    key = (0xDEADBEEF, 0x12345678)
    got = philox(torch.from_numpy(counters), key)
    assert got.T.tolist() == [philox_in_plain_integers(column, key) for column in counters.T.tolist()]
    assert got.dtype == torch.int64
    assert int(got.min()) >= 0
    assert int(got.max()) < 2**32


# -- purity ---------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    chosen=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=12),
    draw=st.integers(0, 2**63 - 1),
    count=st.integers(1, 11),
)
def test_a_slot_gets_its_numbers_whoever_asks_beside_it_and_in_which_order(
    chosen: list[int], draw: int, count: int
) -> None:
    draws = Draws(3)
    together = draws.words("p", draw=draw, slots=torch.tensor(chosen), count=count)
    for row, slot in enumerate(chosen):
        assert torch.equal(together[row], Draws(3).words("p", draw=draw, slots=torch.tensor([slot]), count=count)[0])


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6])
def test_ranks_that_share_a_batch_draw_together_what_one_process_draws(world_size: int) -> None:
    draws, batch = Draws(11), 48
    for sample in (
        lambda slots: draws.normal("z", draw=5, slots=slots, shape=(3, 5)),
        lambda slots: draws.uniform("u", draw=5, slots=slots, shape=(7,)),
        lambda slots: draws.integers("i", draw=5, slots=slots, below=1000),
    ):
        alone = sample(torch.arange(batch))
        shared = torch.empty_like(alone)
        for rank in range(world_size):
            shared[rank::world_size] = sample(torch.arange(rank, batch, world_size))
        assert torch.equal(alone, shared)


def test_what_was_drawn_before_changes_nothing() -> None:
    fresh, used = Draws(5), Draws(5)
    for draw in range(20):
        used.normal("other", draw=draw, slots=SLOTS, shape=(9,))
    torch.manual_seed(0)
    state = torch.random.get_rng_state()
    a = used.normal("z", draw=7, slots=SLOTS, shape=(4,))
    assert torch.equal(state, torch.random.get_rng_state()), "the global generator was advanced"
    torch.manual_seed(99)
    assert torch.equal(a, fresh.normal("z", draw=7, slots=SLOTS, shape=(4,)))


def test_asking_for_fewer_words_gives_the_first_of_them() -> None:
    draws = Draws(5)
    many = draws.words("z", draw=1, slots=SLOTS, count=23)
    for count in (1, 2, 3, 4, 5, 8, 22):
        assert torch.equal(draws.words("z", draw=1, slots=SLOTS, count=count), many[:, :count])


def test_every_part_of_the_address_matters() -> None:
    base = {"seed": 1, "purpose": "latents/generator", "draw": 10, "slot": 4}
    others = [
        {"seed": 2}, {"seed": 2**62}, {"purpose": "latents/discriminator"}, {"purpose": ""}, {"draw": 11}, {"draw": 9},
        {"draw": 10 + 2**32}, {"slot": 5}, {"draw": 4, "slot": 10}, {"seed": 10, "draw": 1},
    ]  # fmt: skip

    def words(at: dict[str, object]) -> list[int]:
        draws = Draws(int(str(at["seed"])))
        slots = torch.tensor([int(str(at["slot"]))])
        return draws.words(str(at["purpose"]), draw=int(str(at["draw"])), slots=slots, count=8)[0].tolist()

    rows = [words(base | other) for other in [{}, *others]]
    for a, b in itertools.combinations(rows, 2):
        assert not set(a) & set(b)


def test_a_seed_and_a_purpose_cannot_be_mistaken_for_another_pair() -> None:
    a = Draws(1).words("2/x", draw=0, slots=SLOTS, count=4)
    b = Draws(12).words("x", draw=0, slots=SLOTS, count=4)
    assert not torch.equal(a, b)


@pytest.mark.parametrize("draw", [2**32 - 1, 2**32, 2**32 + 5, 2**40 + 3, 2**62 + 1])
def test_draws_beyond_32_bits_have_numbers_of_their_own(draw: int) -> None:
    draws = Draws(0)
    high = draws.words("z", draw=draw, slots=SLOTS, count=8)
    low = draws.words("z", draw=draw & 0xFFFFFFFF, slots=SLOTS, count=8)
    assert torch.equal(high, low) == (draw < 2**32)
    next_one = draws.words("z", draw=draw + 1, slots=SLOTS, count=8)
    assert not torch.equal(high, next_one)


def test_a_million_addresses_give_a_million_different_blocks() -> None:
    """128 bits each: even two equal ones would mean that two addresses share a counter."""
    draws = Draws(9)
    rows = [
        draws.words("p", draw=draw, slots=torch.arange(10_000), count=40).view(-1, 4)
        for draw in (0, 1, 2, 3, 2**32, 2**32 + 1, 2**33, 2**40, 2**41 - 1, 2**62)
    ]
    blocks = torch.cat(rows).numpy().astype(np.uint32)
    assert len(blocks) == 10**6
    assert len(np.unique(np.ascontiguousarray(blocks).view("V16"))) == 10**6


# -- types and shapes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_numbers_come_in_the_type_of_the_run_and_are_the_same_numbers(dtype: torch.dtype) -> None:
    draws, exact = Draws(2, dtype=dtype), Draws(2, dtype=torch.float64)
    for shape in ((), (3,), (3, 4, 5), (1,), (7,)):
        uniform = draws.uniform("u", draw=3, slots=SLOTS, shape=shape)
        assert uniform.dtype == dtype
        assert uniform.shape == (64, *shape)
        assert torch.equal(uniform, exact.uniform("u", draw=3, slots=SLOTS, shape=shape).to(dtype))
        if shape:
            normal = draws.normal("n", draw=3, slots=SLOTS, shape=shape)
            assert normal.dtype == dtype
            assert normal.shape == (64, *shape)
            assert torch.equal(normal, exact.normal("n", draw=3, slots=SLOTS, shape=shape).to(dtype))


def test_float64_numbers_are_finer_than_float32_ones() -> None:
    fine = Draws(2, dtype=torch.float64).normal("n", draw=0, slots=SLOTS, shape=(64,))
    assert (fine != fine.float().double()).double().mean() > 0.99


def test_normal_is_box_and_muller_of_the_words() -> None:
    draws = Draws(4, dtype=torch.float64)
    words = draws.words("n", draw=8, slots=torch.tensor([3]), count=6)[0].tolist()
    got = draws.normal("n", draw=8, slots=torch.tensor([3]), shape=(5,))[0].tolist()
    unit = [(w + 0.5) / 2**32 for w in words]
    radius = [math.sqrt(-2 * math.log(u)) for u in unit[:3]]
    angle = [2 * math.pi * u for u in unit[3:]]
    expected = [r * math.cos(a) for r, a in zip(radius, angle, strict=True)]
    expected += [r * math.sin(a) for r, a in zip(radius, angle, strict=True)]
    assert got == pytest.approx(expected[:5], rel=1e-12)


def test_uniform_is_the_middle_of_the_words_cell() -> None:
    draws, slots = Draws(4, dtype=torch.float64), torch.tensor([3])
    words = draws.words("u", draw=8, slots=slots, count=9)[0].tolist()
    got = draws.uniform("u", draw=8, slots=slots, shape=(9,))[0].tolist()
    assert got == [(word + 0.5) / 2**32 for word in words]


def test_no_uniform_number_is_an_end_of_the_interval_in_float64() -> None:
    """What the extreme words 0 and 2^32 - 1 would become; a logarithm must not see 0."""
    lowest, highest = 0.5 * 2.0**-32, (2.0**32 - 0.5) * 2.0**-32
    assert lowest > 0.0
    assert highest < 1.0
    u = Draws(0, dtype=torch.float64).uniform("u", draw=0, slots=torch.arange(1000), shape=(1000,))
    assert lowest <= float(u.min())
    assert float(u.max()) <= highest


def test_no_uniform_number_is_an_end_of_the_interval_in_float32() -> None:
    draws, slot = Draws(0), torch.tensor([399])  # an address whose word is 2^32 - 108
    assert int(draws.words("u", draw=64, slots=slot, count=982)[0, 981]) == 2**32 - 108
    assert float(draws.uniform("u", draw=64, slots=slot, shape=(982,))[0, 981]) < 1.0


# -- statistics: fixed seeds, so that these never waver ------------------------------------------------------------------


def sample(
    kind: str, *, seed: int = 0, draw: int = 0, purpose: str = "p", slots: int = 500, each: int = 400
) -> np.ndarray:
    draws = Draws(seed, dtype=torch.float64)
    made = getattr(draws, kind)(purpose, draw=draw, slots=torch.arange(slots), shape=(each,))
    return made.numpy()


@pytest.mark.parametrize("seed", [0, 1, 2**63 - 1])
def test_uniform_numbers_are_uniform(seed: int) -> None:
    u = sample("uniform", seed=seed).ravel()
    assert stats.kstest(u, "uniform").pvalue > 1e-3
    assert u.mean() == pytest.approx(0.5, abs=4 / math.sqrt(12 * len(u)))
    assert u.var() == pytest.approx(1 / 12, rel=0.02)


@pytest.mark.parametrize("seed", [0, 1, 2**63 - 1])
def test_normal_numbers_are_normal_in_moments_shape_and_tails(seed: int) -> None:
    z = sample("normal", seed=seed).ravel()
    n = len(z)
    assert stats.kstest(z, "norm").pvalue > 1e-3
    assert abs(z.mean()) < 4 / math.sqrt(n)
    assert abs(z.var() - 1) < 4 * math.sqrt(2 / n)
    assert abs(stats.skew(z)) < 4 * math.sqrt(6 / n)
    assert abs(stats.kurtosis(z)) < 4 * math.sqrt(24 / n)
    for limit in (2.0, 3.0, 4.0):
        expected = n * 2 * stats.norm.sf(limit)
        found = int((np.abs(z) > limit).sum())
        assert abs(found - expected) < 5 * math.sqrt(expected) + 1, f"{found} beyond {limit}, {expected:.0f} expected"


def test_the_two_halves_of_a_normal_sample_are_independent() -> None:
    """Box and Muller's pairs share a radius; cosine and sine of it must not show."""
    z = sample("normal", slots=2000, each=64)
    first, second = z[:, :32].ravel(), z[:, 32:].ravel()
    bound = 4.5 / math.sqrt(first.size)
    assert abs(np.corrcoef(first, second)[0, 1]) < bound
    assert abs(np.corrcoef(first**2, second**2)[0, 1]) < bound
    assert abs(np.corrcoef(np.abs(first), np.abs(second))[0, 1]) < bound


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"draw": 0}, {"draw": 1}),
        ({"draw": 0}, {"draw": 2**32}),
        ({"seed": 0}, {"seed": 1}),
        ({"purpose": "latents/generator"}, {"purpose": "latents/discriminator"}),
        ({"purpose": "noise/discriminator/real"}, {"purpose": "noise/discriminator/fake"}),
    ],
    ids=["draws", "far draws", "seeds", "turns", "noises"],
)
@pytest.mark.parametrize("kind", ["uniform", "normal"])
def test_neighbouring_addresses_are_uncorrelated(kind: str, one: dict[str, object], other: dict[str, object]) -> None:
    a = sample(kind, slots=250, **one).ravel()  # type: ignore[arg-type]
    b = sample(kind, slots=250, **other).ravel()  # type: ignore[arg-type]
    assert abs(np.corrcoef(a, b)[0, 1]) < 4.5 / math.sqrt(a.size)
    assert abs(np.corrcoef((a - a.mean()) ** 2, (b - b.mean()) ** 2)[0, 1]) < 4.5 / math.sqrt(a.size)


def test_neighbouring_slots_and_neighbouring_numbers_of_a_slot_are_uncorrelated() -> None:
    u = sample("uniform", slots=600, each=300)
    for lag in (1, 2, 3, 4, 8):
        for a, b in ((u[:-lag], u[lag:]), (u[:, :-lag], u[:, lag:])):
            assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 4.5 / math.sqrt(a.size)


def test_neighbouring_slots_differ_in_half_of_their_bits() -> None:
    words = np.ascontiguousarray(Draws(0).words("p", draw=0, slots=torch.arange(4096), count=4).numpy(), np.uint32)
    flipped = np.unpackbits((words[1:] ^ words[:-1]).view(np.uint8)).mean()
    assert flipped == pytest.approx(0.5, abs=4.5 * 0.5 / math.sqrt(4095 * 128))


def test_every_bit_is_set_half_of_the_time_and_bits_are_independent_of_one_another() -> None:
    words = np.ascontiguousarray(Draws(0).words("bits", draw=3, slots=torch.arange(20_000), count=4), np.uint32)
    bits = np.unpackbits(words.byteswap().view(np.uint8), axis=1).astype(np.float64)
    assert bits.shape == (20_000, 128)
    n = len(bits)
    z = (bits.mean(axis=0) - 0.5) * 2 * math.sqrt(n)
    assert stats.chi2.sf(float((z**2).sum()), 128) > 1e-3
    assert np.abs(z).max() < 5
    correlation = np.corrcoef(bits.T) - np.eye(128)
    assert np.abs(correlation).max() < 5.5 / math.sqrt(n)


@pytest.mark.parametrize("below", [1, 2, 3, 10, 12, 1000])
def test_integers_are_evenly_spread(below: int) -> None:
    numbers = torch.cat(
        [Draws(1).integers("i", draw=d, slots=torch.arange(5000), below=below) for d in range(20)]
    ).numpy()
    assert numbers.dtype == np.int64
    counts = np.bincount(numbers, minlength=below)
    assert len(counts) == below
    if below > 1:
        assert stats.chisquare(counts).pvalue > 1e-3


def test_integers_reach_both_ends_and_never_the_bound_even_for_a_large_one() -> None:
    numbers = Draws(1).integers("i", draw=0, slots=torch.arange(100_000), below=2**31)
    assert int(numbers.min()) >= 0
    assert int(numbers.max()) < 2**31
    assert int(numbers.max()) > 2**31 * 0.999


def test_triples_fill_the_cube_evenly() -> None:
    """A weak generator's triples lie on planes (RANDU)."""
    u = sample("uniform", slots=2000, each=48).reshape(-1, 3)
    cells = (u * 8).astype(int)
    counts = np.bincount(cells[:, 0] * 64 + cells[:, 1] * 8 + cells[:, 2], minlength=512)
    assert stats.chisquare(counts).pvalue > 1e-3


# -- seeds for generators that have no addresses ---------------------------------------------------------------------


def test_seeds_for_turns_are_63_bits_wide_and_all_different() -> None:
    seeds = {
        Draws(seed).seed_for(f"turn/{player}/{piece}", draw=draw, rank=rank)
        for seed in (0, 1)
        for player in ("generator", "discriminator")
        for piece in range(3)
        for draw in range(30)
        for rank in range(12)
    }
    assert len(seeds) == 2 * 2 * 3 * 30 * 12
    assert all(0 <= s < 2**63 for s in seeds)
    assert max(seeds) > 2**62
    assert Draws(4).seed_for("t", draw=1, rank=0) == Draws(4).seed_for("t", draw=1, rank=0)
