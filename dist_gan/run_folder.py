"""Files of a run besides its logs: lock of the folder, number of the attempt, configuration, outcome."""

from __future__ import annotations

import fcntl
import os
import re
import time
from contextlib import suppress
from pathlib import Path
from typing import IO, NamedTuple

from dist_gan import records, storage
from dist_gan.checkpoint import reader
from dist_gan.config import RunConfig
from dist_gan.config.reader import differences, read_written, to_yaml
from dist_gan.process.outcome import OUTCOME, release, reserve, write_outcome
from dist_gan.records import Damaged
from dist_gan.types import TrainingFailed, UserError

ATTEMPTS = "attempts"
"""Name of the file with the number of starts of the run."""
SEEN_WITHIN_S = 15.0
"""A network file system shows a new file within this time."""
STARTS = "attempts.jsonl"
"""A line for each attempt that began to train, and one for each that ended as it should."""
LOGS = (STARTS, "metrics.jsonl", "events.jsonl")
"""Names of the log files, to which lines are appended."""
_FILES = (OUTCOME, ATTEMPTS, "config.yaml", *LOGS)
_FOLDERS = ("checkpoints", "samples", "tensorboard")
_MOST_ATTEMPTS = 10**9
_LONGEST_OWNER = 300
"""Signs of what a living process says of itself in `run.lock`."""


class RunFolder:
    """The folder of a run, owned by one living process (rank 0) at a time.

    Ownership is a lock of the operating system on `run.lock`, so a killed process owns nothing. `attempt` counts the
    starts of this run from 1, `notes` tell what was damaged in the folder and is passed over.

    Raises:
        UserError: the folder cannot be written, belongs to a living process, or to a run with other settings.
    """

    def __init__(self, config: RunConfig) -> None:
        self.path = Path(config.run.dir)
        self.notes: list[str] = []
        self._lock = self._claim()
        try:
            # Nothing in the folder is touched until this process owns it.
            self._refuse_odd_files()
            self._refuse_other_settings(config)
            self._sign()
            self.attempt = self._next_attempt()
            (self.path / OUTCOME).unlink(missing_ok=True)
            reserve(self.path)
            storage.publish(str(self.path / "config.yaml"), to_yaml(config).encode())
        except BaseException:
            self._lock.close()
            raise

    def _claim(self) -> IO[str]:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            # It is written anew at each start: never through a link into a file that is not the run's.
            handle = os.open(self.path / "run.lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
            lock = open(handle, "r+", errors="replace")  # noqa: SIM115 - held as long as the run lives
        except OSError as error:
            raise UserError(f"run.dir: cannot write in {self.path}: {storage.why(error)}") from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.seek(0)
            owner = lock.read(_LONGEST_OWNER).strip() or "another process"
            lock.close()
            raise UserError(
                f"run.dir: {self.path} is in use by {owner}; wait for it to end, stop it, or choose another run.dir"
            ) from error
        except OSError as error:
            lock.close()
            raise UserError(
                f"run.dir: the file system of {self.path} has no locks ({error.strerror}); mount it with them, or choose "
                f"another run.dir"
            ) from error
        return lock

    def _sign(self) -> None:
        try:
            self._lock.seek(0)
            self._lock.truncate()
            self._lock.write(f"process {os.getpid()} on {os.uname().nodename}")
            self._lock.flush()
        except OSError as error:
            raise UserError(f"run.dir: cannot write in {self.path}: {storage.why(error)}") from error

    def _refuse_odd_files(self) -> None:
        """Raises UserError if a folder or a pipe has the name of a file to be written, or a file that of a folder."""
        odd = [name for name in _FILES if (self.path / name).exists() and not (self.path / name).is_file()]
        odd += [name for name in _FOLDERS if (self.path / name).exists() and not (self.path / name).is_dir()]
        if odd:
            kind = "folder" if odd[0] in _FOLDERS else "regular file"
            raise UserError(f"run.dir: {self.path / odd[0]} is no {kind}; move it away, or choose another run.dir")

    def _refuse_other_settings(self, config: RunConfig) -> None:
        """Raises UserError if the newest manifest has other settings; `config.yaml` may be lost or of another start."""
        before = self._settings_of_the_newest()
        changed = differences(before, config) if before is not None else []
        if changed:
            raise UserError(
                f"run.dir: {self.path} belongs to a run with other settings ({'; '.join(changed)}); "
                f"choose another run.dir, or start with the settings in {self.path / 'config.yaml'}"
            )

    def _settings_of_the_newest(self) -> RunConfig | None:
        """Settings in the newest readable manifest; None if there is no checkpoint yet."""
        for entry in reader.entries(str(self.path / "checkpoints")):
            if not entry.is_committed or entry.is_abandoned:
                continue
            try:
                manifest = reader.read_manifest(entry.url)
            except Damaged:
                continue  # reported later, when the run chooses its checkpoint
            if "config" in manifest:
                return read_written(manifest["config"], place=f"run.dir: the settings in {entry.url}/manifest.json")[0]
        return None

    def _next_attempt(self) -> int:
        counter, attempt = self.path / ATTEMPTS, 0
        try:
            attempt = _attempt_in(counter)
        except FileNotFoundError:
            pass  # the first start
        except Damaged as error:
            self.notes.append(f"{error}; attempts are counted by {STARTS} instead")
        try:
            starts, odd = _read_starts(self.path)
        except Damaged as error:
            raise UserError(f"run.dir: {error}; move it away, which forgets how often the run was started") from error
        if odd:
            self.notes.append(f"{self.path / STARTS}: {odd} odd lines are left out")
        attempt = max([attempt, *(start.attempt for start in starts)]) + 1
        storage.publish(str(counter), f"{attempt}\n".encode())
        return attempt

    def write_outcome(self, outcome: str, *, code: int, images: int, reason: str, commit: str | None) -> None:
        """Writes `outcome.json` atomically, before anything else; `commit` is the checkpoint to resume from."""
        write_outcome(self.path, outcome, code=code, images=images, reason=reason, attempt=self.attempt, commit=commit)
        with suppress(OSError, TrainingFailed):  # the outcome has been written
            note_end(self.path, attempt=self.attempt, outcome=outcome)

    def close(self) -> None:
        """Gives the folder up."""
        release(self.path)
        self._lock.close()


def sees_attempt(folder: Path, attempt: int) -> bool:
    """True if this process sees the folder in which rank 0 has begun an attempt."""
    deadline = time.monotonic() + SEEN_WITHIN_S
    while True:
        with suppress(OSError, Damaged):
            os.listdir(folder)  # makes a network file system refresh its cache
            if _attempt_in(folder / ATTEMPTS) == attempt:
                return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.5)


