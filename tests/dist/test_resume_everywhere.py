"""Stopped after any number of steps, a run goes on bit for bit: weights, moments, averages, losses, keys."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.resume_ranks import compare
from tests.conftest import ROOT, launch

WORKER = ROOT / "tests" / "dist" / "resume_worker.py"


@pytest.mark.parametrize(("strategy", "processes"), [("single", 1), ("ddp", 3)])
def test_every_stop_resumes_bitwise(small_shards: Path, tmp_path: Path, strategy: str, processes: int) -> None:
    done = launch(WORKER, [str(small_shards), str(tmp_path)], processes=processes, timeout_s=500)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    wrong = json.loads((tmp_path / "wrong.json").read_text())
    assert wrong == [[]] * processes, wrong
    assert len(list(tmp_path.glob("checkpoints-*/*/COMMIT"))) == 20


@pytest.mark.parametrize(("strategy", "processes"), [("ddp", 3), ("ddp", 4), ("zero2", 3)])
def test_new_processes_on_three_and_four_ranks_go_on_bitwise(
    small_shards: Path, tmp_path: Path, strategy: str, processes: int
) -> None:
    """With two ranks a sum has one order only; how the first gradients of a start are summed shows from three on."""
    cases = ["lazy penalties, accumulation", "points", *(["gradients in two orders"] if strategy == "ddp" else [])]
    rows = compare([strategy], processes, shards=small_shards, out=tmp_path / "out", only=cases)
    assert [row["case"] for row in rows] == cases
    for row in rows:
        assert row["tensors"] > 50
        assert row["different_after_stop"] == dict.fromkeys(["2", "4"] if strategy == "ddp" else ["2"], 0), row
        assert (row["different_logs"], row["different_keys"]) == (0, 0), row
