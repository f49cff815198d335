"""Whole runs through `accelerate launch`, as a user starts them."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dist_gan import load_generator
from dist_gan.checkpoint import reader
from dist_gan.packing.array_sources import ArraySource
from dist_gan.packing.pack import pack
from tests.conftest import ROOT, environment, launch, launch_command, random_images

TRAIN = ROOT / "train.py"


@pytest.fixture(scope="module")
def shards32(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """400 labelled images of 32x32."""
    folder = tmp_path_factory.mktemp("shards32")
    source = ArraySource(random_images(400, resolution=32), np.arange(400) % 4, class_names=tuple("wxyz"))
    pack(source, str(folder), samples_per_shard=128, workers=1)
    return folder


def events(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]


def outcome(run: Path) -> dict:
    return json.loads((run / "outcome.json").read_text())


def final_state(run: Path) -> tuple[dict[str, torch.Tensor], dict]:
    found = reader.newest(str(run / "checkpoints"))
    assert found.url is not None
    manifest, tensors = reader.read(found.url)
    return tensors, manifest


def assert_same_state(a: Path, b: Path) -> None:
    tensors_a, manifest_a = final_state(a)
    tensors_b, manifest_b = final_state(b)
    assert tensors_a.keys() == tensors_b.keys()
    for name, tensor in tensors_a.items():
        assert torch.equal(tensor, tensors_b[name]), name
    values_a, values_b = manifest_a["values"], manifest_b["values"]
    for values in (values_a, values_b):
        del values["progress"]["seconds"]
    assert values_a == values_b


def article(shards: Path, run: Path, *extra: str) -> list[str]:
    """The article's pair, dropout and BatchNorm included, with frequent checkpoints."""
    return [
        "configs/article-32.yaml", f"data.url={shards}", f"run.dir={run}", "run.images=1600", "run.batch=32",
        "log.every=160", "log.samples=4", "log.samples_every=800", "checkpoint.every=160", *extra,
    ]  # fmt: skip


def test_the_embedded_run_leaves_all_that_is_promised(tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = launch(
        TRAIN, [f"run.dir={run}", "run.images=1280", "log.every=320", "log.samples_every=640", "data.count=1200"]
    )
    assert done.returncode == 0, done.stderr[-3000:]
    end = events(run)[-1]
    assert end["event"] == "end"
    modes = {f"metric/{name}" for name in ("modes_covered", "modes_total", "smallest_share", "valid_fraction")}
    assert end["metrics"].keys() == modes
    assert end["metrics"]["metric/modes_total"] == 12
    assert end["images"] == 1280
    assert outcome(run)["outcome"] == "finished"
    for text in ("samples", "tensorboard --logdir", "checkpoint", "dist-gan sample"):
        assert text in done.stderr
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["images"] for line in lines[:4]] == [320, 640, 960, 1280]
    assert all(line["attempt"] == 1 for line in lines)
    board = EventAccumulator(str(run / "tensorboard"), size_guidance={"images": 0})
    board.Reload()
    assert [e.step for e in board.Scalars("loss/generator")] == [320, 640, 960, 1280]
    assert [e.step for e in board.Images("samples/generated")] == [640, 1280]
    assert board.Images("samples/real")
    assert "config/text_summary" in board.Tags()["tensors"]
    assert (run / "samples" / "generated-000000001280.png").exists()


def test_sampling_and_exporting_a_run_gives_pictures_and_a_generator_of_its_own(shards32: Path, tmp_path: Path) -> None:
    from dist_gan.cli import main

    run = tmp_path / "run"
    extra = ["networks.classes=4", "run.images=160"]
    done = launch(TRAIN, article(shards32, run, *extra))
    assert done.returncode == 0, done.stderr[-3000:]
    assert main(["sample", str(run), str(tmp_path / "grid.png"), "--count", "9"]) == 0
    assert main(["sample", str(run), str(tmp_path / "single"), "--count", "3", "--label", "2"]) == 0
    assert main(["sample", str(run), str(tmp_path / "walk.png"), "--count", "2", "--interpolate", "5"]) == 0
    assert len(list((tmp_path / "single").glob("*.png"))) == 3
    assert main(["sample", str(run), str(tmp_path / "no.png"), "--label", "4"]) == 2
    assert main(["export", str(run), str(tmp_path / "generator")]) == 0
    assert main(["export", str(run), str(tmp_path / "generator")]) == 2
    assert sorted(p.name for p in (tmp_path / "generator").iterdir()) == ["config.json", "model.safetensors"]
    generator = load_generator(str(tmp_path / "generator"))
    latents, labels = torch.randn(5, generator.latent_dim), torch.arange(5) % 4
    images = generator(latents, labels)
    assert images.shape == (5, 3, 32, 32)
    tensors, _ = final_state(run)
    assert torch.equal(generator.state_dict()["dense.0.weight"], tensors["ema/dense.0.weight"])
    assert main(["sample", str(tmp_path / "generator"), str(tmp_path / "grid2.png"), "--count", "9"]) == 0
    assert (tmp_path / "grid.png").read_bytes() == (tmp_path / "grid2.png").read_bytes()
    for place in (run, tmp_path / "generator", shards32, reader.newest(str(run / "checkpoints")).url):
        assert main(["inspect", str(place)]) == 0
    assert main(["verify", str(run)]) == 0


