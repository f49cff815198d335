"""Folder of a run on rank 0's machine: its owner, the number of the attempt, settings, outcome, and copies in a store.

An attempt is one start of the run.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from dist_gan import attempts, storage
from dist_gan.attempts import ATTEMPTS, Claim
from dist_gan.checkpoint import reader
from dist_gan.config import RunConfig
from dist_gan.config.reader import differences, read_written, to_yaml
from dist_gan.process.outcome import OUTCOME, release, reserve, write_outcome
from dist_gan.records import Damaged
from dist_gan.run_mirror import RunMirror
from dist_gan.types import TrainingFailed, UserError

LOGS = (ATTEMPTS, "metrics.jsonl", "events.jsonl")
"""Names of the log files, to which lines are appended."""
_FILES = (OUTCOME, "config.yaml", *LOGS)
_FOLDERS = ("checkpoints", "samples", "tensorboard")


def home_of(config: RunConfig) -> str:
    """Returns the URL of the folder that keeps the checkpoints and copies of the logs; empty for the run's own folder."""
    url = config.checkpoint.url
    if url is None:
        return ""
    local = storage.local_path(url)
    if local is not None and os.path.realpath(local) == os.path.realpath(config.run.dir):
        return ""
    return url if local is None else str(local.absolute())


def checkpoints_of(config: RunConfig) -> str:
    """Returns the URL of the folder that holds the checkpoints of a run."""
    return storage.join(home_of(config) or config.run.dir, "checkpoints")


