"""Kills one run again and again on a seeded schedule, and compares where it ends with a run that nobody touched.

    python benchmarks/soak.py [--json] [--kills 100] [--seed 0] [--processes 2] --data SHARDS

The run is small, with a checkpoint every five steps; each start is killed (SIGKILL, every process at once) at a random
moment after it began to train, until the schedule is spent, and then left to finish.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dist_gan import attempts
from dist_gan.checkpoint import reader

ROOT = Path(__file__).resolve().parents[1]


def command(run: Path, options: argparse.Namespace) -> list[str]:
    """The same command each time; the batch is the smallest from 32 on that divides among the processes."""
    batch = -(-32 // options.processes) * options.processes
    start = [sys.executable]
    if options.processes > 1:
        start += ["-m", "accelerate.commands.launch", "--config_file", "launch/cpu.yaml"]
        start += ["--num_processes", str(options.processes), "--main_process_port", "0"]
    return [
        *start, "train.py", "configs/dcgan-cifar10.yaml", f"data.url={options.data}", f"run.dir={run}",
        f"run.images={options.images}", f"run.batch={batch}", f"networks.resolution={options.resolution}", "networks.g_width=4",
        "networks.d_width=4", "networks.latent_dim=8", "log.samples=4",
        f"log.every={10 * batch}", f"checkpoint.every={5 * batch}", "runtime.threads=1", "recovery.max_restarts=1000",
    ]  # fmt: skip


def newest_images(run: Path) -> int:
    """Images of the newest committed checkpoint; -1 for none."""
    found = [int(p.parent.name.split("-")[2]) for p in (run / "checkpoints").glob("*/COMMIT")]
    return max(found, default=-1)


def killed_once(run: Path, options: argparse.Namespace, chance: random.Random) -> bool:
    """Starts the run and kills it at a random moment of its training; whether it was killed before it ended."""
    begun = len(attempts.read(run).began)
    process = subprocess.Popen(
        command(run, options), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    while len(attempts.read(run).began) == begun:
        if process.poll() is not None:
            return False
        time.sleep(0.005)
    time.sleep(chance.uniform(0, options.longest_s))
    alive = process.poll() is None
    found = subprocess.run(["pgrep", "-f", f"run.dir={run}"], capture_output=True, text=True, check=False)
    for pid in map(int, found.stdout.split()):
        if pid != os.getpid():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
    process.wait()
    return alive


def state_of(run: Path) -> tuple[dict[str, torch.Tensor], dict[str, object]]:
    """Everything in the newest checkpoint but the clock."""
    found = reader.newest(str(run / "checkpoints"))
    assert found.url is not None
    manifest, tensors = reader.read(found.url)
    manifest["values"]["progress"].pop("seconds")
    return tensors, manifest["values"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print nothing but the JSON line")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--images", type=int, default=32_000)
    parser.add_argument("--resolution", type=int, default=32)
    parser.add_argument("--longest-s", type=float, default=1.0, help="longest life of a start after it began to train")
    parser.add_argument("--data", required=True, help="shards of pictures")
    options = parser.parse_args()
    began, chance = time.monotonic(), random.Random(options.seed)
    with tempfile.TemporaryDirectory() as name:
        whole, killed = Path(name) / "whole", Path(name) / "killed"
        subprocess.run(command(whole, options), check=True, capture_output=True, cwd=ROOT)
        kills, in_vain = 0, 0
        while kills < options.kills:
            before = newest_images(killed)
            if not killed_once(killed, options, chance):
                break
            kills += 1
            in_vain += newest_images(killed) == before
            if not options.json:
                print(f"kill {kills}: newest checkpoint at {newest_images(killed):,} images", flush=True)
        subprocess.run(command(killed, options), check=True, capture_output=True, cwd=ROOT)
        (a, values_a), (b, values_b) = state_of(whole), state_of(killed)
        different = [n for n in a if n not in b or not torch.equal(a[n], b[n])] + sorted(b.keys() - a.keys())
        count = attempts.read(killed).last
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    print(json.dumps({
        "benchmark": "soak",
        "commit": commit.stdout.strip(),
        "machine": {"cores": os.cpu_count(), "torch": torch.__version__},
        "rows": [{"processes": options.processes, "kills": kills, "kills_without_a_new_checkpoint": in_vain}],
        "summary": {
            "kills": kills, "attempts": count, "different_tensors": len(different),
            "same_values": values_a == values_b, "seconds": round(time.monotonic() - began, 1),
        },
    }))  # fmt: skip
    sys.exit(bool(different) or values_a != values_b)


if __name__ == "__main__":
    main()
