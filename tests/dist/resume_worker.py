"""Stops after every number of steps, rebuilds everything from disk, and goes on: resume_worker.py SHARDS OUT.

The process group stays; networks, optimizers, average, stream and counters are thrown away and made anew from the
checkpoint. The cases take turns over the stops. Rank 0 leaves what differed from the undisturbed run.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.parity_cases import one_case
from benchmarks.parity_worker import tensors_of
from dist_gan.build import new_game
from dist_gan.checkpoint.writer import Checkpointer
from dist_gan.config import CheckpointSection, DCGANNetworks, RunConfig, ShardsData
from dist_gan.data.manifest import read_manifest
from dist_gan.data.pieces import ShardFolder
from dist_gan.data.stream import ImageStream
from dist_gan.draws import Draws
from dist_gan.models import build_networks
from dist_gan.runtime import Runtime, read_launch_settings
from dist_gan.scalars import ScalarMeans
from dist_gan.schedules import knobs_at

STEPS = 20
CASES: tuple[dict[str, Any], ...] = (
    {"r1_gamma": 1.0, "r2_gamma": 1.0, "g_norm": "batch"},
    {"d_updates": 2, "r1_gamma": 1.0},
    {"accumulate": True, "r1_gamma": 1.0},
    {"penalty_every": 4, "r1_gamma": 1.0, "loss": "relativistic"},
    {"lecam": 0.3, "d_norm": "spectral"},
)


class Trainee:
    """Everything that learns, made anew."""

    def __init__(self, config: RunConfig, runtime: Runtime) -> None:
        assert isinstance(config.data, ShardsData)
        assert isinstance(config.networks, DCGANNetworks)
        self.config, self.runtime = config, runtime
        self.draws = Draws(config.run.seed)
        self.stream = ImageStream(
            [(ShardFolder(config.data.url, read_manifest(config.data.url)), 1)], section=config.data, resolution=16, channels=3, classes=0,
            batch=config.run.batch, slots=runtime.slots(config.run.batch), draws=self.draws,
        )  # fmt: skip
        networks = build_networks(config.networks, seed=1)
        self.game = new_game(config, runtime, networks, self.stream, self.draws)
        self.state = self.game.state
        self.log: list[Any] = []

    def train(self, steps: int) -> None:
        """Logs what was seen at every step: losses, learning rates, keys."""
        for _ in range(steps):
            scalars = ScalarMeans()
            knobs = knobs_at(self.state.progress.images, config=self.config)
            self.state.recovery.watch(self.game.step(knobs, scalars))
            self.log.append([scalars.flush(self.runtime), list(knobs), self.state.stream.values()["draw"]])


def main(shards: str, out: Path) -> None:
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    configs = [
        one_case(shards, world_size=world_size, precision="fp32", batch=24, **{"loss": "nonsaturating"} | case)
        for case in CASES
    ]
    runtime = Runtime(configs[0].runtime, read_launch_settings(configs[0], os.environ, gpus=0))
    whole = []
    for config in configs:
        runtime.section = config.runtime
        trainee = Trainee(config, runtime)
        trainee.train(STEPS)
        whole.append((tensors_of(trainee.state), trainee.log, trainee.stream.next().keys))
        trainee.stream.close()
    wrong: list[str] = []
    for stop in range(STEPS):
        index = stop % len(configs)
        config = configs[index]
        runtime.section = config.runtime
        checkpointer = Checkpointer(
            str(out / f"checkpoints-{stop}"), runtime=runtime, section=CheckpointSection(), facts={}
        )
        first = Trainee(config, runtime)
        first.train(stop)
        checkpointer.save(first.state.progress.images, first.state.parts())
        first.train(1)  # the state moves on at once: what is saved is the boundary's
        checkpointer.drain()
        first.stream.close()
        second = Trainee(config, runtime)
        checkpointer.load(str(checkpointer.newest().url), second.state.parts())
        second.train(STEPS - stop)
        tensors, log, keys = whole[index]
        found = tensors_of(second.state)
        wrong += [f"stop {stop}: tensor {n}" for n in tensors if not torch.equal(tensors[n], found.get(n, torch.empty(0)))]
        wrong += [f"stop {stop}: log of step {k}" for k in range(stop, STEPS) if log[k] != second.log[k - stop]]
        if second.stream.next().keys != keys:
            wrong.append(f"stop {stop}: keys")
        second.stream.close()
    everywhere = runtime.control_group.gather_json(wrong)
    if runtime.is_main:
        (out / "wrong.json").write_text(json.dumps(everywhere))
    runtime.close()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
