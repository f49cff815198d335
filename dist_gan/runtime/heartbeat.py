"""Heartbeats between ranks, by which a rank that died, fell silent or hangs is detected and named.

A collective with a dead rank need not fail: NCCL's kernels wait for ever. Every rank therefore has two threads. The
first thread writes a heartbeat once a second to the launch's key-value store, with the number of passed landmarks
(named points of training, such as the start of a network's update, which all ranks pass in the same order). Every five
seconds it reads the heartbeats of the rank's two neighbours in the ring of ranks, and the message that the launch is
over (`EndNotice`), if there is one. The second thread never waits for the store: it judges what the first thread has
read, and ends the process if necessary. Each rank thus makes seven requests to the store in five seconds, whatever the
number of ranks.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from dist_gan.runtime.launcher import Process
from dist_gan.runtime.lost_ranks import (
    Beat,
    LostRanks,
    Neighbour,
    dead_local_ranks,
    host_name,
    judge_ranks,
    local_processes,
)
from dist_gan.runtime.meeting import OVER, EndNotice, Meeting

INTERVAL_S = 1.0
"""Seconds between two heartbeats of a rank."""
READ_EVERY = 5
"""Number of own heartbeats between two readings of the neighbours' heartbeats; 1 while a neighbour seems silent."""
COMPARED_FOR_S = 3.0
"""Seconds between the two readings of all ranks' heartbeats whose comparison shows the silent ranks."""
STORE_AWAY_AFTER_S = 12.0
"""Seconds without an answer of the launch's store after which its machine, or the network to it, counts as lost."""
PAUSED_AFTER_S = 4.0
"""Seconds in which this process did not run, after which it counts as paused; all time limits then start anew."""
ENDING_WITHIN_S = 30.0
"""Time limit, in seconds, of the last barrier of all ranks, after rank 0 has declared the run finished."""


