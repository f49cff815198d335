"""Trains small pairs and leaves checkpoints, or goes on from them in new processes.

resume_ranks_worker.py SHARDS OUT unbroken|resumed [--strategy NAME ...] [--only CASE ...]

`unbroken` trains every case to its end, with a checkpoint at each of the case's stops; `resumed` makes everything anew
from each of those checkpoints and trains as far. Both leave a digest of every tensor, the losses of every step, and the
keys of the next batch. One launch takes all of ZeRO's stages in turn.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.parity_cases import one_case
from benchmarks.parity_worker import slug
from dist_gan.build import new_game
from dist_gan.checkpoint.writer import Checkpointer
from dist_gan.config import (
    ArticleNetworks,
    CheckpointSection,
    DCGANNetworks,
    MLPNetworks,
    PointsData,
    RunConfig,
    ShardsData,
)
from dist_gan.data.manifest import read_manifest
from dist_gan.data.pieces import ShardFolder
from dist_gan.data.points import PointStream
from dist_gan.data.stream import ImageStream
from dist_gan.draws import Draws
from dist_gan.models import build_networks
from dist_gan.runtime import Runtime, read_launch_settings
from dist_gan.scalars import ScalarMeans
from dist_gan.schedules import knobs_at
from dist_gan.types import HasTensors, Networks

BATCH = 96
"""Divides among 1, 2, 3 and 4 processes, and each share into two micro-batches."""


class Case(NamedTuple):
    """One recipe and where it is interrupted."""

    config: RunConfig
    stops: tuple[int, ...] = (2, 4)
    """Steps after which a checkpoint is taken."""
    further: int = 3
    """Steps that are trained after each stop."""
    own: bool = False
    """Whether the discriminator is `Wandering`."""


class Wandering(nn.Module):
    """A discriminator of two branches that run in an order which the data decide, so that gradients arrive in two orders."""

    def __init__(self, *, features: int, width: int = 96) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Flatten(), nn.Linear(features, width), nn.SiLU(), nn.Linear(width, width))
        self.second = nn.Sequential(
            nn.Flatten(), nn.Linear(features, 2 * width), nn.SiLU(), nn.Linear(2 * width, width)
        )
        self.head = nn.Linear(width, 1)

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        branches = [self.first, self.second]
        if float(images.detach().sum()) > 0:
            branches.reverse()
        return self.head(branches[0](images) * branches[1](images)).squeeze(1)


def cases(shards: str, *, world_size: int, strategy: str) -> dict[str, Case]:
    """Everything that could make the first step of a start unlike those in the middle of a run."""

    def case(**changes: Any) -> RunConfig:
        return one_case(
            shards, world_size=world_size, precision="fp32", batch=BATCH, **{"loss": "relativistic"} | changes
        )

    both = {"r1_gamma": 1.0, "r2_gamma": 1.0}
    lazy = case(**both, penalty_every=4)
    found = {
        "penalties": Case(case(**both, g_norm="batch")),
        "accumulation": Case(case(**both, accumulate=True, g_norm="batch")),
        "lazy penalties, accumulation": Case(case(**both, penalty_every=4, accumulate=True, d_updates=2)),
        "several updates": Case(case(r1_gamma=1.0, d_updates=3, g_norm="batch", d_norm="batch")),
        "conditional, spectral, memory": Case(
            _changed(
                case(loss="hinge", classes=5, lecam=0.3, d_norm="spectral", g_norm="batch"),
                networks={"d_stddev": 4, "g_mapping": 2},
            )
        ),
        "points": Case(_points(lazy)),
        "dropout": Case(_article(case(loss="nonsaturating", shared_batch=True)), stops=(1,), further=1),
    }
    if strategy not in ("single", "ddp"):
        if world_size == 1:  # there is nothing to sum: that everything comes back is what is left to show
            found = {name: found[name] for name in ("penalties", "lazy penalties, accumulation", "dropout")}
        return {name: entry._replace(stops=entry.stops[:1]) for name, entry in found.items()}
    return found | {
        "lazy penalties": Case(lazy),
        "synchronised batch norm": Case(case(g_norm="batch", d_norm="batch", sync_batchnorm=True, r1_gamma=0.1)),
        # Not under DeepSpeed, which adds gradients in the order in which they arrive on each rank.
        "gradients in two orders": Case(lazy, own=True),
    }


def _changed(config: RunConfig, **sections: dict[str, Any]) -> RunConfig:
    return config.model_copy(
        update={name: getattr(config, name).model_copy(update=changes) for name, changes in sections.items()}
    )


def _points(config: RunConfig) -> RunConfig:
    return config.model_copy(update={"data": PointsData(), "networks": MLPNetworks(width=64)})


def _article(config: RunConfig) -> RunConfig:
    """The article's pair, on pictures of its size beside the other shards."""
    assert isinstance(config.data, ShardsData)
    data = config.data.model_copy(update={"url": f"{config.data.url}-32"})
    return config.model_copy(update={"networks": ArticleNetworks(), "data": data})


