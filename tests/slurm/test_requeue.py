"""Whether `train.sh` requeues a crashed job whose run is kept in a store: only if its attempt has committed a checkpoint."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.slurm.test_jobs import SCRIPT

OLD, NEW = (f"s3://runs/a/checkpoints/checkpoint-{number}" for number in ("0001-000000000640", "0002-000000001280"))
STARTED = {"event": "start", "images": 0, "attempt": 2, "checkpoint": None}
RESUMED = {"event": "resume", "images": 640, "attempt": 2, "checkpoint": OLD}
COMMITTED = {"event": "checkpoint", "images": 1280, "attempt": 2, "url": NEW}
BEFORE = {"event": "checkpoint", "images": 640, "attempt": 1, "url": OLD}


def last_line(project: Path, folder: Path, *, events: list[dict[str, Any]], commit: str | None) -> str:
    """Last line of `train.sh` for a run that crashes and leaves a log and an outcome; programs stand in for Slurm's."""
    programs, run, left = folder / "bin", folder / "run", folder / "left"
    for made in (programs, left):
        made.mkdir()
    outcome = {"outcome": "crashed", "code": 1, "images": 1300, "commit": commit, "attempt": 2, "reason": "rank 1 died"}
    (left / "outcome.json").write_text(json.dumps(outcome, indent=1) + "\n")
    (left / "attempts.jsonl").write_text(
        '{"attempt": 1, "run": "a", "by": "x"}\n{"attempt": 2, "run": "a", "by": "x"}\n'
    )
    (left / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    for name, text in {
        "scontrol": f'case "$*" in *hostnames*) echo n0 ;; requeue*) : >{folder}/requeued ;; '
        '*) echo "JobId=7 JobState=RUNNING Restarts=0 " ;; esac',
        "getent": ":",
        "srun": f'case "$*" in *train.py*) cp {left}/* {run}/ && exit 1 ;; esac',
    }.items():
        (programs / name).write_text(f"#!/bin/bash\n{text}\n")
        (programs / name).chmod(0o755)
    done = subprocess.run(
        ["bash", SCRIPT, "configs/points.yaml", f"run.dir={run}", "checkpoint.url=s3://runs/a"],
        cwd=project, capture_output=True, text=True, timeout=60, check=False,
        env={"PATH": f"{programs}:{os.environ['PATH']}", "HOME": str(folder), "SLURM_CPUS_ON_NODE": "1", "SLURM_JOB_ID": "7",
             "SLURM_JOB_NODELIST": "n0"},
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    said = done.stdout.splitlines()[-1]
    assert (folder / "requeued").exists() == ("requeued, to go on" in said)
    return said


@pytest.mark.parametrize(
    ("events", "commit"),
    [
        pytest.param([BEFORE, RESUMED, COMMITTED], NEW, id="the log and the outcome name it"),
        pytest.param([BEFORE, RESUMED], NEW, id="the run was lost before the log could name it"),
        pytest.param([STARTED], NEW, id="it is the first of the run"),
        pytest.param([BEFORE, RESUMED, COMMITTED], None, id="no rank could write an outcome of this attempt"),
    ],
)
def test_a_crashed_job_goes_on_from_the_checkpoint_that_its_attempt_committed(
    project: Path, tmp_path: Path, events: list[dict[str, Any]], commit: str | None
) -> None:
    said = last_line(project, tmp_path, events=events, commit=commit)
    assert said == f"dist_gan: requeued, to go on from {NEW.rsplit('/', 1)[1]}"


@pytest.mark.parametrize(
    ("events", "commit"),
    [
        pytest.param([BEFORE, RESUMED], OLD, id="it resumed from the checkpoint of another attempt"),
        pytest.param([BEFORE], OLD, id="it ended before it trained"),
        pytest.param([STARTED], None, id="there is none"),
    ],
)
def test_a_crashed_job_whose_attempt_committed_nothing_is_not_requeued(
    project: Path, tmp_path: Path, events: list[dict[str, Any]], commit: str | None
) -> None:
    said = last_line(project, tmp_path, events=events, commit=commit)
    assert said.startswith("dist_gan: not requeued: no checkpoint has been committed since this start")
