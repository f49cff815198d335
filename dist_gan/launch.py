"""One process of a run from its first check to its exit code and `outcome.json`."""

from __future__ import annotations

import os
import time
import traceback
from pathlib import Path

from dist_gan.config import RunConfig
from dist_gan.data.embedded import prepare_data
from dist_gan.run_folder import OUTCOME, RunFolder, refuse, write_outcome
from dist_gan.runtime import Runtime
from dist_gan.trainer import build, fit
from dist_gan.types import TrainingFailed, UserError

FINISHED, CONFIGURATION_WRONG, FAILED, CRASHED = 0, 2, 3, 1


def run(config: RunConfig) -> int:
    """Trains, and returns the exit code: 0 finished, 2 the configuration is wrong, 3 training failed.

    Rank 0 makes every check that needs no other rank before there is a process group; the others wait for it in the
    rendezvous, and the launcher ends them if it leaves. Anything unforeseen is raised, for a traceback and exit 1.
    """
    folder: RunFolder | None = None
    if int(os.environ.get("RANK", "0")) == 0:
        try:
            folder = RunFolder(config)
            prepare_data(config)
        except UserError as error:
            return _refused(config, folder, str(error))
        except TrainingFailed as error:
            return _leave(config, folder, "failed", code=FAILED, reason=str(error))
    runtime = None
    try:
        try:
            runtime = Runtime(config.runtime)
        except UserError as error:
            return _refused(config, folder, str(error)) if folder else CONFIGURATION_WRONG
        attempt = runtime.share_json(folder.attempt if folder else None)
        parts = build(config, runtime, attempt=attempt)
        try:
            images = fit(parts)
        finally:
            parts.tracker.close()
            parts.state.stream.close()
        if folder is not None:
            folder.write_outcome("finished", code=FINISHED, images=images, reason="")
        runtime.barrier()
        return FINISHED
    except UserError as error:
        return _leave(config, folder, "configuration_wrong", code=CONFIGURATION_WRONG, reason=str(error))
    except TrainingFailed as error:
        return _leave(config, folder, "failed", code=FAILED, reason=str(error))
    except Exception as error:
        if (Path(config.run.dir) / OUTCOME).exists():
            return CRASHED  # another rank has said what happened; this one only lost the connection
        traceback.print_exc()
        return _leave(config, folder, "crashed", code=CRASHED, reason=f"{type(error).__name__}: {error}")
    finally:
        if runtime is not None:
            runtime.close()
        if folder is not None:
            folder.close()


def _refused(config: RunConfig, folder: RunFolder | None, reason: str) -> int:
    """A start that ended before there were other ranks."""
    if folder is not None:
        return _leave(config, folder, "configuration_wrong", code=CONFIGURATION_WRONG, reason=reason)
    say(reason)
    refuse(Path(config.run.dir), reason=reason)
    return CONFIGURATION_WRONG


def _leave(config: RunConfig, folder: RunFolder | None, outcome: str, *, code: int, reason: str) -> int:
    """Says once, over all ranks, why the run ended.

    What all ranks agree on is for rank 0 to say; what only this rank knows is said here when rank 0 stays silent.
    """
    path = Path(config.run.dir) / OUTCOME
    if folder is None:
        deadline = time.monotonic() + 5.0
        while not path.exists() and time.monotonic() < deadline:
            time.sleep(0.1)
    if path.exists():
        return code
    say(reason)
    try:
        if folder is not None:
            folder.write_outcome(outcome, code=code, images=0, reason=reason)
        else:
            write_outcome(Path(config.run.dir), outcome, code=code, reason=reason)
    except TrainingFailed as error:
        say(f"outcome.json could not be written: {error}")
    return code


def say(reason: str) -> None:
    """The one message of a run that did not start or did not finish."""
    print(f"dist_gan: {reason}", flush=True)
