"""The step against a game written out by hand, and what becomes of an update that is skipped."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from itertools import combinations, pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from dist_gan.data import PointStream
from dist_gan.draws import Draws
from dist_gan.runtime import Player, Runtime
from tests.games import Game, PointDiscriminator, game, points_config, poison, stateful_networks

# -- the game by hand -----------------------------------------------------------------------------------------------


class Ramped:
    """A setting that falls in a straight line from `start` to `end` over `images`."""

    def __init__(self, start: float, end: float, images: int) -> None:
        self.start, self.end, self.images = start, end, images

    def __call__(self, images: int) -> float:
        return self.start + (self.end - self.start) * min(1.0, images / self.images)

    def __str__(self) -> str:
        return f"{{start: {self.start}, end: {self.end}, images: {self.images}}}"


class ByHand:
    """The game without the toolkit's step, players, optimizers, schedules and average: only its random numbers.

    Args:
        networks: start of both players, copied.
        make_g, make_d: torch's own optimizer over parameters.
        g_rates, d_rates: learning rate and beta2 when so many images have been seen.
    """

    def __init__(
        self, networks: tuple[nn.Module, nn.Module], *, make_g: Callable[..., torch.optim.Optimizer],
        make_d: Callable[..., torch.optim.Optimizer], g_rates: Callable[[int], dict[str, float]],
        d_rates: Callable[[int], dict[str, float]], relativistic: bool, d_updates: int, gamma: float, every: int,
        half_life: float,
    ) -> None:  # fmt: skip
        self.G, self.D = (copy.deepcopy(network).double() for network in networks)
        self.average = copy.deepcopy(self.G)
        self.g_optimizer, self.d_optimizer = make_g(self.G.parameters()), make_d(self.D.parameters())
        self.g_rates, self.d_rates = g_rates, d_rates
        self.relativistic, self.d_updates, self.gamma, self.every = relativistic, d_updates, gamma, every
        self.half_life = half_life
        self.draws = Draws(0, dtype=torch.float64)
        self.points = PointStream(points_config().data, classes=0, slots=torch.arange(8), draws=self.draws)  # type: ignore[arg-type]
        self.images = self.updates_of_d = 0

    def latents(self, player: str, draw: int) -> Tensor:
        return self.draws.normal(f"latents/{player}", draw=draw, slots=torch.arange(8), shape=(4,))

    @staticmethod
    def move(optimizer: torch.optim.Optimizer, loss: Tensor, rates: dict[str, float]) -> None:
        optimizer.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = rates["lr"]
            if "betas" in group:
                group["betas"] = (group["betas"][0], rates["beta2"])
        optimizer.step()

    def step(self) -> None:
        seen_before = self.images
        for _ in range(self.d_updates):
            batch = self.points.next()
            real = batch.images.clone().requires_grad_()
            real_B, fake_B = self.D(real), self.D(self.G(self.latents("discriminator", batch.draw)).detach())
            loss = (
                softplus(fake_B - real_B).mean() if self.relativistic else (softplus(-real_B) + softplus(fake_B)).mean()
            )
            if self.gamma and self.updates_of_d % self.every == 0:
                (slope,) = torch.autograd.grad(real_B.sum(), real, create_graph=True)
                loss = loss + self.every * self.gamma / 2 * slope.square().sum(dim=1).mean()
            self.move(self.d_optimizer, loss, self.d_rates(seen_before))
            self.images += 8
            self.updates_of_d += 1
        if self.relativistic:
            batch = self.points.next()
        fake_B = self.D(self.G(self.latents("generator", batch.draw)))
        loss = softplus(self.D(batch.images) - fake_B).mean() if self.relativistic else softplus(-fake_B).mean()
        self.move(self.g_optimizer, loss, self.g_rates(seen_before))
        keep = 0.5 ** ((self.images - seen_before) / self.half_life)
        with torch.no_grad():
            for average, weight in zip(self.average.parameters(), self.G.parameters(), strict=True):
                average.copy_(keep * average + (1 - keep) * weight)


def adam(beta1: float, **more: float) -> Callable[..., torch.optim.Optimizer]:
    return lambda parameters: torch.optim.Adam(parameters, betas=(beta1, 0.5), eps=1e-6, foreach=False, **more)


def adamw(beta1: float, **more: float) -> Callable[..., torch.optim.Optimizer]:
    return lambda parameters: torch.optim.AdamW(parameters, betas=(beta1, 0.5), eps=1e-6, foreach=False, **more)


def sgd(**more: float) -> Callable[..., torch.optim.Optimizer]:
    return lambda parameters: torch.optim.SGD(parameters, lr=0.1, foreach=False, **more)


FALLING = Ramped(2e-2, 4e-3, 60)
FORGETTING = Ramped(0.5, 0.9, 60)


@pytest.mark.parametrize(
    ("settings", "by_hand"),
    [
        pytest.param(
            ["objective.kind=nonsaturating", "objective.r1_gamma=0.6", "objective.penalty_every=2", "run.d_updates=3",
             f"g_optim={{kind: adam, lr: {FALLING}, beta1: 0.2, beta2: {FORGETTING}, eps: 1e-6}}",
             "d_optim={kind: adam, lr: 3e-2, beta1: 0.7, beta2: 0.8, eps: 1e-6, weight_decay: 0.1}"],
            {"make_g": adam(0.2), "make_d": adam(0.7, weight_decay=0.1), "relativistic": False, "d_updates": 3,
             "g_rates": lambda n: {"lr": FALLING(n), "beta2": FORGETTING(n)}, "d_rates": lambda n: {"lr": 3e-2, "beta2": 0.8},
             "gamma": 0.6, "every": 2},
            id="lazy-r1-three-turns-adam",
        ),
        pytest.param(
            ["objective.kind=relativistic", "objective.r1_gamma=0.4",
             "g_optim={kind: adamw, lr: 1e-2, beta1: 0.3, beta2: 0.95, eps: 1e-6, weight_decay: 0.5}",
             f"d_optim={{kind: sgd, lr: {FALLING}, momentum: 0.8, weight_decay: 0.2}}"],
            {"make_g": adamw(0.3, weight_decay=0.5), "make_d": sgd(momentum=0.8, weight_decay=0.2), "relativistic": True,
             "d_updates": 1, "g_rates": lambda n: {"lr": 1e-2, "beta2": 0.95}, "d_rates": lambda n: {"lr": FALLING(n)},
             "gamma": 0.4, "every": 1},
            id="relativistic-adamw-and-sgd",
        ),
        pytest.param(
            ["objective.kind=relativistic", "runtime.micro_batch=2", "run.d_updates=2",
             "g_optim={kind: sgd, lr: 2e-2, momentum: 0.6}",
             f"d_optim={{kind: adam, lr: 2e-3, beta1: 0.1, beta2: {FORGETTING}, eps: 1e-6}}"],
            {"make_g": sgd(momentum=0.6), "make_d": adam(0.1), "relativistic": True, "d_updates": 2,
             "g_rates": lambda n: {"lr": 2e-2}, "d_rates": lambda n: {"lr": 2e-3, "beta2": FORGETTING(n)},
             "gamma": 0.0, "every": 1},
            id="micro-batches-of-two",
        ),
    ],
)  # fmt: skip
def test_four_steps_are_those_of_a_game_written_out_by_hand(settings: list[str], by_hand: dict[str, Any]) -> None:
    ours = game("ema.half_life=40", *settings)
    theirs = ByHand((ours.state.generator.module, ours.state.discriminator.module), half_life=40, **by_hand)
    for step in range(4):
        assert all(update.applied for update in ours.step())
        theirs.step()
        for name, module, expected in (
            ("discriminator", ours.state.discriminator.module, theirs.D),
            ("generator", ours.state.generator.module, theirs.G),
            ("average", ours.state.ema.module, theirs.average),
        ):
            wanted = dict(expected.named_parameters())
            for key, tensor in module.named_parameters():
                torch.testing.assert_close(
                    tensor, wanted[key], rtol=1e-9, atol=1e-11, msg=lambda text, at=f"{name}/{key} after step {step}: ": at + text
                )  # fmt: skip
    assert ours.state.progress.images == theirs.images
    assert ours.state.stream.values()["draw"] == theirs.points.draw


# -- what is counted ------------------------------------------------------------------------------------------------


def test_images_are_those_of_every_discriminator_update_and_of_no_other() -> None:
    played = game("run.d_updates=3", "objective.kind=relativistic")
    fired = poison(played.state.discriminator.parameters["head.linear.weight"], backward_passes={4})
    for _ in range(2):
        played.step()
    progress = played.state.progress
    assert fired == [4]
    assert (progress.images, progress.d_updates, progress.g_updates) == (2 * 3 * 8, 6, 2)
    assert played.state.stream.values()["draw"] == 2 * (3 + 1), "each turn of D and each of G took a batch of its own"


def test_the_average_follows_its_formula_also_over_a_skipped_update_of_the_generator() -> None:
    played = game("run.d_updates=3", "ema={half_life: 50, warmup: 0.3}")
    state = played.state
    fired = poison(state.generator.parameters["out.weight"], backward_passes={1, 2})
    poison(state.discriminator.parameters["head.linear.weight"], backward_passes={3})
    expected = {name: p.detach().clone() for name, p in state.ema.module.named_parameters()}
    images, averaged_at = 0, 0
    for step in range(6):
        half_life = min(50, 0.3 * images)
        played.step()
        images += 3 * 8
        if step not in (1, 2):
            keep = 0.5 ** ((images - averaged_at) / half_life) if half_life else 0.0
            averaged_at = images
            for name, parameter in state.generator.parameters.items():
                expected[name] = keep * expected[name] + (1 - keep) * parameter.detach()
        for name, parameter in state.ema.module.named_parameters():
            torch.testing.assert_close(parameter, expected[name], rtol=1e-12, atol=1e-14)
        assert state.progress.averaged_images == averaged_at
    assert fired == [1, 2]


# -- what each turn sees --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "draws"),
    [
        (["objective.kind=relativistic"], [0, 1, 2, 3, 4, 5, 6, 7]),
        (["objective.kind=relativistic", "objective.shared_batch=true"], [0, 1, 2, 2, 3, 4, 5, 5]),
    ],
)
def test_every_turn_of_the_discriminator_has_its_own_images_and_the_generators_those_it_asks_for(
    settings: list[str], draws: list[int]
) -> None:
    played = game("run.d_updates=3", *settings)
    seen: list[Tensor] = []
    played.state.discriminator.module.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().clone()))
    played.step()
    played.step()
    # A turn of D sees the real points, then the generated ones; G's turn the generated ones, then the real ones.
    real = [seen[turn * 2 + (turn % 4 == 3)] for turn in range(8)]
    points = PointStream(points_config().data, classes=0, slots=torch.arange(8), draws=Draws(0, dtype=torch.float64))  # type: ignore[arg-type]
    stored = [points.next().images for _ in range(8)]
    assert [next(i for i, s in enumerate(stored) if torch.equal(s, r)) for r in real] == draws


class Watched(Runtime):
    """A runtime that remembers what it was asked for."""

    def __init__(self, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self.turns: list[tuple[str, str, bool]] = []
        self.averaged: list[list[str]] = []
        self.before_a_turn: Callable[[], object] = lambda: None

    def turn(self, active: Player, resting: Player, *, last_micro: bool) -> AbstractContextManager[Any]:
        self.turns.append((active.name, resting.name, last_micro))
        self.before_a_turn()
        return super().turn(active, resting, last_micro=last_micro)

    def average_buffers(self, *players: Player) -> None:
        self.averaged.append([player.name for player in players])
        super().average_buffers(*players)


def test_gradients_are_reduced_with_the_last_micro_batch_and_both_players_buffers_after_each_applied_update() -> None:
    played = game("runtime.micro_batch=2", networks=stateful_networks(), make_runtime=Watched)
    poison(played.state.generator.parameters["layers.0.weight"], backward_passes={2})
    played.step()
    runtime = played.runtime
    assert isinstance(runtime, Watched)
    d, g = "discriminator", "generator"
    lasts = [False, False, False, True]
    assert runtime.turns == [(d, g, last) for last in lasts] + [(g, d, last) for last in lasts]
    assert [sorted(names) for names in runtime.averaged] == [[d, g]], "once for D's update; G's was skipped"


def dropout_masks(played: Game, *, steps: int = 2) -> Iterator[tuple[int, ...]]:
    """Pattern of zeros of each pass through the discriminator's dropout."""
    masks: list[tuple[int, ...]] = []
    module = played.state.discriminator.module
    assert isinstance(module, PointDiscriminator)
    module.dropout.register_forward_pre_hook(lambda _, args: (args[0] * 0 + 1,))
    module.dropout.register_forward_hook(lambda _, args, out: masks.append(tuple((out > 0).flatten().int().tolist())))
    for _ in range(steps):
        played.step()
    return iter(masks)


