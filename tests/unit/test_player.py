"""A player alone: what its update does to the weights, what it hands out, what it takes back."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dist_gan.config import AdamSection, SGDSection
from dist_gan.runtime import LaunchSettings, Player, Runtime
from dist_gan.types import Networks
from tests.games import game, points_config, stateful_networks

Section = AdamSection | SGDSection
START = [1.0, -2.0, 0.5]
GRADIENTS = ([0.3, -0.1, 4.0], [-0.2, 0.4, 1.0], [5.0, 0.0, -3.0])
RATES = ((0.1, 0.9), (0.05, 0.99), (0.2, 0.5))
"""Learning rate and beta2 of three updates."""


class Weights(nn.Module):
    """Three weights and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(START))


def player(section: Section) -> Player:
    runtime = Runtime(points_config().runtime, LaunchSettings(precision="fp64"))
    return runtime.players(Networks(Weights(), Weights()), g_optim=section, d_optim=SGDSection())[0]


def adam_by_hand(section: AdamSection) -> Tensor:
    """Kingma and Ba 2015, algorithm 1; Loshchilov and Hutter 2019, algorithm 2; beta2 of each update corrects the bias."""
    w, m, v = torch.tensor(START).double(), torch.zeros(3).double(), torch.zeros(3).double()
    for t, (gradient, (lr, beta2)) in enumerate(zip(GRADIENTS, RATES, strict=True), start=1):
        g = torch.tensor(gradient).double()
        if section.kind == "adam":
            g = g + section.weight_decay * w
        else:
            w = w - lr * section.weight_decay * w
        m = section.beta1 * m + (1 - section.beta1) * g
        v = beta2 * v + (1 - beta2) * g.square()
        w = w - lr * (m / (1 - section.beta1**t)) / ((v / (1 - beta2**t)).sqrt() + section.eps)
    return w


def sgd_by_hand(section: SGDSection) -> Tensor:
    w, momentum = torch.tensor(START).double(), torch.zeros(3).double()
    for gradient, (lr, _) in zip(GRADIENTS, RATES, strict=True):
        momentum = section.momentum * momentum + torch.tensor(gradient).double() + section.weight_decay * w
        w = w - lr * momentum
    return w


@pytest.mark.parametrize(
    "section",
    [
        AdamSection(beta1=0.3, eps=1e-3), AdamSection(beta1=0.3, weight_decay=0.7),
        AdamSection(kind="adamw", beta1=0.3, weight_decay=0.7), SGDSection(), SGDSection(momentum=0.9),
        SGDSection(momentum=0.5, weight_decay=0.3),
    ],
    ids=["adam", "adam-decay", "adamw", "sgd", "sgd-momentum", "sgd-decay"],
)  # fmt: skip
def test_three_updates_are_those_of_the_papers_formulae(section: Section) -> None:
    moved = player(section)
    for gradient, (lr, beta2) in zip(GRADIENTS, RATES, strict=True):
        weights = moved.parameters["w"]
        moved.backward((weights * torch.tensor(gradient).double()).sum())
        update = moved.update(lr=lr, beta2=beta2)
        assert update.applied
        assert update.norm == pytest.approx(sum(g * g for g in gradient) ** 0.5)
    expected = adam_by_hand(section) if isinstance(section, AdamSection) else sgd_by_hand(section)
    torch.testing.assert_close(moved.parameters["w"].detach(), expected, rtol=1e-10, atol=1e-12)


def test_gradients_of_several_backward_passes_add_up_and_are_gone_after_the_update() -> None:
    moved = player(SGDSection())
    for _ in range(2):
        for gradient in GRADIENTS:
            moved.backward((moved.parameters["w"] * torch.tensor(gradient).double()).sum())
        moved.update(lr=0.5, beta2=0.0)
    expected = torch.tensor(START).double() - 2 * 0.5 * torch.tensor(GRADIENTS).double().sum(0)
    torch.testing.assert_close(moved.parameters["w"].detach(), expected)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_is_named_and_thrown_away(bad: float) -> None:
    moved = player(AdamSection())
    moved.backward((moved.parameters["w"] * torch.tensor([1.0, bad, 1.0])).sum())
    update = moved.update(lr=0.1, beta2=0.9)
    assert not update.applied
    assert update.culprit == "generator/w"
    assert moved.parameters["w"].tolist() == START
    moved.backward(moved.parameters["w"].sum())
    assert moved.update(lr=0.1, beta2=0.9).applied, "nothing of it is left"


def test_what_a_player_hands_out_another_takes_back_and_goes_on_alike() -> None:
    one, other = game(networks=stateful_networks(0)), game(networks=stateful_networks(1))
    for _ in range(3):
        one.step()
    for name in ("generator", "discriminator"):
        source, target = getattr(one.state, name), getattr(other.state, name)
        tensors = {n: t.clone() for n, t in source.full_tensors()}
        assert {n: (tuple(t.shape), t.dtype) for n, t in tensors.items()} == dict(source.table())
        assert {n.split("/")[0] for n in tensors} == {"weights", "buffers", "optimizer"}
        target.load_full_tensors(tensors)
        assert all(torch.equal(tensors[n], t) for n, t in target.full_tensors())
    other.state.stream.load_values(one.state.stream.values())
    one.step()
    other.step()
    for name in ("generator", "discriminator"):
        theirs = dict(getattr(other.state, name).full_tensors())
        assert all(torch.equal(t, theirs[n]) for n, t in getattr(one.state, name).full_tensors())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("weights/layers.0.bias"), "missing"),
        (lambda t: t.update({"weights/more": torch.zeros(1)}), "unknown"),
        (lambda t: t.update({"weights/layers.0.bias": torch.zeros(9)}), "has to be (8,)"),
        (lambda t: t.pop("optimizer/layers.0.bias/exp_avg"), "moments"),
    ],
)
def test_tensors_of_another_network_are_refused_with_the_name_of_the_first(change: object, words: str) -> None:
    played = game(networks=stateful_networks())
    played.step()
    tensors = {n: t.clone() for n, t in played.state.generator.full_tensors()}
    change(tensors)  # type: ignore[operator]
    with pytest.raises(ValueError, match="generator") as refused:
        played.state.generator.load_full_tensors(tensors)
    assert words in str(refused.value)
