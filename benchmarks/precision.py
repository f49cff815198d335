"""Whether bf16 learns what fp32 learns: 300 steps of DCGAN on real pictures from the same start, loss curve by loss curve.

    python benchmarks/precision.py [--json] [--steps 300] [--data SHARDS]

Every run has 400 steps of fp32 behind it, because the game's first minutes are unstable: fp32 on two processes then
leaves fp32 on one as far behind as another seed does. Three seeds of fp32 give the spread that chance alone makes; bf16
goes on from the first seed's checkpoint in one process, under DDP and under ZeRO-2 on two. A curve is the means of both
players' losses over windows of a tenth of the steps; the distance of two curves is the root of their mean squared
difference over windows, relative to fp32's mean loss. The summary is bf16's largest distance to fp32, over the smallest
one between two seeds of fp32.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
BATCH = 32
LOSSES = ("loss/discriminator", "loss/generator")


WARM_UP = 400


def train(run: Path, *, data: str, images: int, window: int, seed: int, precision: str, launch: list[str]) -> None:
    """Trains a run, or goes on with it, until `images`."""
    command = [sys.executable, "-m", "accelerate.commands.launch", *launch, "--mixed_precision", precision]
    command += ["train.py", "configs/dcgan-cifar10.yaml", f"data.url={data}", f"run.dir={run}", f"run.seed={seed}"]
    command += [f"run.batch={BATCH}", f"run.images={images}", f"log.every={window}", "log.samples=4"]
    command += ["checkpoint.every=1M"]
    environment = os.environ | {"HF_HOME": "/nonexistent"}
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT, env=environment)


def curve(run: Path, *, data: str, steps: int, seed: int, precision: str, launch: list[str]) -> list[dict[str, float]]:
    """The losses of a run after its warm-up, a window a row; `run` may hold the warm-up already."""
    where: dict[str, Any] = {"data": data, "window": BATCH * steps // 10, "seed": seed}
    if not run.exists():
        train(run, images=BATCH * WARM_UP, precision="no", launch=[], **where)
        shutil.copytree(run, run.with_name(f"warm-{seed}"), dirs_exist_ok=True)
    train(run, images=BATCH * (WARM_UP + steps), precision=precision, launch=launch, **where)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: line[name] for name in LOSSES} for line in lines if line["images"] > BATCH * WARM_UP]


def distance(a: list[dict[str, float]], b: list[dict[str, float]], scale: dict[str, float]) -> float:
    """Of two curves; the larger of the two players'."""
    assert len(a) == len(b) > 5
    return max(
        math.sqrt(sum((x[n] - y[n]) ** 2 for x, y in zip(a, b, strict=True)) / len(a)) / scale[n] for n in LOSSES
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print nothing but the JSON line")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--data", default="shards/cifar10", help="shards of 32x32 pictures")
    options = parser.parse_args()
    two = ["--num_processes", "2", "--main_process_port", "0"]
    gpus = torch.cuda.device_count()
    ddp = ["--config_file", f"launch/{'one-node' if gpus > 1 else 'cpu'}.yaml", *two]
    ways = {"single": [], "ddp": ddp, "zero2": ["--config_file", "launch/zero2.yaml", *two]}
    if gpus == 1:
        ways = {"single": [], "zero2": ["--config_file", "launch/zero2.yaml", "--num_processes", "1"]}
    with tempfile.TemporaryDirectory() as name:
        folder, where = Path(name), {"data": options.data, "steps": options.steps}
        seeds = [curve(folder / f"fp32-{s}", seed=s, precision="no", launch=[], **where) for s in range(3)]
        scale = {n: sum(abs(row[n]) for row in seeds[0]) / len(seeds[0]) for n in LOSSES}
        spread = [distance(a, b, scale) for a, b in itertools.combinations(seeds, 2)]
        rows: list[dict[str, Any]] = [{"row": "fp32, other seeds", "distances": [round(d, 4) for d in spread]}]
        for way, launch in ways.items():
            run = Path(shutil.copytree(folder / "warm-0", folder / f"bf16-{way}"))
            found = distance(seeds[0], curve(run, seed=0, precision="bf16", launch=launch, **where), scale)
            rows.append({"row": f"bf16, {way}", "distance": round(found, 4)})
            if not options.json:
                print(rows[-1], flush=True)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    worst = max(row["distance"] for row in rows[1:])
    print(json.dumps({
        "benchmark": "precision",
        "commit": commit.stdout.strip(),
        "machine": {"cores": os.cpu_count(), "torch": torch.__version__, "gpus": gpus},
        "rows": rows,
        "summary": {"bf16_over_spread": round(worst / min(spread), 3), "bf16_distance": worst, "spread": min(spread)},
    }))  # fmt: skip


if __name__ == "__main__":
    main()
