"""Signs of life: which rank died, fell silent or hangs, in words, whatever the ranks that miss it are waiting in.

A collective with a dead rank need not fail: NCCL's kernels spin for ever. So every rank has two threads of its own. One
talks: it tells the launch's store once a second how many landmarks training has passed, and every five seconds it reads
what its two neighbours in the ring of ranks said last, and whether somebody has said that the launch is over. The other
never waits for the store: it judges what the first has found, and ends the process. So each rank costs the store seven
requests in five seconds, however many ranks there are.
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
"""Beats from one look at the neighbours to the next; once one of them seems silent, every beat is one."""
SILENT_AFTER_S = 8.0
"""Eight beats that did not come while the store answers: a machine with ten times more work than cores delays a beat by one
or two seconds, and a call that keeps Python's interpreter to itself for longer is seen by its CPU time."""
COMPARED_FOR_S = 3.0
"""Between the two looks at all ranks that decide who is silent."""
STORE_AWAY_AFTER_S = 12.0
"""Without an answer of the store for so long, its machine is gone, or the way there."""
PAUSED_AFTER_S = 4.0
"""Without a turn for so long, this process itself was stopped, or its machine slept: it knows nothing of the others."""
NEVER_CAME_AFTER_S = 30.0
"""Without a first beat for so long after this rank's own, a neighbour died between joining and beating."""
ENDING_WITHIN_S = 30.0
"""For the last barrier, once rank 0 has said that the run has ended as it should."""


class Beat(NamedTuple):
    """What a rank last said of itself."""

    beats: int
    landmarks: int
    place: str
    """What it began last."""
    host: str
    pid: int
    left: bool = False
    """Whether it has ended as it should."""


class Missing(NamedTuple):
    """What a process could find out about the others."""

    reason: str | None
    """Who died or hangs, in one sentence; None if everybody lives and is equally far."""
    cut_off: bool = False
    """Whether the store did not answer, so that nothing is known of the others, and they may know nothing of this one."""
    missing: tuple[tuple[int, int, str], ...] = ()
    """Rank, process and host of the dead and the silent."""
    hanging: tuple[int, ...] = ()


