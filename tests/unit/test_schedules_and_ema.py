"""Settings that move with the images seen, lazy penalties, and the averaged generator."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from dist_gan.config import AdamSection, EMASection, ObjectiveSection, Ramp, RunConfig, SGDSection
from dist_gan.ema import GeneratorEMA
from dist_gan.schedules import at, knobs_at, lazily
from dist_gan.types import HasValues, Knobs

# -- ramps ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "quarter"), [("linear", 7.75), ("cosine", 10 - 9 * (1 - math.cos(math.pi / 4)) / 2)])
def test_a_ramp_starts_passes_half_way_and_stays_at_its_end(shape: str, quarter: float) -> None:
    ramp = Ramp(start=10.0, end=1.0, images=1000, shape=shape)  # type: ignore[arg-type]
    assert at(ramp, 0) == 10.0
    assert at(ramp, 250) == pytest.approx(quarter, rel=1e-12)
    assert at(ramp, 500) == pytest.approx(5.5, rel=1e-12)
    assert at(ramp, 1000) == pytest.approx(1.0, rel=1e-12)
    assert at(ramp, 1001) == at(ramp, 10**15) == at(ramp, 1000)


@pytest.mark.parametrize("shape", ["linear", "cosine"])
def test_a_ramp_that_begins_later_holds_its_start_until_then(shape: str) -> None:
    ramp = Ramp(start=2.0, end=4.0, begin=600, images=1000, shape=shape)  # type: ignore[arg-type]
    assert at(ramp, 0) == at(ramp, 599) == at(ramp, 600) == 2.0
    assert at(ramp, 800) == pytest.approx(3.0, rel=1e-12)
    assert at(ramp, 1000) == pytest.approx(4.0)
    assert at(ramp, 5000) == pytest.approx(4.0)


@pytest.mark.parametrize("shape", ["linear", "cosine"])
@pytest.mark.parametrize(("start", "end"), [(2e-3, 0.0), (0.9, 0.99), (1.0, 1.0)])
def test_a_ramp_moves_one_way_and_never_leaves_its_ends(shape: str, start: float, end: float) -> None:
    ramp = Ramp(start=start, end=end, images=997, shape=shape)  # type: ignore[arg-type]
    values = [at(ramp, n) for n in range(0, 1200, 7)]
    assert all(min(start, end) - 1e-15 <= v <= max(start, end) + 1e-15 for v in values)
    assert all((b - a) * (end - start) >= -1e-18 for a, b in pairwise(values))
    assert at(ramp, 997) == pytest.approx(end, abs=1e-18)


def test_a_number_is_the_same_at_all_times() -> None:
    assert [at(0.25, n) for n in (0, 1, 10**12)] == [0.25] * 3
    assert isinstance(at(1, 0), float)


def test_every_knob_follows_its_own_setting() -> None:
    starts = (0.1, 0.3, 0.2, 0.4, 5, 6, 7, 8, 9)

    def ramp(start: float) -> Ramp:
        return Ramp(start=start, end=0, images=100)

    config = RunConfig(
        g_optim=AdamSection(lr=ramp(0.1), beta2=ramp(0.2)),
        d_optim=AdamSection(lr=ramp(0.3), beta2=ramp(0.4)),
        objective=ObjectiveSection(
            r1_gamma=ramp(5), r2_gamma=ramp(6), gradient_penalty=ramp(7), instance_noise=ramp(8)
        ),
        ema=EMASection(half_life=ramp(9), warmup=0),
    )
    assert knobs_at(0, config=config) == Knobs(*starts)
    assert knobs_at(50, config=config) == Knobs(*(v / 2 for v in starts))
    assert knobs_at(100, config=config) == Knobs(*[0.0] * 9)


def test_a_second_moment_decay_is_asked_of_adam_only() -> None:
    knobs = knobs_at(0, config=RunConfig(g_optim=SGDSection(lr=0.5)))
    assert knobs.g_lr == 0.5
    assert knobs.g_beta2 == 0.0
    assert knobs.d_beta2 == 0.999


# -- lazy penalties -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [1, 2, 4, 16])
def test_lazy_penalties_keep_their_mean_strength_and_leave_the_rest_alone(every: int) -> None:
    knobs = Knobs(1, 2, 3, 4, r1_gamma=5.0, r2_gamma=0.7, gradient_penalty=10.0, instance_noise=0.3, ema_half_life=9)
    updates = [lazily(knobs, update=u, every=every) for u in range(3 * every)]
    for name in ("r1_gamma", "r2_gamma", "gradient_penalty"):
        values = [getattr(u, name) for u in updates]
        assert sum(values) / len(values) == pytest.approx(getattr(knobs, name))
        assert sum(v > 0 for v in values) == 3
        assert values[0] > 0, "the first update of a run has its penalty"
    for update in updates:
        assert update._replace(r1_gamma=5.0, r2_gamma=0.7, gradient_penalty=10.0) == knobs


# -- the averaged generator -----------------------------------------------------------------------------------------


def filled(value: float) -> nn.Module:
    """A small generator with batch norm whose every parameter and floating buffer is `value`."""
    network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double()
    with torch.no_grad():
        for tensor in [*network.parameters(), *network.buffers()]:
            tensor.fill_(value)
    return network


def averaged(generator: nn.Module) -> GeneratorEMA:
    return GeneratorEMA(generator, device=torch.device("cpu"), dtype=torch.float64)


def follow(ema: GeneratorEMA, generator: nn.Module, *, images: int, half_life: float) -> None:
    """An update by the whole generator, a parameter at a time."""
    parts = ({name: p} for name, p in generator.named_parameters())
    ema.update(parts, generator.buffers(), images=images, half_life=half_life)


def values_of(ema: GeneratorEMA) -> set[float]:
    return {float(v) for p in ema.module.parameters() for v in p.flatten()}


@pytest.mark.parametrize("pieces", [[20_000], [64] * 312 + [32], [1] * 5000 + [15_000], [12_345, 7_655]])
def test_after_one_half_life_an_old_weight_counts_half_whatever_the_batches(pieces: list[int]) -> None:
    assert sum(pieces) == 20_000
    ema, current = averaged(filled(1.0)), filled(0.0)
    for images in pieces:
        follow(ema, current, images=images, half_life=20_000.0)
    (value,) = {round(v, 12) for v in values_of(ema)}
    assert value == pytest.approx(0.5, rel=1e-10)


def test_two_half_lives_leave_a_quarter_and_the_average_goes_towards_the_new() -> None:
    ema = averaged(filled(8.0))
    follow(ema, filled(4.0), images=200, half_life=100.0)
    assert [round(v, 12) for v in values_of(ema)] == [5.0]


def test_a_half_life_of_zero_copies() -> None:
    ema = averaged(filled(8.0))
    follow(ema, filled(4.0), images=1, half_life=0.0)
    assert values_of(ema) == {4.0}


def test_the_half_life_warms_up_with_the_images_seen() -> None:
    config = RunConfig(ema=EMASection(half_life=10_000, warmup=0.05))
    assert knobs_at(0, config=config).ema_half_life == 0.0
    assert knobs_at(1_000, config=config).ema_half_life == pytest.approx(50)
    assert knobs_at(200_000, config=config).ema_half_life == pytest.approx(10_000)
    assert knobs_at(10**9, config=config).ema_half_life == 10_000
    unlimited = RunConfig(ema=EMASection(half_life=10_000, warmup=0))
    assert knobs_at(0, config=unlimited).ema_half_life == 10_000


def test_buffers_are_copied_and_not_averaged() -> None:
    ema, current = averaged(filled(1.0)), filled(3.0)
    follow(ema, current, images=10, half_life=1e9)
    assert all(torch.equal(a, b) for a, b in zip(ema.module.buffers(), current.buffers(), strict=True))
    assert int(ema.module[1].num_batches_tracked) == 3  # type: ignore[index]
    assert max(values_of(ema)) < 1.001


def test_the_average_is_in_evaluation_mode_without_gradients_and_its_own_copy() -> None:
    generator = filled(1.0).train()
    ema = averaged(generator)
    assert generator.training
    assert not any(m.training for m in ema.module.modules())
    assert not any(p.requires_grad for p in ema.module.parameters())
    assert all(p.requires_grad for p in generator.parameters())
    with torch.no_grad():
        for p in generator.parameters():
            p.fill_(7.0)
    assert values_of(ema) == {1.0}
    out = ema.module(torch.ones(2, 3, dtype=torch.float64))
    assert not out.requires_grad
    buffers = [b.clone() for b in ema.module.buffers()]
    ema.module(torch.randn(5, 3, dtype=torch.float64))
    assert all(torch.equal(a, b) for a, b in zip(buffers, ema.module.buffers(), strict=True))


def test_an_update_leaves_the_generator_alone_and_builds_no_graph() -> None:
    ema, generator = averaged(filled(1.0)), filled(3.0)
    before = [t.clone() for t in generator.state_dict().values()]
    follow(ema, generator, images=10, half_life=10)
    assert all(torch.equal(a, b) for a, b in zip(before, generator.state_dict().values(), strict=True))
    assert all(p.grad_fn is None and p.grad is None for p in ema.module.parameters())


def test_what_it_saves_it_takes_back_bit_for_bit() -> None:
    ema, other = averaged(filled(1.0)), averaged(filled(5.0))
    follow(ema, filled(3.0), images=7, half_life=10)
    other.load_tensors({name: t.clone() for name, t in ema.tensors()})
    for (name, a), (other_name, b) in zip(ema.tensors(), other.tensors(), strict=True):
        assert name == other_name
        assert torch.equal(a, b)
    assert not isinstance(ema, HasValues), "all its state is in tensors"
    assert not any(p.requires_grad for p in other.module.parameters())
