"""Launch files as users have them: those that come along work without a GPU, and those that cannot be honoured end soon."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT, environment, launch, launch_command

TRAIN = ROOT / "train.py"
ZERO = yaml.safe_load((ROOT / "launch" / "zero2.yaml").read_text())


def small(shards: Path, run: Path, *extra: str) -> list[str]:
    return [
        "configs/dcgan-cifar10.yaml", f"data.url={shards}", f"run.dir={run}", "run.images=320", "run.batch=32",
        "networks.resolution=16", "networks.g_width=4", "networks.d_width=4", "networks.latent_dim=8", "log.samples=4",
        "runtime.threads=1", *extra,
    ]  # fmt: skip


def refused(shards: Path, tmp_path: Path, launch_file: dict, *extra: str) -> str:
    """Launches two processes that have to refuse; the one message, after the checks that hold for every refusal."""
    file, run = tmp_path / "launch.yaml", tmp_path / "run"
    file.write_text(yaml.safe_dump(launch_file))
    began = time.monotonic()
    done = subprocess.run(
        launch_command(TRAIN, small(shards, run, *extra), processes=2, config_file=file),
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert time.monotonic() - began < 60
    said = done.stdout + done.stderr
    assert said.count("dist_gan: ") == 1, said[-3000:]
    left = json.loads((run / "outcome.json").read_text())
    assert left["code"] == 2
    assert left["reason"] in said
    assert not (run / "checkpoints").exists()
    return str(left["reason"])


@pytest.mark.parametrize("name", ["zero1.yaml", "zero3-offload.yaml"])
def test_a_launch_file_for_zero_trains_on_the_cpu_as_it_is(name: str, small_shards: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = launch(
        TRAIN, small(small_shards, run), processes=2, config_file=ROOT / "launch" / name, timeout_s=200
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    start = json.loads((run / "events.jsonl").read_text().splitlines()[0])
    assert start["strategy"] == name.removesuffix(".yaml").replace("-", "+")
    assert start["precision"] == "bf16", "what the launch file says"
    assert json.loads((run / "outcome.json").read_text())["images"] == 320


def test_a_launch_file_for_gpus_says_that_there_are_none_or_refuses_where_they_are_asked_for(
    small_shards: Path, tmp_path: Path
) -> None:
    file = ROOT / "launch" / "one-node.yaml"
    done = launch(TRAIN, small(small_shards, tmp_path / "cpu"), processes=2, config_file=file)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert "attempt 1: from scratch; 2 processes on cpu, ddp, bf16" in done.stderr
    asked = refused(small_shards, tmp_path, yaml.safe_load(file.read_text()), "runtime.device=cuda")
    assert "runtime.device: 'cuda', and torch finds no GPU here" in asked


def test_clipping_in_the_launch_file_is_sent_to_the_recipe(small_shards: Path, tmp_path: Path) -> None:
    file = ZERO | {"deepspeed_config": ZERO["deepspeed_config"] | {"gradient_clipping": 1.0}}
    assert "gradient_clipping: 1.0 in the launch file" in refused(small_shards, tmp_path, file)


def test_a_deepspeed_file_with_its_own_optimizer_is_refused(small_shards: Path, tmp_path: Path) -> None:
    settings = tmp_path / "deepspeed.json"
    settings.write_text(json.dumps({"zero_optimization": {"stage": 2}, "optimizer": {"type": "AdamW"}}))
    file = ZERO | {"deepspeed_config": {"deepspeed_config_file": str(settings)}}
    file.pop("mixed_precision")
    assert "the optimizers belong to the recipe" in refused(small_shards, tmp_path, file)


def test_two_words_on_precision_are_one_too_many(small_shards: Path, tmp_path: Path) -> None:
    reason = refused(small_shards, tmp_path, ZERO, "runtime.precision=fp32")
    assert "runtime.precision: 'fp32' contradicts mixed_precision 'bf16' of the launch file" in reason


def test_a_static_graph_is_refused_with_its_reason(small_shards: Path, tmp_path: Path) -> None:
    cpu = yaml.safe_load((ROOT / "launch" / "cpu.yaml").read_text())
    reason = refused(small_shards, tmp_path, cpu, "runtime.static_graph=true")
    assert "runtime.static_graph: unknown key" in reason
    assert "the gradient of a penalty is not reduced" in reason


def test_more_processes_than_lanes_are_refused(small_shards: Path, tmp_path: Path) -> None:
    cpu = yaml.safe_load((ROOT / "launch" / "cpu.yaml").read_text())
    assert "data.lanes: 1 lanes cannot be dealt to 2 processes" in refused(small_shards, tmp_path, cpu, "data.lanes=1")
