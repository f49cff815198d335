"""Course of one process of a run, from its first check to its exit code and `outcome.json`."""

from __future__ import annotations

import hashlib
import os
import platform
from contextlib import suppress
from pathlib import Path

import torch

from dist_gan.attempts import Claim
from dist_gan.build import Run, build
from dist_gan.config import RunConfig
from dist_gan.config.reader import to_yaml
from dist_gan.models.own import described
from dist_gan.own_parts import NO_PARTS, OwnParts
from dist_gan.process import terminal
from dist_gan.process.ending import Ending
from dist_gan.process.last_words import silent_about_full_disks, within
from dist_gan.run_data import prepare_data, sees_data
from dist_gan.run_folder import RunFolder, checkpoints_of, claim_of, mirror_of
from dist_gan.run_mirror import sees_claim
from dist_gan.runtime import EndNotice, MeetingFailed, Runtime, StopRequest, open_meeting, read_launch_settings
from dist_gan.trainer import fit
from dist_gan.types import TrainingFailed, UserError

_REFUSAL_WITHIN_S = 20.0
"""Time limit, in seconds, for reaching the launch's store when the settings of a start are unusable."""


def run(config: RunConfig, *, own: OwnParts = NO_PARTS) -> int:
    """Trains a run on this process; returns the exit code: 0 finished, 1 crash, 2 wrong configuration, 3 training failed.

    Exit code 75 means that the run was asked to stop, has saved a checkpoint, and should be started again. A launcher
    with `--max-restarts` would restart such a run at once, so under such a launcher a stopped run exits with 0.

    Before process groups exist, rank 0 makes every check that needs no other rank; the other ranks wait in the launch's
    key-value store for rank 0's decision, and exit with the same code if rank 0 refuses the start. In a launch of
    several ranks, a rank that fails does not return: the rank publishes a notice that the launch is over, writes the
    outcome, prints one sentence, and ends its process.

    Args:
        config: every setting.
        own: parts of the user's own script, as passed to `dist_gan.train`.
    """
    with terminal.unbreakable(), silent_about_full_disks():
        ending = Ending(config.run.dir, checkpoints_of(config))
        ending.watch_launcher()
        parts: list[Run] = []
        try:
            code = _run(config, ending, own, parts)
        except BaseException as error:  # whatever the exception is, the other ranks wait for a notice
            code = ending.badly(error)
        for part in parts:  # cleans up after a failed run
            within(part.report.tracker.close)
            within(part.state.stream.close)
        ending.close(code)
        return code


def refuse_start(mistake: UserError, run_dir: str | None) -> int:
    """Refuses a start with unusable settings, on all ranks of the launch; returns the exit code.

    Args:
        mistake: error with the report of all mistakes.
        run_dir: the run's folder; None if the user named none, or if this is a rehearsal.
    """
    with terminal.unbreakable():
        ending = Ending(run_dir)
        with suppress(MeetingFailed):  # without a store, each rank reports the mistake itself
            ending.meeting = open_meeting(os.environ, patience_s=_REFUSAL_WITHIN_S)
        code = ending.badly(mistake)
        ending.close(code)
        return code


