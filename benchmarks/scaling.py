"""What the second process costs, what goes over the wire, and what that makes of N nodes.

    python benchmarks/scaling.py [--json] [--blocks 12] [--steps 5] [--link-gbit 100] [--compress bf16]

Two processes, each pinned to a core (or with a GPU of its own), alternate between blocks of DDP steps and blocks of
steps that each takes alone, at once: their ratio is the weak efficiency, free of what the machine does otherwise. Bytes
are counted from the collectives that torch's profiler saw in a step. The projection is that of docs/launching.md:

    time(N) = step + 2 (N - 1) / N x bytes / link
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.overhead import Pool
from dist_gan.build import new_game
from dist_gan.config import RunConfig
from dist_gan.config.reader import load_config
from dist_gan.draws import Draws
from dist_gan.models import build_networks, count_parameters
from dist_gan.optimizers import OptimizerSettings, build_optimizer
from dist_gan.runtime import Player, Runtime, read_launch_settings
from dist_gan.runtime.player import TorchPlayer
from dist_gan.runtime.rank_group import RankGroup
from dist_gan.scalars import ScalarMeans
from dist_gan.schedules import knobs_at

ROOT = Path(__file__).resolve().parents[1]
BATCH_A_PROCESS = 64


class Alone(Runtime):
    """A process of several that trains for itself."""

    @classmethod
    def of(cls, runtime: Runtime) -> Alone:
        """The same device and precision, and nobody else."""
        alone = copy.copy(runtime)
        alone.__class__ = cls
        alone.rank, alone.world_size = 0, 1
        alone.training_group = alone.control_group = alone.writer_group = RankGroup(None, rank=0, world_size=1)
        assert isinstance(alone, Alone)
        return alone

    def _player(self, name: str, module: nn.Module, section: OptimizerSettings) -> Player:
        module = module.to(device=self.device, dtype=self.dtype)
        return TorchPlayer(name, module, module, build_optimizer(list(module.parameters()), section), clip=section.clip)


class Steps:
    """One training loop, a step at a call."""

    def __init__(self, config: RunConfig, runtime: Runtime) -> None:
        self.config, self.runtime = config, runtime
        self.draws = Draws(0, device=runtime.device)
        pool = Pool((torch.rand(512, 3, 32, 32) * 2 - 1).to(runtime.device), BATCH_A_PROCESS)
        networks = build_networks(config.networks, seed=0)
        self.parameters = sum(count_parameters(network) for network in networks)
        self.game = new_game(config, runtime, networks, pool, self.draws)
        self.scalars = ScalarMeans()

    def step(self) -> None:
        self.game.step(knobs_at(self.game.state.progress.images, config=self.config), self.scalars)


def timed(steps: Steps, count: int, runtime: Runtime) -> float:
    """Seconds of a step, by the slower rank, all ranks starting at once."""
    runtime.control_group.barrier()
    began = time.perf_counter()
    for _ in range(count):
        steps.step()
    if runtime.device.type == "cuda":
        torch.cuda.synchronize()
    return max(runtime.control_group.gather_json((time.perf_counter() - began) / count))


def bytes_of_a_step(steps: Steps) -> tuple[int, int]:
    """Bytes and number of the collectives of the training group in one step; the control group is not in it."""
    with torch.profiler.profile(record_shapes=True) as profile:
        steps.step()
    sizes = [
        sum(torch.Size(shape).numel() for shape in event.input_shapes)
        for event in profile.events()
        if event.name in ("gloo:all_reduce", "nccl:all_reduce")
    ]
    width = 2 if steps.config.runtime.compress == "bf16" else 4
    return width * sum(sizes), len(sizes)


def worker(options: argparse.Namespace) -> None:
    """One of the two processes."""
    rank = int(os.environ["RANK"])
    if not torch.cuda.is_available():
        os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[rank]})
    overrides = [f"run.batch={2 * BATCH_A_PROCESS}", "data.url=unused", "runtime.precision=fp32"]
    overrides += ["runtime.threads=1", f"runtime.compress={options.compress}"]
    config = load_config(ROOT / "configs" / "dcgan-cifar10.yaml", overrides, world_size=2)
    runtime = Runtime(config.runtime, read_launch_settings(config, os.environ, gpus=torch.cuda.device_count()))
    together, alone = Steps(config, runtime), Steps(config, Alone.of(runtime))
    times: dict[str, list[float]] = {"together": [], "alone": []}
    for block in range(options.blocks + 1):
        for name, steps in (
            (("together", together), ("alone", alone)) if block % 2 else (("alone", alone), ("together", together))
        ):
            seconds = timed(steps, options.steps, runtime)
            if block:
                times[name].append(seconds)
    moved, collectives = bytes_of_a_step(together)
    minimum = together.parameters * (2 if options.compress == "bf16" else 4)
    if runtime.is_main:
        ratios = [a / t for a, t in zip(times["alone"], times["together"], strict=True)]
        report = {
            "step_s": statistics.median(times["together"]),
            "alone_s": statistics.median(times["alone"]),
            "quartiles": [round(q, 4) for q in statistics.quantiles(ratios, n=4)],
            "blocks": options.blocks,
            "bytes": moved,
            "minimum_bytes": minimum,
            "collectives": collectives,
            "device": runtime.describe()["device"],
        }
        Path(options.worker).write_text(json.dumps(report))
    runtime.close()


def projected(step_s: float, moved: int, *, nodes: int, link_gbit: float) -> dict[str, Any]:
    """Seconds of a step on `nodes` nodes with one reduction over the link, nothing hidden behind the backward pass."""
    wire_s = 2 * (nodes - 1) / nodes * moved * 8 / (link_gbit * 1e9)
    return {
        "row": "projection", "nodes": nodes, "link_gbit": link_gbit, "step_s": round(step_s + wire_s, 5),
        "efficiency": round(step_s / (step_s + wire_s), 4),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print nothing but the JSON line")
    parser.add_argument("--blocks", type=int, default=12)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--link-gbit", type=float, default=100.0)
    parser.add_argument("--compress", choices=("none", "bf16"), default="none")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options)
        return
    out = Path(os.environ.get("TMPDIR", "/tmp")) / f"scaling-{os.getpid()}.json"
    launch_file = ROOT / "launch" / ("one-node.yaml" if torch.cuda.device_count() > 1 else "cpu.yaml")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(launch_file)]
    command += [
        "--num_processes",
        "2",
        "--mixed_precision",
        "no",
        "--main_process_port",
        "0",
        __file__,
        "--worker",
        str(out),
    ]
    command += ["--blocks", str(options.blocks), "--steps", str(options.steps), "--compress", options.compress]
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
    facts = json.loads(out.read_text())
    out.unlink()
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    rows = [{"row": "two processes"} | facts]
    rows += [
        projected(facts["alone_s"], facts["bytes"], nodes=n, link_gbit=options.link_gbit) for n in (2, 8, 64)
    ]  # fmt: skip
    if not options.json:
        for row in rows:
            print(row)
    print(json.dumps({
        "benchmark": "scaling",
        "commit": commit.stdout.strip(),
        "machine": {"cores": os.cpu_count(), "torch": torch.__version__, "device": facts["device"]},
        "rows": rows,
        "summary": {
            "weak_efficiency_2": facts["quartiles"][1],
            "step_s": round(facts["step_s"], 4),
            "bytes_over_minimum": facts["bytes"] / facts["minimum_bytes"],
            "collectives": facts["collectives"],
        },
    }))  # fmt: skip


if __name__ == "__main__":
    main()
