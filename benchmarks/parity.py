"""Whether every strategy gives the weights of one process: the table of strategy x penalty x mode x processes.

    python benchmarks/parity.py [--json] [--strategy NAME ...] [--processes N ...] [--float64]

A small convolutional pair trains twenty steps on the same global batches, different images on every rank. The reference
is one process without any wrapper. For every tensor of both networks, the average and the optimizers' moments: the
largest difference, in absolute numbers and over the tensor's own movement. In float32 the activations are smooth
(where one has a kink, rounding alone flips a derivative now and then); in float64 they are the networks' own. ZeRO's
third stage is made to partition every tensor, however small.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.parity_worker import slug
from dist_gan.checkpoint import tensorfile
from dist_gan.packing.array_sources import ArraySource
from dist_gan.packing.pack import pack

ROOT = Path(__file__).resolve().parents[1]
STRATEGIES = ("ddp", "zero0", "zero1", "zero2", "zero3", "zero2-offload", "zero3-offload")


def make_shards(folder: Path, *, resolution: int = 16) -> Path:
    """700 labelled square pictures: coarse coloured noise, every one its own."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (700, 4, 4, 3), dtype=np.uint8)
    images = coarse.repeat(resolution // 4, axis=1).repeat(resolution // 4, axis=2)
    pack(
        ArraySource(images, np.arange(700) % 5, class_names=tuple("abcde")),
        str(folder),
        samples_per_shard=100,
        workers=1,
    )
    return folder


def launch_file(strategy: str, folder: Path) -> Path:
    """An accelerate file for CPU processes; ZeRO's third stage keeps no small tensor whole."""
    if strategy == "ddp":
        return ROOT / "launch" / "cpu.yaml"
    stage = int(strategy[4])
    zero: dict[str, Any] = {"stage": stage}
    if stage == 3:
        zero["stage3_param_persistence_threshold"] = 0
    if strategy.endswith("offload"):
        zero["offload_optimizer"] = {"device": "cpu"}
    settings = folder / f"{strategy}.json"
    settings.write_text(json.dumps({"zero_optimization": zero}))
    file = folder / f"{strategy}.yaml"
    file.write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: DEEPSPEED\n"
        f"deepspeed_config:\n  deepspeed_config_file: {settings}\n"
        "use_cpu: true\nnum_machines: 1\nmachine_rank: 0\nnum_processes: 2\n"
    )
    return file


def train(strategy: str, processes: int, *, shards: Path, out: Path, which: str, extra: tuple[str, ...] = ()) -> Path:
    """Trains all cases under a strategy; the folder of what they came to.

    Raises:
        subprocess.CalledProcessError: with what the launch said.
    """
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    if strategy != "single":
        with socket.socket() as place:
            place.bind(("127.0.0.1", 0))
            port = place.getsockname()[1]
        out.parent.mkdir(parents=True, exist_ok=True)
        command += ["--config_file", str(launch_file(strategy, out.parent))]
        command += ["--num_processes", str(processes), "--main_process_port", str(port)]
        if strategy == "ddp" and processes == 1:
            command = [sys.executable]  # accelerate starts a lone process without DDP, and so do we
    command += [str(ROOT / "benchmarks" / "parity_worker.py"), str(shards), str(out), which, *extra]
    dropped = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    environment = {k: v for k, v in os.environ.items() if k not in dropped and not k.startswith("ACCELERATE_")}
    environment |= {
        "PYTHONPATH": str(ROOT),
        "HF_HOME": "/nonexistent",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }
    subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT, env=environment)
    return out


def _load(folder: Path, name: str, when: str) -> dict[str, torch.Tensor]:
    return tensorfile.from_bytes((folder / f"{slug(name)}.{when}").read_bytes(), name=name)


