"""Launches on GPUs: wrappers over NCCL, a resume that is bitwise, processes that are killed or fail."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.parity import compare
from tests.conftest import ROOT
from tests.gpu.conftest import GPUS, gpu_environment, launch_command, run
from tests.scenarios.test_runs import assert_same_state, events, outcome

WORKER = ROOT / "tests" / "gpu" / "wrapped_worker.py"
FAULTY = ROOT / "tests" / "dist" / "instrumented.py"
CASES = ("r1+r2/plain", "r1/lazy", "r1+r2/accumulated", "none/several")
PROCESSES = min(2, max(1, GPUS))
"""One card is enough for the wrappers; with two, gradients have a way to go."""
ZERO2 = """
compute_environment: LOCAL_MACHINE
distributed_type: DEEPSPEED
deepspeed_config: {deepspeed_multinode_launcher: standard, zero_stage: 2, zero3_init_flag: false}
num_machines: 1
machine_rank: 0
num_processes: 1
mixed_precision: 'no'
"""


@pytest.fixture(scope="module")
def alone(small_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one GPU without a wrapper makes of the cases."""
    out = tmp_path_factory.mktemp("alone") / "out"
    arguments = [str(small_shards), str(out), "fp32", *(word for name in CASES for word in ("--only", name))]
    done = run([sys.executable, str(ROOT / "benchmarks" / "parity_worker.py"), *arguments])
    assert done.returncode == 0, done.stderr[-3000:]
    return out


@pytest.mark.parametrize(("strategy", "wrapper"), [("ddp", "DistributedDataParallel"), ("zero2", "DeepSpeedEngine")])
def test_ddp_and_zero_over_nccl_give_the_weights_of_a_lone_gpu(
    strategy: str, wrapper: str, alone: Path, small_shards: Path, tmp_path: Path
) -> None:
    file = None
    if strategy == "zero2":
        file = tmp_path / "zero2.yaml"
        file.write_text(ZERO2)
    arguments = [str(small_shards), str(tmp_path / "out"), *CASES]
    done = run(launch_command(WORKER, arguments, processes=PROCESSES, config_file=file))
    assert done.returncode == 0, done.stderr[-3000:]
    facts = json.loads((tmp_path / "out" / "facts.json").read_text())
    assert facts["wrappers"] == [wrapper, wrapper]
    assert facts["device"] == "cuda"
    assert "nccl" in facts["backend"]
    for name in CASES:
        row = compare(alone, tmp_path / "out", name)
        assert row["max_relative_error"] <= 2e-2, (name, row)
        assert row["smallest_movement"] >= 1e-3, (name, row)


def training(shards: Path, folder: Path, *extra: str) -> list[str]:
    """Settings of a small run with batch normalisation and penalties, deterministic."""
    return [
        "configs/dcgan-cifar10.yaml", f"data.url={shards}", f"run.dir={folder}", "run.images=1920", "run.batch=32",
        "networks.resolution=16", "networks.g_width=8", "networks.d_width=8", "networks.g_norm=batch", "log.samples=4",
        "log.every=320", "checkpoint.every=320", "runtime.deterministic=true", *extra,
    ]  # fmt: skip


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_killed_run_goes_on_to_the_very_weights_of_one_that_was_not(
    precision: str, small_shards: Path, tmp_path: Path
) -> None:
    settings = f"runtime.precision={precision}"
    start = [sys.executable, str(ROOT / "train.py")]
    whole = run([*start, *training(small_shards, tmp_path / "whole", settings)])
    assert whole.returncode == 0, whole.stderr[-3000:]
    folder = tmp_path / "killed"
    command = [*start, *training(small_shards, folder, settings)]
    process = subprocess.Popen(
        command, cwd=ROOT, env=gpu_environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 120
    while not list((folder / "checkpoints").glob("*/COMMIT")) and time.monotonic() < deadline:
        assert process.poll() is None, process.stderr and process.stderr.read()[-3000:]
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    again = run(command)
    assert again.returncode == 0, again.stderr[-3000:]
    assert [e["event"] for e in events(folder)].count("resume") == 1
    assert_same_state(tmp_path / "whole", folder)


def faulty(tmp_path: Path, shards: Path, fault: str, *, processes: int, rank: int) -> tuple[str, dict, float]:
    """A run with a fault on one rank; what was said, its outcome, and the seconds from the fault to its end."""
    arguments = [
        str(tmp_path / "out"), f"{fault}:20", *training(shards, tmp_path / "run", "run.images=64k", "run.batch=48"),
        "runtime.step_timeout_s=60",
    ]  # fmt: skip
    done = subprocess.run(
        launch_command(FAULTY, arguments, processes=processes),
        cwd=ROOT, env=gpu_environment() | {"FAULTY_RANK": str(rank)}, capture_output=True, text=True, timeout=200,
        check=False,
    )  # fmt: skip
    ended, fired = time.time(), tmp_path / "out" / "fault-fired"
    assert done.returncode != 0
    assert fired.read_text() == fault
    return done.stdout + done.stderr, outcome(tmp_path / "run"), ended - os.path.getmtime(fired)


def test_a_process_that_fails_in_its_own_code_leaves_its_outcome_and_does_not_hang(
    small_shards: Path, tmp_path: Path
) -> None:
    said, left, seconds = faulty(tmp_path, small_shards, "fail", processes=1, rank=0)
    assert left["outcome"] == "crashed"
    assert "LookupError: a stage of its own" in left["reason"]
    assert left["images"] > 0
    assert "LookupError: a stage of its own" in said
    assert seconds < 30, seconds


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize(
    ("fault", "words"),
    [("kill", "rank 1 died in: "), ("fail", "rank 1 failed in: "), ("stop", "rank 1 has fallen silent")],
)
def test_a_rank_that_is_gone_over_nccl_is_named_within_seconds(
    fault: str, words: str, small_shards: Path, tmp_path: Path
) -> None:
    said, left, seconds = faulty(tmp_path, small_shards, fault, processes=2, rank=1)
    assert left["outcome"] == "crashed"
    assert words in left["reason"], left
    assert said.count(words) == 1, said[-3000:]
    assert seconds < 30, seconds
