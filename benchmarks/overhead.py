"""What our step costs beside a plain hand-written loop, and how long a real run waits for data.

    python benchmarks/overhead.py [--json] [--pairs 200]

One process, alternating pairs of steps of the same networks, loss, penalties, optimizer, batch and images; the plain
loop below does what a good hand would: generated images for D without a graph, D frozen in G's turn, fused Adam, a
foreach average, gradient norms read for the log. The ratio is of medians over pairs, with quartiles.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import softplus

from dist_gan.build import new_game
from dist_gan.config import PointsData, RunConfig
from dist_gan.config.reader import load_config
from dist_gan.draws import Draws
from dist_gan.models import build_networks
from dist_gan.runtime import LaunchSettings, Runtime
from dist_gan.scalars import ScalarMeans
from dist_gan.schedules import at, knobs_at
from dist_gan.types import Batch, Networks

ROOT = Path(__file__).resolve().parents[1]


class Pool:
    """A stream of images that are on the device already, so that both loops pay for the step alone."""

    def __init__(self, images: torch.Tensor, batch: int) -> None:
        self.images, self.batch = images, batch
        self.draw, self.waited_s = 0, 0.0

    def next(self) -> Batch:
        start = self.draw * self.batch % len(self.images)
        slots = torch.arange(self.batch)
        self.draw += 1
        return Batch(self.images[start : start + self.batch], None, slots, ("",) * self.batch, self.draw - 1)

    def values(self) -> dict[str, Any]:
        return {}

    def load_values(self, values: dict[str, Any]) -> None:
        pass

    def preview(self, count: int) -> torch.Tensor:
        return self.images[:count]

    def seek(self, draw: int) -> None:
        self.draw = draw

    def close(self) -> None:
        pass


class PlainLoop:
    """The same game, written out by hand."""

    def __init__(self, networks: Networks, config: RunConfig, pool: Pool) -> None:
        self.G, self.D = networks
        self.average = copy.deepcopy(self.G).eval().requires_grad_(False)
        self.pool = pool
        optim = {"lr": at(config.g_optim.lr, 0), "betas": (0.0, 0.99), "fused": True}
        self.g_optimizer = torch.optim.Adam(self.G.parameters(), **optim)
        self.d_optimizer = torch.optim.Adam(self.D.parameters(), **optim)
        self.gamma = at(config.objective.r1_gamma, 0)
        self.batch, self.latent_dim = config.run.batch, config.networks.latent_dim
        self.losses = torch.zeros(2)

    def step(self) -> tuple[float, float]:
        real = self.pool.next().images.detach().requires_grad_()
        self.D.requires_grad_(True)
        with torch.no_grad():
            fake = self.G(torch.randn(self.batch, self.latent_dim))
        fake.requires_grad_()
        real_logits, fake_logits = self.D(real), self.D(fake)
        loss = softplus(fake_logits - real_logits).mean()
        for images, logits in ((real, real_logits), (fake, fake_logits)):
            (gradient,) = torch.autograd.grad(logits.sum(), images, create_graph=True)
            loss = loss + 0.5 * self.gamma * gradient.flatten(1).square().sum(1).mean()
        loss.backward()
        d_norm = torch.nn.utils.get_total_norm([p.grad for p in self.D.parameters()]).item()
        self.d_optimizer.step()
        self.d_optimizer.zero_grad(set_to_none=True)
        self.losses[0] += loss.detach()

        self.D.requires_grad_(False)
        with torch.no_grad():
            real_logits = self.D(self.pool.next().images)
        loss = softplus(real_logits - self.D(self.G(torch.randn(self.batch, self.latent_dim)))).mean()
        loss.backward()
        g_norm = torch.nn.utils.get_total_norm([p.grad for p in self.G.parameters()]).item()
        self.g_optimizer.step()
        self.g_optimizer.zero_grad(set_to_none=True)
        self.losses[1] += loss.detach()
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.parameters()), list(self.G.parameters()), 1e-3)
        return d_norm, g_norm


def our_step(runtime: Runtime, config: RunConfig, pool: Pool) -> Any:
    """A closure that runs one step of the toolkit, as the trainer's loop does between ticks."""
    draws = Draws(0, device=runtime.device)
    game = new_game(config, runtime, build_networks(config.networks, seed=0), pool, draws)
    scalars = ScalarMeans()

    def step() -> None:
        game.step(knobs_at(game.state.progress.images, config=config), scalars)

    return step


def compare_steps(pairs: int) -> dict[str, Any]:
    config = load_config(ROOT / "configs" / "dcgan-cifar10.yaml", ["data.url=unused", "runtime.precision=fp32"])
    assert not isinstance(config.data, PointsData)
    runtime = Runtime(config.runtime, LaunchSettings())
    images = torch.rand(1024, 3, 32, 32) * 2 - 1
    plain = PlainLoop(build_networks(config.networks, seed=0), config, Pool(images, config.run.batch))
    ours = our_step(runtime, config, Pool(images, config.run.batch))
    times: dict[str, list[float]] = {"ours": [], "plain": []}
    for pair in range(pairs + 5):
        order = [("ours", ours), ("plain", plain.step)]
        for name, step in order if pair % 2 else reversed(order):
            began = time.perf_counter()
            step()
            if pair >= 5:
                times[name].append(time.perf_counter() - began)
    ratios = [a / b for a, b in zip(times["ours"], times["plain"], strict=True)]
    quartiles = statistics.quantiles(ratios, n=4)
    return {
        "row": "step",
        "pairs": pairs,
        "ours_ms": round(1e3 * statistics.median(times["ours"]), 2),
        "plain_ms": round(1e3 * statistics.median(times["plain"]), 2),
        "ratio_quartiles": [round(q, 4) for q in quartiles],
    }


def data_wait() -> dict[str, Any]:
    """Share of time that the embedded run waits for data, after its first tick."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / "train.py"), f"run.dir={folder}/run", "run.images=20k", "log.every=4k"]
        subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
        lines = [json.loads(line) for line in Path(folder, "run", "metrics.jsonl").read_text().splitlines()]
    waits = [line["time/data_wait_share"] for line in lines if "time/data_wait_share" in line]
    return {"row": "data_wait", "share": round(statistics.median(waits[1:]), 5)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print nothing but the JSON line")
    parser.add_argument("--pairs", type=int, default=200)
    options = parser.parse_args()
    rows = [compare_steps(options.pairs), data_wait()]
    if not options.json:
        for row in rows:
            print(row)
    print(json.dumps({
        "benchmark": "overhead",
        "commit": subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
        ).stdout.strip(),
        "machine": {"cores": os.cpu_count(), "torch": torch.__version__, "threads": torch.get_num_threads()},
        "rows": rows,
        "summary": {"step_ratio_median": rows[0]["ratio_quartiles"][1], "data_wait_share": rows[1]["share"]},
    }))  # fmt: skip


if __name__ == "__main__":
    main()
