"""Copies of a run's small files in the folder that keeps its checkpoints, and the mark of the launch that owns it.

Without a shared disk, only rank 0 sees the folder `run.dir`. If `checkpoint.url` names another folder, rank 0 copies the
small files of `run.dir` (`MIRRORED`) to that folder, so that the run can continue on any machine. docs/checkpoints.md
says what the mark of the owner, the file `owner.json`, guarantees.
"""

from __future__ import annotations

import json
import os
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from dist_gan import attempts, records, storage
from dist_gan.attempts import ATTEMPTS, Claim
from dist_gan.records import Damaged
from dist_gan.types import TrainingFailed, UserError
from dist_gan.wording import report

OWNER = "owner.json"
"""Name of the file, in the folder of the checkpoints, with the claim of the launch that owns the checkpoints."""
OUTCOME = "outcome.json"
MIRRORED = re.compile(
    r"config\.yaml|attempts\.jsonl|(metrics|events)\.jsonl|metrics\.before-[\w-]+\.jsonl|outcome\.json"
    r"|samples/[\w-]+\.png|tensorboard/[\w.-]+"
)
"""Pattern of the paths, inside a run's folder, of the files that are mirrored."""
_FOLDERS = ("samples", "tensorboard")
_LARGEST_OWNER = 2**14
_SEEN_WITHIN_S = 15.0
"""Time limit, in seconds, for a network file system to show a new file."""


