"""The loop on points on every rank, the last of which is asked to stop: loop_worker.py FOLDER [key=value ...].

Every rank leaves how its run ended in FOLDER/rank-N.json.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import torch

from dist_gan.build import build
from dist_gan.data import PointStream
from dist_gan.metrics import Metric, Samples
from dist_gan.own_parts import OwnParts
from dist_gan.runtime import LaunchSettings, Runtime, StopRequest
from dist_gan.trainer import fit
from dist_gan.types import Batch
from tests.games import points_config

ASKED_AT_DRAW = 11


def ordered(samples: Samples) -> dict[str, float]:
    """A sum over seven samples, which no two ranks share equally, and one in which their order counts."""
    rows = torch.cat(list(samples.generated(7)))
    weighted = torch.arange(7)[:, None] * samples.gather(rows, count=7)
    return {"sum": float(samples.sum(rows.sum())), "weighted": float(weighted.sum())}


ORDERED = Metric("ordered", 40, ordered)


def main(folder: Path, overrides: list[str]) -> None:
    config = points_config(f"run.dir={folder}", *overrides)
    runtime = Runtime(config.runtime, LaunchSettings("ddp", precision="fp64"))
    stop, honest_next = StopRequest(names=("USR1",)), PointStream.next

    def asking(stream: PointStream) -> Batch:
        batch = honest_next(stream)
        if runtime.rank == runtime.world_size - 1 and batch.draw == ASKED_AT_DRAW:
            os.kill(os.getpid(), signal.SIGUSR1)
        return batch

    PointStream.next = asking  # type: ignore[method-assign]
    run = build(config, runtime, stop, attempt=1, own=OwnParts(metrics=(ORDERED,)))
    stop.training_begins()
    end = fit(run)
    run.close()
    asked = stop.signal
    (folder / f"rank-{runtime.rank}.json").write_text(json.dumps({"end": list(end), "asked": asked}))
    runtime.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
