"""Stopped after any number of steps, a run goes on bit for bit: weights, moments, averages, losses, keys."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.parity import launch_file
from tests.conftest import ROOT, launch

WORKER = ROOT / "tests" / "dist" / "resume_worker.py"


@pytest.mark.parametrize(("strategy", "processes"), [("single", 1), ("ddp", 2), ("zero2", 2)])
def test_every_stop_resumes_bitwise(small_shards: Path, tmp_path: Path, strategy: str, processes: int) -> None:
    config_file = None if strategy == "single" else launch_file(strategy, tmp_path)
    done = launch(
        WORKER, [str(small_shards), str(tmp_path)], processes=processes, config_file=config_file, timeout_s=500
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    wrong = json.loads((tmp_path / "wrong.json").read_text())
    assert wrong == [[]] * processes, wrong
    assert len(list(tmp_path.glob("checkpoints-*/*/COMMIT"))) == 20