class _Neighbour:
    """What is known of a rank that this one looks after."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.beat: Beat | None = None
        self.since = time.monotonic()
        """When its last beat was first seen, or it was seen alive otherwise."""
        self.process: Process | None = None
        """Itself, if it is on this machine."""
        self.cpu = 0

    def note(self, beat: Beat) -> None:
        """Takes what it said last, and whether that is new."""
        if beat != self.beat:
            if beat.host == os.uname().nodename and (self.process is None or self.process.pid != beat.pid):
                self.process = Process.find(beat.pid)
            self.beat, self.since = beat, time.monotonic()

    def look(self) -> None:
        """Sees on its own machine that it works without a beat, or is held by a debugger, and is not to be missed."""
        if self.process is not None:
            cpu = self.process.cpu()
            if cpu > self.cpu or self.process.state() == "t":
                self.cpu, self.since = cpu, time.monotonic()

    @property
    def died(self) -> bool:
        """Whether its process is gone from this machine, without having said that it leaves."""
        return self.beat is not None and not self.beat.left and self.process is not None and self.process.state() == "X"

    def silent(self) -> bool:
        """Whether it has said nothing for longer than any load explains."""
        if self.beat is None:
            return time.monotonic() - self.since > NEVER_CAME_AFTER_S
        return not self.beat.left and time.monotonic() - self.since > SILENT_AFTER_S


class Heartbeat:
    """The signs of life of one process.

    Args:
        meeting: of the launch, on a connection that nobody else waits on.
        patience_s: seconds without a landmark after which this process looks for the culprit and ends.
        launcher: of this process, which holds the store on the first machine.
        on_missing: is told who is missing; the process ends when it returns.
        on_over: is told why the launch is over, if another rank said so; the process ends when it returns.
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
        # They are there from here on, empty: a question for a key that is not there would wait for it.
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
        """What this rank began last."""
        return self._place

    def mark(self, place: str) -> None:
        """Passes a landmark: `place` begins. Every rank passes the same ones in the same order."""
        self._place, self._landmarks, self._since = place, self._landmarks + 1, time.monotonic()

    def close(self) -> None:
        """Ends the signs of life with one that says so."""
        self._left = True
        self._stop.set()
        for thread in self._threads:
            thread.join(timeout=2 * INTERVAL_S)

    def missing(self) -> Missing:
        """Who died, and who hangs. Takes a few seconds, and ends even if the store's machine no longer answers."""
        found: list[Missing] = []

        def ask() -> None:
            try:
                found.append(self._missing())
            except Exception as error:
                found.append(Missing(_store_away(type(error).__name__), cut_off=True))

        # A connection without another end answers after minutes, if at all.
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
            if time.monotonic() - last > PAUSED_AFTER_S:  # stopped between the two looks: the others may have been, too
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
        """Ranks of this machine that are known to be gone; where there is no /proc, nobody is."""
        if not has_proc():
            return []
        here = [
            (r, beat) for r, beat in enumerate(beats) if beat is not None and beat.host == _host() and not beat.left
        ]
        return [r for r, beat in here if (found := Process.find(beat.pid)) is None or found.state() == "X"]

    # -- the thread that talks ------------------------------------------------------------------------------------

    def _talk(self) -> None:
        # A connection that broke is broken for good; the other thread judges how long the store has been away.
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

    # -- the thread that judges -----------------------------------------------------------------------------------

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
        """Takes a time in which this process did not run itself off all clocks."""
        now = time.monotonic()
        self._since += pause
        self._answered = now
        for neighbour in self._neighbours:
            neighbour.since = now

    def _look_for_trouble(self, now: float) -> Missing | None:
        """What is certain enough to end this process for."""
        waited = now - self._since
        away = now - self._answered
        if away > STORE_AWAY_AFTER_S:
            held = self._launcher is not None and self._launcher.state() in ("T", "t")
            if waited > STORE_AWAY_AFTER_S and not held:
                return Missing(_store_away(f"for {away:.0f} s"), cut_off=True)
            return None
        for neighbour in self._neighbours:
            neighbour.look()
        # A store that did not answer a moment ago cannot say who is silent.
        if any(n.died or (away < 2 * INTERVAL_S and n.silent()) for n in self._neighbours):
            found = self.missing()
            if found.missing or found.cut_off:
                return found
        if waited > self.patience_s:
            found = self.missing()
            if self._since > time.monotonic() - self.patience_s or self._word is not None:
                return None  # it went on while we were looking, or somebody else has found out
            reason = found.reason or "every rank waits at the same place"
            return found._replace(reason=f"no progress for {waited:.0f} s ({self._place}): {reason}")
        return None

    def _end_without(self, found: Missing) -> None:
        if self._stop.is_set():
            return
        try:
            self._on_missing(found)
        finally:
            _show_stacks()
            os._exit(1)

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
        # Two requests while everybody has beaten once: all ranks ask at the same time when one is lost.
        here = [True] * len(keys) if self._store.check(keys) else [self._store.check([key]) for key in keys]
        values = iter(self._store.multi_get([key for key, there in zip(keys, here, strict=True) if there]))
        read = [next(values) if there else b"" for there in here]
        return [Beat(*json.loads(data)) if data else None for data in read]


def end_the_silent(word: Word) -> None:
    """Kills the ranks of this machine that will not hear the word: they would wait for ever, and their launcher for them."""
    for _, pid, host in word.missing:
        if host == _host() and pid not in (0, os.getpid()):
            with suppress(OSError):
                os.kill(pid, signal.SIGKILL)


def _show_stacks() -> None:
    with suppress(Exception):  # nobody may be reading
        faulthandler.dump_traceback(file=sys.stderr)


def _host() -> str:
    return os.uname().nodename


def _left(beat: Beat | None) -> bool:
    return beat is not None and beat.left


def _busy(process: Process | None, cpu: int) -> bool:
    """Whether a process of this machine works, or is held by a debugger, though it gives no sign."""
    return process is not None and (process.cpu() > cpu or process.state() == "t")


def _where(beat: Beat | None) -> str:
    if beat is None:
        return " and never gave a sign of life"
    return f" in: {beat.place} (process {beat.pid} on {beat.host})"


def _store_away(how: str) -> str:
    return f"rank 0's launcher does not answer {_host()} ({how}): it has ended, or its machine or the network between is gone"
