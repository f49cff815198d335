"""A rank that dies, hangs, goes astray or is a stranger: the others end in time, and one message names it."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT, environment, launch_command

SCRIPT = ROOT / "tests" / "dist" / "instrumented.py"
STEP_TIMEOUT_S = 10


def start(tmp_path: Path, shards: Path, fault: str, *extra: str, processes: int = 2) -> tuple[int, str, dict, float]:
    """Trains with a fault on rank 1; exit code, what was said, outcome.json and the seconds since the fault."""
    run, out = tmp_path / "run", tmp_path / "out"
    overrides = [
        f"data.url={shards}", f"run.dir={run}", "run.images=64k", f"run.batch={12 * processes}", "networks.resolution=16",
        "networks.g_width=4", "networks.d_width=4", "networks.latent_dim=8", "log.samples=4", "log.every=3200",
        f"runtime.step_timeout_s={STEP_TIMEOUT_S}", "runtime.threads=1", *extra,
    ]  # fmt: skip
    command = launch_command(
        SCRIPT, [str(out), fault, "configs/dcgan-cifar10.yaml", *overrides], processes=processes
    )
    done = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=150, check=False
    )
    ended = time.time()
    fired = out / "fault-fired"
    since = ended - os.path.getmtime(fired) if fired.exists() else 0.0
    left = json.loads((run / "outcome.json").read_text())
    return done.returncode, done.stdout + done.stderr, left, since


@pytest.mark.parametrize("processes", [2, 3])
def test_a_killed_rank_is_named_and_the_others_end_at_once(tmp_path: Path, small_shards: Path, processes: int) -> None:
    code, said, left, seconds = start(tmp_path, small_shards, "kill:20", processes=processes)
    assert (tmp_path / "out" / "fault-fired").read_text() == "kill"
    assert code != 0
    assert left["outcome"] == "crashed"
    assert "rank 1 died in: " in left["reason"], left
    assert "start the same command again" in left["reason"]
    assert said.count("rank 1 died") == 1, said[-3000:]
    assert seconds < 25, seconds


def test_a_hanging_rank_is_named_with_its_place_within_the_step_timeout(tmp_path: Path, small_shards: Path) -> None:
    code, said, left, seconds = start(tmp_path, small_shards, "hang:20")
    assert (tmp_path / "out" / "fault-fired").read_text() == "hang"
    assert code != 0
    assert left["outcome"] == "crashed"
    assert "rank 1 hangs in: reading images" in left["reason"], left
    assert said.count("rank 1 hangs") == 1, said[-3000:]
    assert "time.sleep" in said or "next_batch" in said, "the stack of the one that hangs"
    assert STEP_TIMEOUT_S <= seconds < STEP_TIMEOUT_S + 25, seconds


@pytest.mark.parametrize("how", [["checkpoint.every=1600"], ["runtime.compare_every=960", "checkpoint.every=64k"]])
def test_a_replica_that_goes_astray_is_named_by_tensor_and_rank(
    tmp_path: Path, small_shards: Path, how: list[str]
) -> None:
    code, said, left, _ = start(tmp_path, small_shards, "corrupt:20", *how, processes=3)
    assert (tmp_path / "out" / "fault-fired").read_text() == "corrupt"
    assert code != 0
    assert left["code"] == 3
    assert "the replicas differ: tensor generator/weights/stages." in left["reason"]
    assert "on rank 1 is" in left["reason"]
    assert said.count("the replicas differ") == 1


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        ("settings", "the settings of rank 1 differ from rank 0's"),
        ("code", "the code of dist_gan of rank 1 differ from rank 0's (0123456789abcdef and "),
        ("package", "accelerate of rank 1 differ from rank 0's (0.0.1 and "),
    ],
)
def test_a_rank_with_other_settings_code_or_packages_is_refused(
    tmp_path: Path, small_shards: Path, fault: str, text: str
) -> None:
    code, said, left, _ = start(tmp_path, small_shards, fault)
    assert code != 0
    assert left["outcome"] == "configuration_wrong"
    assert left["code"] == 2
    assert text in left["reason"]
    assert said.count(text) == 1
    assert not (tmp_path / "run" / "checkpoints").exists()
