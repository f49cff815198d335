"""Killed at every moment of a save, a resume and a rollback, the run ends with the weights of an undisturbed one."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dist_gan.checkpoint import reader
from tests.conftest import ROOT, environment, launch_command
from tests.scenarios.test_runs import assert_same_state, events, outcome

KILLER = ROOT / "tests" / "dist" / "killer.py"
POINTS = (
    "before-staging", "mid-file", "after-files", "before-commit", "after-commit", "in-retention", "in-resume",
)  # fmt: skip
ROLLBACK_POINTS = ("rollback-after-intent", "rollback-before-load", "rollback-before-commit", "rollback-before-end")


def start(out: Path, point: str, shards: Path, run: Path, *extra: str, processes: int, **more: str) -> int:
    """One start of a small run; the exit code of the process, or of the launcher above it."""
    arguments = [
        str(out), point, "configs/dcgan-cifar10.yaml", f"data.url={shards}", f"run.dir={run}", "run.images=960",
        "run.batch=32", "networks.resolution=16", "networks.g_width=4", "networks.d_width=4", "networks.latent_dim=8",
        "log.samples=4", "log.every=160", "checkpoint.every=160", "checkpoint.keep=2", "runtime.threads=1", *extra,
    ]  # fmt: skip
    command = (
        [sys.executable, str(KILLER), *arguments]
        if processes == 1
        else launch_command(KILLER, arguments, processes=processes)
    )
    done = subprocess.run(
        command, cwd=ROOT, env=environment(**more), capture_output=True, text=True, timeout=120, check=False
    )
    return done.returncode


@pytest.fixture(scope="module")
def undisturbed(small_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The run that nobody killed, by one process and by two."""
    work = tmp_path_factory.mktemp("undisturbed")
    for processes in (1, 2):
        code = start(work / "out", "never", small_shards, work / str(processes), processes=processes)
        assert code == 0, outcome(work / str(processes))
    return {processes: work / str(processes) for processes in (1, 2)}


@pytest.mark.parametrize(
    ("processes", "everybody", "point"),
    [(1, "", point) for point in POINTS] + [(2, "1", point) for point in POINTS] + [(2, "", "mid-file")],
)
def test_a_run_killed_while_saving_or_resuming_loses_nothing(
    undisturbed: dict[int, Path], small_shards: Path, tmp_path: Path, point: str, processes: int, everybody: str
) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    more = {"KILL_ALL": everybody} if everybody else {}
    if point == "in-resume":
        assert start(out, "never", small_shards, run, "run.images=480", processes=processes) == 0
    code = start(out, point, small_shards, run, processes=processes, **more)
    assert (out / "fired").read_text() == point
    assert code == (-signal.SIGKILL if processes == 1 else 1)
    found = reader.newest(str(run / "checkpoints"))
    assert found.url is not None, "at every instant there is a valid checkpoint"
    assert not found.damaged, "nothing half-written is taken for a checkpoint"
    assert start(out, point, small_shards, run, processes=processes) == 0, outcome(run)
    assert outcome(run)["outcome"] == "finished"
    resumed = [e for e in events(run) if e["event"] == "resume"]
    assert resumed[-1]["checkpoint"] == found.url
    assert_same_state(undisturbed[processes], run)
    kept = reader.list_checkpoints(str(run / "checkpoints"))
    assert [s for s, _ in kept] == sorted({s for s, _ in kept})
    serials = [json.loads(p.read_text())["serial"] for p in sorted((run / "checkpoints").glob("*/manifest.json"))]
    assert serials == sorted(serials)


PERSISTENT = ("recovery.max_nonfinite=4", "recovery.window=20", "run.images=3200")


@pytest.mark.parametrize("point", ["never", *ROLLBACK_POINTS])
def test_gradients_that_stay_not_finite_roll_back_within_the_budget_and_end_with_exit_3(
    small_shards: Path, tmp_path: Path, point: str
) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    # Two draws a step: from draw 50 on, at 800 images, every update of D is skipped.
    code = start(out, f"{point}:50", small_shards, run, *PERSISTENT, processes=1)
    if point != "never":
        assert (out / "fired").read_text() == point
        assert code == -signal.SIGKILL
        assert reader.newest(str(run / "checkpoints")).url is not None
        code = start(out, f"{point}:50", small_shards, run, *PERSISTENT, processes=1)
    assert code == 3
    left = outcome(run)
    assert left["code"] == 3
    assert "4 of the last" in left["reason"]
    assert "the run has gone back 2 times (recovery.rollbacks)" in left["reason"]
    story = events(run)
    names = [e["event"] for e in story]
    # Killed before it could say so, the first rollback is told of in the notes of the start that finished it.
    cut_off = point in ("rollback-after-intent", "rollback-before-load")
    assert names.count("rollback") == (1 if cut_off else 2), names
    assert any("finished a rollback" in str(e.get("notes")) for e in story) == (point not in ("never", "rollback-before-end"))
    assert names[-1] == "failure"
    assert not (run / "checkpoints" / "rollback.json").exists()
    abandoned = {p.parent.name for p in (run / "checkpoints").glob("*/ABANDONED")}
    newest = reader.newest(str(run / "checkpoints")).url
    assert newest is not None
    assert Path(newest).name not in abandoned
    assert reader.read_manifest(newest)["values"]["recovery"]["rollbacks"] == 2
    images = [json.loads(line)["images"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert images == sorted(set(images)), "each point is seen once"


def test_a_crash_loop_ends_with_exit_3(small_shards: Path, tmp_path: Path) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    for _ in range(3):
        (out / "fired").unlink(missing_ok=True)
        killed = start(out, "first-save", small_shards, run, "recovery.max_restarts=3", processes=1)
        assert killed == -signal.SIGKILL
    assert start(out, "never", small_shards, run, "recovery.max_restarts=3", processes=1) == 3
    assert "3 attempts in a row began at 0 images and none reached a new checkpoint" in outcome(run)["reason"]
    assert start(out, "never", small_shards, run, "recovery.max_restarts=4", processes=1) == 0
    for _ in range(4):  # a finished run may be started again as often as one likes
        assert start(out, "never", small_shards, run, "recovery.max_restarts=2", processes=1) == 0
