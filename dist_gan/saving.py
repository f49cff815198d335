"""Checkpoints of a run while it trains: saved, reported once committed, and marked once they have proven healthy."""

from __future__ import annotations

from dist_gan.checkpoint.writer import Checkpointer
from dist_gan.health.candidate import HealthCandidate
from dist_gan.report import Report
from dist_gan.resume import roll_back
from dist_gan.runtime import Runtime
from dist_gan.state import TrainState
from dist_gan.types import Scalars


class Saving:
    """Saves a run's state and rolls it back. Every method except `note_committed` is collective.

    Args:
        checkpointer: writer of the run's checkpoints.
        runtime: this process and its process groups.
        state: state of the run.
        report: receives an event for each committed checkpoint.
    """

    def __init__(self, checkpointer: Checkpointer, runtime: Runtime, state: TrainState, report: Report) -> None:
        self.checkpointer = checkpointer
        self._runtime, self._state, self._report = runtime, state, report
        self._candidate = HealthCandidate()

    def save(self, scalars: Scalars) -> str:
        """Begins to write a checkpoint, and returns its URL; marks the checkpoint before it as healthy if no failure
        followed.

        Args:
            scalars: latest logged scalars, which the manifest records.

        Raises:
            TrainingFailed: the checkpoint before it could not be written.
        """
        checkpointer, quiet = self.checkpointer, self._state.recovery.quiet
        self.wait()
        proven = self._candidate.proven(quiet=quiet)
        if proven is not None and self._runtime.is_main:
            checkpointer.mark_healthy(proven)
        url = checkpointer.save(self._state.progress.images, self._state.parts(), scalars=scalars)
        self._candidate.replace(url, quiet=quiet)
        self._report.tracker.flush()
        return url

    def note_committed(self) -> None:
        """Reports checkpoints that have been committed since the last call, without waiting."""
        self._report.committed(self.checkpointer.finished())

    def wait(self) -> None:
        """Waits for the checkpoint that is being written, and reports it.

        Raises:
            TrainingFailed: the checkpoint could not be written; raised on every rank.
        """
        self.checkpointer.drain()
        self.note_committed()

    def newest(self) -> str | None:
        """URL of the newest committed checkpoint, after waiting for the one that is being written."""
        url = self.checkpointer.newest().url
        self.note_committed()
        return url

    def roll_back(self, *, reason: str) -> str:
        """Puts the run back to its newest healthy checkpoint, and returns its URL; `commit_rollback` makes it final.

        Args:
            reason: failure that the run is rolled back for.

        Raises:
            TrainingFailed: there is no healthy checkpoint.
        """
        self._candidate.drop()
        target = roll_back(self.checkpointer, self._state, reason=reason)
        self.note_committed()
        return target

    def commit_rollback(self) -> None:
        """Makes a rollback final before training continues, so that a later crash neither undoes nor repeats it."""
        url = self.save({})
        self.wait()
        if self._runtime.is_main:
            self.checkpointer.mark_healthy(url)
            self.checkpointer.end_rollback()
        self._runtime.control_group.barrier()