def compare(reference: Path, other: Path, name: str) -> dict[str, Any]:
    """The largest differences of one case, and the smallest movement of a weight relative to its size."""
    start, end, theirs = _load(reference, name, "start"), _load(reference, name, "end"), _load(other, name, "end")
    assert end.keys() == theirs.keys(), sorted(end.keys() ^ theirs.keys())[:5]
    absolute, relative, still = (0.0, ""), (0.0, ""), (float("inf"), "")
    for key, value in end.items():
        if not value.is_floating_point():
            assert torch.equal(value, theirs[key]), key
            continue
        before = start.get(key, torch.zeros_like(value)).double()
        difference = float((value.double() - theirs[key].double()).abs().max())
        moved = float((value.double() - before).abs().max())
        absolute = max(absolute, (difference, key))
        relative = max(relative, (difference / moved if moved else float(difference > 0), key))
        if "/weights/" in key and float(before.norm()) > 0:
            still = min(still, (float((value.double() - before).norm() / before.norm()), key))
    return {
        "max_abs_difference": absolute[0], "of_abs": absolute[1], "max_relative_error": relative[0], "of": relative[1],
        "smallest_movement": still[0], "of_movement": still[1],
    }  # fmt: skip


def table(
    strategies: tuple[str, ...], counts: tuple[int, ...], *, which: str, shards: Path, work: Path, say: bool
) -> tuple[list[dict[str, Any]], list[str]]:
    """A row for every case of every strategy and number of processes; and what could not be trained."""
    reference = train("single", 1, shards=shards, out=work / which / "single", which=which)
    rows: list[dict[str, Any]] = []
    refused = []
    for strategy in strategies:
        for processes in counts:
            if strategy == "ddp" and processes == 1:
                continue
            label = f"{strategy} x {processes}"
            try:
                out = train(strategy, processes, shards=shards, out=work / which / label.replace(" ", ""), which=which)
            except subprocess.CalledProcessError as error:
                refused.append(f"{label}: {(error.stderr or error.stdout).strip().splitlines()[-1]}")
                continue
            for name in json.loads((out / "report.json").read_text()):
                row = {"strategy": strategy, "processes": processes, "case": name, "precision": which}
                rows.append(row | compare(reference, out, name))
            if say:
                mine = [r for r in rows if r["strategy"] == strategy and r["processes"] == processes]
                worst = max(mine, key=lambda r: r["max_relative_error"])
                print(
                    f"{which} {label}: {len(mine)} cases, worst {worst['case']} {worst['max_relative_error']:.1e}",
                    flush=True,
                )
    return rows, refused


def negative_control(*, shards: Path, work: Path) -> float:
    """The relative error of DDP on two processes when gradients are not averaged: it has to be large."""
    name = "r1+r2/plain"
    out = train("ddp", 2, shards=shards, out=work / "unreduced", which="fp32", extra=("--unreduced", "--only", name))
    return float(compare(work / "fp32" / "single", out, name)["max_relative_error"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print nothing but the JSON line")
    parser.add_argument("--strategy", action="append", choices=STRATEGIES)
    parser.add_argument("--processes", action="append", type=int)
    options = parser.parse_args()
    strategies = tuple(options.strategy or STRATEGIES)
    counts = tuple(options.processes or (1, 2, 4))
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        shards = make_shards(work / "shards")
        where = {"shards": shards, "work": work, "say": not options.json}
        rows, refused = table(strategies, counts, which="fp32", **where)
        exact: list[dict[str, Any]] = []
        if "ddp" in strategies:
            exact, more = table(("ddp",), counts, which="fp64", **where)
            refused += more
        control = negative_control(shards=shards, work=work)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    print(json.dumps({
        "benchmark": "parity",
        "commit": commit.stdout.strip(),
        "machine": {"cores": os.cpu_count(), "torch": torch.__version__},
        "rows": rows + exact,
        "summary": {
            "rows": len(rows) + len(exact),
            "max_abs_difference": max(r["max_abs_difference"] for r in rows),
            "max_relative_error": max(r["max_relative_error"] for r in rows),
            "max_abs_difference_float64": max((r["max_abs_difference"] for r in exact), default=None),
            "smallest_movement": min(r["smallest_movement"] for r in rows),
            "negative_control": control,
            "refused": refused,
        },
    }))  # fmt: skip


if __name__ == "__main__":
    main()
