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


def start(
    tmp_path: Path, shards: Path, fault: str, *extra: str, processes: int = 2, **more: str
) -> tuple[int, str, dict, float]:
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
        command, cwd=ROOT, env=environment(**more), capture_output=True, text=True, timeout=150, check=False
    )
    ended = time.time()
    fired = out / "fault-fired"
    since = ended - os.path.getmtime(fired) if fired.exists() else 0.0
    left = json.loads((run / "outcome.json").read_text())
    return done.returncode, done.stdout + done.stderr, left, since


def is_last(sentence: str, said: str) -> bool:
    """Whether no traceback comes after a sentence on the terminal."""
    return "Traceback (most recent call last)" not in said[said.rindex(sentence) :]


@pytest.mark.parametrize(
    ("fault", "processes", "words"),
    [
        ("kill", 2, "rank 1 died in: "),
        ("fail", 4, "rank 1 failed in: reading images ("),
        ("stop", 4, "rank 1 has fallen silent in: "),
    ],
)
def test_a_rank_that_is_gone_is_named_and_all_end_though_no_collective_ever_fails(
    tmp_path: Path, small_shards: Path, fault: str, processes: int, words: str
) -> None:
    code, said, left, seconds = start(tmp_path, small_shards, f"{fault}:20", processes=processes, DEAF="1")
    fired = tmp_path / "out" / "fault-fired"
    assert fired.read_text() == fault
    assert code != 0
    assert left["outcome"] == "crashed"
    assert left["attempt"] == 1
    assert left["images"] > 0, "images that were seen, though none was saved"
    assert words in left["reason"], left
    assert said.count(words) == 1, said[-3000:]
    assert is_last(words, said), said[-3000:]
    assert left["unix_time"] - os.path.getmtime(fired) < 20
    assert seconds < 30, seconds
    assert not subprocess.run(["pgrep", "-f", f"run.dir={tmp_path}/"], capture_output=True, check=False).stdout


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
        ("refused", "rank 1: 1 mistake in the configuration"),
    ],
)
def test_a_rank_with_other_settings_code_or_packages_or_none_that_can_be_read_is_refused(
    tmp_path: Path, small_shards: Path, fault: str, text: str
) -> None:
    began = time.monotonic()
    code, said, left, _ = start(tmp_path, small_shards, fault)
    assert time.monotonic() - began < 60
    assert code != 0
    assert is_last(text, said)
    assert left["outcome"] == "configuration_wrong"
    assert left["code"] == 2
    assert text in left["reason"]
    assert said.count(text) == 1
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_an_exception_while_one_rank_is_built_ends_all_and_replaces_an_older_outcome(
    tmp_path: Path, small_shards: Path
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "outcome.json").write_text(json.dumps({"outcome": "finished", "code": 0, "attempt": 0}))
    code, said, left, _ = start(tmp_path, small_shards, "build")
    assert code != 0
    assert left["outcome"] == "crashed"
    assert left["attempt"] == 1
    assert "rank 1 failed in: an agreement of all ranks" in left["reason"]
    assert "'NoneType' object is not callable" in left["reason"]
    assert said.count("dist_gan: rank 1 failed") == 1
    assert is_last("dist_gan: rank 1 failed", said)
