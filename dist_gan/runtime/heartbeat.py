"""Heartbeats between ranks: detects and names a rank that died, fell silent or hangs, even inside a collective.

A collective with a dead rank need not fail: NCCL's kernels spin for ever. Every rank therefore has two threads. The
first one writes a heartbeat with the number of passed landmarks to the launch's store once a second, and every five
seconds reads the heartbeats of the rank's two neighbours in the ring of ranks, and the verdict that the launch is over,
if there is one. The second thread never waits for the store: it judges the first one's findings, and ends the process.
Each rank thus costs the store seven requests in five seconds, whatever the number of ranks.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

from dist_gan.runtime.launcher import Process, has_proc
from dist_gan.runtime.meeting import OVER, Meeting, Word

INTERVAL_S = 1.0
LOOK_EVERY = 5
"""Interval, in beats, at which the neighbours' beats are read; every beat once a neighbour seems silent."""
SILENT_AFTER_S = 8.0
"""Seconds without a beat, while the store answers, after which a rank counts as silent. A machine with ten times more
work than cores delays a beat by one or two seconds; a call that holds Python's GIL for longer shows in the CPU time."""
COMPARED_FOR_S = 3.0
"""Seconds between the two readings of all ranks' beats whose comparison shows the silent ranks."""
STORE_AWAY_AFTER_S = 12.0
"""Seconds without an answer of the store after which its machine, or the network to it, counts as gone."""
PAUSED_AFTER_S = 4.0
"""Seconds without running after which this process counts as stopped, or its machine as asleep; all clocks restart."""
NEVER_CAME_AFTER_S = 30.0
"""Seconds without a neighbour's first beat, after this rank's own, after which it counts as dead since it joined."""
ENDING_WITHIN_S = 30.0
"""Time limit, in seconds, of the last barrier, after rank 0 has declared the run finished."""


class Beat(NamedTuple):
    """The latest heartbeat of a rank."""

    beats: int
    landmarks: int
    place: str
    """Name of the landmark that the rank passed last."""
    host: str
    pid: int
    left: bool = False
    """True if the rank has ended normally."""


class Missing(NamedTuple):
    """Findings of one rank about the other ranks."""

    reason: str | None
    """Sentence that names the dead or hanging ranks; None if all live and have passed the same landmarks."""
    cut_off: bool = False
    """True if the store did not answer: the state of the other ranks is unknown, and they may not know this rank's."""
    missing: tuple[tuple[int, int, str], ...] = ()
    """Rank, process ID and host of each dead or silent rank."""
    hanging: tuple[int, ...] = ()
    """Ranks that live, but are behind the others."""


class _Neighbour:
    """State of a neighbouring rank that this rank watches."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.beat: Beat | None = None
        self.since = time.monotonic()
        """Time at which the rank's latest beat was first seen, or its process was seen alive otherwise."""
        self.process: Process | None = None
        """Process of the neighbour, if it runs on this machine; None otherwise."""
        self.cpu = 0

    def note(self, beat: Beat) -> None:
        """Records the rank's latest beat, and the time if it is new."""
        if beat != self.beat:
            if beat.host == os.uname().nodename and (self.process is None or self.process.pid != beat.pid):
                self.process = Process.find(beat.pid)
            self.beat, self.since = beat, time.monotonic()

    def look(self) -> None:
        """Counts a local process as alive if it used CPU time or is held by a debugger, even without a beat."""
        if self.process is not None:
            cpu = self.process.cpu()
            if cpu > self.cpu or self.process.state() == "t":
                self.cpu, self.since = cpu, time.monotonic()

    @property
    def died(self) -> bool:
        """True if the rank ran on this machine and its process is gone without a last beat."""
        return self.beat is not None and not self.beat.left and self.process is not None and self.process.state() == "X"

    def silent(self) -> bool:
        """True if the rank has sent no beat for longer than load can explain."""
        if self.beat is None:
            return time.monotonic() - self.since > NEVER_CAME_AFTER_S
        return not self.beat.left and time.monotonic() - self.since > SILENT_AFTER_S