def _attempt_in(counter: Path) -> int:
    """Number of the last attempt, from its file. Raises FileNotFoundError or Damaged."""
    digits = re.fullmatch(rb"\s*([0-9]{1,9})\s*", records.read(str(counter), limit=64))
    if digits is None:
        raise Damaged(f"{counter} is damaged: it holds no number")
    return int(digits[1])


class _Start(NamedTuple):
    """One line of `attempts.jsonl`."""

    attempt: int
    images: int | None
    """Number of images seen when the attempt began to train; None in a line about the end of an attempt."""


def _read_starts(folder: Path) -> tuple[list[_Start], int]:
    """Usable lines of `attempts.jsonl`, and the number of unusable ones. Raises Damaged if it cannot be read."""
    lines = records.read_lines(folder / STARTS)
    found, odd = [], lines.odd
    for line in lines.records:
        try:
            attempt = line.whole("attempt", low=1, high=_MOST_ATTEMPTS)
            found.append(_Start(attempt, None if "ended" in line else line.whole("images")))
        except Damaged:
            odd += 1
    return found, odd


def note_start(folder: Path, *, attempt: int, images: int, limit: int) -> str | None:
    """Notes that an attempt begins to train at `images`; what is wrong if too many have begun there and died.

    An attempt that finished, or was asked to stop, does not count.
    """
    starts, _ = _read_starts(folder)
    ended = {start.attempt for start in starts if start.images is None}
    in_vain = 0
    for start in reversed([start for start in starts if start.images is not None]):
        if start.images != images or start.attempt in ended:
            break
        in_vain += 1
    if in_vain >= limit:
        return (
            f"training failed: {in_vain} attempts in a row began at {images:,} images and none reached a new checkpoint "
            f"(recovery.max_restarts); see the ends of their logs, and start again once the cause is gone with a larger "
            f"recovery.max_restarts or a smaller checkpoint.every"
        )
    records.append(folder / STARTS, {"attempt": attempt, "images": images})
    return None


def note_end(folder: Path, *, attempt: int, outcome: str) -> None:
    """Notes that an attempt ended as it should."""
    records.append(folder / STARTS, {"attempt": attempt, "ended": outcome})


def is_attempt_of(folder: Path, attempt: int) -> bool:
    """True if `attempt` is the latest attempt in a run folder; only the latest may write the outcome there."""
    with suppress(OSError, UserError, TrainingFailed):
        os.listdir(folder)  # makes a network file system refresh its cache
        return _attempt_in(folder / ATTEMPTS) == attempt
    return False
