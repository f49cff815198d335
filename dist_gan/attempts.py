"""The file `attempts.jsonl` in the folder of a run: lock of the folder, and history of the run's attempts.

An attempt is one start of the run. Lines are appended and never changed, so a damaged line damages no other line:

    {"attempt": 3, "run": "5f0c...", "token": "91ab...", "by": "process 12 on host-a", "home": "", "unix_time": ...}
    {"attempt": 3, "images": 12800}          the attempt began to train there
    {"attempt": 3, "ended": "preempted"}     the attempt ended as it should

A line of the first kind is a claim: it says which launch owns the run from then on. A lock of the operating system on
the file says whether the owner is still alive, on this machine or on a machine that shares the disk. Earlier versions
counted the attempts in a file `attempts` and locked the file `run.lock`; both are read once, and removed.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import stat
import time
from contextlib import suppress
from pathlib import Path
from typing import IO, NamedTuple

from dist_gan import records, storage
from dist_gan.records import Damaged, Record
from dist_gan.types import TrainingFailed, UserError
from dist_gan.wording import redact

ATTEMPTS = "attempts.jsonl"
"""Name of the file in the folder of a run."""
OLD_COUNTER, OLD_LOCK = "attempts", "run.lock"
"""Names of the files with which earlier versions counted attempts and locked the folder of a run."""
_MOST_ATTEMPTS = 10**9
_LONGEST_OWNER = 300
"""Largest length, in characters, of the text that names the owner of a run."""


class Claim(NamedTuple):
    """Claim of one launch to own a run: only this launch may train the run, until a later launch makes a claim."""

    attempt: int
    run: str
    """Random name of the run, the same for all of its attempts."""
    token: str
    """Random name of the launch that made the claim."""
    by: str
    """Process ID and host of rank 0 of the launch."""
    home: str
    """URL of the folder that keeps the checkpoints; empty for the run's own folder."""
    unix_time: float

    @staticmethod
    def read(line: Record) -> Claim:
        """Reads a claim from a JSON object. Raises Damaged if the object is no claim."""
        return Claim(
            line.whole("attempt", low=1, high=_MOST_ATTEMPTS),
            line.text("run", longest=64),
            line.text("token", longest=64),
            line.text("by", longest=_LONGEST_OWNER),
            line.text("home"),
            line.number("unix_time"),
        )

    def succeed(self, *, home: str, attempt: int) -> Claim:
        """Returns the claim of a new launch of the same run, made by this process.

        Args:
            home: URL of the folder that keeps the checkpoints; empty for the run's own folder.
            attempt: number of the new attempt.
        """
        by = f"process {os.getpid()} on {os.uname().nodename}"[:_LONGEST_OWNER]
        return Claim(attempt, self.run, secrets.token_hex(8), by, home, round(time.time(), 3))


NOBODY = Claim(0, "", "", "", "", 0.0)
"""Claim that stands for the owner of a run that no launch has claimed yet."""


class Attempts(NamedTuple):
    """Content of the file `attempts.jsonl` of a run."""

    claims: tuple[Claim, ...] = ()
    began: tuple[tuple[int, int], ...] = ()
    """Number of each attempt that began to train, with the number of images seen before it began, in order."""
    ended: frozenset[int] = frozenset()
    """Numbers of the attempts that finished the run, or stopped because they were asked to."""
    odd: int = 0
    """Number of unreadable lines in the file."""

    @property
    def owner(self) -> Claim:
        """The last claim; `NOBODY` if there is no claim."""
        return self.claims[-1] if self.claims else NOBODY

    @property
    def last(self) -> int:
        """Number of the latest attempt; 0 for a run that was never started."""
        return max((*(c.attempt for c in self.claims), *(a for a, _ in self.began), *self.ended), default=0)

    def in_vain(self, images: int) -> int:
        """Returns the number of latest attempts in a row that began after `images` images and ended by a failure."""
        count = 0
        for attempt, at in reversed(self.began):
            if at != images or attempt in self.ended:
                break
            count += 1
        return count


def read(folder: Path) -> Attempts:
    """Reads `attempts.jsonl` in a run's folder; an absent file counts as empty. Raises Damaged if it cannot be read."""
    lines = records.read_lines(folder / ATTEMPTS)
    claims, began, ended, odd = [], [], set(), lines.odd
    for line in lines.records:
        try:
            if "by" in line:
                claims.append(Claim.read(line))
                continue
            attempt = line.whole("attempt", low=1, high=_MOST_ATTEMPTS)
            if "ended" in line:
                ended.add(attempt)
            else:
                began.append((attempt, line.whole("images")))
        except Damaged:
            odd += 1
    return Attempts(tuple(claims), tuple(began), frozenset(ended), odd)


def is_latest(folder: Path, attempt: int) -> bool:
    """Returns True if `attempt` is the latest attempt of the run in a folder, as far as this process can see."""
    with suppress(OSError, UserError, TrainingFailed):
        os.listdir(folder)  # makes a network file system refresh its cache
        return read(folder).last == attempt
    return False


# -- the lock -----------------------------------------------------------------------------------------------------


