"""Losses and penalties against closed forms written out here, and against finite differences, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from dist_gan.config import ObjectiveSection
from dist_gan.draws import Draws
from dist_gan.objectives import AdversarialObjective, losses, penalties
from dist_gan.objectives.losses import LOSSES
from dist_gan.schedules import lazily
from dist_gan.types import Batch, Knobs

KINDS = tuple(LOSSES)
REAL = (1.7, -0.4, 0.3, -2.2, 1.0001, 19.0, 0.9)
FAKE = (-1.1, 0.8, -0.2, 2.5, -1.0001, -45.0, -0.9)
NO_KNOBS = Knobs(0, 0, 0, 0, r1_gamma=0, r2_gamma=0, gradient_penalty=0, instance_noise=0, ema_half_life=0)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """The tensors here are tiny, and threads would only wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# -- closed forms, in plain Python ------------------------------------------------------------------------------------


def log1pexp(t: float) -> float:
    return max(t, 0.0) + math.log1p(math.exp(-abs(t)))


def sigmoid(t: float) -> float:
    return 1 / (1 + math.exp(-t)) if t >= 0 else math.exp(t) / (1 + math.exp(t))


def d_closed(kind: str, x: float, f: float, *, smooth: float = 0.0) -> tuple[float, float, float]:
    """Discriminator's loss of one pair of logits, and its derivatives at the real and the generated one."""
    if kind in ("minimax", "nonsaturating"):  # cross-entropy with targets 1 - smooth and 0
        target = 1 - smooth
        loss = target * log1pexp(-x) + (1 - target) * log1pexp(x) + log1pexp(f)
        return loss, sigmoid(x) - target, sigmoid(f)
    if kind == "hinge":
        return max(0.0, 1 - x) + max(0.0, 1 + f), -1.0 if x < 1 else 0.0, 1.0 if f > -1 else 0.0
    if kind == "least_squares":
        return 0.5 * (x - 1) ** 2 + 0.5 * f**2, x - 1, f
    if kind == "wasserstein":
        return f - x, -1.0, 1.0
    return log1pexp(-(x - f)), -sigmoid(f - x), sigmoid(f - x)


def g_closed(kind: str, x: float, f: float) -> tuple[float, float]:
    """Generator's loss of one pair, and its derivative at the generated logit."""
    if kind == "minimax":
        return -log1pexp(f), -sigmoid(f)
    if kind == "nonsaturating":
        return log1pexp(-f), -sigmoid(-f)
    if kind in ("hinge", "wasserstein"):
        return -f, -1.0
    if kind == "least_squares":
        return 0.5 * (f - 1) ** 2, f - 1
    return log1pexp(-(f - x)), -sigmoid(x - f)


def d_loss(kind: str, real_B: Tensor, fake_B: Tensor, *, smooth: float = 0.0) -> Tensor:
    return LOSSES[kind].discriminator(real_B=real_B, fake_B=fake_B, label_smoothing=smooth)


def g_loss(kind: str, fake_B: Tensor, real_B: Tensor | None = None) -> Tensor:
    return LOSSES[kind].generator(fake_B=fake_B, real_B=fake_B.new_empty(0) if real_B is None else real_B)


def logits(values: tuple[float, ...]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize(
    ("kind", "smooth"), [*((kind, 0.0) for kind in KINDS), ("minimax", 0.1), ("minimax", 0.3), ("nonsaturating", 0.1)]
)
def test_the_discriminators_loss_and_gradient_are_the_closed_form(kind: str, smooth: float) -> None:
    real_B, fake_B = logits(REAL), logits(FAKE)
    loss = d_loss(kind, real_B, fake_B, smooth=smooth)
    expected = [d_closed(kind, x, f, smooth=smooth) for x, f in zip(REAL, FAKE, strict=True)]
    n = len(REAL)
    assert loss.shape == ()
    assert loss.item() == pytest.approx(sum(e[0] for e in expected) / n, rel=1e-13)
    loss.backward()
    assert real_B.grad is not None
    assert fake_B.grad is not None
    assert real_B.grad.tolist() == pytest.approx([e[1] / n for e in expected], rel=1e-12, abs=1e-16)
    assert fake_B.grad.tolist() == pytest.approx([e[2] / n for e in expected], rel=1e-12, abs=1e-16)


@pytest.mark.parametrize("kind", KINDS)
def test_the_generators_loss_and_gradient_are_the_closed_form(kind: str) -> None:
    fake_B, real_B = logits(FAKE), torch.tensor(REAL, dtype=torch.float64)
    loss = g_loss(kind, fake_B, real_B)
    expected = [g_closed(kind, x, f) for x, f in zip(REAL, FAKE, strict=True)]
    n = len(REAL)
    assert loss.item() == pytest.approx(sum(e[0] for e in expected) / n, rel=1e-13)
    loss.backward()
    assert fake_B.grad is not None
    assert fake_B.grad.tolist() == pytest.approx([e[1] / n for e in expected], rel=1e-12, abs=1e-16)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1e4, -1e4])