def test_dropout_is_drawn_anew_in_every_turn_micro_batch_and_rank_and_the_same_when_a_turn_is_done_again() -> None:
    class SecondRank(Runtime):
        """A runtime that draws as rank 1 does."""

        def __init__(self, *arguments: Any, **more: Any) -> None:
            super().__init__(*arguments, **more)
            self.rank = 1

    # hinge: G's turn takes D's last batch again, so only the player's name keeps the two turns' masks apart
    settings = ("objective.kind=hinge", "runtime.micro_batch=4")
    first = list(dropout_masks(game(*settings, networks=stateful_networks())))
    again = list(dropout_masks(game(*settings, networks=stateful_networks())))
    assert first == again
    # per step: D's turn with two micro-batches of real and generated images, G's turn with two of generated ones
    assert len(first) == 2 * (2 * 2 + 2)
    other_rank = list(dropout_masks(game(*settings, networks=stateful_networks(), make_runtime=SecondRank)))
    assert all(a != b for a, b in combinations([*first, *other_rank], 2))
    other_seed = list(dropout_masks(game(*settings, "run.seed=1", networks=stateful_networks())))
    assert all(a != b for a, b in zip(first, other_seed, strict=True))


# -- the objective's memory -----------------------------------------------------------------------------------------


def test_the_memory_moves_once_an_applied_update_of_the_discriminator_by_the_mean_of_its_micro_batches() -> None:
    played = game("objective={kind: hinge, lecam: 0.3}", "runtime.micro_batch=2", "run.d_updates=2")
    state = played.state
    fired = poison(state.discriminator.parameters["head.linear.weight"], backward_passes={4 * 2})
    logits: list[Tensor] = []
    state.discriminator.module.register_forward_hook(lambda _, args, out: logits.append(out.detach()))
    real = fake = updates = 0.0
    for step in range(3):
        logits.clear()
        played.step()
        for turn in range(2):
            if (step, turn) == (1, 0):
                continue  # the skipped one
            passes = logits[8 * turn : 8 * turn + 8]
            weight = 1.0 if updates == 0 else 0.01
            real += weight * (float(torch.cat(passes[0::2]).mean()) - real)
            fake += weight * (float(torch.cat(passes[1::2]).mean()) - fake)
            updates += 1
        memory = {name: float(tensor) for name, tensor in state.memory.items()}
        assert memory == pytest.approx({"lecam/real": real, "lecam/fake": fake, "lecam/updates": updates}, rel=1e-7)
    assert fired == [8]
    assert updates == 5