def lock(folder: Path) -> IO[bytes]:
    """Creates the folder of a run, and locks it for this process until the returned file is closed.

    Raises:
        UserError: the folder cannot be written or is locked by another process, or its `attempts.jsonl` is a link or no
            regular file.
    """
    file = _open(folder, ATTEMPTS, create=True)
    try:
        _lock(file, folder)
        if (folder / OLD_LOCK).exists():
            with _open(folder, OLD_LOCK) as old:  # a process of an earlier version may still run
                _lock(old, folder)
    except BaseException:
        file.close()
        raise
    return file


def _open(folder: Path, name: str, *, create: bool = False) -> IO[bytes]:
    try:
        if create:
            folder.mkdir(parents=True, exist_ok=True)
        # O_NOFOLLOW: a link might lead to a file of another owner. O_NONBLOCK: the open of a pipe would wait for a writer.
        flags = os.O_RDWR | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | (os.O_CREAT if create else 0)
        handle = os.open(folder / name, flags, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise UserError(
                f"run.dir: {folder / name} is a symbolic link, and lines are appended to the run's own file only; remove "
                f"the link, or choose another run.dir"
            ) from error
        if error.errno == errno.EISDIR:
            raise _odd(folder / name) from error
        raise UserError(f"run.dir: cannot write in {folder}: {storage.why(error)}") from error
    file = open(handle, "r+b", buffering=0)  # noqa: SIM115 - held as long as the run lives
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        file.close()
        raise _odd(folder / name)
    return file


def _odd(path: Path) -> UserError:
    return UserError(f"run.dir: {path} is no regular file; move it away, or choose another run.dir")


def _lock(file: IO[bytes], folder: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(
            f"run.dir: {folder} is in use by {_owner(folder)}; wait for it to end, stop it, or choose another run.dir"
        ) from error
    except OSError as error:
        raise UserError(
            f"run.dir: the file system of {folder} has no locks ({error.strerror}); mount it with them, or choose another "
            f"run.dir"
        ) from error


def _owner(folder: Path) -> str:
    try:
        return read(folder).owner.by or "another process"
    except (UserError, TrainingFailed):
        return "another process"


# -- lines --------------------------------------------------------------------------------------------------------


def claim(folder: Path, *, home: str, at_least: int) -> tuple[Claim, list[str]]:
    """Appends the claim of the run's next attempt, in a locked folder; returns the claim, and notes about damaged lines.

    Args:
        folder: the run's folder.
        home: URL of the folder that keeps the checkpoints; empty for the run's own folder.
        at_least: number of the last attempt that the copies in a store name; 0 without copies.

    Raises:
        UserError: `attempts.jsonl` cannot be read.
        TrainingFailed: `attempts.jsonl` cannot be written.
    """
    try:
        found = read(folder)
    except Damaged as error:
        raise UserError(f"run.dir: {error}; move it away, which forgets how often the run was started") from error
    notes = [f"{folder / ATTEMPTS}: {found.odd} odd lines are left out"] if found.odd else []
    counted = 0
    try:
        counted = _old_count(folder)
    except FileNotFoundError:
        pass  # the run was begun by this version
    except Damaged as error:
        notes.append(f"{error}; attempts are counted by {ATTEMPTS} instead")
    before = found.owner if found.owner.run else NOBODY._replace(run=secrets.token_hex(8))
    made = before.succeed(home=home, attempt=max(found.last, counted, at_least) + 1)
    records.append(folder / ATTEMPTS, made._asdict())
    for name in (OLD_COUNTER, OLD_LOCK):
        with suppress(OSError):
            (folder / name).unlink(missing_ok=True)
    return made, notes


def _old_count(folder: Path) -> int:
    """Returns the number of the last attempt from the file of earlier versions. Raises FileNotFoundError or Damaged."""
    counter = folder / OLD_COUNTER
    digits = re.fullmatch(rb"\s*([0-9]{1,9})\s*", records.read(str(counter), limit=64))
    if digits is None:
        raise Damaged(f"{redact(str(counter))} is damaged: it holds no number")
    return int(digits[1])


def note_start(folder: Path, *, attempt: int, images: int, limit: int) -> str | None:
    """Records that an attempt begins to train; returns a problem instead if too many attempts failed at the same place.

    An attempt that finished, or was asked to stop, is not counted as failed.

    Args:
        folder: the run's folder.
        attempt: number of the attempt.
        images: number of images that the run has seen.
        limit: number of failed attempts in a row, all begun at `images`, that are too many.

    Returns:
        One sentence for the user if there were `limit` failed attempts; None otherwise.
    """
    in_vain = read(folder).in_vain(images)
    if in_vain >= limit:
        return (
            f"training failed: {in_vain} attempts in a row began at {images:,} images and none reached a new checkpoint "
            f"(recovery.max_restarts); see the ends of their logs, and start again once the cause is gone with a larger "
            f"recovery.max_restarts or a smaller checkpoint.every"
        )
    records.append(folder / ATTEMPTS, {"attempt": attempt, "images": images})
    return None


def note_end(folder: Path, *, attempt: int, outcome: str) -> None:
    """Records that an attempt ended without a failure, with the outcome `finished` or `preempted`."""
    records.append(folder / ATTEMPTS, {"attempt": attempt, "ended": outcome})
