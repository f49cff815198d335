"""The file `outcome.json`: result of one attempt (start) of a run, by which scripts and operators decide what to do."""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from dist_gan import attempts, records, storage
from dist_gan.types import TrainingFailed, UserError
from dist_gan.wording import report

OUTCOME = "outcome.json"
REFUSED = "DIST_GAN_REFUSED"
"""Environment variable with the path of a file into which a refused start writes its outcome, for a batch script.

A refused start owns no run folder, so it cannot write `outcome.json` there.
"""
_RESERVE = ".reserve"
_RESERVED_BYTES = 8192
_LARGEST_BYTES = 2**20


def write_outcome(
    folder: str,
    outcome: str,
    *,
    code: int,
    images: int = 0,
    reason: str = "",
    attempt: int = 0,
    commit: str | None = None,
) -> None:
    """Writes `outcome.json`, the result of an attempt, into a folder on a disk or in a store.

    Args:
        folder: URL of the folder.
        outcome: the result in one word, such as `finished`.
        code: exit code.
        images: number of images that the run has seen.
        reason: one sentence.
        attempt: number of the attempt; 0 for a refused start.
        commit: URL of the newest checkpoint; None without a checkpoint.

    Raises:
        TrainingFailed: the file cannot be written, not even into the disk space reserved for it.
    """
    data = _outcome_json(outcome, code=code, images=images, reason=reason, attempt=attempt, commit=commit)
    try:
        storage.publish(storage.join(folder, OUTCOME), data)
    except TrainingFailed:
        local = storage.local_path(folder)
        if local is None or not (local / _RESERVE).exists():
            raise
        release(local)
        storage.publish(storage.join(folder, OUTCOME), data)


def reserve(folder: Path) -> None:
    """Reserves disk space for `outcome.json` by a file in the run's folder, in case the disk becomes full."""
    storage.publish(str(folder / _RESERVE), os.urandom(_RESERVED_BYTES))


def release(folder: Path) -> None:
    """Releases the disk space that was reserved for `outcome.json`."""
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


def outcome_of(folder: str, attempt: int) -> dict[str, Any] | None:
    """Returns the outcome that an attempt has written into a folder; None if there is none of that attempt.

    Args:
        folder: URL of the folder.
        attempt: number of the attempt.
    """
    try:
        value = json.loads(records.read(storage.join(folder, OUTCOME), limit=_LARGEST_BYTES))
    except (OSError, ValueError, RecursionError, TrainingFailed):
        return None
    return value if isinstance(value, dict) and value.get("attempt") == attempt else None


def refuse(folder: Path | None, outcome: str, *, code: int, reason: str) -> None:
    """Writes the outcome of a start that was refused, or failed, before it owned a run folder.

    The outcome is written into the file that the environment variable DIST_GAN_REFUSED names, if the variable is set,
    and into `outcome.json` of the run folder if no run has ever begun there. The outcome of an earlier run is kept.

    Args:
        folder: the run's folder; None if no readable one was given.
        outcome: the result in one word, such as `failed`.
        code: exit code.
        reason: one sentence.
    """
    data = _outcome_json(outcome, code=code, reason=reason)
    with suppress(OSError, TrainingFailed):  # the reason has been printed already
        if told := os.environ.get(REFUSED):
            storage.publish(told, data)
    with suppress(OSError, TrainingFailed, UserError):
        if folder is None or not _nobody_has_run_in(folder):
            return
        with attempts.lock(folder):
            if _nobody_has_run_in(folder):
                storage.publish(str(folder / OUTCOME), data)


def _nobody_has_run_in(folder: Path) -> bool:
    """Returns True if the folder is absent, or holds only files of refused starts and of a batch script."""
    if not folder.exists():
        return True
    names = {path.name for path in folder.iterdir()}
    if not names <= {OUTCOME, attempts.ATTEMPTS, attempts.OLD_LOCK, "slurm"} or attempts.read(folder).last:
        return False
    return OUTCOME not in names or outcome_of(str(folder), 0) is not None