class Heartbeat:
    """Sends the heartbeats of one rank, and watches those of its neighbours.

    Args:
        meeting: the launch's store, over a connection used by nothing else.
        patience_s: seconds without a landmark after which this process looks for the cause and ends.
        launcher: launcher of this process, which holds the store on the first machine.
        on_missing: called with the missing ranks; the process ends when it returns.
        on_over: called with another rank's verdict that the launch is over; the process ends when it returns.
    """

    def __init__(
        self,
        meeting: Meeting,
        *,
        patience_s: float,
        launcher: Process | None,
        on_missing: Callable[[Missing], object],
        on_over: Callable[[Word], object],
    ) -> None:
        self.patience_s = patience_s
        self._store, self._rank, self._world_size = meeting.store, meeting.rank, meeting.world_size
        self._launcher, self._on_missing, self._on_over = launcher, on_missing, on_over
        self._landmarks, self._place, self._since = 0, "starting", time.monotonic()
        self._beats, self._answered = 0, time.monotonic()
        self._word: Word | None = None
        self._left = False
        around = {(self._rank - 1) % self._world_size, (self._rank + 1) % self._world_size}
        self._neighbours = [_Neighbour(rank) for rank in sorted(around)]
        self._stop = threading.Event()
        # The keys exist from here on, with empty values: reading an absent key would block.
        for key in (OVER, *(f"beat/{n.rank}" for n in self._neighbours)):
            self._store.compare_set(key, "", "")
        self._beat()
        self._threads = [
            threading.Thread(target=target, name=f"heartbeat-{name}", daemon=True)
            for name, target in (("talk", self._talk), ("judge", self._judge))
        ]
        for thread in self._threads:
            thread.start()

    @property
    def place(self) -> str:
        """Name of the landmark that this rank passed last."""
        return self._place

    def mark(self, place: str) -> None:
        """Passes a landmark: `place` begins. Every rank passes the same ones in the same order."""
        self._place, self._landmarks, self._since = place, self._landmarks + 1, time.monotonic()

    def close(self) -> None:
        """Ends the heartbeats with a last one that announces the normal end."""
        self._left = True
        self._stop.set()
        for thread in self._threads:
            thread.join(timeout=2 * INTERVAL_S)

    def missing(self) -> Missing:
        """Dead and hanging ranks. Takes a few seconds, and returns even if the store's machine no longer answers."""
        found: list[Missing] = []

        def ask() -> None:
            try:
                found.append(self._missing())
            except Exception as error:
                found.append(Missing(_store_away(type(error).__name__), cut_off=True))

        # A request to a machine that is gone fails after minutes, if at all; so it runs in a thread.
        asking = threading.Thread(target=ask, name="heartbeat-missing", daemon=True)
        asking.start()
        asking.join(timeout=STORE_AWAY_AFTER_S)
        return found[0] if found else Missing(_store_away(f"for {STORE_AWAY_AFTER_S:.0f} s"), cut_off=True)

    def _missing(self) -> Missing:
        before = self._read()
        known = {
            r: Process.find(beat.pid) for r, beat in enumerate(before) if beat is not None and beat.host == _host()
        }
        cpu = {r: process.cpu() for r, process in known.items() if process is not None}
        deadline = time.monotonic() + COMPARED_FOR_S
        last = time.monotonic()
        while not (dead := self._dead(before)) and time.monotonic() < deadline:
            time.sleep(INTERVAL_S / 4)
            if self._word is not None:
                return Missing(None)
            if (
                time.monotonic() - last > PAUSED_AFTER_S
            ):  # this process was stopped in between; the others may have been, too
                before, deadline = self._read(), time.monotonic() + COMPARED_FOR_S
            last = time.monotonic()
        now = self._read()
        silent = [] if dead else [r for r, b in enumerate(now) if r != self._rank and (b is None or b == before[r])]
        silent = [r for r in silent if not _busy(known.get(r), cpu.get(r, 0)) and not _left(now[r])]
        dead = [r for r in dead if not _left(now[r])]
        if dead or silent:
            reason = "; ".join(
                f"rank {r} {'died' if r in dead else 'has fallen silent'}{_where(now[r])}" for r in dead + silent
            )
            lost = [(r, now[r]) for r in dead + silent]
            return Missing(reason, missing=tuple((r, b.pid if b else 0, b.host if b else "") for r, b in lost))
        reached = [beat.landmarks for beat in now if beat is not None]
        behind = [r for r, b in enumerate(now) if b is not None and not b.left and b.landmarks < max(reached)]
        if behind:
            return Missing("; ".join(f"rank {r} hangs{_where(now[r])}" for r in behind), hanging=tuple(behind))
        return Missing(None)

    @staticmethod
    def _dead(beats: list[Beat | None]) -> list[int]:
        """Ranks of this machine whose processes are gone; empty without /proc."""
        if not has_proc():
            return []
        here = [
            (r, beat) for r, beat in enumerate(beats) if beat is not None and beat.host == _host() and not beat.left
        ]
        return [r for r, beat in here if (found := Process.find(beat.pid)) is None or found.state() == "X"]

    # -- thread that sends and reads beats ------------------------------------------------------------------------------------

    def _talk(self) -> None:
        # A broken connection stays broken; the other thread judges how long the store has not answered.
        with suppress(Exception):
            while not self._stop.wait(INTERVAL_S):
                self._beat()
                self._answered = time.monotonic()
                if self._beats % LOOK_EVERY == 0 or self._suspicious():
                    self._look()
            self._beat()

    def _beat(self) -> None:
        self._beats += 1
        mine = Beat(self._beats, self._landmarks, self._place, _host(), os.getpid(), self._left)
        self._store.set(f"beat/{self._rank}", json.dumps(mine))

    def _look(self) -> None:
        word, *beats = self._store.multi_get([OVER, *(f"beat/{n.rank}" for n in self._neighbours)])
        for neighbour, beat in zip(self._neighbours, beats, strict=True):
            if beat:
                neighbour.note(Beat(*json.loads(beat)))
        self._word = Word.read(word)

    def _suspicious(self) -> bool:
        return any(n.died or time.monotonic() - n.since > (LOOK_EVERY + 1) * INTERVAL_S for n in self._neighbours)

    # -- thread that judges -----------------------------------------------------------------------------------

    def _judge(self) -> None:
        last, ended_at = time.monotonic(), None
        while not self._stop.wait(INTERVAL_S / 2):
            now = time.monotonic()
            if now - last > PAUSED_AFTER_S:
                self._excuse(now - last)
            word = self._word
            if word is not None and word.at_end:
                ended_at = ended_at or now
                if now - ended_at > ENDING_WITHIN_S:
                    self._end_for(word)
            elif word is not None:
                self._end_for(word)
            elif found := self._look_for_trouble(now):
                self._end_without(found)
            last = time.monotonic()

    def _excuse(self, pause: float) -> None:
        """Excludes a pause of this process itself from all time limits."""
        now = time.monotonic()
        self._since += pause
        self._answered = now
        for neighbour in self._neighbours:
            neighbour.since = now

    def _look_for_trouble(self, now: float) -> Missing | None:
        """Findings certain enough to end this process; None if there are none."""
        waited = now - self._since
        away = now - self._answered
        if away > STORE_AWAY_AFTER_S:
            held = self._launcher is not None and self._launcher.state() in ("T", "t")
            if waited > STORE_AWAY_AFTER_S and not held:
                return Missing(_store_away(f"for {away:.0f} s"), cut_off=True)
            return None
        for neighbour in self._neighbours:
            neighbour.look()
        # Beats may be missing because the store has not answered.
        if any(n.died or (away < 2 * INTERVAL_S and n.silent()) for n in self._neighbours):
            found = self.missing()
            if found.missing or found.cut_off:
                return found
        if waited > self.patience_s:
            found = self.missing()
            if self._since > time.monotonic() - self.patience_s or self._word is not None:
                return None  # training went on meanwhile, or another rank has given a verdict
            reason = found.reason or "every rank waits at the same place"
            return found._replace(reason=f"no progress for {waited:.0f} s ({self._place}): {reason}")
        return None

    def _end_without(self, found: Missing) -> None:
        if self._stop.is_set():
            return
        code: object = 1
        try:
            code = self._on_missing(found)  # 0 if the run had ended as it should before the rank went
        finally:
            code = code if isinstance(code, int) else 1
            if code:
                _show_stacks()
            os._exit(code)

    def _end_for(self, word: Word) -> None:
        if self._stop.is_set():
            return
        try:
            self._on_over(word)
        finally:
            if self._rank in word.hanging:
                _show_stacks()
            os._exit(word.code)

    def _read(self) -> list[Beat | None]:
        keys = [f"beat/{rank}" for rank in range(self._world_size)]
        # Two requests once every rank has sent a beat: all ranks ask at the same time when one is lost.
        here = [True] * len(keys) if self._store.check(keys) else [self._store.check([key]) for key in keys]
        values = iter(self._store.multi_get([key for key, there in zip(keys, here, strict=True) if there]))
        read = [next(values) if there else b"" for there in here]
        return [Beat(*json.loads(data)) if data else None for data in read]


def end_the_silent(word: Word) -> None:
    """Kills ranks of this machine that cannot read the verdict: they, and their launcher, would wait for ever."""
    for _, pid, host in word.missing:
        if host == _host() and pid not in (0, os.getpid()):
            with suppress(OSError):
                os.kill(pid, signal.SIGKILL)


def _show_stacks() -> None:
    with suppress(Exception):  # stderr may be closed
        faulthandler.dump_traceback(file=sys.stderr)


def _host() -> str:
    return os.uname().nodename


def _left(beat: Beat | None) -> bool:
    return beat is not None and beat.left


def _busy(process: Process | None, cpu: int) -> bool:
    """True if a process of this machine used CPU time since it had used `cpu` ticks, or is held by a debugger."""
    return process is not None and (process.cpu() > cpu or process.state() == "t")


def _where(beat: Beat | None) -> str:
    if beat is None:
        return " and never gave a sign of life"
    return f" in: {beat.place} (process {beat.pid} on {beat.host})"


def _store_away(how: str) -> str:
    return f"rank 0's launcher does not answer {_host()} ({how}): it has ended, or its machine or the network between is gone"
