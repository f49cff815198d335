"""The file `outcome.json`: the result of one attempt of a run, for scripts and operators that decide what follows."""

from __future__ import annotations

import fcntl
import json
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from dist_gan import records, storage
from dist_gan.checkpoint import reader
from dist_gan.types import TrainingFailed
from dist_gan.wording import report

OUTCOME = "outcome.json"
REFUSED = "DIST_GAN_REFUSED"
"""Environment variable with the path of the file into which a refused start writes its outcome, for a batch script; a
refused start owns no run folder."""
_RESERVE = ".reserve"
_RESERVED_BYTES = 8192
_LARGEST_BYTES = 2**20


def write_outcome(
    folder: Path,
    outcome: str,
    *,
    code: int,
    images: int = 0,
    reason: str = "",
    attempt: int = 0,
    commit: str | None = None,
) -> None:
    """Writes `outcome.json`: the result of an attempt.

    Raises:
        TrainingFailed: the file cannot be written, not even into the disk space reserved for it.
    """
    data = _outcome_json(outcome, code=code, images=images, reason=reason, attempt=attempt, commit=commit)
    try:
        storage.publish(str(folder / OUTCOME), data)
    except TrainingFailed:
        if not (folder / _RESERVE).exists():
            raise
        release(folder)
        storage.publish(str(folder / OUTCOME), data)


def reserve(folder: Path) -> None:
    """Reserves disk space for `outcome.json`, in case the disk becomes full."""
    storage.publish(str(folder / _RESERVE), os.urandom(_RESERVED_BYTES))


def release(folder: Path) -> None:
    """Releases the disk space reserved for `outcome.json`."""
    with suppress(OSError):
        (folder / _RESERVE).unlink(missing_ok=True)


def _outcome_json(
    outcome: str, *, code: int, images: int = 0, reason: str = "", attempt: int = 0, commit: str | None = None
) -> bytes:
    value: dict[str, Any] = {
        "outcome": outcome,
        "code": code,
        "images": images,
        "commit": commit,
        "attempt": attempt,
        "reason": report(reason),
        "unix_time": round(time.time(), 3),
    }
    return (json.dumps(value, indent=1) + "\n").encode()


def outcome_of(folder: Path, attempt: int) -> dict[str, Any] | None:
    """The outcome written by the given attempt; None if it wrote none, even if another attempt did."""
    try:
        value = json.loads(records.read(str(folder / OUTCOME), limit=_LARGEST_BYTES))
    except (OSError, ValueError, RecursionError, TrainingFailed):
        return None
    return value if isinstance(value, dict) and value.get("attempt") == attempt else None


def newest_commit(folder: Path) -> str | None:
    """URL of the newest committed and not abandoned checkpoint, found by file names alone; None if there is none."""
    with suppress(OSError, TrainingFailed):
        for entry in reader.entries(str(folder / "checkpoints")):
            if entry.is_committed and not entry.is_abandoned:
                return entry.url
    return None


def images_of(commit: str | None) -> int:
    """Number of images seen at a checkpoint, from its name."""
    images = commit.rsplit("-", 1)[-1] if commit else ""
    return int(images) if images.isdecimal() else 0


def refuse(folder: Path | None, *, reason: str) -> None:
    """Writes the outcome of a start that was refused before it owned a run folder.

    The outcome goes into the file named by the environment variable DIST_GAN_REFUSED, if it is set, and into
    `outcome.json` of the run folder if no run has ever begun there. The outcome of an earlier run is not overwritten.

    Args:
        folder: the run's folder; None if no readable one was given.
        reason: the mistake, in one sentence.
    """
    data = _outcome_json("configuration_wrong", code=2, reason=reason)
    with suppress(OSError, TrainingFailed):  # the reason has been printed already
        if told := os.environ.get(REFUSED):
            storage.publish(told, data)
    with suppress(OSError, TrainingFailed):
        if folder is None or not _nobody_has_run_in(folder):
            return
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "run.lock", "a+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _nobody_has_run_in(folder):
                storage.publish(str(folder / OUTCOME), data)


def _nobody_has_run_in(folder: Path) -> bool:
    """True if the folder is absent, or holds only files of refused starts and of a batch script."""
    if not folder.exists():
        return True
    names = {path.name for path in folder.iterdir()}
    return names <= {OUTCOME, "run.lock", "slurm"} and (OUTCOME not in names or outcome_of(folder, 0) is not None)
