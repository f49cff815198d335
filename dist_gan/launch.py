"""One process of a run from its first check to its exit code and `outcome.json`."""

from __future__ import annotations

import errno
import os
import time
import traceback
from pathlib import Path

import torch

from dist_gan import storage
from dist_gan.config import RunConfig
from dist_gan.data.embedded import prepare_data
from dist_gan.run_folder import OUTCOME, RunFolder, refuse, write_outcome
from dist_gan.runtime import Runtime, read_launch
from dist_gan.trainer import build, fit
from dist_gan.types import TrainingFailed, UserError

FINISHED, CRASHED, CONFIGURATION_WRONG, FAILED = 0, 1, 2, 3
_DISK_TROUBLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)


def run(config: RunConfig) -> int:
    """Trains, and returns the exit code: 0 finished, 2 the configuration is wrong, 3 training failed, 1 a crash.

    Rank 0 makes every check that needs no other rank before there is a process group; the others wait for it in the
    rendezvous, and the launcher ends them if it leaves.
    """
    folder: RunFolder | None = None
    runtime: Runtime | None = None
    try:
        if int(os.environ.get("RANK", "0")) == 0:
            try:
                launched = read_launch(config, os.environ, gpus=torch.cuda.device_count())
                folder = RunFolder(config)
            except UserError as error:
                say(str(error))
                refuse(Path(config.run.dir), reason=str(error))
                return CONFIGURATION_WRONG
            prepare_data(config)
        else:
            launched = read_launch(config, os.environ, gpus=torch.cuda.device_count())
        runtime = Runtime(config.runtime, launched)
        images = _train(config, runtime, folder)
        if folder is not None:
            folder.write_outcome("finished", code=FINISHED, images=images, reason="")
        runtime.barrier()
        return FINISHED
    except UserError as error:
        return _leave(config, folder, "configuration_wrong", code=CONFIGURATION_WRONG, reason=str(error))
    except TrainingFailed as error:
        return _leave(config, folder, "failed", code=FAILED, reason=str(error))
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _DISK_TROUBLE:
            reason = f"cannot write {error.filename or config.run.dir}: {storage.why(error)}"
            return _leave(config, folder, "failed", code=FAILED, reason=reason)
        if _outcome(config).exists():
            return CRASHED  # another rank has said what happened; this one only lost the connection
        traceback.print_exc()
        return _leave(config, folder, "crashed", code=CRASHED, reason=f"{type(error).__name__}: {error}")
    finally:
        if runtime is not None:
            runtime.close()
        if folder is not None:
            folder.close()


def _train(config: RunConfig, runtime: Runtime, folder: RunFolder | None) -> int:
    attempt = runtime.share_json(folder.attempt if folder else None)
    parts = build(config, runtime, attempt=attempt)
    try:
        return fit(parts)
    finally:
        parts.tracker.close()
        parts.state.stream.close()


def _outcome(config: RunConfig) -> Path:
    return Path(config.run.dir) / OUTCOME


def _leave(config: RunConfig, folder: RunFolder | None, outcome: str, *, code: int, reason: str) -> int:
    """Says once, over all ranks, why the run ended.

    What all ranks agree on is for rank 0 to say; what only this rank knows is said here when rank 0 stays silent.
    """
    if folder is None:
        deadline = time.monotonic() + 5.0
        while not _outcome(config).exists() and time.monotonic() < deadline:
            time.sleep(0.1)
    if _outcome(config).exists():
        return code
    say(reason)
    try:
        attempt = folder.attempt if folder is not None else 0
        write_outcome(Path(config.run.dir), outcome, code=code, reason=reason, attempt=attempt)
    except TrainingFailed as error:
        say(f"outcome.json could not be written: {error}")
    return code


def say(reason: str) -> None:
    """The one message of a run that did not start or did not finish."""
    print(f"dist_gan: {reason}", flush=True)