@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_killed_at_a_random_moment_ends_with_the_weights_of_an_undisturbed_one(
    shards32: Path, tmp_path: Path, processes: int
) -> None:
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    done = launch(TRAIN, article(shards32, undisturbed), processes=processes)
    assert done.returncode == 0, done.stderr[-3000:]
    if processes == 2:
        assert len(final_state(undisturbed)[1]["files"]) == 2, "every rank writes its share"

    command = launch_command(TRAIN, article(shards32, killed), processes=processes)
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment(),
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    while not list((killed / "checkpoints").glob("*/COMMIT")):
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(random.uniform(0, 0.6))
    assert process.poll() is None, "the run ended before it could be killed"
    # torchrun starts its workers in sessions of their own: every process of the run is found by its arguments.
    for line in subprocess.run(["pgrep", "-f", str(killed)], capture_output=True, text=True, check=True).stdout.split():
        if int(line) != os.getpid():
            os.kill(int(line), signal.SIGKILL)
    process.wait(timeout=60)
    assert not (killed / "outcome.json").exists(), "a killed run has no outcome"
    resumed_from = max(int(p.parent.name.split("-")[2]) for p in (killed / "checkpoints").glob("*/COMMIT"))
    assert resumed_from < 1600

    done = launch(TRAIN, article(shards32, killed), processes=processes)
    assert done.returncode == 0, done.stderr[-3000:]
    resumed = [e for e in events(killed) if e["event"] == "resume"]
    assert [e["attempt"] for e in resumed] == [2]
    assert resumed[0]["images"] == resumed_from
    assert_same_state(undisturbed, killed)
    images = [json.loads(line)["images"] for line in (killed / "metrics.jsonl").read_text().splitlines()]
    assert images == sorted(set(images)), "each point is seen once"


def test_a_finished_run_started_again_changes_nothing_and_more_images_go_on_from_it(
    shards32: Path, tmp_path: Path
) -> None:
    run, whole = tmp_path / "run", tmp_path / "whole"
    for images in ("640", "640", "1280"):
        done = launch(TRAIN, article(shards32, run, f"run.images={images}"))
        assert done.returncode == 0, done.stderr[-3000:]
    done = launch(TRAIN, article(shards32, whole, "run.images=1280"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same_state(run, whole)


def test_two_processes_train_on_real_photographs_and_webdataset_reads_the_same_shards(
    cifar10_zip: Path, tmp_path: Path
) -> None:
    from dist_gan.cli import main

    shards, run = tmp_path / "cifar10", tmp_path / "run"
    assert main(["pack", str(cifar10_zip), str(shards)]) == 0
    urls = sorted(str(p) for p in shards.glob("*.tar"))
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert len(samples) == 50_000
    assert {bytes(s["cls"]) for s in samples} == {str(k).encode() for k in range(10)}
    done = launch(
        TRAIN,
        [
            "configs/dcgan-cifar10.yaml",
            f"data.url={shards}",
            f"run.dir={run}",
            "run.images=640",
            "checkpoint.every=320",
        ],
        processes=2,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert outcome(run)["images"] == 640
    assert len([e for e in events(run) if e["event"] == "checkpoint"]) == 2


def test_gradients_that_stay_not_finite_end_the_run_with_exit_3_and_the_name_of_the_first_tensor(
    shards32: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    settings = ["objective.kind=least_squares", "d_optim.lr=1e30", "recovery.max_nonfinite=5"]
    done = subprocess.run(
        [sys.executable, str(TRAIN), *article(shards32, run, *settings)],
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 3, done.stderr[-2000:]
    left = outcome(run)
    assert left["outcome"] == "failed"
    assert left["code"] == 3
    assert "5 updates" in left["reason"]
    assert "/stages." in left["reason"] or "/dense." in left["reason"]
    story = [e["event"] for e in events(run)]
    assert "skipped_update" in story
    assert story[-1] == "failure"
    assert done.stdout.count("training failed") == 1
