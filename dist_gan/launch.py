"""One process of a run from its first check to its exit code and `outcome.json`."""

from __future__ import annotations

import errno
import hashlib
import os
import platform
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

import torch

from dist_gan import storage
from dist_gan.config import RunConfig
from dist_gan.config_reader import to_yaml
from dist_gan.data import Stage
from dist_gan.data.embedded import prepare_data
from dist_gan.run_folder import OUTCOME, RunFolder, refuse, sees_attempt, write_outcome
from dist_gan.runtime import Missing, Runtime, StopRequest, read_launch
from dist_gan.trainer import End, build, fit
from dist_gan.types import TrainingFailed, UserError
from dist_gan.wording import report, safe

FINISHED, CRASHED, CONFIGURATION_WRONG, FAILED, PREEMPTED = 0, 1, 2, 3, 75
_DISK_TROUBLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)


class _ForRankZeroToSay(UserError):
    """What all ranks know, and this one has no place to ask whether it has been said."""


def run(config: RunConfig, *, stages: Sequence[Stage] = ()) -> int:
    """Trains, and returns the exit code: 0 finished, 2 the configuration is wrong, 3 training failed, 1 a crash.

    75 says that the run was asked to stop, has saved itself, and wants to be started again. A launcher that restarts
    by itself (`--max-restarts`) would do so at once, so under such a one a stopped run leaves with 0.

    Rank 0 makes every check that needs no other rank before there is a process group; the others wait for it in the
    rendezvous, and the launcher ends them if it leaves.

    Args:
        config: every setting.
        stages: a user's own steps between decoding and batching; docs/data.md has an example.
    """
    folder: RunFolder | None = None
    runtime: Runtime | None = None
    stop: StopRequest | None = None  # until there is something to lose, a signal just ends the process
    try:
        if int(os.environ.get("RANK", "0")) == 0:
            try:
                launched = read_launch(config, os.environ, gpus=torch.cuda.device_count())
                folder = RunFolder(config)
            except UserError as error:
                say(str(error))
                refuse(Path(config.run.dir), reason=str(error))
                return CONFIGURATION_WRONG
            for note in (*folder.notes, *prepare_data(config)):
                say(note)
        else:
            launched = read_launch(config, os.environ, gpus=torch.cuda.device_count())
        runtime = Runtime(config.runtime, launched, on_lost=lambda missing: _lost(config, folder, missing))
        stop = StopRequest()
        end = _train(config, runtime, folder, stop, stages)
        code = FINISHED if end.stopped_by is None else PREEMPTED
        if folder is not None:
            outcome = "finished" if end.stopped_by is None else "preempted"
            reason = "" if end.stopped_by is None else f"asked to stop by {end.stopped_by}"
            folder.write_outcome(outcome, code=code, images=end.images, reason=reason, commit=end.commit)
        runtime.barrier()
        return FINISHED if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0 else code
    except _ForRankZeroToSay:
        return CONFIGURATION_WRONG
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
        missing = runtime.lost() if runtime is not None and isinstance(error, RuntimeError) else Missing(None)
        if missing.reason is not None:
            return _lost(config, folder, missing)
        print(report(traceback.format_exc()), file=sys.stderr, flush=True)
        return _leave(config, folder, "crashed", code=CRASHED, reason=safe(f"{type(error).__name__}: {error}"))
    finally:
        if runtime is not None:
            runtime.close()
        if folder is not None:
            folder.close()
        if stop is not None:
            stop.close()


def _lost(config: RunConfig, folder: RunFolder | None, missing: Missing) -> int:
    """Says who is missing; a process that is cut off from the first machine cannot leave that to another one."""
    reason = f"{missing.reason}; start the same command again to resume"
    if missing.cut_off and int(os.environ.get("LOCAL_RANK", "0")) == 0 and _outcome(config).exists():
        say(reason)
        return CRASHED
    return _leave(config, folder, "crashed", code=CRASHED, reason=reason)


def _train(
    config: RunConfig, runtime: Runtime, folder: RunFolder | None, stop: StopRequest, stages: Sequence[Stage]
) -> End:
    _refuse_strangers(config, runtime)
    attempt = runtime.share_json(folder.attempt if folder else None)
    _refuse_a_private_folder(config, runtime, attempt=attempt)
    parts = build(config, runtime, stop, attempt=attempt, stages=stages)
    try:
        return fit(parts)
    finally:
        parts.tracker.close()
        parts.state.stream.close()


def _refuse_strangers(config: RunConfig, runtime: Runtime) -> None:
    """Raises unless all ranks run the same settings with the same code and packages."""
    mine = {
        "the settings": hashlib.sha256(to_yaml(config).encode()).hexdigest()[:16],
        "the code of dist_gan": code_hash(),
        "Python": platform.python_version(),
        "torch": torch.__version__,
        **runtime.packages(),
    }
    everywhere = runtime.gather_json(mine)
    for name, value in everywhere[0].items():
        strangers = [rank for rank, facts in enumerate(everywhere) if facts.get(name) != value]
        if strangers:
            other = everywhere[strangers[0]].get(name)
            raise UserError(
                f"{name} of rank {', '.join(map(str, strangers))} differ from rank 0's ({other} and {value}); start the same "
                f"command, from the same checkout and environment, on every machine"
            )


def _refuse_a_private_folder(config: RunConfig, runtime: Runtime, *, attempt: int) -> None:
    """Raises unless all ranks see the run folder of rank 0."""
    blind = None if sees_attempt(Path(config.run.dir), attempt) else f"rank {runtime.rank} on {platform.node()}"
    names = [name for name in runtime.gather_json(blind) if name is not None]
    if not names:
        return
    if not runtime.is_main:
        raise _ForRankZeroToSay
    raise UserError(
        f"run.dir: {', '.join(names)} does not see {config.run.dir} as rank 0 does; choose a run.dir on a disk that all "
        f"machines share"
    )


def code_hash() -> str:
    """A short hash of the package's own files."""
    digest = hashlib.sha256()
    package = Path(__file__).parent
    for file in sorted(package.rglob("*.py")):
        digest.update(f"{file.relative_to(package)}\0".encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def _outcome(config: RunConfig) -> Path:
    return Path(config.run.dir) / OUTCOME


def _leave(config: RunConfig, folder: RunFolder | None, outcome: str, *, code: int, reason: str) -> int:
    """Says once, over all ranks, why the run ended.

    What all ranks agree on is for rank 0 to say; what only this rank knows is said here when rank 0 stays silent.
    """
    if folder is None:
        deadline = time.monotonic() + 8.0  # rank 0 may need a few seconds to find out who is missing
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
    print(report(f"dist_gan: {reason}"), flush=True)
