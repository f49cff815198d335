"""train.py with a recorder, or with a fault on one rank: instrumented.py OUT FAULT[:DRAW] CONFIG [key=value ...].

FAULT is `record`, or what rank 1 (or FAULTY_RANK) does when it takes its DRAW-th batch: `hang`, `kill`, `stop` (SIGSTOP),
`fail` in its own code, `corrupt` a weight, `nan-once`, or from there on always `nan`; or what it starts with: other `settings`,
other `code`, another `package`, `refused` settings, a broken `build`. Every rank leaves keys, labels, and the hashes of images
and latents of each batch in OUT.

With DEAF=1 in the environment a collective whose other ranks are gone never returns, as over NCCL.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import torch.distributed as dist

from dist_gan import __main__ as program
from dist_gan.build import Run
from dist_gan.process import life
from dist_gan.data.stream import ImageStream
from dist_gan.runtime import Runtime
from dist_gan.types import Batch, byte_range

OUT, (FAULT, _, DRAW) = Path(sys.argv[1]), sys.argv[2].partition(":")
RANK = int(os.environ.get("RANK", "0"))
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", "1"))
FAULTY = int(os.environ.get("FAULTY_RANK", "1"))


def instrument() -> None:
    honest_next, honest_build = ImageStream.next, life.build
    parts: list[Run] = []

    def build(*arguments: object, **more: object) -> Run:
        parts.append(honest_build(*arguments, **more))  # type: ignore[arg-type]
        return parts[-1]

    def next_batch(stream: ImageStream) -> Batch:
        batch = honest_next(stream)
        run = parts[0]
        latents = run.game.draws.normal("latents/generator", draw=batch.draw, slots=batch.slots, shape=(8,))
        rows = [hashlib.sha256(row.numpy().tobytes()).hexdigest()[:12] for row in latents.cpu()]
        with open(OUT / f"rank-{RANK}.jsonl", "a") as file:
            line = {"draw": batch.draw, "slots": batch.slots.tolist(), "keys": batch.keys, "latents": rows}
            line["labels"] = None if batch.labels is None else batch.labels.tolist()
            line["images"] = [hashlib.sha256(byte_range(image).cpu().numpy().tobytes()).hexdigest() for image in batch.images]
            file.write(json.dumps(line) + "\n")
        if RANK == WORLD_SIZE - 1 and FAULT == "nan" and batch.draw >= int(DRAW):
            (OUT / "fault-fired").write_text(FAULT)
            batch.images[0, 0, 0, 0] = float("nan")
        if RANK == WORLD_SIZE - 1 and FAULT == "nan-once" and batch.draw == int(DRAW):
            (OUT / "fault-fired").write_text(FAULT)
            batch.images[0, 0, 0, 0] = float("nan")
        if RANK == FAULTY and DRAW and batch.draw == int(DRAW):
            (OUT / "fault-fired").write_text(FAULT)
            if FAULT == "hang":
                time.sleep(10_000)
            if FAULT == "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
            if FAULT == "fail":
                raise LookupError("a stage of its own")
            if FAULT == "kill" and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
                os.kill(os.getpid(), signal.SIGKILL)
            if FAULT == "corrupt":
                with torch.no_grad():
                    run.state.generator.parameters["stages.2.weight"][0, 0, 0, 0] += 1e-3
        return batch

    ImageStream.next = next_batch  # type: ignore[method-assign]
    life.build = build


def be_deaf() -> None:
    """A collective that fails waits for ever instead, wherever it was called."""

    def deaf(function: Callable[..., Any]) -> Callable[..., Any]:
        def called(*arguments: Any, **more: Any) -> Any:
            try:
                return function(*arguments, **more)
            except RuntimeError:
                while True:
                    time.sleep(1000)

        return called

    for name in ("all_reduce", "all_gather", "broadcast", "gather", "barrier"):
        setattr(dist, name, deaf(getattr(dist, name)))
    torch.Tensor.backward = deaf(torch.Tensor.backward)  # type: ignore[method-assign]
    torch.autograd.backward = deaf(torch.autograd.backward)


if __name__ == "__main__":
    OUT.mkdir(parents=True, exist_ok=True)
    overrides = sys.argv[4:]
    if RANK == FAULTY and FAULT == "settings":
        overrides.append("g_optim.lr=1e-5")
    if RANK == FAULTY and FAULT == "build":
        life.build = None
    if RANK == FAULTY and FAULT == "code":
        life.code_hash = lambda: "0123456789abcdef"
    if RANK == FAULTY and FAULT == "package":
        Runtime.packages = staticmethod(lambda: {"accelerate": "0.0.1"})
    if os.environ.get("DEAF"):
        be_deaf()
    if FAULT != "build":
        instrument()
    if RANK == FAULTY and FAULT == "refused":
        sys.exit(program.start([sys.argv[3], *overrides, "run.imagez=3"]))
    sys.exit(program.start([sys.argv[3], *overrides]))
