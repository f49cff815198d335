"""End of a run on one rank, after success or any failure: notice, `outcome.json`, one sentence, and exit code.

A notice (`EndNotice`) tells the other ranks that the launch is over. The first rank that puts a notice into the launch's
store writes the outcome and prints the sentence; the other ranks exit silently once they read the notice. `outcome.json`
contains the number of the attempt (start of the run) that it belongs to, and only ranks of that attempt write it.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import traceback
from typing import NoReturn

from dist_gan import storage
from dist_gan.process.last_words import DISK_TROUBLE, STEP_WITHIN_S, say_last, within, write_error_file
from dist_gan.process.outcome_writer import PREEMPTED, OutcomeWriter
from dist_gan.runtime import (
    EndNotice,
    LostRanks,
    Meeting,
    MeetingFailed,
    Process,
    Runtime,
    StoppedBeforeTraining,
    StopRequest,
    find_launcher,
    kill_unreachable_ranks,
)
from dist_gan.state import Progress
from dist_gan.types import TrainingFailed, UserError
from dist_gan.wording import report, safe

FINISHED, CRASHED, CONFIGURATION_WRONG, FAILED = 0, 1, 2, 3
_RANK_ZERO_FIRST_S = 2.0
"""Seconds for which another rank waits with an error that all ranks find, so that rank 0 can report the error first."""
_OUTCOME_WITHIN_S = 8.0
"""Seconds for which a rank without connection to the store waits for rank 0 to find lost ranks and write the outcome."""
_SAVED_WITHIN_S, _ASKED_BEFORE_S = 10.0, 30.0
"""Seconds in which a rank may save and stop after its launcher has ended: without and with an earlier stop request."""
_LOOK_S = 1.0


class Ending:
    """Everything that a process needs in order to end, and one method for each way in which a process may end.

    Args:
        run_dir: the run's folder; None where it is not known.
        checkpoints: URL of the folder that holds the run's checkpoints; None where it is not known.
    """

    def __init__(self, run_dir: str | None, checkpoints: str | None = None) -> None:
        self.rank, self.world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        self.outcome = OutcomeWriter(run_dir, checkpoints, rank=self.rank)
        self.meeting: Meeting | None = None
        self.runtime: Runtime | None = None
        self.progress: Progress | None = None
        self.stop: StopRequest | None = None
        self._launcher = find_launcher(os.environ)
        self._done = threading.Event()
        self._leaving = threading.Lock()
        self._said: EndNotice | None = None

    # -- normal end -----------------------------------------------------------------------------------------------

    def well(self, *, images: int, commit: str | None, stopped_by: str | None) -> int:
        """Ends a run that finished or was asked to stop, on all ranks together; returns the exit code.

        A launcher with `--max-restarts` would restart a stopped run at once, so under such a launcher the code is 0.

        Args:
            images: number of images that the run has seen.
            commit: URL of the last checkpoint; None without a checkpoint.
            stopped_by: name of the stop signal; None for a finished run.
        """
        code = FINISHED if stopped_by is None else PREEMPTED
        shown = FINISHED if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0 else code
        outcome = "finished" if stopped_by is None else "preempted"
        reason = "" if stopped_by is None else f"asked to stop by {stopped_by}"
        folder = self.outcome.folder
        if folder is not None:
            folder.write_outcome(outcome, code=code, images=images, reason=reason, commit=commit)
            self.outcome.copy_logs()
            self._said = EndNotice(self.rank, outcome, shown, reason, at_end=True)
            if self.meeting is not None:
                self.meeting.publish_notice(self._said)
        if self.runtime is not None:
            self.runtime.control_group.barrier()
        if shown != FINISHED:
            write_error_file(f"{reason}, and saved: start the same command again to go on", time.time())
        self._done.set()
        if self.runtime is not None:
            self.runtime.close()
        return shown

    # -- failures ------------------------------------------------------------------------------------------------

    def badly(self, error: BaseException) -> int:
        """Ends the run because of an exception; returns the exit code."""
        match error:
            case StoppedBeforeTraining():
                return self._stopped(str(error))
            case UserError():
                return self.leave(
                    "configuration_wrong", code=CONFIGURATION_WRONG, reason=str(error), rank_zero_first=True
                )
            case TrainingFailed():
                return self.leave("failed", code=FAILED, reason=str(error), rank_zero_first=True)
            case MeetingFailed():
                return self.leave("crashed", code=CRASHED, reason=str(error))
            case OSError() if error.errno in DISK_TROUBLE:
                reason = f"cannot write {error.filename or self.outcome.run_dir}: {storage.why(error)}"
                return self.leave("failed", code=FAILED, reason=reason)
            case RuntimeError() if self.runtime is not None and self.world_size > 1:
                lost = self.runtime.find_lost_ranks()  # a failed collective is usually the consequence of a lost rank
                if lost.reason is not None:
                    return self.lost(lost)
        reason = safe(" ".join(f"{type(error).__name__}: {error}".split()))
        if self.world_size > 1:
            place = f" in: {self.runtime.landmark}" if self.runtime is not None else " before training"
            here = f"process {os.getpid()} on {os.uname().nodename}"
            reason = f"rank {self.rank} failed{place} ({here}): {reason}"
        return self.leave("crashed", code=CRASHED, reason=reason, error=error)

    def refused_by(self, notice: EndNotice) -> int:
        """Ends a start that a rank has refused; returns the exit code. Rank 0 reports it, as owner of the run's folder."""
        if self.rank != 0:
            self.heard(notice)
            return notice.code
        reason = (
            notice.reason if notice.outcome == "crashed" or notice.rank == 0 else f"rank {notice.rank}: {notice.reason}"
        )
        return self.leave(notice.outcome, code=notice.code, reason=reason)

    def asked_twice(self, name: str) -> None:
        """Ends the run without saving, because a second stop signal, `name`, has arrived."""
        if not self._leaving.locked():
            reason = (
                f"asked to stop again ({name}): left at once, without saving; start the same command again to resume"
            )
            self.leave("crashed", code=CRASHED, reason=reason)

    def lost(self, lost: LostRanks) -> int:
        """Ends the run because other ranks are lost, or this rank is cut off from them; returns the exit code."""
        reason = f"{lost.reason}; start the same command again to resume"
        if lost.cut_off:
            return self._cut_off(reason)
        return self.leave("crashed", code=CRASHED, reason=reason, lost=lost)

    def heard(self, notice: EndNotice) -> None:
        """Ends this rank because another rank's notice says that the launch is over."""
        if self._leaving.acquire(blocking=False):
            self._hear(notice)
        else:
            time.sleep(4 * STEP_WITHIN_S)  # another thread is already ending the process

    def leave(
        self,
        outcome: str,
        *,
        code: int,
        reason: str,
        lost: LostRanks | None = None,
        rank_zero_first: bool = False,
        error: BaseException | None = None,
    ) -> int:
        """Ends the run, and reports the reason unless another rank has already reported one; returns the exit code.

        Args:
            outcome: value of `outcome` in `outcome.json`.
            code: exit code.
            reason: one sentence.
            lost: lost ranks, which are named in the notice to the others; None without lost ranks.
            rank_zero_first: True to wait for rank 0, which may be about to report the same error.
            error: exception whose traceback is printed before the sentence.
        """
        if not self._leaving.acquire(blocking=False):
            time.sleep(4 * STEP_WITHIN_S)
            return code
        notice = EndNotice(self.rank, outcome, code, self._cause(reason) if outcome == "crashed" else reason)
        if lost is not None:
            notice = notice._replace(unreachable=lost.unreachable, hanging=lost.hanging)
        held = self._said or self._claim(notice, rank_zero_first=rank_zero_first and self.rank != 0)
        if held.at_end or held.rank != self.rank:
            self._hear(held)
            return held.code
        self._speak(held, error)
        return code

    def _claim(self, notice: EndNotice, *, rank_zero_first: bool) -> EndNotice:
        """Publishes a notice of the end; returns the notice in force, or the given notice if the store does not answer."""
        meeting = self.meeting
        if meeting is None:
            return notice
        began = self.outcome.attempt is not None
        found: list[EndNotice] = []

        def ask() -> None:
            if not began and self.rank != 0:
                found.append(meeting.raise_objection(notice, patience_s=4 * STEP_WITHIN_S))
                return
            deadline = time.monotonic() + _RANK_ZERO_FIRST_S
            while rank_zero_first and time.monotonic() < deadline:
                if (held := meeting.notice()) is not None:
                    found.append(held)
                    return
                time.sleep(0.1)
            found.append(meeting.publish_notice(notice))

        within(ask, seconds=STEP_WITHIN_S if began or self.rank == 0 else 5 * STEP_WITHIN_S)
        return found[0] if found else notice

    def _speak(self, notice: EndNotice, error: BaseException | None) -> None:
        self._write_outcome(notice)
        if error is not None:
            within(lambda: print(report("".join(traceback.format_exception(error))), file=sys.stderr, flush=True))
        within(lambda: say_last(notice.reason, launcher_waits=self._launcher_waits()))
        kill_unreachable_ranks(notice)
        self.outcome.copy_logs()
        self._wait_for_the_others(notice)

    def _write_outcome(self, notice: EndNotice) -> None:
        images = self.progress.images if self.progress is not None else 0
        within(lambda: self.outcome.write(notice, images=images), seconds=self.outcome.seconds)

    def _hear(self, notice: EndNotice) -> None:
        """Ends a rank because of another rank's notice; the owner of the run's folder writes a missing outcome."""
        if self.outcome.folder is not None and not notice.at_end:
            self._write_outcome(notice)
        if not notice.at_end:
            write_error_file(f"left with rank {notice.rank}, which has ended the run", time.time())
        kill_unreachable_ranks(notice)
        meeting = self.meeting
        if meeting is not None and self._said is None:
            within(meeting.confirm_notice)
        if not notice.at_end:
            self.outcome.copy_logs()
        self._wait_for_the_others(notice)

    def _wait_for_the_others(self, notice: EndNotice) -> None:
        """Waits, on rank 0, until all reachable ranks have read the notice; the store may end together with rank 0."""
        meeting = self.meeting
        if meeting is not None and self.rank == 0 and not notice.at_end:
            within(lambda: meeting.wait_for_confirmations(notice), seconds=2 * STEP_WITHIN_S)

    def _cut_off(self, reason: str) -> int:
        """Ends a rank that cannot reach the launch's store; returns the exit code. Only local rank 0 reports the reason."""
        if not self._leaving.acquire(blocking=False):
            time.sleep(4 * STEP_WITHIN_S)
            return CRASHED
        notice = EndNotice(self.rank, "crashed", CRASHED, self._cause(reason))
        if int(os.environ.get("LOCAL_RANK", "0")) == 0:
            deadline = time.monotonic() + (_OUTCOME_WITHIN_S if self.outcome.folder is None else 0.0)
            told: list[bool] = []
            within(lambda: told.append(self._is_told_by(deadline)), seconds=2 * _OUTCOME_WITHIN_S)
            if told != [True]:
                self._write_outcome(notice)
            within(lambda: say_last(notice.reason, launcher_waits=self._launcher_waits()))
            self.outcome.copy_logs()
        return CRASHED

    def _is_told_by(self, deadline: float) -> bool:
        """Returns True once another rank has written the outcome, False at `deadline`, a value of `time.monotonic`."""
        while not self.outcome.exists():
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.2)
        return True

    def _stopped(self, name: str) -> int:
        """Ends the run because of a stop signal before training began; returns the exit code."""
        notice = self._notice_so_far()
        if notice is not None:
            return self.leave(notice.outcome, code=notice.code, reason=notice.reason)
        code = FINISHED if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0 else PREEMPTED
        died: list[str | None] = []
        meeting = self.meeting
        if meeting is not None and name == "SIGTERM":
            within(lambda: died.append(meeting.dead_local_ranks(os.environ)))
        if died and died[0] is not None:
            reason = f"rank {died[0]} ended before it joined the others, and the launcher has ended this start ({name})"
            return self.leave("crashed", code=CRASHED, reason=reason)
        reason = f"asked to stop by {name} before training began; start the same command again to go on"
        return self.leave("preempted", code=code, reason=reason, rank_zero_first=True)

    def _notice_so_far(self) -> EndNotice | None:
        found: list[EndNotice | None] = []
        meeting = self.meeting
        if meeting is not None:
            within(lambda: found.append(meeting.objection()))
        return found[0] if found else None

    def _cause(self, reason: str) -> str:
        """Returns the end of this process's launcher as the reason, if it has ended: what fails afterwards follows from it."""
        if self._launcher is None or self._launcher_waits():
            return reason
        host = f"{os.uname().nodename} (process {self._launcher.pid})"
        return f"the launcher of {host} has ended without its ranks; start the same command again to resume"

    def _launcher_waits(self) -> bool:
        return self._launcher is not None and not self._launcher.has_ended()

    # -- the launcher ---------------------------------------------------------------------------------------------

    def watch_launcher(self) -> None:
        """Starts a thread that ends this process soon after its launcher has ended."""
        if self._launcher is not None:
            threading.Thread(target=self._watch, args=(self._launcher,), name="launcher", daemon=True).start()

    def _watch(self, launcher: Process) -> None:
        while not launcher.has_ended():
            if self._done.wait(_LOOK_S):
                return
        if self._done.is_set():
            return
        # A lone process can save by itself. Several ranks would have to agree, and their store may be gone.
        if self.stop is not None and (self.world_size == 1 or self.stop.requested):
            seconds = _ASKED_BEFORE_S if self.stop.requested else _SAVED_WITHIN_S
            self.stop.request("the end of its launcher")
            self._done.wait(seconds)
        if self._done.is_set():
            return
        if os.environ.get("GROUP_RANK", "0") == "0":
            self.meeting = None  # the first machine's launcher held the store
        if int(os.environ.get("LOCAL_RANK", "0")) == 0:
            self.leave("crashed", code=CRASHED, reason="the launcher has ended")
        self.exit(CRASHED)

    # -- the end --------------------------------------------------------------------------------------------------

    def close(self, code: int) -> None:
        """Releases the run's folder and the signal handlers.

        After a failure in a launch of several ranks, exits with `code` at once, since a normal exit may wait for lost ranks.
        """
        self._done.set()
        if self.outcome.attempt is not None and self.world_size > 1 and self._leaving.locked():
            self.exit(code)
        self.outcome.close()
        if self.stop is not None:
            self.stop.close()

    def exit(self, code: int) -> NoReturn:
        """Ends the process at once, without waiting for threads, process groups or open files."""
        within(self.outcome.close)
        for stream in (sys.stdout, sys.stderr):
            within(stream.flush)
        os._exit(code)
