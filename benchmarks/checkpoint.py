"""What a checkpoint costs: how long training stands still, how soon it is safe, beside what others do with the same state.

    python benchmarks/checkpoint.py [--json] [--mib 512] [--rounds 7] [--folder DIR]

One process, the same state, rounds that alternate between ours, `accelerate.save_state`, `torch.save`, and a plain copy of
as many bytes on the same disk (read, written, fsynced). A step is one of our own training steps of the same networks. Ours
and the copy are timed twice a round: with nothing beside them, and while training steps go on (`..._in_training`).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.overhead import Pool
from dist_gan.build import new_game
from dist_gan.checkpoint.writer import Checkpointer
from dist_gan.config import CheckpointSection
from dist_gan.config.reader import load_config
from dist_gan.draws import Draws
from dist_gan.models import build_networks
from dist_gan.runtime import LaunchSettings, Runtime
from dist_gan.scalars import ScalarMeans
from dist_gan.schedules import knobs_at
from dist_gan.types import HasTensors

ROOT = Path(__file__).resolve().parents[1]


def width_for(mib: int) -> int:
    """Channels of a DCGAN pair whose whole state takes about `mib`: 3.5 copies of what grows with the square of it."""
    return max(16, round(64 * (mib / 24.5) ** 0.5 / 8) * 8)


def plain_copy(source: Path, folder: Path) -> float:
    """Seconds to copy a file to a new one and make that durable."""
    (folder / "copy").unlink(missing_ok=True)
    began = time.perf_counter()
    with open(source, "rb") as read, open(folder / "copy", "wb") as write:
        shutil.copyfileobj(read, write, 2**24)
        write.flush()
        os.fsync(write.fileno())
    return time.perf_counter() - began


def ratio(above: list[float], below: list[float]) -> float:
    """Median of the rounds' own ratios."""
    return round(statistics.median(a / b for a, b in zip(above, below, strict=True)), 3)


class InBackground:
    """A plain copy in a thread, to be timed while steps go on."""

    def __init__(self, source: Path, folder: Path) -> None:
        self.seconds = 0.0
        self.thread = threading.Thread(target=self._run, args=(source, folder))
        self.thread.start()

    def _run(self, source: Path, folder: Path) -> None:
        self.seconds = plain_copy(source, folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print nothing but the JSON line")
    parser.add_argument("--mib", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", type=Path, help="on the disk to be measured")
    options = parser.parse_args()
    width = width_for(options.mib)
    overrides = [f"networks.g_width={width}", f"networks.d_width={width}", "run.batch=8", "data.url=unused"]
    config = load_config(ROOT / "configs" / "dcgan-cifar10.yaml", [*overrides, "runtime.precision=fp32"])
    runtime = Runtime(config.runtime, LaunchSettings())
    draws = Draws(0, device=runtime.device)
    pool = Pool(torch.rand(64, 3, 32, 32, device=runtime.device) * 2 - 1, 8)
    game = new_game(config, runtime, build_networks(config.networks, seed=0), pool, draws)
    state = game.state

    def step() -> float:
        began = time.perf_counter()
        game.step(knobs_at(state.progress.images, config=config), ScalarMeans())
        if runtime.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    step()
    accelerator = runtime._accelerators["generator"]
    accelerator._models = [state.generator.module, state.discriminator.module, state.ema.module]
    accelerator._optimizers = [state.generator.optimizer, state.discriminator.optimizer]  # type: ignore[attr-defined]
    times: dict[str, list[float]] = {
        name: []
        for name in (
            "step", "blocked", "durable", "copy", "save_state", "torch_save",
            "step_in_flight", "durable_in_training", "step_beside_copy", "copy_in_training",
        )
    }  # fmt: skip
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        checkpointer = Checkpointer(
            str(folder / "ours"), runtime=runtime, section=CheckpointSection(), facts={"config": ""}
        )
        size = 0
        for turn in range(options.rounds + 1):
            os.sync()  # what the others have left unwritten is not to be waited for by our fsync
            quiet = [step() for _ in range(3)]
            checkpointer.save(turn, state.parts())
            checkpointer.drain()
            (written,) = checkpointer.finished()
            (file,) = Path(written.url).glob("data-*")
            size = file.stat().st_size
            os.sync()
            copied = plain_copy(file, folder)
            os.sync()
            checkpointer.save(turn, state.parts())
            in_flight = []
            while checkpointer._thread is not None and checkpointer._thread.is_alive():
                in_flight.append(step())
            checkpointer.drain()
            (in_training,) = checkpointer.finished()
            os.sync()
            copy, beside_copy = InBackground(file, folder), []
            while copy.thread.is_alive():
                beside_copy.append(step())
            began = time.perf_counter()
            accelerator.save_state(str(folder / "accelerate"))
            saved = time.perf_counter() - began
            began = time.perf_counter()
            everything = {p: dict(part.tensors()) for p, part in state.parts().items() if isinstance(part, HasTensors)}
            torch.save(everything, folder / "torch.pt")
            torch_saved = time.perf_counter() - began
            if turn == 0:
                continue  # buffers and caches are new
            times["step"] += quiet
            times["step_in_flight"] += in_flight
            times["step_beside_copy"] += beside_copy
            for key, value in (
                ("blocked", written.blocked_s), ("durable", written.durable_s), ("copy", copied),
                ("durable_in_training", in_training.durable_s), ("copy_in_training", copy.seconds),
                ("save_state", saved), ("torch_save", torch_saved),
            ):  # fmt: skip
                times[key].append(value)
    median = {name: statistics.median(values) for name, values in times.items() if values}
    rows: list[dict[str, Any]] = [
        {"row": name, "median_s": round(value, 4), "count": len(times[name])} for name, value in median.items()
    ]
    if not options.json:
        for row in rows:
            print(row)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    print(json.dumps({
        "benchmark": "checkpoint",
        "commit": commit.stdout.strip(),
        "machine": {"cores": os.cpu_count(), "torch": torch.__version__, "device": str(runtime.device)},
        "rows": rows,
        "summary": {
            "bytes": size,
            "blocked_s": round(median["blocked"], 4),
            "blocked_steps": round(median["blocked"] / median["step"], 3),
            "blocked_vs_save_state": round(median["blocked"] / median["save_state"], 4),
            "durable_s": round(median["durable"], 3),
            "throughput_vs_copy": ratio(times["copy"], times["durable"]),
            "throughput_vs_copy_in_training": ratio(times["copy_in_training"], times["durable_in_training"]),
            "slow_down_in_flight": round(median["step_in_flight"] / median["step"], 3),
            "slow_down_beside_copy": round(median["step_beside_copy"] / median["step"], 3),
        },
    }))  # fmt: skip


if __name__ == "__main__":
    main()
