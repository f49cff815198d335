"""One run through four launches: DDP on 4, ZeRO-2 on 2, ZeRO-3 on 4, one process. Nothing is lost, nothing repeated."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.parity import launch_file
from dist_gan.checkpoint import reader
from tests.conftest import ROOT, launch

SCRIPT = ROOT / "tests" / "dist" / "instrumented.py"
BATCH = 32
LEGS = (("ddp", 4, 640), ("zero2", 2, 1280), ("zero3", 4, 1920), ("single", 1, 2560))


def train(shards: Path, run: Path, out: Path, strategy: str, processes: int, images: int, work: Path) -> None:
    overrides = [
        f"data.url={shards}", f"run.dir={run}", f"run.images={images}", f"run.batch={BATCH}", "data.lanes=16",
        "networks.resolution=16", "networks.g_width=4", "networks.d_width=4", "networks.latent_dim=8", "log.samples=4",
        "objective.r1_gamma=0.5", "objective.r2_gamma=0.5", "runtime.threads=1", "checkpoint.every=1M",
        "g_optim.eps=1e-5", "d_optim.eps=1e-5",
    ]  # fmt: skip
    config_file = None if strategy == "single" else launch_file(strategy, work)
    done = launch(
        SCRIPT, [str(out), "record", "configs/dcgan-cifar10.yaml", *overrides],
        processes=processes, config_file=config_file, timeout_s=200,
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]


def drawn(out: Path) -> dict[int, dict[int, tuple[str, str]]]:
    """By draw and slot: the image's key and the latent's hash; a draw that comes twice is a repeat."""
    found: dict[int, dict[int, tuple[str, str]]] = {}
    for file in sorted(out.glob("rank-*.jsonl")):
        for line in map(json.loads, file.read_text().splitlines()):
            batch = found.setdefault(line["draw"], {})
            for slot, key, latent in zip(line["slots"], line["keys"], line["latents"], strict=True):
                assert slot not in batch, f"draw {line['draw']} slot {slot} was taken twice"
                batch[slot] = (key, latent)
    return found


def weights(run: Path) -> dict[str, torch.Tensor]:
    found = reader.newest(str(run / "checkpoints"))
    assert found.url is not None
    tensors = reader.read(found.url)[1]
    return {n: t.double() for n, t in tensors.items() if "/weights/" in n or n.startswith("ema/")}


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[n] - b[n]).abs().max()) for n in a)


@pytest.fixture(scope="module")
def runs(small_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`changed`: all legs. `whole`: one process. `two`, `four`: an undisturbed run of as many processes."""
    work = tmp_path_factory.mktemp("legs")
    for strategy, processes, images in LEGS:
        train(small_shards, work / "changed", work / "changed-out", strategy, processes, images, work)
    for name, strategy, processes in (("whole", "single", 1), ("two", "ddp", 2), ("four", "ddp", 4)):
        train(small_shards, work / name, work / f"{name}-out", strategy, processes, LEGS[-1][2], work)
    return work


def test_the_images_and_latents_are_one_unbroken_sequence(runs: Path) -> None:
    changed, whole = drawn(runs / "changed-out"), drawn(runs / "whole-out")
    # Each leg takes batches ahead; what it drew last and never trained on is drawn again by the next one.
    assert whole.keys() == set(range(2 * LEGS[-1][2] // BATCH))
    assert changed == whole


def test_each_leg_resumed_where_the_last_one_ended(runs: Path) -> None:
    events = [json.loads(line) for line in (runs / "changed" / "events.jsonl").read_text().splitlines()]
    starts = [e for e in events if e["event"] in ("start", "resume")]
    assert [(e["strategy"], e["world_size"], e["images"]) for e in starts] == [
        ("ddp", 4, 0), ("zero2", 2, 640), ("zero3", 4, 1280), ("single", 1, 1920),
    ]  # fmt: skip


def test_the_weights_are_no_further_off_than_another_number_of_processes_makes_them(runs: Path) -> None:
    whole = weights(runs / "whole")
    by_processes = max(distance(whole, weights(runs / name)) for name in ("two", "four"))
    assert distance(whole, weights(runs / "changed")) <= max(4 * by_processes, 1e-5)
    start = {n: t for n, t in whole.items() if n.startswith("generator/")}
    assert max(float(t.abs().max()) for t in start.values()) > 0