class Heartbeat:
    """Sends the heartbeats of one rank, and watches the heartbeats of its two neighbours in the ring of ranks.

    Args:
        meeting: the launch's store, over a connection used by nothing else.
        patience_s: seconds without a landmark (a named point of training that all ranks pass in the same order) after
            which this process looks for the cause and ends.
        launcher: launcher of this process, which holds the store on the first machine.
        on_lost: function that is called with the lost ranks; when it returns, the process ends with the exit code that it
            returned, or with 1.
        on_notice: function that is called with another rank's message that the launch is over; when it returns, the
            process ends.
    """

    def __init__(
        self,
        meeting: Meeting,
        *,
        patience_s: float,
        launcher: Process | None,
        on_lost: Callable[[LostRanks], object],
        on_notice: Callable[[EndNotice], object],
    ) -> None:
        self.patience_s = patience_s
        self._store, self._rank, self._world_size = meeting.store, meeting.rank, meeting.world_size
        self._launcher, self._on_lost, self._on_notice = launcher, on_lost, on_notice
        self._landmarks, self._landmark, self._passed_at = 0, "starting", time.monotonic()
        self._beats, self._answered_at = 0, time.monotonic()
        self._notice: EndNotice | None = None
        self._left = False
        around = {(self._rank - 1) % self._world_size, (self._rank + 1) % self._world_size}
        self._neighbours = [Neighbour(rank) for rank in sorted(around)]
        self._stop = threading.Event()
        # The keys exist from here on, with empty values: reading an absent key would block.
        for key in (OVER, *(f"beat/{n.rank}" for n in self._neighbours)):
            self._store.compare_set(key, "", "")
        self._send()
        self._threads = [
            threading.Thread(target=target, name=f"heartbeat-{name}", daemon=True)
            for name, target in (("exchange", self._exchange), ("judge", self._judge))
        ]
        for thread in self._threads:
            thread.start()

    @property
    def landmark(self) -> str:
        """Name of the landmark (named point of training) that this rank passed last."""
        return self._landmark

    def mark(self, landmark: str) -> None:
        """Counts a landmark as passed: the part of training named `landmark` begins on this rank.

        Every rank passes the same landmarks in the same order.
        """
        self._landmark, self._landmarks, self._passed_at = landmark, self._landmarks + 1, time.monotonic()

    def close(self) -> None:
        """Sends a last heartbeat, which says that this rank ends normally, and ends both threads."""
        self._left = True
        self._stop.set()
        for thread in self._threads:
            thread.join(timeout=2 * INTERVAL_S)

    def find_lost_ranks(self) -> LostRanks:
        """Returns the dead, silent and hanging ranks.

        The call takes a few seconds, and returns even if the store's machine no longer answers.
        """
        found: list[LostRanks] = []

        def find() -> None:
            try:
                found.append(self._compare_beats())
            except Exception as error:
                found.append(LostRanks(_store_away(type(error).__name__), cut_off=True))

        # A request to a lost machine fails after minutes or never, so the requests run in a thread.
        thread = threading.Thread(target=find, name="heartbeat-find", daemon=True)
        thread.start()
        thread.join(timeout=STORE_AWAY_AFTER_S)
        return found[0] if found else LostRanks(_store_away(f"for {STORE_AWAY_AFTER_S:.0f} s"), cut_off=True)

    def _compare_beats(self) -> LostRanks:
        """Reads the heartbeats of all ranks twice, a few seconds apart; returns the lost ranks that a comparison shows."""
        before = self._read_all()
        processes = local_processes(before)
        last = time.monotonic()
        deadline = last + COMPARED_FOR_S
        while not (dead := dead_local_ranks(before)) and time.monotonic() < deadline:
            time.sleep(INTERVAL_S / 4)
            if self._notice is not None:
                return LostRanks(None)
            if time.monotonic() - last > PAUSED_AFTER_S:
                # This process was stopped in between; the others may have been, too.
                before, deadline = self._read_all(), time.monotonic() + COMPARED_FOR_S
            last = time.monotonic()
        return judge_ranks(before, self._read_all(), own_rank=self._rank, dead=dead, processes=processes)

    # -- thread that sends and reads beats ------------------------------------------------------------------------

    def _exchange(self) -> None:
        # A broken connection stays broken; the other thread judges how long the store has not answered.
        with suppress(Exception):
            while not self._stop.wait(INTERVAL_S):
                self._send()
                self._answered_at = time.monotonic()
                if self._beats % READ_EVERY == 0 or self._suspects_a_neighbour():
                    self._read_neighbours()
            self._send()

    def _send(self) -> None:
        self._beats += 1
        beat = Beat(self._beats, self._landmarks, self._landmark, host_name(), os.getpid(), self._left)
        self._store.set(f"beat/{self._rank}", json.dumps(beat))

    def _read_neighbours(self) -> None:
        notice, *beats = self._store.multi_get([OVER, *(f"beat/{n.rank}" for n in self._neighbours)])
        for neighbour, beat in zip(self._neighbours, beats, strict=True):
            if beat:
                neighbour.record(Beat(*json.loads(beat)))
        self._notice = EndNotice.read(notice)

    def _suspects_a_neighbour(self) -> bool:
        late = time.monotonic() - (READ_EVERY + 1) * INTERVAL_S
        return any(n.has_died() or n.since < late for n in self._neighbours)

    def _read_all(self) -> list[Beat | None]:
        """Returns the latest heartbeat of every rank, in rank order; None for a rank that has sent no heartbeat."""
        keys = [f"beat/{rank}" for rank in range(self._world_size)]
        # Only two requests if every rank has sent a heartbeat, since all ranks read at once after a rank was lost.
        exists = [True] * len(keys) if self._store.check(keys) else [self._store.check([key]) for key in keys]
        values = iter(self._store.multi_get([key for key, there in zip(keys, exists, strict=True) if there]))
        read = [next(values) if there else b"" for there in exists]
        return [Beat(*json.loads(data)) if data else None for data in read]

    # -- thread that judges ---------------------------------------------------------------------------------------

    def _judge(self) -> None:
        last, ended_at = time.monotonic(), None
        while not self._stop.wait(INTERVAL_S / 2):
            now = time.monotonic()
            if now - last > PAUSED_AFTER_S:
                self._discount_pause(now - last)
            notice = self._notice
            if notice is not None and notice.at_end:
                ended_at = ended_at or now
                if now - ended_at > ENDING_WITHIN_S:
                    self._end_by_notice(notice)
            elif notice is not None:
                self._end_by_notice(notice)
            elif lost := self._look_for_lost_ranks(now):
                self._end_without(lost)
            last = time.monotonic()

    def _discount_pause(self, pause: float) -> None:
        """Excludes a pause of this process itself, of `pause` seconds, from all time limits."""
        now = time.monotonic()
        self._passed_at += pause
        self._answered_at = now
        for neighbour in self._neighbours:
            neighbour.since = now

    def _look_for_lost_ranks(self, now: float) -> LostRanks | None:
        """Returns the lost ranks if they are certain enough to end this process; None otherwise.

        Args:
            now: present time, a value of `time.monotonic`.
        """
        waited = now - self._passed_at
        away = now - self._answered_at
        if away > STORE_AWAY_AFTER_S:
            is_stopped = self._launcher is not None and self._launcher.state() in ("T", "t")
            if waited > STORE_AWAY_AFTER_S and not is_stopped:
                return LostRanks(_store_away(f"for {away:.0f} s"), cut_off=True)
            return None
        for neighbour in self._neighbours:
            neighbour.check_process()
        # Heartbeats may seem late only because the store has not answered.
        if any(n.has_died() or (away < 2 * INTERVAL_S and n.is_silent()) for n in self._neighbours):
            lost = self.find_lost_ranks()
            if lost.unreachable or lost.cut_off:
                return lost
        if waited > self.patience_s:
            lost = self.find_lost_ranks()
            if self._passed_at > time.monotonic() - self.patience_s or self._notice is not None:
                return None  # training went on meanwhile, or another rank has published a notice
            reason = lost.reason or "every rank waits at the same place"
            return lost._replace(reason=f"no progress for {waited:.0f} s ({self._landmark}): {reason}")
        return None

    def _end_without(self, lost: LostRanks) -> None:
        if self._stop.is_set():
            return
        code: object = 1
        try:
            code = self._on_lost(lost)  # 0 if the run had ended normally before the rank was lost
        finally:
            code = code if isinstance(code, int) else 1
            if code:
                _print_stacks()
            os._exit(code)

    def _end_by_notice(self, notice: EndNotice) -> None:
        if self._stop.is_set():
            return
        try:
            self._on_notice(notice)
        finally:
            if self._rank in notice.hanging:
                _print_stacks()
            os._exit(notice.code)


def _print_stacks() -> None:
    """Prints the stack of each thread of this process to standard error."""
    with suppress(Exception):  # stderr may be closed
        faulthandler.dump_traceback(file=sys.stderr)


def _store_away(how: str) -> str:
    return f"rank 0's launcher does not answer {host_name()} ({how}): it has ended, or its machine or the network between is gone"
