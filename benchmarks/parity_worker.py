"""Trains every case and leaves weights, keys and latents; launched once for each strategy and number of processes.

parity_worker.py SHARDS OUT losses|fp32|fp64|bf16 [--only NAME] [--unreduced] [--steps N]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.parity_cases import STEPS, loss_cases, of_steps, strategy_cases
from dist_gan.build import new_game
from dist_gan.checkpoint import tensorfile
from dist_gan.config import DCGANNetworks, RunConfig, ShardsData
from dist_gan.data.manifest import read_manifest
from dist_gan.data.pieces import ShardFolder
from dist_gan.data.stream import ImageStream
from dist_gan.draws import Draws
from dist_gan.models import build_networks
from dist_gan.runtime import Player, Runtime, read_launch_settings
from dist_gan.scalars import ScalarMeans
from dist_gan.schedules import knobs_at
from dist_gan.state import TrainState
from dist_gan.types import HasTensors, Network


class Unreduced(Runtime):
    """The negative control: gradients are never averaged over the ranks."""

    def turn(
        self, active: Player, resting: Player, *, last_micro: bool
    ) -> AbstractContextManager[tuple[Network, Network]]:
        return super().turn(active, resting, last_micro=False)


def train_case(config: RunConfig, runtime: Runtime) -> tuple[dict[str, Any], dict[str, torch.Tensor], TrainState]:
    """Trains one case; its facts, the tensors that it started with, and the state at the end."""
    assert isinstance(config.data, ShardsData)
    assert isinstance(config.networks, DCGANNetworks)
    draws = Draws(config.run.seed, device=runtime.device, dtype=runtime.dtype)
    slots = runtime.slots(config.run.batch)
    stream = ImageStream(
        [(ShardFolder(config.data.url, read_manifest(config.data.url)), 1)], section=config.data, resolution=16, channels=3,
        classes=config.networks.classes, batch=config.run.batch, slots=slots, draws=draws,
    )  # fmt: skip
    networks = build_networks(config.networks, seed=1)
    if runtime.precision in ("fp32", "bf16"):
        # Where an activation has a kink, rounding alone flips a derivative now and then, and no strategy can help it.
        for network in networks:
            _smooth(network)
    game = new_game(config, runtime, networks, stream, draws)
    state = game.state
    start = tensors_of(state)
    scalars = ScalarMeans()
    while state.progress.images < config.run.images:
        game.step(knobs_at(state.progress.images, config=config), scalars)
    mine = list(stream.next().keys)
    keys = [key for row in zip(*runtime.control_group.gather_json(mine), strict=True) for key in row]
    latents = runtime.training_group.gather_rows(draws.normal("latents/generator", draw=3, slots=slots, shape=(16,)))
    stream.close()
    facts = {
        "keys": keys,
        "latents": hashlib.sha256(latents.cpu().numpy().tobytes()).hexdigest(),
        "scalars": scalars.flush(runtime),
    }
    return facts, start, state


def _smooth(network: nn.Module) -> None:
    for name, child in network.named_children():
        if isinstance(child, nn.LeakyReLU | nn.ReLU):
            setattr(network, name, nn.SiLU())
        _smooth(child)


def tensors_of(state: TrainState) -> dict[str, torch.Tensor]:
    """Copies of all that a checkpoint would keep."""
    return {
        f"{part}/{name}": tensor.detach().to("cpu", copy=True)
        for part, stateful in state.parts().items()
        if isinstance(stateful, HasTensors)
        for name, tensor in stateful.tensors()
    }


def slug(name: str) -> str:
    """A case's name as a file's."""
    return name.replace("/", "_").replace(" ", "-")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shards")
    parser.add_argument("out", type=Path)
    parser.add_argument("which", choices=("losses", "fp32", "fp64", "bf16"))
    parser.add_argument("--only", action="append")
    parser.add_argument("--unreduced", action="store_true")
    parser.add_argument("--steps", type=int, default=STEPS, help="steps of each case")
    options = parser.parse_args()
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    found = (
        loss_cases(options.shards, world_size=world_size)
        if options.which == "losses"
        else strategy_cases(options.shards, world_size=world_size, precision=options.which)
    )
    cases = {
        name: of_steps(config, options.steps)
        for name, config in found.items()
        if not options.only or name in options.only
    }
    options.out.mkdir(parents=True, exist_ok=True)
    report, seconds, runtime = {}, {}, None
    for name, config in cases.items():
        settings = read_launch_settings(config, os.environ, gpus=torch.cuda.device_count())
        if runtime is None:
            runtime = (Unreduced if options.unreduced else Runtime)(config.runtime, settings)
        runtime.section = config.runtime  # one process group for all cases
        began = time.perf_counter()
        report[name], start, state = train_case(config, runtime)
        seconds[name] = round(time.perf_counter() - began, 2)
        end = tensors_of(state)
        if runtime.is_main:
            (options.out / f"{slug(name)}.start").write_bytes(tensorfile.to_bytes(start))
            (options.out / f"{slug(name)}.end").write_bytes(tensorfile.to_bytes(end))
    assert runtime is not None
    if runtime.is_main:
        (options.out / "report.json").write_text(json.dumps(report))
        (options.out / "seconds.json").write_text(json.dumps(seconds))
    runtime.close()


if __name__ == "__main__":
    main()
