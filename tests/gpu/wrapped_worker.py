"""Trains parity cases under whatever wrapper the launch gives, and says which: wrapped_worker.py SHARDS OUT NAME [NAME ...].

torchrun with a single process makes accelerate wrap both networks in DDP over NCCL, so that one card is enough.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks.parity_cases import strategy_cases
from benchmarks.parity_worker import slug, tensors_of, train_case
from dist_gan.checkpoint import tensorfile
from dist_gan.runtime import Runtime, read_launch_settings


def main(shards: str, out: Path, names: list[str]) -> None:
    cases = strategy_cases(shards, world_size=int(os.environ.get("WORLD_SIZE", "1")), precision="fp32")
    runtime = None
    for name in names:
        config = cases[name]
        if runtime is None:
            runtime = Runtime(config.runtime, read_launch_settings(config, os.environ, gpus=torch.cuda.device_count()))
        runtime.section = config.runtime
        _, start, state = train_case(config, runtime)
        players = (state.generator, state.discriminator)
        wrappers = [type(getattr(player, "wrapped", getattr(player, "_engine", None))).__name__ for player in players]
        end = tensors_of(state)
        if runtime.is_main:
            out.mkdir(parents=True, exist_ok=True)
            (out / f"{slug(name)}.start").write_bytes(tensorfile.to_bytes(start))
            (out / f"{slug(name)}.end").write_bytes(tensorfile.to_bytes(end))
            facts = {"wrappers": wrappers, "backend": dist.get_backend(), "device": runtime.device.type}
            (out / "facts.json").write_text(json.dumps(facts))
    if runtime is not None:
        runtime.close()
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