class RunFolder:
    """The folder of a run, owned by one living process (rank 0) at a time.

    Ownership is a lock of the operating system on `attempts.jsonl`, so a killed process owns nothing. `claim` holds the
    number of this attempt, counted from 1; `notes` tell what was damaged in the folder and is passed over, and what was
    fetched. With `checkpoint.url` the folder may be empty, or older than the copies there: it is then filled from them.

    Raises:
        UserError: the folder cannot be written, belongs to a living process, to another run, or to a run with other
            settings.
        TrainingFailed: the store does not answer.
    """

    def __init__(self, config: RunConfig) -> None:
        self.path = Path(config.run.dir)
        self.notes: list[str] = []
        self._config = config
        self.home, self.checkpoints = home_of(config), checkpoints_of(config)
        self.mirror = RunMirror(self.path, self.home) if self.home else None
        self._lock = attempts.lock(self.path)
        try:
            # Nothing in the folder is touched until this process owns it.
            self._refuse_odd_files()
            last = self._catch_up()
            self._refuse_other_settings()
            self._refuse_checkpoints_elsewhere()
            self.claim, notes = attempts.claim(self.path, home=self.home, at_least=last)
            self.notes += notes
            (self.path / OUTCOME).unlink(missing_ok=True)
            reserve(self.path)
            storage.publish(str(self.path / "config.yaml"), to_yaml(config).encode())
        except BaseException:
            self._lock.close()
            raise

    @property
    def attempt(self) -> int:
        """Number of this start of the run, counted from 1."""
        return self.claim.attempt

    def take_home(self) -> None:
        """Makes this launch the owner of the checkpoints in the store, and copies the logs there.

        Raises:
            UserError: another launch did the same at this moment, or access is refused.
            TrainingFailed: the store does not answer.
        """
        if self.mirror is not None:
            self.mirror.take(self.claim)
            self.mirror.push()

    def _catch_up(self) -> int:
        """Copies the run's files from the store into the folder, if they are newer there.

        Returns:
            Number of the last attempt that the store knows; 0 without copies in a store.
        """
        owner = self.mirror.owner() if self.mirror is not None else None
        if self.mirror is None or owner is None:
            return 0
        here = self._attempts_here()
        if owner.token in {claim.token for claim in here.claims}:
            return owner.attempt
        is_used = bool(here.last) or any((self.path / name).exists() for name in LOGS[1:])
        if is_used and here.owner.run != owner.run:
            raise UserError(
                f"run.dir: {self.path} holds another run than {storage.redact(self.home)}; choose another run.dir, or another "
                f"checkpoint.url"
            )
        count = self.mirror.fetch(self._lock)
        self.notes.append(f"{self.path}: {count} files of this run were fetched from {storage.redact(self.home)}")
        return owner.attempt

    def _attempts_here(self) -> attempts.Attempts:
        try:
            return attempts.read(self.path)
        except Damaged as error:
            raise UserError(f"run.dir: {error}; move it away, which forgets how often the run was started") from error

    def _refuse_odd_files(self) -> None:
        """Raises UserError if the name of a file to be written belongs to something else, or likewise of a folder."""
        odd = [name for name in _FILES if (self.path / name).exists() and not (self.path / name).is_file()]
        odd += [name for name in _FOLDERS if (self.path / name).exists() and not (self.path / name).is_dir()]
        if odd:
            kind = "folder" if odd[0] in _FOLDERS else "regular file"
            raise UserError(f"run.dir: {self.path / odd[0]} is no {kind}; move it away, or choose another run.dir")

    def _refuse_other_settings(self) -> None:
        """Raises UserError if the settings of this start differ from those in the manifest of the newest checkpoint.

        `config.yaml` is not compared, since it may be lost, or belong to another start.
        """
        before = self._settings_of_the_newest()
        changed = differences(before, self._config) if before is not None else []
        if changed:
            raise UserError(
                f"run.dir: {self.path} belongs to a run with other settings ({'; '.join(changed)}); "
                f"choose another run.dir, or start with the settings in {self.path / 'config.yaml'}"
            )

    def _settings_of_the_newest(self) -> RunConfig | None:
        """Returns the settings in the newest readable manifest of a checkpoint; None if there is no checkpoint yet."""
        for entry in reader.entries(self.checkpoints):
            if not entry.is_committed or entry.is_abandoned:
                continue
            try:
                manifest = reader.read_manifest(entry.url)
            except Damaged:
                continue  # reported later, when the run chooses its checkpoint
            if "config" in manifest:
                return read_written(manifest["config"], place=f"run.dir: the settings in {entry.url}/manifest.json")[0]
        return None

    def _refuse_checkpoints_elsewhere(self) -> None:
        """Raises UserError if the run has checkpoints in its earlier folder, and none in the folder of these settings."""
        before = self._attempts_here().owner.home
        if before == self.home or reader.newest_commit(self.checkpoints) is not None:
            return
        found = reader.newest_commit(storage.join(before or str(self.path), "checkpoints"))
        if found is not None:
            remedy = f"checkpoint.url={before}" if before else "no checkpoint.url"
            raise UserError(
                f"checkpoint.url: the checkpoints of {self.path} are in {storage.redact(found.url.rsplit('/', 1)[0])}, and none "
                f"are in {storage.redact(self.checkpoints)}; start with {remedy}, copy them, or choose another run.dir"
            )

    def write_outcome(self, outcome: str, *, code: int, images: int, reason: str, commit: str | None) -> None:
        """Writes `outcome.json` atomically, then records the end of the attempt in `attempts.jsonl`.

        Args:
            outcome: `finished` or `preempted`.
            code: exit code.
            images: number of images that the run has seen.
            reason: one sentence; empty for a finished run.
            commit: URL of the checkpoint from which the run resumes; None without a checkpoint.
        """
        write_outcome(
            str(self.path), outcome, code=code, images=images, reason=reason, attempt=self.attempt, commit=commit
        )
        with suppress(OSError, TrainingFailed):  # the outcome has been written
            attempts.note_end(self.path, attempt=self.attempt, outcome=outcome)

    def close(self) -> None:
        """Releases the lock of the folder, and the disk space reserved for `outcome.json`."""
        release(self.path)
        self._lock.close()


def claim_of(folder: RunFolder | None) -> Claim | None:
    """Returns the claim of this launch to own the run, on rank 0, which owns the folder; None on other ranks."""
    return None if folder is None else folder.claim


def mirror_of(folder: RunFolder | None) -> RunMirror | None:
    """Returns the copies of the run's files in a store, on rank 0 of a run with `checkpoint.url`; None otherwise."""
    return None if folder is None else folder.mirror