def _run(config: RunConfig, ending: Ending, own: OwnParts, parts: list[Run]) -> int:
    ending.stop = stop = StopRequest(on_second=ending.asked_twice)
    patience_s = config.runtime.start_timeout_s
    ending.meeting = meeting = open_meeting(os.environ, patience_s=patience_s)
    if mistakes := own.mistakes(config.networks.kind):
        raise UserError(*mistakes)
    launch_settings = read_launch_settings(config, os.environ, gpus=torch.cuda.device_count())
    if ending.rank == 0:
        with stop.deferred():
            ending.outcome.folder = folder = RunFolder(config)
            ending.outcome.attempt = folder.attempt
        folder.take_home()
        for note in (*folder.notes, *prepare_data(config)):
            terminal.say(note)
        if meeting is not None and (notice := meeting.admit_ranks(folder.attempt, patience_s=patience_s)) is not None:
            return ending.refused_by(notice)
    elif meeting is not None:
        answer = meeting.join(patience_s=patience_s)
        if isinstance(answer, EndNotice):
            return ending.refused_by(answer)
        ending.outcome.attempt = answer
    ending.runtime = runtime = Runtime(
        config.runtime, launch_settings, meeting=meeting, on_lost=ending.lost, on_notice=ending.heard
    )
    ending.meeting = runtime.meeting  # the process groups own the first connection from here on
    _refuse_strangers(config, runtime, own)
    claim = Claim(*runtime.control_group.share_json(claim_of(ending.outcome.folder)))
    ending.outcome.claim = claim
    _refuse_private_checkpoints(config, runtime, claim)
    _prepare_data_of_this_machine(config, runtime)
    run = build(config, runtime, stop, attempt=claim.attempt, mirror=mirror_of(ending.outcome.folder), own=own)
    parts.append(run)
    ending.progress = run.state.progress
    stop.training_begins()
    end = fit(run)
    run.close()
    parts.clear()
    return ending.well(images=end.images, commit=end.commit, stopped_by=end.stopped_by)


def _refuse_strangers(config: RunConfig, runtime: Runtime, own: OwnParts) -> None:
    """Raises UserError on every rank unless all ranks have the same settings, code and packages. Collective."""
    script = own.script()
    mine = {
        "the settings": hashlib.sha256(to_yaml(config).encode()).hexdigest()[:16],
        "the code of dist_gan": code_hash(),
        "the parts of the script": described(None if script is None else script._asdict()),
        "Python": platform.python_version(),
        "torch": torch.__version__,
        **runtime.packages(),
    }
    everywhere = runtime.control_group.gather_json(mine)
    for name, value in everywhere[0].items():
        strangers = [rank for rank, facts in enumerate(everywhere) if facts.get(name) != value]
        if strangers:
            other = everywhere[strangers[0]].get(name)
            raise UserError(
                f"{name} of rank {', '.join(map(str, strangers))} differ from rank 0's ({other} and {value}); start the same "
                f"command, from the same checkout and environment, on every machine"
            )


def _refuse_private_checkpoints(config: RunConfig, runtime: Runtime, claim: Claim) -> None:
    """Raises UserError on every rank unless all ranks see the same folder of checkpoints, where each writes. Collective."""
    error: UserError | TrainingFailed | None = None
    blind: str | None = None
    try:
        if not sees_claim(Path(config.run.dir), claim):
            blind = f"rank {runtime.rank} on {platform.node()}"
    except (UserError, TrainingFailed) as found:
        error = found
    runtime.control_group.raise_together(error)
    names = [name for name in runtime.control_group.gather_json(blind) if name is not None]
    if names and claim.home:
        raise UserError(
            f"checkpoint.url: {', '.join(names)} does not see {claim.home} as rank 0 does; choose a store, or a folder on a "
            f"disk that all machines share"
        )
    if names:
        raise UserError(
            f"run.dir: {', '.join(names)} does not see {config.run.dir} as rank 0 does; choose a run.dir on a disk that all "
            f"machines share, or keep the checkpoints in a store: checkpoint.url=s3://bucket/run"
        )


def _prepare_data_of_this_machine(config: RunConfig, runtime: Runtime) -> None:
    """Writes the embedded data set on every machine that does not see rank 0's copy; all copies are equal. Collective."""
    error: UserError | TrainingFailed | None = None
    if runtime.rank != 0 and os.environ.get("LOCAL_RANK", "0") == "0" and not sees_data(config):
        try:
            prepare_data(config)
        except (UserError, TrainingFailed) as found:
            error = found
    runtime.control_group.raise_together(error)


def code_hash() -> str:
    """Returns a short hash of the names and contents of this package's Python files."""
    digest = hashlib.sha256()
    package = Path(__file__).parents[1]
    for file in sorted(package.rglob("*.py")):
        digest.update(f"{file.relative_to(package)}\0".encode() + file.read_bytes())
    return digest.hexdigest()[:16]