def test_losses_stay_finite_at_extreme_logits_in_float32(kind: str, size: float) -> None:
    real_B = torch.full((3,), size, requires_grad=True)
    fake_B = torch.full((3,), -size, requires_grad=True)
    total = d_loss(kind, real_B, fake_B)
    total = total + g_loss(kind, fake_B, real_B)
    total.backward()
    assert math.isfinite(total.item())
    assert real_B.grad is not None
    assert torch.isfinite(real_B.grad).all()


def test_at_the_optimum_of_the_minimax_game_the_discriminators_loss_is_log_4() -> None:
    zero = torch.zeros(5, dtype=torch.float64)
    assert float(d_loss("minimax", zero, zero)) == pytest.approx(math.log(4))
    assert float(d_loss("relativistic", zero, zero)) == pytest.approx(math.log(2))


def test_minimax_saturates_where_the_discriminator_is_sure_and_nonsaturating_does_not() -> None:
    """Goodfellow et al. 2014, section 3: the same fixed point and direction, another strength."""
    for sure, strong in ((-20.0, "nonsaturating"), (20.0, "minimax")):
        slopes = {}
        for kind in ("minimax", "nonsaturating"):
            f = torch.tensor([sure], dtype=torch.float64, requires_grad=True)
            g_loss(kind, f).backward()
            assert f.grad is not None
            slopes[kind] = float(f.grad)
        weak = "minimax" if strong == "nonsaturating" else "nonsaturating"
        assert slopes[strong] == pytest.approx(-1.0, abs=1e-8)
        assert -1e-8 < slopes[weak] < 0
    at_zero = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    (a,) = torch.autograd.grad(g_loss("minimax", at_zero), at_zero)
    (b,) = torch.autograd.grad(g_loss("nonsaturating", at_zero), at_zero)
    assert torch.equal(a, b)


def test_the_minimax_game_is_zero_sum_at_the_generated_images() -> None:
    fake_B, real_B = logits(FAKE), torch.tensor(REAL, dtype=torch.float64)
    (d,) = torch.autograd.grad(d_loss("minimax", real_B, fake_B), fake_B)
    (g,) = torch.autograd.grad(g_loss("minimax", fake_B), fake_B)
    assert torch.allclose(d, -g, rtol=1e-14, atol=0)


def test_a_smoothed_label_moves_the_optimum_of_a_real_logit_to_the_log_odds_of_the_target() -> None:
    best = math.log(0.9 / 0.1)
    for x, sign in ((best - 0.01, -1), (best + 0.01, 1)):
        real_B = torch.tensor([x], dtype=torch.float64, requires_grad=True)
        loss = d_loss("minimax", real_B, real_B.detach(), smooth=0.1)
        (slope,) = torch.autograd.grad(loss, real_B)
        assert math.copysign(1, float(slope)) == sign


def test_lecam_is_the_squared_positive_part_of_the_distance_to_the_other_mean() -> None:
    real_B, fake_B = logits((0.5, -0.3, 2.0)), logits((0.1, -1.5, 0.9))
    mean_real, mean_fake = torch.tensor(0.8), torch.tensor(-0.1)
    loss = losses.lecam(real_B=real_B, fake_B=fake_B, mean_real=mean_real, mean_fake=mean_fake)
    expected = (0.6**2 + 0 + 2.1**2) / 3 + (0.7**2 + 2.3**2 + 0) / 3
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    loss.backward()
    assert real_B.grad is not None
    assert real_B.grad.tolist() == pytest.approx([2 * 0.6 / 3, 0, 2 * 2.1 / 3], rel=1e-6)


