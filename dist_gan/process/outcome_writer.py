"""Writer of a run's `outcome.json` on any rank, into the run's folder or the store that keeps its checkpoints."""

from __future__ import annotations

import time
from pathlib import Path

from dist_gan import attempts, storage
from dist_gan.attempts import Claim
from dist_gan.checkpoint import reader
from dist_gan.checkpoint.reader import Commit
from dist_gan.process import terminal
from dist_gan.process.last_words import STEP_WITHIN_S, within
from dist_gan.process.outcome import outcome_of, refuse, write_outcome
from dist_gan.run_folder import RunFolder
from dist_gan.run_mirror import owner_of
from dist_gan.runtime import EndNotice
from dist_gan.types import TrainingFailed

PREEMPTED = 75
"""Exit code of a run that was asked to stop, during training or before training began."""
_OTHER_RANK_S = 1.0
"""Seconds for which a rank waits for the outcome of the rank that has ended the run."""
_COMMIT_WITHIN_S = 3.0
"""Time limit, in seconds, for finding the newest checkpoint of the run, when the run ends."""
_COPIED_WITHIN_S = 15.0
"""Time limit, in seconds, for copying the logs into a store, when a run ends."""


class OutcomeWriter:
    """Writer of the outcome of this attempt (start of the run), with the facts that the outcome contains.

    Rank 0 writes into the run's folder, which it owns. If rank 0 cannot write, another rank writes into the same folder
    if that rank sees it; otherwise into the store beside the checkpoints, if this launch still owns the checkpoints.

    Args:
        run_dir: the run's folder; None where it is not known.
        checkpoints: URL of the folder that holds the run's checkpoints; None where it is not known.
        rank: rank of this process.
    """

    def __init__(self, run_dir: str | None, checkpoints: str | None, *, rank: int) -> None:
        self.run_dir = Path(run_dir) if run_dir is not None else None
        self.folder: RunFolder | None = None
        """The run's folder, on rank 0 after rank 0 has locked the folder; None otherwise."""
        self.attempt: int | None = None
        self.claim: Claim | None = None
        """Rank 0's claim to own the run; None until rank 0 has sent the claim to all ranks."""
        self._checkpoints, self._rank = checkpoints, rank

    def exists(self) -> bool:
        """Returns True if this attempt has an outcome, as far as this rank can see."""
        if self.attempt is None:
            return False
        places = [str(self.run_dir)] if self.run_dir is not None else []
        if self._writes_to_store():
            places.append(self._home())
        return any(outcome_of(place, self.attempt) is not None for place in places)

    def write(self, notice: EndNotice, *, images: int) -> None:
        """Writes the outcome of this attempt, unless the rank that issued the notice has written it.

        Args:
            notice: message that the launch is over, with outcome and reason.
            images: number of images that this rank has seen; the outcome counts at least those of the last checkpoint.
        """
        if self.attempt is None:
            if self._rank == 0 and notice.outcome in ("configuration_wrong", "failed"):
                refuse(self.run_dir, notice.outcome, code=notice.code, reason=notice.reason)
            return
        place = self._place()
        if place is None:
            return
        if notice.rank != self._rank:
            deadline = time.monotonic() + _OTHER_RANK_S
            while not self.exists() and time.monotonic() < deadline:
                time.sleep(0.1)
            if self.exists():
                return
        commit = self._newest_commit()
        try:
            write_outcome(
                place,
                notice.outcome,
                code=PREEMPTED if notice.outcome == "preempted" else notice.code,
                images=max(commit.images if commit is not None else 0, images),
                reason=notice.reason,
                attempt=self.attempt,
                commit=commit.url if commit is not None else None,
            )
        except TrainingFailed as error:
            terminal.say(f"outcome.json could not be written: {error}")
        if notice.outcome == "preempted" and storage.local_path(place) is not None:
            attempts.note_end(Path(place), attempt=self.attempt, outcome="preempted")

    @property
    def seconds(self) -> float:
        """Time limit for the method `write`, in seconds; longer if the checkpoints are in a store."""
        return 2 * STEP_WITHIN_S if self._home() else STEP_WITHIN_S

    def copy_logs(self) -> None:
        """Copies the outcome and the logs into the store that keeps the checkpoints, on rank 0, within a time limit."""
        if self.folder is not None and self.folder.mirror is not None:
            within(self.folder.mirror.push, seconds=_COPIED_WITHIN_S)

    def close(self) -> None:
        """Releases the lock of the run's folder."""
        if self.folder is not None:
            self.folder.close()

    def _place(self) -> str | None:
        """Returns the URL of the folder for `outcome.json`; None if this rank may not write the outcome."""
        if self.run_dir is None or self.attempt is None:
            return None
        if self.folder is not None or attempts.is_latest(self.run_dir, self.attempt):
            return str(self.run_dir)
        if self.claim is None or not self._writes_to_store():
            return None
        owner = owner_of(self._home())
        return self._home() if owner is not None and owner.token == self.claim.token else None

    def _home(self) -> str:
        return self.claim.home if self.claim is not None else ""

    def _writes_to_store(self) -> bool:
        """Returns True on a rank other than 0 if the run keeps its checkpoints outside of the run's folder."""
        return self.folder is None and bool(self._home())

    def _newest_commit(self) -> Commit | None:
        found: list[Commit | None] = []
        checkpoints = self._checkpoints
        if checkpoints is not None:
            within(lambda: found.append(reader.newest_commit(checkpoints)), seconds=_COMMIT_WITHIN_S)
        return found[0] if found else None
