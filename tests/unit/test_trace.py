"""Fifty steps on a CPU, number for number: a refactor keeps them, a change of numbers says why.

The file beside this one is written anew by `python -m tests.unit.test_trace`.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

from dist_gan.build import new_game
from dist_gan.config import (
    AdamSection,
    DCGANNetworks,
    EMASection,
    ObjectiveSection,
    RunSection,
    RuntimeSection,
    ShardsData,
)
from dist_gan.config import RunConfig as Config
from dist_gan.data.manifest import read_manifest
from dist_gan.data.pieces import ShardFolder
from dist_gan.data.stream import ImageStream
from dist_gan.draws import Draws
from dist_gan.models import build_networks
from dist_gan.packing.array_sources import ArraySource
from dist_gan.packing.pack import pack
from dist_gan.runtime import LaunchSettings, Runtime
from dist_gan.scalars import ScalarMeans
from dist_gan.schedules import knobs_at
from tests.conftest import random_images

TRACE = Path(__file__).with_name("trace-50.json")


def fifty_steps(folder: Path) -> list[dict[str, float]]:
    """Scalars of every step: relativistic loss, R1 and R2, BatchNorm in G, labels, flips, accumulation, float64."""
    pack(ArraySource(random_images(128, resolution=16), np.arange(128) % 3), str(folder), workers=1)
    optim = AdamSection(lr=1e-3, beta1=0.5, beta2=0.99)
    config = Config(
        run=RunSection(batch=16),
        data=ShardsData(url=str(folder), flip=True, lanes=8, block=8, holdout=0.1),
        networks=DCGANNetworks(
            resolution=16, latent_dim=8, g_width=4, d_width=4, d_norm="none", classes=3, g_mapping=1
        ),
        objective=ObjectiveSection(kind="relativistic", r1_gamma=0.5, r2_gamma=0.5, instance_noise=0.05),
        g_optim=optim,
        d_optim=optim,
        ema=EMASection(half_life=100, warmup=0),
        runtime=RuntimeSection(precision="fp64", micro_batch=8, threads=1),
    )
    runtime = Runtime(config.runtime, LaunchSettings(precision="fp64"))
    draws = Draws(11, dtype=runtime.dtype)
    stream = ImageStream(
        [(ShardFolder(str(folder), read_manifest(str(folder))), 1)], section=config.data, resolution=16, channels=3, classes=3,
        batch=16, slots=runtime.slots(16), draws=draws,
    )  # fmt: skip
    game = new_game(config, runtime, build_networks(config.networks, seed=3), stream, draws)
    state = game.state
    lines = []
    for _ in range(50):
        scalars = ScalarMeans()
        game.step(knobs_at(state.progress.images, config=config), scalars)
        lines.append(scalars.flush(runtime))
    stream.close()
    lines.append({f"ema/{n}": float(t.double().abs().sum()) for n, t in state.ema.tensors()})
    return lines


def test_fifty_steps_give_the_numbers_that_were_committed(tmp_path: Path) -> None:
    committed = json.loads(TRACE.read_text())
    lines = fifty_steps(tmp_path / "shards")
    assert len(lines) == len(committed) == 51
    for step, (line, expected) in enumerate(zip(lines, committed, strict=True)):
        # float64: what differs between processors stays far below what a change of the code brings
        assert line == pytest.approx(expected, rel=1e-6, abs=1e-9), f"step {step}"


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        TRACE.write_text(json.dumps(fifty_steps(Path(place) / "shards"), indent=0) + "\n")
    sys.exit(0)