# -- skipped updates ------------------------------------------------------------------------------------------------


def learned(played: Game) -> dict[str, Tensor]:
    """Weights, running statistics and moments of both players, copied."""
    players = (played.state.discriminator, played.state.generator)
    return {f"{p.name}/{n}": t.clone() for p in players for n, t in p.full_tensors() if t.is_floating_point()}


@pytest.mark.parametrize("skipped", ["discriminator", "generator"])
def test_a_skipped_update_leaves_weights_moments_both_players_buffers_the_memory_and_the_log_alone(
    skipped: str,
) -> None:
    played = game("objective={kind: hinge, lecam: 0.3}", networks=stateful_networks(), make_runtime=Watched)
    state, runtime = played.state, played.runtime
    assert isinstance(runtime, Watched)
    played.step()
    active = state.discriminator if skipped == "discriminator" else state.generator
    fired = poison(next(iter(active.parameters.values())), backward_passes={0})
    played.scalars.flush(runtime)
    memory = {name: t.clone() for name, t in state.memory.items()}
    at_the_start_of_a_turn: list[dict[str, Tensor]] = []
    runtime.before_a_turn = lambda: at_the_start_of_a_turn.append(learned(played))
    updates = played.step()
    states = [*at_the_start_of_a_turn, learned(played)]
    turn = ("discriminator", "generator").index(skipped)
    assert fired == [0]
    assert [u.applied for u in updates] == [turn != 0, turn != 1]
    assert updates[turn].culprit == f"{skipped}/{next(iter(active.parameters))}"
    changed = [[name for name in a if not torch.equal(a[name], b[name])] for a, b in pairwise(states)]
    assert changed[turn] == []
    assert {name.split("/")[0] for name in changed[1 - turn]} == {"discriminator", "generator"}
    assert all(torch.equal(memory[n], t) for n, t in state.memory.items()) == (turn == 0)
    logged = played.scalars.flush(runtime)
    assert not [name for name in logged if name.endswith(skipped)], "its loss and gradient norm are not numbers"
    assert all(math.isfinite(value) for value in logged.values())


