"""The file `attempts.jsonl` of a run: lock of the run's folder, number of starts, where each began and how it ended.

Lines are appended and never changed, so a torn line costs no other one:

    {"attempt": 3, "run": "5f0c...", "token": "91ab...", "by": "process 12 on host-a", "home": "", "unix_time": ...}
    {"attempt": 3, "images": 12800}          the attempt began to train there
    {"attempt": 3, "ended": "preempted"}     the attempt ended as it should

The first kind is a claim: who owns the run from then on. A lock of the operating system on the file says whether the
owner still lives on this machine (or on one that shares the disk). Earlier versions counted
starts in a file `attempts` and locked `run.lock`; both are read once, and removed.
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
"""Names of the files that earlier versions used."""
_MOST_ATTEMPTS = 10**9
_LONGEST_OWNER = 300
"""Limit of the text about an owner, in characters."""


class Claim(NamedTuple):
    """Ownership of a run by one launch: who trains it from now on."""

    attempt: int
    run: str
    """Random name of the run, the same for all of its attempts."""
    token: str
    """Random name of this launch."""
    by: str
    """Process and host of rank 0."""
    home: str
    """URL of the folder that keeps the checkpoints; empty for the run's own folder."""
    unix_time: float

    @staticmethod
    def read(line: Record) -> Claim:
        """The claim in a JSON object. Raises Damaged if it holds none."""
        return Claim(
            line.whole("attempt", low=1, high=_MOST_ATTEMPTS),
            line.text("run", longest=64),
            line.text("token", longest=64),
            line.text("by", longest=_LONGEST_OWNER),
            line.text("home"),
            line.number("unix_time"),
        )

    def succeed(self, *, home: str, attempt: int) -> Claim:
        """The claim of a new launch of the same run, made by this process."""
        by = f"process {os.getpid()} on {os.uname().nodename}"[:_LONGEST_OWNER]
        return Claim(attempt, self.run, secrets.token_hex(8), by, home, round(time.time(), 3))


NOBODY = Claim(0, "", "", "", "", 0.0)
"""Stands for the owner of a run that has no claim yet."""


class Attempts(NamedTuple):
    """Content of the file."""

    claims: tuple[Claim, ...] = ()
    began: tuple[tuple[int, int], ...] = ()
    """Attempt and images of every start that came to train, in order."""
    ended: frozenset[int] = frozenset()
    """Attempts that finished, or were asked to stop."""
    odd: int = 0
    """Number of unusable lines."""

    @property
    def owner(self) -> Claim:
        """The last claim; `NOBODY` if there is none."""
        return self.claims[-1] if self.claims else NOBODY

    @property
    def last(self) -> int:
        """Largest number of an attempt; 0 for a run that was never started."""
        return max((*(c.attempt for c in self.claims), *(a for a, _ in self.began), *self.ended), default=0)

    def in_vain(self, images: int) -> int:
        """Number of attempts in a row, up to the last, that began at `images` and did not end as they should."""
        count = 0
        for attempt, at in reversed(self.began):
            if at != images or attempt in self.ended:
                break
            count += 1
        return count


def read(folder: Path) -> Attempts:
    """Content of the file in a run's folder; an absent file is empty. Raises Damaged if it cannot be read."""
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
    """True if this process sees that `attempt` is the latest one of the run in a folder."""
    with suppress(OSError, UserError, TrainingFailed):
        os.listdir(folder)  # makes a network file system refresh its cache
        return read(folder).last == attempt
    return False


# -- the lock -----------------------------------------------------------------------------------------------------


def lock(folder: Path) -> IO[bytes]:
    """Makes the folder, and locks it for this process until the returned file is closed.

    Raises:
        UserError: the folder cannot be written, belongs to a living process, or the file is a link or no regular file.
    """
    file = _open(folder, ATTEMPTS, create=True)
    try:
        _lock(file, folder)
        if (folder / OLD_LOCK).exists():
            with _open(folder, OLD_LOCK) as old:  # a process of an earlier version may live
                _lock(old, folder)
    except BaseException:
        file.close()
        raise
    return file


def _open(folder: Path, name: str, *, create: bool = False) -> IO[bytes]:
    try:
        if create:
            folder.mkdir(parents=True, exist_ok=True)
        # Never through a link into a file that is not the run's; without waiting for the writer of a pipe.
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
    """Begins the next attempt of the run in a locked folder; returns the claim, and notes about what was damaged.

    Args:
        folder: the run's folder.
        home: URL of the folder that keeps the checkpoints; empty for the run's own folder.
        at_least: number of the last attempt known from elsewhere.

    Raises:
        UserError: the file cannot be read.
        TrainingFailed: the file cannot be written.
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
        pass  # begun by this version
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
    """Number of the last attempt, as earlier versions counted it. Raises FileNotFoundError or Damaged."""
    counter = folder / OLD_COUNTER
    digits = re.fullmatch(rb"\s*([0-9]{1,9})\s*", records.read(str(counter), limit=64))
    if digits is None:
        raise Damaged(f"{redact(str(counter))} is damaged: it holds no number")
    return int(digits[1])


def note_start(folder: Path, *, attempt: int, images: int, limit: int) -> str | None:
    """Notes that an attempt begins to train at `images`; what is wrong if too many have begun there and died.

    An attempt that finished, or was asked to stop, does not count.
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
    """Notes that an attempt ended as it should."""
    records.append(folder / ATTEMPTS, {"attempt": attempt, "ended": outcome})
