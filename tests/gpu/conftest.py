"""Tests that need a GPU: `pytest tests/gpu`, under ten minutes on one card. Elsewhere each is skipped with its reason."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT, environment, free_port

GPUS = torch.cuda.device_count()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips by a mark and not in a fixture, so that nothing is trained for a test that is going to be skipped."""
    if GPUS == 0:
        here = Path(__file__).parent
        for item in items:
            if here in item.path.parents:
                item.add_marker(pytest.mark.skip(reason="no GPU: torch finds no CUDA device here"))


@pytest.fixture
def two_gpus() -> None:
    if GPUS < 2:
        pytest.skip("no GPU: this test needs two of them, since NCCL refuses two ranks on one card")


def gpu_environment() -> dict[str, str]:
    """The environment of a launch that sees the GPUs which this process sees."""
    kept = environment()
    del kept["CUDA_VISIBLE_DEVICES"]
    return kept | {k: v for k, v in os.environ.items() if k == "CUDA_VISIBLE_DEVICES"}


def launch_command(
    script: Path, arguments: Sequence[str], *, processes: int, config_file: Path | None = None
) -> list[str]:
    """Processes on GPUs: torchrun, which makes DDP of a single one too, or accelerate with a launch file."""
    port = str(free_port())
    if config_file is None:
        start = [sys.executable, "-m", "torch.distributed.run", "--nnodes=1", f"--nproc_per_node={processes}"]
        start += ["--master_addr=127.0.0.1", f"--master_port={port}"]
    else:
        start = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config_file)]
        start += ["--num_processes", str(processes), "--main_process_port", port]
    return [*start, str(script), *arguments]


def run(command: Sequence[str], *, timeout_s: float = 300, on_gpu: bool = True) -> subprocess.CompletedProcess[str]:
    """Runs a command from the checkout, with its GPUs or without."""
    return subprocess.run(
        command,
        cwd=ROOT,
        env=gpu_environment() if on_gpu else environment(),
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