def test_an_applied_update_moves_the_running_statistics_of_both_players() -> None:
    played = game(networks=stateful_networks())
    before = learned(played)
    played.step()
    after = learned(played)
    buffers = [name for name in before if "/buffers/" in name]
    assert len(buffers) == 4
    assert not [name for name in buffers if torch.equal(before[name], after[name])]


# -- clipping and what is logged ------------------------------------------------------------------------------------


@pytest.mark.parametrize("player", ["g", "d"])
def test_clipping_shrinks_a_gradient_to_the_limit_and_leaves_a_smaller_one_alone(player: str) -> None:
    """With SGD of rate 1 the weights move by the gradient itself."""

    def moved(*settings: str) -> tuple[float, float]:
        played = game(
            "objective.kind=wasserstein", "g_optim={kind: sgd, lr: 1}", "d_optim={kind: sgd, lr: 1}", *settings
        )
        active = played.state.generator if player == "g" else played.state.discriminator
        before = [p.detach().clone() for p in active.parameters.values()]
        update = played.step()[1 if player == "g" else 0]
        change = sum(
            float((p.detach() - b).square().sum()) for p, b in zip(active.parameters.values(), before, strict=True)
        )
        return update.norm, change**0.5

    norm, change = moved()
    assert change == pytest.approx(norm, rel=1e-9)
    norm_seen, change = moved(f"{player}_optim.clip={0.25 * norm}")
    assert norm_seen == pytest.approx(norm, rel=1e-9), "the norm that is shown is the one before clipping"
    assert change == pytest.approx(0.25 * norm, rel=1e-6)
    assert moved(f"{player}_optim.clip={4 * norm}")[1] == pytest.approx(norm, rel=1e-9)


def test_a_step_logs_the_mean_over_its_micro_batches_and_each_players_own_gradient() -> None:
    whole, pieces = game("objective.kind=hinge"), game("objective.kind=hinge", "runtime.micro_batch=2")
    updates = whole.step()
    pieces.step()
    expected, logged = whole.scalars.flush(whole.runtime), pieces.scalars.flush(pieces.runtime)
    assert logged == pytest.approx(expected, rel=1e-9)
    assert expected["gradient_norm/discriminator"] == pytest.approx(updates[0].norm)
    assert expected["gradient_norm/generator"] == pytest.approx(updates[1].norm)
    assert whole.scalars.flush(whole.runtime) == {}