class Trainee:
    """Everything that learns, made anew."""

    def __init__(self, case: Case, runtime: Runtime) -> None:
        config, networks = case.config, case.config.networks
        self.config, self.runtime = config, runtime
        self.draws = Draws(config.run.seed)
        slots = runtime.slots(config.run.batch)
        self.stream: ImageStream | PointStream
        if isinstance(config.data, PointsData):
            self.stream = PointStream(config.data, classes=networks.classes, slots=slots, draws=self.draws)
        else:
            assert isinstance(config.data, ShardsData)
            assert isinstance(networks, DCGANNetworks | ArticleNetworks)
            self.stream = ImageStream(
                [(ShardFolder(config.data.url, read_manifest(config.data.url)), 1)], section=config.data,
                resolution=networks.resolution, channels=3, classes=networks.classes, batch=config.run.batch,
                slots=slots, draws=self.draws,
            )  # fmt: skip
        pair = build_networks(networks, seed=1)
        if case.own:
            torch.manual_seed(1)
            pair = Networks(pair.generator, Wandering(features=3 * 16 * 16))
        self.game = new_game(config, runtime, pair, self.stream, self.draws)
        self.state = self.game.state
        self.log: list[Any] = []

    def train(self, steps: int) -> None:
        """Logs the losses of every step."""
        for _ in range(steps):
            scalars = ScalarMeans()
            knobs = knobs_at(self.state.progress.images, config=self.config)
            self.state.recovery.watch(self.game.step(knobs, scalars))
            self.log.append(scalars.flush(self.runtime))

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All that a checkpoint would keep."""
        with_tensors = {n: part for n, part in self.state.parts().items() if isinstance(part, HasTensors)}
        for part, stateful in with_tensors.items():
            for name, tensor in stateful.tensors():
                yield f"{part}/{name}", tensor.detach()

    def facts(self, *, since: int) -> dict[str, Any]:
        """What this trainee has come to; the log from step `since` on."""
        return {
            "tensors": {
                name: hashlib.sha256(tensor.cpu().contiguous().numpy().tobytes()).hexdigest()[:16]
                for name, tensor in self.tensors()
            },
            "log": self.log[since:],
            "keys": hashlib.sha256("\n".join(self.stream.next().keys).encode()).hexdigest(),
        }


def unbroken(case: Case, runtime: Runtime, folder: Path) -> dict[int, Any]:
    """Facts at the end of each stretch, by the stop that it begins with."""
    ends = {stop + case.further: stop for stop in case.stops}
    trainee, found = Trainee(case, runtime), {}
    for done in range(1, max(ends) + 1):
        trainee.train(1)
        if done in case.stops:
            checkpointer = _checkpointer(runtime, folder / f"stop-{done}")
            checkpointer.save(trainee.state.progress.images, trainee.state.parts())
            checkpointer.drain()
        if done in ends:
            found[ends[done]] = trainee.facts(since=ends[done])
            trainee.stream.seek(trainee.state.stream.values()["draw"] - 1)  # the keys were only looked at
    trainee.stream.close()
    return found


def resumed(case: Case, runtime: Runtime, folder: Path) -> dict[int, Any]:
    """The same, of trainees that were made from the checkpoints."""
    found = {}
    for stop in case.stops:
        trainee = Trainee(case, runtime)
        checkpointer = _checkpointer(runtime, folder / f"stop-{stop}")
        checkpointer.load(str(checkpointer.newest().url), trainee.state.parts())
        trainee.train(case.further)
        found[stop] = trainee.facts(since=0)
        trainee.stream.close()
        runtime.control_group.barrier()
        if runtime.is_main:
            shutil.rmtree(folder / f"stop-{stop}")
    return found


def _checkpointer(runtime: Runtime, folder: Path) -> Checkpointer:
    return Checkpointer(str(folder), runtime=runtime, section=CheckpointSection(), facts={})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shards")
    parser.add_argument("out", type=Path)
    parser.add_argument("which", choices=("unbroken", "resumed"))
    parser.add_argument("--strategy", action="append", help="of DeepSpeed's launches: zero0 to zero3")
    parser.add_argument("--only", action="append", help="a case's name")
    options = parser.parse_args()
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    runtime: Runtime | None = None
    report: dict[str, Any] = {}
    first = next(iter(cases(options.shards, world_size=world_size, strategy="zero0").values())).config
    settings = read_launch_settings(first, os.environ, gpus=0)
    for strategy in options.strategy or [settings.strategy]:
        for name, case in cases(options.shards, world_size=world_size, strategy=strategy).items():
            if options.only and name not in options.only:
                continue
            if runtime is None:
                runtime = Runtime(case.config.runtime, settings)
            runtime.section = case.config.runtime
            runtime.launch_settings = dataclasses.replace(settings, strategy=strategy)
            torch.manual_seed(0)
            folder = options.out / slug(f"{strategy}/{world_size}/{name}")
            began = time.perf_counter()
            found = (unbroken if options.which == "unbroken" else resumed)(case, runtime, folder)
            row = {"seconds": round(time.perf_counter() - began, 2), "stops": found}
            report[f"{strategy}/{name}"] = row
    assert runtime is not None
    (options.out / f"{options.which}-{runtime.rank}.json").write_text(json.dumps(report))
    runtime.control_group.barrier()
    runtime.close()


if __name__ == "__main__":
    main()