class RunMirror:
    """Copies of one run's files in the folder of its checkpoints; for rank 0 only, and for any of its threads.

    Args:
        folder: the run's folder, on a disk of this machine.
        home: URL of the folder that keeps the checkpoints and the copies.
    """

    def __init__(self, folder: Path, home: str) -> None:
        self.home = home
        self._folder = folder
        self._claim: Claim | None = None
        self._sent: dict[str, tuple[int, int]] = {}
        self._turn = threading.Lock()
        self._has_failed = False

    # -- owner ----------------------------------------------------------------------------------------------------

    def owner(self) -> Claim | None:
        """Reads the claim of the launch that owns the checkpoints; returns None if no launch has used their folder.

        Raises:
            UserError: the mark is damaged, or access is refused.
            TrainingFailed: the store does not answer.
        """
        return owner_of(self.home)

    def take(self, claim: Claim) -> None:
        """Makes this launch the owner of the checkpoints; from then on, no launch that owned them before may write there.

        Args:
            claim: claim of this launch.

        Raises:
            UserError: another launch has done the same at this moment, or access is refused.
            TrainingFailed: the store does not answer.
        """
        storage.make_folder(self.home)
        storage.publish(storage.join(self.home, OWNER), (json.dumps(claim._asdict()) + "\n").encode())
        found = self.owner()
        if found is None or found.token != claim.token:
            by = found.by if found is not None else "another launch"
            raise UserError(
                f"checkpoint.url: {storage.redact(self.home)} was taken over by {by} while this start began; let one of "
                f"them train, or give each its own checkpoint.url"
            )
        self._claim = claim
        storage.remove(storage.join(self.home, OUTCOME))  # the outcome of the previous attempt
        self._sent = self._present()

    def check_owner(self) -> None:
        """Raises TrainingFailed or UserError if another launch owns the checkpoints now, or if the owner cannot be read."""
        if self._claim is None:
            return
        found = self.owner()
        if found is None or found.token != self._claim.token:
            by = f"attempt {found.attempt} ({found.by})" if found is not None else "nobody: its owner.json is gone"
            raise TrainingFailed(
                f"checkpoint.url: {storage.redact(self.home)} now belongs to {by}; this launch writes nothing more there, "
                f"and ends; start one launch at a time"
            )

    def owner_problem(self) -> str | None:
        """Returns the error of `check_owner` as one sentence; None if this launch owns the checkpoints."""
        try:
            self.check_owner()
        except (UserError, TrainingFailed) as error:
            return str(error)
        return None

    # -- copies ---------------------------------------------------------------------------------------------------

    def push(self) -> None:
        """Copies every file that has changed. The first failure is reported on the terminal; training continues."""
        try:
            with self._turn:
                self.check_owner()
                for name in self._names():
                    self._send(name)
        except Exception as error:  # a failure to copy logs must not end the run
            if not self._has_failed:
                self._has_failed = True
                said = str(error) if isinstance(error, UserError | TrainingFailed | OSError) else type(error).__name__
                print(
                    report(
                        f"dist_gan: the logs are not copied to {storage.redact(self.home)} ({said}); training goes on"
                    ),
                    flush=True,
                )

    def _names(self) -> Iterator[str]:
        """Yields the paths of the files to copy, inside the run's folder; `outcome.json` comes last."""
        found = [path.name for path in self._folder.iterdir()]
        for folder in _FOLDERS:
            if (self._folder / folder).is_dir():
                found += [f"{folder}/{path.name}" for path in (self._folder / folder).iterdir()]
        chosen = (name for name in found if MIRRORED.fullmatch(name) and (self._folder / name).is_file())
        yield from sorted(chosen, key=lambda name: (name == OUTCOME, name))

    def _send(self, name: str) -> None:
        path = self._folder / name
        facts = path.stat()
        version = (facts.st_size, facts.st_mtime_ns)
        before = self._sent.get(name)
        if before == version or (before is not None and before == (facts.st_size, 0) and name.startswith("samples/")):
            return
        storage.publish(storage.join(self.home, name), path.read_bytes())
        self._sent[name] = version

    def _present(self) -> dict[str, tuple[int, int]]:
        """Returns the size in bytes of each sample grid that is in the store already; grids never change once written."""
        place = storage.join(self.home, "samples")
        sizes = storage.sizes(place, storage.list_names(place))
        return {f"samples/{name}": (size, 0) for name, size in sizes.items() if size is not None}

    def fetch(self, attempts_file: IO[bytes]) -> int:
        """Copies the run's files from the store into the run's folder; returns the number of files.

        Args:
            attempts_file: the locked `attempts.jsonl`, whose content is replaced in place, because a new file would not
                be locked.

        Raises:
            UserError, TrainingFailed: the store refuses or does not answer, or the disk cannot be written.
        """
        names = storage.list_names(self.home)
        for folder in _FOLDERS:
            names += [f"{folder}/{name}" for name in storage.list_names(storage.join(self.home, folder))]
        wanted = [name for name in names if MIRRORED.fullmatch(name) and name != OUTCOME]
        for name in wanted:
            data = storage.read(storage.join(self.home, name))
            if name == ATTEMPTS:
                attempts_file.truncate(0)
                attempts_file.write(data)
                os.fsync(attempts_file.fileno())
            else:
                (self._folder / name).parent.mkdir(parents=True, exist_ok=True)
                storage.publish(str(self._folder / name), data)
        return len(wanted)


def owner_of(home: str) -> Claim | None:
    """Reads the claim of the launch that owns the checkpoints in a folder; returns None if no launch has used the folder.

    Raises:
        UserError: the mark is damaged, or access is refused.
        TrainingFailed: the store does not answer.
    """
    remedy = "; remove it once no launch trains there"
    try:
        return Claim.read(records.load(storage.join(home, OWNER), remedy=remedy, limit=_LARGEST_OWNER))
    except FileNotFoundError:
        return None
    except Damaged as error:
        raise UserError(f"checkpoint.url: {error}") from error


def sees_claim(folder: Path, claim: Claim) -> bool:
    """Returns True if this process finds rank 0's claim in the folder of the checkpoints, so that it is the same folder.

    Args:
        folder: the run's folder, which is read if it keeps the checkpoints itself.
        claim: rank 0's claim.

    Raises:
        UserError, TrainingFailed: the store refuses access, or does not answer.
    """
    deadline = time.monotonic() + _SEEN_WITHIN_S
    while True:
        if claim.home:
            found = owner_of(claim.home)
            if found is not None and found.token == claim.token:
                return True
        elif attempts.is_latest(folder, claim.attempt):
            return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.5)