# -- a small game -----------------------------------------------------------------------------------------------------


def conv_critic(dtype: torch.dtype = torch.float64) -> nn.Module:
    """Smooth, so that finite differences are good to many digits; no norm, no dropout."""
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, 2, 1), nn.Softplus(), nn.Conv2d(3, 4, 3, 2, 1), nn.Tanh(), nn.Flatten(), nn.Linear(16, 1)
    ).to(dtype)


def mlp_critic(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(4)
    return nn.Sequential(nn.Flatten(), nn.Linear(128, 5), nn.Tanh(), nn.Linear(5, 4), nn.SiLU(), nn.Linear(4, 1)).to(
        dtype
    )


CRITICS = {"conv": conv_critic, "mlp": mlp_critic}


class Game:
    """Generator, discriminator and one batch: 2x8x8 images of 6 slots."""

    def __init__(self, critic: str = "conv", *, dtype: torch.dtype = torch.float64, labels: bool = False) -> None:
        self.D_module = CRITICS[critic](dtype)
        torch.manual_seed(5)
        self.G_module = nn.Sequential(nn.Linear(3, 128), nn.Tanh(), nn.Unflatten(1, (2, 8, 8))).to(dtype)
        self.draws = Draws(7, dtype=dtype)
        slots = torch.arange(6)
        images = self.draws.uniform("test images", draw=0, slots=slots, shape=(2, 8, 8)) * 2 - 1
        self.batch = Batch(images, torch.arange(6) % 3 if labels else None, slots, tuple("abcdef"), draw=12)

    def G(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.G_module(latents)

    def D(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.D_module(images).squeeze(1)

    def objective(self, *, apart: bool = False, **section: Any) -> AdversarialObjective:
        return AdversarialObjective(ObjectiveSection(**section), latent_dim=3, penalties_apart=apart)

    def d_loss(self, objective: AdversarialObjective, *, batch: Batch | None = None, **knobs: float) -> Any:
        memory = objective.initial_memory(torch.device("cpu"), torch.float64)
        return objective.discriminator_loss(
            self.G, self.D, batch or self.batch, self.draws, NO_KNOBS._replace(**knobs), memory
        )

    def g_loss(self, objective: AdversarialObjective, *, batch: Batch | None = None, **knobs: float) -> Any:
        memory = objective.initial_memory(torch.device("cpu"), torch.float64)
        return objective.generator_loss(
            self.G, self.D, batch or self.batch, self.draws, NO_KNOBS._replace(**knobs), memory
        )

    def fake(self, turn: str) -> Tensor:
        """The generated images of a turn, put together here from addresses."""
        latents = self.draws.normal(f"latents/{turn}", draw=12, slots=self.batch.slots, shape=(3,))
        with torch.no_grad():
            return self.G_module(latents)


@contextmanager
def moved(parameter: nn.Parameter, index: int, by: float) -> Iterator[None]:
    old = parameter.detach().clone()
    with torch.no_grad():
        parameter.view(-1)[index] += by
        yield
        parameter.copy_(old)


def assert_gradient_is_the_finite_difference(
    value: Callable[[], Tensor], module: nn.Module, *, each: int = 6, step: float = 1e-5, rel: float = 2e-6
) -> None:
    """Gradient at the parameters against central differences, at some entries of every parameter."""
    names = [n for n, _ in module.named_parameters()]
    grads = torch.autograd.grad(value(), list(module.parameters()), allow_unused=True)
    scale = max(float(g.abs().max()) for g in grads if g is not None)
    assert scale > 1e-4, "the gradient vanishes: nothing would be tested"
    for name, parameter, grad in zip(names, module.parameters(), grads, strict=True):
        flat = torch.zeros_like(parameter).view(-1) if grad is None else grad.reshape(-1)
        for index in torch.linspace(0, parameter.numel() - 1, min(each, parameter.numel())).long().tolist():
            with moved(parameter, index, step):
                up = float(value())
            with moved(parameter, index, -step):
                down = float(value())
            expected = (up - down) / (2 * step)
            assert float(flat[index]) == pytest.approx(expected, rel=rel, abs=rel * scale), f"{name}[{index}]"


# -- penalties --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("critic", CRITICS)
def test_the_squared_gradient_norm_is_that_of_finite_differences_at_the_input(critic: str) -> None:
    game = Game(critic)
    images = game.batch.images.clone().requires_grad_()
    got = penalties.squared_gradient_norm(images, game.D(images))
    assert got.shape == (6,)
    step, expected = 1e-5, []
    with torch.no_grad():
        eye = torch.eye(128, dtype=torch.float64).view(128, 2, 8, 8) * step
        for image in game.batch.images:
            slope = (game.D(image + eye) - game.D(image - eye)) / (2 * step)
            expected.append(float(slope.square().sum()))
    assert got.tolist() == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize("critic", CRITICS)
@pytest.mark.parametrize("penalty", ["r1", "unit"])
def test_the_gradient_of_a_penalty_at_the_parameters_is_the_finite_difference(critic: str, penalty: str) -> None:
    game = Game(critic)

    def value() -> Tensor:
        with torch.enable_grad():
            if penalty == "unit":
                return penalties.unit_gradient_penalty(game.D, game.batch.images).mean()
            images = game.batch.images.clone().requires_grad_()
            return penalties.squared_gradient_norm(images, game.D(images)).mean()

    assert_gradient_is_the_finite_difference(value, game.D_module)


def test_r1_and_wgan_gp_of_a_linear_critic_are_known_exactly() -> None:
    weight = torch.tensor([3.0, -4.0], dtype=torch.float64)
    images = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    assert penalties.squared_gradient_norm(images, images @ weight).tolist() == pytest.approx([25.0] * 5)
    assert penalties.unit_gradient_penalty(lambda x: x @ weight, images).tolist() == pytest.approx([16.0] * 5)


def test_a_critic_without_slope_has_a_finite_penalty_and_gradient() -> None:
    weight = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    penalty = penalties.unit_gradient_penalty(lambda x: x @ weight, torch.randn(3, 2, dtype=torch.float64)).mean()
    assert float(penalty) == pytest.approx(1.0, abs=1e-5)
    penalty.backward()
    assert weight.grad is not None
    assert torch.isfinite(weight.grad).all()


def test_penalties_pass_gradcheck_and_gradgradcheck() -> None:
    torch.manual_seed(0)
    images = torch.randn(2, 3, dtype=torch.float64)
    w1 = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    w2 = torch.randn(4, dtype=torch.float64, requires_grad=True)

    def r1(w1: Tensor, w2: Tensor) -> Tensor:
        x = images.clone().requires_grad_()
        return penalties.squared_gradient_norm(x, torch.tanh(x @ w1.T) @ w2)

    def unit(w1: Tensor, w2: Tensor) -> Tensor:
        return penalties.unit_gradient_penalty(lambda x: torch.tanh(x @ w1.T) @ w2, images)

    for penalty in (r1, unit):
        assert torch.autograd.gradcheck(penalty, (w1, w2))
        assert torch.autograd.gradgradcheck(penalty, (w1, w2))


def test_interpolation_goes_from_real_to_generated_each_slot_by_its_own_weight() -> None:
    real, fake = torch.zeros(3, 2, 4, 4), torch.ones(3, 2, 4, 4)
    points = penalties.interpolate(real, fake, weight_B=torch.tensor([0.0, 0.25, 1.0], dtype=torch.float64))
    assert points.dtype == torch.float32
    for point, weight in zip(points, (0.0, 0.25, 1.0), strict=True):
        assert (point == weight).all()


# -- the whole objective ----------------------------------------------------------------------------------------------

PENALTIES = {
    "none": {},
    "r1": {"r1_gamma": 0.7},
    "r2": {"r2_gamma": 1.3},
    "r1 and r2": {"r1_gamma": 0.7, "r2_gamma": 1.3},
    "wgan-gp": {"gradient_penalty": 10.0},
    "all": {"r1_gamma": 0.7, "r2_gamma": 1.3, "gradient_penalty": 10.0, "instance_noise": 0.2},
}


@pytest.mark.parametrize("apart", [False, True], ids=["shared pass", "own pass"])
@pytest.mark.parametrize("name", PENALTIES)
def test_the_discriminators_total_has_the_gradient_of_finite_differences(name: str, apart: bool) -> None:
    game = Game()
    objective = game.objective(kind="relativistic", apart=apart)

    def value() -> Tensor:
        with torch.enable_grad():
            return game.d_loss(objective, **PENALTIES[name]).total

    assert_gradient_is_the_finite_difference(value, game.D_module, each=4)


@pytest.mark.parametrize("apart", [False, True], ids=["shared pass", "own pass"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_discriminators_total_is_loss_plus_weighted_penalties_put_together_by_hand(kind: str, apart: bool) -> None:
    game = Game("mlp")
    got = game.d_loss(game.objective(kind=kind, apart=apart), r1_gamma=0.7, r2_gamma=1.3, gradient_penalty=10.0)
    real, fake = game.batch.images, game.fake("discriminator")

    def slopes(images: Tensor) -> Tensor:
        """By reverse mode of each image alone, through torch.func."""
        parameters = dict(game.D_module.named_parameters())
        one = lambda x: functional_call(game.D_module, parameters, (x.unsqueeze(0),)).squeeze()  # noqa: E731
        return torch.stack([torch.func.grad(one)(image) for image in images]).flatten(1)

    weight = game.draws.uniform("interpolation", draw=12, slots=game.batch.slots).view(-1, 1, 1, 1)
    r1 = slopes(real).square().sum(1).mean()
    r2 = slopes(fake).square().sum(1).mean()
    unit = (slopes(real + weight * (fake - real)).norm(dim=1) - 1).square().mean()
    pairs = zip(game.D(real).tolist(), game.D(fake).tolist(), strict=True)
    loss = sum(d_closed(kind, x, f)[0] for x, f in pairs) / 6
    assert float(got.terms["loss/discriminator"]) == pytest.approx(loss, rel=1e-12)
    assert float(got.terms["penalty/r1"]) == pytest.approx(float(r1), rel=1e-12)
    assert float(got.terms["penalty/r2"]) == pytest.approx(float(r2), rel=1e-12)
    assert float(got.terms["penalty/gradient_penalty"]) == pytest.approx(float(unit), rel=1e-8)
    expected = loss + 0.35 * float(r1) + 0.65 * float(r2) + 10 * float(unit)
    assert float(got.total) == pytest.approx(expected, rel=1e-9)
    assert float(got.terms["logits/real"]) == pytest.approx(float(game.D(real).mean()))
    assert float(got.terms["logits/fake"]) == pytest.approx(float(game.D(fake).mean()))
    assert float(got.terms["logits/real_positive"]) == pytest.approx(float((game.D(real) > 0).double().mean()))
    assert not any(term.requires_grad for term in got.terms.values())


@pytest.mark.parametrize(("dtype", "rel"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
@pytest.mark.parametrize("name", PENALTIES)
def test_penalties_in_a_pass_of_their_own_are_the_same_penalties(name: str, dtype: torch.dtype, rel: float) -> None:
    results = []
    for apart in (False, True):
        game = Game(dtype=dtype)
        total = game.d_loss(game.objective(kind="hinge", apart=apart), **PENALTIES[name]).total
        assert total.dtype == dtype
        results.append([total, *torch.autograd.grad(total, list(game.D_module.parameters()))])
    scale = max(float(t.abs().max()) for t in results[0])
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a, b, rtol=rel, atol=rel * scale)


@pytest.mark.parametrize("kind", KINDS)
def test_the_generators_gradient_is_the_finite_difference(kind: str) -> None:
    game = Game()
    objective = game.objective(kind=kind)

    def value() -> Tensor:
        with torch.enable_grad():
            return game.g_loss(objective, instance_noise=0.1).total

    assert_gradient_is_the_finite_difference(value, game.G_module)


@pytest.mark.parametrize("kind", KINDS)
def test_the_generators_total_is_the_closed_form_of_fresh_images(kind: str) -> None:
    game = Game()
    got = game.g_loss(game.objective(kind=kind))
    real_B, fake_B = game.D(game.batch.images).tolist(), game.D(game.fake("generator")).tolist()
    expected = sum(g_closed(kind, x, f)[0] for x, f in zip(real_B, fake_B, strict=True)) / 6
    assert float(got.total) == pytest.approx(expected, rel=1e-12)
    assert float(got.terms["loss/generator"]) == pytest.approx(expected, rel=1e-12)
    assert got.observed == {}


def test_a_shared_batch_takes_the_discriminators_latents_again_and_else_fresh_ones() -> None:
    game = Game()
    seen: list[Tensor] = []

    def G(latents: Tensor, labels: Tensor | None) -> Tensor:
        seen.append(latents.detach())
        return game.G_module(latents)

    game.G = G  # type: ignore[method-assign]
    for shared in (True, False):
        seen.clear()
        objective = game.objective(kind="nonsaturating", shared_batch=shared)
        game.d_loss(objective)
        game.g_loss(objective)
        assert torch.equal(seen[0], seen[1]) == shared


@pytest.mark.parametrize("kind", KINDS)
def test_the_discriminators_turn_gives_no_gradient_to_the_generator(kind: str) -> None:
    game = Game()
    game.d_loss(
        game.objective(kind=kind), r1_gamma=1, r2_gamma=1, gradient_penalty=1, instance_noise=0.1
    ).total.backward()
    assert all(p.grad is None for p in game.G_module.parameters())
    assert all(p.grad is not None for p in game.D_module.parameters())


def test_the_discriminators_turn_builds_no_graph_of_the_generator() -> None:
    game, graphs = Game(), []

    def G(latents: Tensor, labels: Tensor | None) -> Tensor:
        graphs.append(torch.is_grad_enabled())
        return game.G_module(latents)

    game.G = G  # type: ignore[method-assign]
    game.d_loss(game.objective(), r2_gamma=1, gradient_penalty=1)
    game.g_loss(game.objective())
    assert graphs == [False, True]


@pytest.mark.parametrize("kind", KINDS)
def test_the_generators_turn_leaves_no_gradient_on_a_frozen_discriminator(kind: str) -> None:
    game = Game()
    game.D_module.requires_grad_(False)
    game.g_loss(game.objective(kind=kind)).total.backward()
    assert all(p.grad is None for p in game.D_module.parameters())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in game.G_module.parameters())


def test_the_objective_leaves_its_batch_alone() -> None:
    game = Game()
    before = game.batch.images.clone()
    game.d_loss(game.objective(), r1_gamma=1, r2_gamma=1, gradient_penalty=1, instance_noise=0.3)
    game.g_loss(game.objective(), instance_noise=0.3)
    assert torch.equal(before, game.batch.images)
    assert not game.batch.images.requires_grad
    assert game.batch.images.grad is None


@pytest.mark.parametrize("turn", ["d", "g"])
def test_the_relativistic_loss_compares_images_of_the_same_slot(turn: str) -> None:
    """The order of slots inside a process does not matter; with which image a generated one is paired does."""
    game = Game()
    objective = game.objective(kind="relativistic")
    loss = game.d_loss if turn == "d" else game.g_loss
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    together = game.batch._replace(images=game.batch.images[order], slots=game.batch.slots[order])
    torn = game.batch._replace(images=game.batch.images[order])
    base = float(loss(objective).total)
    assert float(loss(objective, batch=together).total) == pytest.approx(base, rel=1e-13)
    assert abs(float(loss(objective, batch=torn).total) - base) > 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_parts_of_a_batch_average_to_the_whole(kind: str) -> None:
    """What micro-batches and ranks rely on: every number is addressed by slot."""
    game = Game("mlp")
    objective = game.objective(kind=kind)
    knobs = {"r1_gamma": 0.7, "r2_gamma": 0.3, "gradient_penalty": 2.0, "instance_noise": 0.2}
    for loss in (game.d_loss, game.g_loss):
        whole = float(loss(objective, **knobs).total)
        parts = []
        for rank in range(3):
            mine = slice(rank, None, 3)
            part = game.batch._replace(images=game.batch.images[mine], slots=game.batch.slots[mine])
            parts.append(float(loss(objective, batch=part, **knobs).total))
        assert sum(parts) / 3 == pytest.approx(whole, rel=1e-12)


def test_instance_noise_is_seen_by_both_turns_and_has_the_strength_that_was_asked_for() -> None:
    game = Game()
    seen: list[Tensor] = []

    def D(images: Tensor, labels: Tensor | None) -> Tensor:
        seen.append(images.detach())
        return game.D_module(images).squeeze(1)

    game.D = D  # type: ignore[method-assign]
    objective = game.objective(kind="relativistic")
    game.d_loss(objective, instance_noise=0.5)
    game.g_loss(objective, instance_noise=0.5)
    clean = [game.batch.images, game.fake("discriminator"), game.fake("generator"), game.batch.images]
    noises = [(a - b).flatten() for a, b in zip(seen, clean, strict=True)]
    for noise in noises:
        assert float(noise.std()) == pytest.approx(0.5, rel=0.1)
        assert abs(float(noise.mean())) < 0.07
    correlations = torch.corrcoef(torch.stack(noises)) - torch.eye(4, dtype=torch.float64)
    assert float(correlations.abs().max()) < 0.17


def test_labels_reach_both_networks() -> None:
    game = Game(labels=True)
    seen: list[Tensor | None] = []

    def G(latents: Tensor, labels: Tensor | None) -> Tensor:
        seen.append(labels)
        return game.G_module(latents)

    def D(images: Tensor, labels: Tensor | None) -> Tensor:
        seen.append(labels)
        return game.D_module(images).squeeze(1)

    game.G, game.D = G, D  # type: ignore[method-assign]
    objective = game.objective(kind="relativistic", apart=True)
    game.d_loss(objective, r1_gamma=1, r2_gamma=1, gradient_penalty=1)
    game.g_loss(objective)
    assert len(seen) == 3 + 3 + 3
    assert all(labels is game.batch.labels for labels in seen)


# -- lazy penalties, memory, precision --------------------------------------------------------------------------------


def test_lazy_penalties_give_in_the_mean_the_gradient_of_penalties_at_every_update() -> None:
    game = Game()
    objective, parameters = game.objective(kind="hinge"), list(game.D_module.parameters())
    knobs = NO_KNOBS._replace(r1_gamma=0.7, r2_gamma=1.3, gradient_penalty=2.0)

    def gradient(k: Knobs) -> Tensor:
        total = objective.discriminator_loss(game.G, game.D, game.batch, game.draws, k, {}).total
        return torch.cat([g.flatten() for g in torch.autograd.grad(total, parameters)])

    lazy = torch.stack([gradient(lazily(knobs, update=u, every=4)) for u in range(8)])
    assert torch.allclose(lazy.mean(0), gradient(knobs), rtol=1e-10, atol=1e-12)
    assert torch.allclose(lazy[1], gradient(NO_KNOBS), rtol=1e-12)


def test_a_penalty_that_is_not_due_costs_no_pass_and_leaves_no_term() -> None:
    game, calls = Game(), 0

    def D(images: Tensor, labels: Tensor | None) -> Tensor:
        nonlocal calls
        calls += 1
        assert not images.requires_grad
        return game.D_module(images).squeeze(1)

    game.D = D  # type: ignore[method-assign]
    got = game.d_loss(game.objective(kind="hinge"))
    assert calls == 2
    assert not [name for name in got.terms if name.startswith("penalty/")]


def test_lecam_is_silent_until_its_memory_is_set_then_pulls_by_it_and_the_memory_decays() -> None:
    game = Game()
    objective = game.objective(kind="hinge", lecam=0.5)
    memory = objective.initial_memory(torch.device("cpu"), torch.float64)
    addresses = {name: t.data_ptr() for name, t in memory.items()}

    def turn() -> Any:
        return objective.discriminator_loss(game.G, game.D, game.batch, game.draws, NO_KNOBS, memory)

    plain = float(game.d_loss(game.objective(kind="hinge")).total)
    first = turn()
    assert float(first.total) == pytest.approx(plain, rel=1e-14)
    real_B, fake_B = game.D(game.batch.images), game.D(game.fake("discriminator"))
    assert float(first.observed["lecam/real"]) == pytest.approx(float(real_B.mean()))
    assert float(first.observed["lecam/fake"]) == pytest.approx(float(fake_B.mean()))
    assert float(memory["lecam/updates"]) == 0, "a turn moves no memory, its caller does"

    objective.remember(memory, {"lecam/real": torch.tensor(0.4), "lecam/fake": torch.tensor(-0.2)})
    assert float(memory["lecam/real"]) == pytest.approx(0.4)
    assert float(memory["lecam/fake"]) == pytest.approx(-0.2)
    second = turn()
    pull = (real_B + 0.2).clamp(min=0).square().mean() + (0.4 - fake_B).clamp(min=0).square().mean()
    assert float(second.terms["penalty/lecam"]) == pytest.approx(float(pull), rel=1e-6)
    assert float(second.total) == pytest.approx(plain + 0.5 * float(pull), rel=1e-6)

    objective.remember(memory, {"lecam/real": torch.tensor(1.4), "lecam/fake": torch.tensor(-0.2)})
    assert float(memory["lecam/real"]) == pytest.approx(0.99 * 0.4 + 0.01 * 1.4)
    assert float(memory["lecam/fake"]) == pytest.approx(-0.2)
    assert float(memory["lecam/updates"]) == 2
    assert {name: t.data_ptr() for name, t in memory.items()} == addresses, "the memory is moved in place"
    objective.remember(memory, {})
    assert float(memory["lecam/updates"]) == 2


def test_without_lecam_there_is_no_memory() -> None:
    game = Game()
    assert game.objective().initial_memory(torch.device("cpu"), torch.float32) == {}
    assert game.d_loss(game.objective()).observed == {}


def exact_images(game: Game) -> None:
    """Generated images that autocast does not round, so that penalties are compared at the same points."""

    def G(latents: Tensor, labels: Tensor | None) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return game.G_module(latents)

    game.G = G  # type: ignore[method-assign]


def under(mode: str, *, name: str) -> tuple[dict[str, float], Tensor]:
    """Terms, and the gradient of the penalties alone, in fp32 or under autocast with or without a pass of their own."""
    gradients = []
    for knobs in (PENALTIES[name], {}):
        game = Game(dtype=torch.float32)
        exact_images(game)
        objective = game.objective(kind="wasserstein", apart=mode == "bf16 apart")
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mode != "fp32"):
            got = game.d_loss(objective, **knobs)
        assert got.total.dtype == torch.float32
        parameters = list(game.D_module.parameters())
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(got.total, parameters)]))
        if knobs:
            terms = {key: float(term) for key, term in got.terms.items()}
    return terms, gradients[0] - gradients[1]


@pytest.mark.parametrize("name", ["r1", "r2", "wgan-gp"])
def test_under_bf16_a_penalty_of_its_own_pass_is_as_exact_as_in_fp32(name: str) -> None:
    (exact, exact_slope), (got, slope) = under("fp32", name=name), under("bf16 apart", name=name)
    penalty = f"penalty/{'gradient_penalty' if name == 'wgan-gp' else name}"
    assert got["loss/discriminator"] != exact["loss/discriminator"], "autocast was not on: nothing was tested"
    assert got[penalty] == pytest.approx(exact[penalty], rel=1e-6)
    assert torch.allclose(slope, exact_slope, rtol=1e-4, atol=1e-4 * float(exact_slope.abs().max()))


@pytest.mark.parametrize("name", ["r1", "r2"])
def test_under_bf16_a_penalty_in_the_shared_pass_would_not_be_exact(name: str) -> None:
    """The reason for a pass of its own."""
    exact, got = under("fp32", name=name)[0], under("bf16 shared", name=name)[0]
    assert abs(got[f"penalty/{name}"] / exact[f"penalty/{name}"] - 1) > 1e-4


@pytest.mark.parametrize("name", ["r1 and r2", "wgan-gp"])
def test_under_bf16_the_critic_of_a_penalty_sees_autocast_switched_off(name: str) -> None:
    game, seen = Game(dtype=torch.float32), []

    def D(images: Tensor, labels: Tensor | None) -> Tensor:
        logits_B = game.D_module(images).squeeze(1)
        seen.append((torch.is_autocast_enabled("cpu"), images.dtype, logits_B.dtype))
        return logits_B

    game.D = D  # type: ignore[method-assign]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total = game.d_loss(game.objective(apart=True), **PENALTIES[name]).total
    assert [autocast for autocast, _, _ in seen[:2]] == [True, True]
    assert seen[2:]
    assert all(entry == (False, torch.float32, torch.float32) for entry in seen[2:])
    total.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in game.D_module.parameters())
