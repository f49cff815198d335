"""What only several processes can show, reported by every rank into a folder: runtime_worker.py SHARDS OUT."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from dist_gan.build import new_game
from dist_gan.config import DCGANNetworks, ObjectiveSection, RunConfig, RunSection, RuntimeSection, ShardsData
from dist_gan.data.manifest import read_manifest
from dist_gan.data.pieces import ShardFolder
from dist_gan.data.stream import ImageStream
from dist_gan.draws import Draws
from dist_gan.models import build_networks
from dist_gan.runtime import Fingerprints, LaunchSettings, Runtime
from dist_gan.scalars import ScalarMeans
from dist_gan.schedules import knobs_at
from dist_gan.types import Batch, HasTensors, TrainingFailed


class Poisoned(ImageStream):
    """A stream with one image that is not a number, on one rank, in one draw."""

    poisoned_rank_here = False

    def next(self) -> Batch:
        batch = super().next()
        if self.poisoned_rank_here and batch.draw == 3:
            batch.images[0, 0, 0, 0] = float("nan")
        return batch


def compare(runtime: Runtime, tensors: dict[str, torch.Tensor]) -> None:
    fingerprints = Fingerprints(enabled=runtime.world_size > 1)
    for name, tensor in tensors.items():
        fingerprints.add(name, tensor)
    runtime.writer_group.compare_replicas(fingerprints)


def main(shards: str, out: Path) -> None:
    runtime = Runtime(RuntimeSection(threads=1), LaunchSettings("ddp"))
    report: dict = {"rank": runtime.rank}
    draws = Draws(0)
    section = DCGANNetworks(resolution=16, latent_dim=8, g_width=4, d_width=4)
    config = RunConfig(
        run=RunSection(batch=32), networks=section, objective=ObjectiveSection(kind="hinge", lecam=0.1)
    )  # fmt: skip
    slots = runtime.slots(32)
    stream = Poisoned(
        [(ShardFolder(shards, read_manifest(shards)), 1)], section=ShardsData(url=shards), resolution=16, channels=3, classes=0, batch=32,
        slots=slots, draws=draws,
    )  # fmt: skip
    stream.poisoned_rank_here = runtime.rank == 1
    game = new_game(config, runtime, build_networks(section, seed=0), stream, draws)
    state = game.state
    discriminator, scalars = state.discriminator, ScalarMeans()
    applied, unchanged = [], []
    for _ in range(6):
        before = {n: t.clone() for n, t in discriminator.full_tensors() if not n.endswith("num_batches_tracked")}
        memory = {n: t.clone() for n, t in state.memory.items()}
        updates = game.step(knobs_at(0, config=config), scalars)
        state.recovery.watch(updates)
        after = dict(discriminator.full_tensors())
        applied.append([u.applied for u in updates])
        same_weights = all(torch.equal(t, after[n]) for n, t in before.items() if n.startswith("weights/"))
        unchanged.append([same_weights, all(torch.equal(t, state.memory[n]) for n, t in memory.items())])
    report |= {"applied": applied, "unchanged": unchanged, "skipped": state.recovery.skipped}
    with_tensors = {name: part for name, part in state.parts().items() if isinstance(part, HasTensors)}
    report["finite"] = all(
        bool(t.isfinite().all()) for part in with_tensors.values() for _, t in part.tensors() if t.is_floating_point()
    )
    report["scalars"] = scalars.flush(runtime)
    everything = {f"{p}/{n}": t for p, part in with_tensors.items() for n, t in part.tensors()}
    compare(runtime, everything)
    report["batch_norm_buffers"] = sum("running_var" in n for n in everything)

    rows = slots.double().unsqueeze(1) * 10
    report["gathered"] = runtime.training_group.gather_rows(rows).squeeze(1).tolist()
    report["json"] = runtime.control_group.gather_json({"rank": runtime.rank, "text": "x" * (1 + 50 * runtime.rank)})
    report["shared"] = runtime.control_group.share_json(["from", runtime.rank])
    report["any"] = [runtime.control_group.any_rank(runtime.rank == 1), runtime.control_group.any_rank(False)]
    if runtime.rank == 1:
        everything["discriminator/weights/head.linear.weight"][0, 3] += 1e-6
    try:
        compare(runtime, everything)
        report["corrupted"] = "not noticed"
    except TrainingFailed as error:
        report["corrupted"] = str(error)
    try:
        runtime.control_group.agree("no disk left" if runtime.rank == 1 else None)
    except TrainingFailed as error:
        report["agreed"] = str(error)
    stream.close()
    (out / f"rank-{runtime.rank}.json").write_text(json.dumps(report))
    runtime.close()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
