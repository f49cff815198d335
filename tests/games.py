"""A small real game for tests: points in the plane and tiny networks, a step in milliseconds, in float64."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dist_gan import step
from dist_gan.build import Run, build, new_game
from dist_gan.config import PointsData, RunConfig
from dist_gan.config.reader import load_config
from dist_gan.data import PointStream
from dist_gan.draws import Draws
from dist_gan.models import build_networks
from dist_gan.runtime import LaunchSettings, Runtime, StopRequest, Update
from dist_gan.scalars import ScalarMeans
from dist_gan.schedules import knobs_at
from dist_gan.state import TrainState
from dist_gan.trainer import End, fit
from dist_gan.types import Networks

SMALL = (
    "data.kind=points", "networks.kind=mlp", "networks.latent_dim=4", "networks.width=8", "networks.depth=1",
    "run.batch=8", "runtime.precision=fp64", "runtime.threads=1", "ema.warmup=0",
)  # fmt: skip


def points_config(*overrides: str) -> RunConfig:
    """Settings of a game on points, checked as a user's are."""
    return load_config(None, [*SMALL, *overrides])


class Game(NamedTuple):
    """A game with the settings that its steps are made with, and their scalars."""

    config: RunConfig
    parts: step.Game
    scalars: ScalarMeans

    @property
    def state(self) -> TrainState:
        return self.parts.state

    @property
    def runtime(self) -> Runtime:
        return self.parts.runtime

    def step(self) -> list[Update]:
        """The next step, with the settings of this moment."""
        return self.parts.step(knobs_at(self.state.progress.images, config=self.config), self.scalars)


def game(*overrides: str, networks: Networks | None = None, make_runtime: Callable[..., Runtime] = Runtime) -> Game:
    """A game that begins; the settings' own perceptrons by default."""
    config = points_config(*overrides)
    assert isinstance(config.data, PointsData)
    runtime = make_runtime(config.runtime, LaunchSettings(precision="fp64"))
    draws = Draws(config.run.seed, dtype=runtime.dtype)
    stream = PointStream(config.data, classes=0, slots=runtime.slots(config.run.batch), draws=draws)
    networks = networks or build_networks(config.networks, seed=config.run.seed)
    return Game(config, new_game(config, runtime, networks, stream, draws), ScalarMeans())


class PointGenerator(nn.Module):
    """BZ -> B2 with batch normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.latent_dim = 4
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.LeakyReLU(0.2), nn.Linear(8, 2))

    def forward(self, latents_BZ: Tensor, labels_B: Tensor | None = None) -> Tensor:
        return self.layers(latents_BZ)


class PointDiscriminator(nn.Module):
    """B2 -> logits_B with batch normalisation and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.LeakyReLU(0.2))
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(8, 1)

    def forward(self, images_B2: Tensor, labels_B: Tensor | None = None) -> Tensor:
        return self.head(self.dropout(self.layers(images_B2))).squeeze(1)


def stateful_networks(seed: int = 0) -> Networks:
    """Networks with running statistics and dropout."""
    torch.manual_seed(seed)
    return Networks(PointGenerator(), PointDiscriminator())


def poison(parameter: nn.Parameter, *, backward_passes: Collection[int]) -> list[int]:
    """Makes a parameter's gradient not finite in the backward passes of these numbers; returns those in which it was."""
    seen, fired = [0], []

    def hook(gradient: Tensor) -> Tensor | None:
        seen[0] += 1
        if seen[0] - 1 not in backward_passes:
            return None
        fired.append(seen[0] - 1)
        return torch.full_like(gradient, float("nan"))

    parameter.requires_grad_(True)
    parameter.register_hook(hook)
    return fired


@contextmanager
def started(
    folder: Path, *overrides: str, attempt: int = 1, make_runtime: Callable[..., Runtime] = Runtime, **parts: Any
) -> Iterator[Run]:
    """A run in this process, built and resumed, whose files are closed afterwards; no signal reaches it.

    `parts` are further arguments of `build`, such as metrics.
    """
    config = points_config(f"run.dir={folder}", *overrides)
    runtime = make_runtime(config.runtime, LaunchSettings(precision="fp64"))
    folder.mkdir(parents=True, exist_ok=True)
    run = build(config, runtime, StopRequest(names=()), attempt=attempt, **parts)
    try:
        yield run
    finally:
        run.close()


def trained(folder: Path, *overrides: str, attempt: int = 1, **parts: Any) -> End:
    """A run in this process to its end."""
    with started(folder, *overrides, attempt=attempt, **parts) as run:
        return fit(run)


def lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file."""
    return [json.loads(line) for line in path.read_text().splitlines()]
