"""Trains every case for twenty steps and leaves weights, keys and latents; started once for each number of processes.

    parity_worker.py SHARDS OUT [--unreduced]
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from contextlib import AbstractContextManager
from pathlib import Path

import torch

from dist_gan import tensorfile
from dist_gan.data.manifest import read_manifest
from dist_gan.data.stream import ImageStream
from dist_gan.draws import Draws
from dist_gan.ema import GeneratorEMA
from dist_gan.models import build_networks
from dist_gan.objectives import AdversarialObjective
from dist_gan.runtime import Player, Runtime
from dist_gan.scalars import ScalarMeans
from dist_gan.schedules import knobs_at
from dist_gan.state import Progress, TrainState
from dist_gan.step import Rules, train_step
from tests.dist.cases import STEPS, cases

class Unreduced(Runtime):
    """The negative control: gradients are never averaged over the ranks."""

    def turn(self, active: Player, resting: Player, *, last_micro: bool) -> AbstractContextManager:
        return super().turn(active, resting, last_micro=False)


def main(shards: str, out: Path, *, unreduced: bool) -> None:
    runtime = None
    manifest = read_manifest(shards)
    report = {}
    for name, config in cases(shards, world_size=int(os.environ.get("WORLD_SIZE", "1"))).items():
        if unreduced and name != "relativistic/r1+r2/plain":
            continue
        if runtime is None:
            runtime = (Unreduced if unreduced else Runtime)(config.runtime)
        draws = Draws(config.run.seed, device=runtime.device, dtype=runtime.dtype)
        networks = build_networks(config.networks, seed=1)
        generator, discriminator = runtime.players(networks, g_optim=config.g_optim, d_optim=config.d_optim)
        objective = AdversarialObjective(config.objective, latent_dim=config.networks.latent_dim)
        stream = ImageStream(
            shards, manifest, section=config.data, resolution=16, channels=3, classes=config.networks.classes,
            batch=config.run.batch, slots=runtime.slots(config.run.batch), draws=draws,
        )  # fmt: skip
        state = TrainState(
            generator, discriminator, GeneratorEMA(generator.module), stream,
            Progress(memory=objective.initial_memory(runtime.device, runtime.dtype)),
        )  # fmt: skip
        rules = Rules(
            batch=config.run.batch, d_updates=config.run.d_updates, micro_batch=config.runtime.micro_batch,
            penalty_every=config.objective.penalty_every,
            fresh_batch_for_g=objective.needs_real_in_g_turn and not config.objective.shared_batch,
        )  # fmt: skip
        start = {k: t.clone() for k, t in _tensors(state).items()}
        scalars = ScalarMeans()
        for _ in range(STEPS):
            train_step(
                runtime, state, objective, draws, knobs_at(state.progress.images, config=config), scalars, rules=rules
            )  # fmt: skip
        keys = [key for row in zip(*runtime.gather_json(list(_first_keys(stream))), strict=True) for key in row]
        latents = runtime.gather(
            draws.normal("latents/generator", draw=3, slots=runtime.slots(config.run.batch), shape=(16,))
        )
        stream.close()
        report[name] = {
            "keys": keys,
            "latents": hashlib.sha256(latents.numpy().tobytes()).hexdigest(),
            "scalars": scalars.flush(runtime),
        }
        if runtime.is_main:
            slug = name.replace("/", "_").replace(" ", "-")
            (out / f"{slug}.start").write_bytes(tensorfile.to_bytes(start))
            (out / f"{slug}.end").write_bytes(tensorfile.to_bytes(_tensors(state)))
    assert runtime is not None
    if runtime.is_main:
        (out / "report.json").write_text(json.dumps(report))
    runtime.close()


def _first_keys(stream: ImageStream) -> tuple[str, ...]:
    """The keys of the next batch after twenty steps."""
    return stream.next().keys


def _tensors(state: TrainState) -> dict[str, torch.Tensor]:
    found = {f"generator/{k}": t for k, t in state.generator.full_tensors().items()}
    found |= {f"discriminator/{k}": t for k, t in state.discriminator.full_tensors().items()}
    return found | {f"ema/{k}": t for k, t in state.ema.tensors().items()} | dict(state.progress.memory)


if __name__ == "__main__":
    destination = Path(sys.argv[2])
    destination.mkdir(parents=True, exist_ok=True)
    main(sys.argv[1], destination, unreduced="--unreduced" in sys.argv)
