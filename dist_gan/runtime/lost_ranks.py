"""Judgement of ranks by their heartbeats: each rank is alive, dead, silent, or hangs while the others wait for it.

A landmark is a named point of training that all ranks pass in the same order, so a rank that hangs has passed fewer.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple

from dist_gan.runtime.launcher import Process, has_proc
from dist_gan.runtime.meeting import EndNotice

SILENT_AFTER_S = 8.0
"""Seconds without a heartbeat, while the launch's store answers, after which a rank counts as silent.

A machine with ten times more work than cores delays a heartbeat by one or two seconds. A call that holds Python's GIL
for longer can be told from a dead rank, since the process uses CPU time.
"""
FIRST_BEAT_WITHIN_S = 30.0
"""Seconds after this rank's first heartbeat within which a neighbour has to send its first; later it counts as silent."""


class Beat(NamedTuple):
    """The latest heartbeat of a rank, as it is stored for the other ranks."""

    beats: int
    """Number of heartbeats sent so far."""
    landmarks: int
    """Number of landmarks passed so far."""
    landmark: str
    """Name of the landmark that the rank passed last, such as `the generator's turn`."""
    host: str
    pid: int
    left: bool = False
    """True if the rank has ended normally."""


class LostRanks(NamedTuple):
    """Ranks that died, fell silent or hang, as far as one rank can see."""

    reason: str | None
    """Sentence that names the lost ranks; None if all ranks are alive and have passed equally many landmarks."""
    cut_off: bool = False
    """True if the launch's store did not answer; this rank and the others then cannot learn each other's state."""
    unreachable: tuple[tuple[int, int, str], ...] = ()
    """Rank, process ID and host of each dead or silent rank."""
    hanging: tuple[int, ...] = ()
    """Ranks that are alive, but have passed fewer landmarks (named points of training) than the others."""


class Neighbour:
    """A rank that this rank watches, with the time at which it was last seen alive.

    Args:
        rank: the neighbour's rank.
    """

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.beat: Beat | None = None
        self.since = time.monotonic()
        """Time (`time.monotonic`) at which a new heartbeat of the rank, or activity of its process, was last seen."""
        self.process: Process | None = None
        """Process of the neighbour, if it runs on this machine; None otherwise."""
        self.cpu = 0
        """CPU time, in clock ticks, that the process had used when it was last seen active."""

    def record(self, beat: Beat) -> None:
        """Records a heartbeat of the watched rank, and the present time if the heartbeat is new."""
        if beat != self.beat:
            if beat.host == host_name() and (self.process is None or self.process.pid != beat.pid):
                self.process = Process.find(beat.pid)
            self.beat, self.since = beat, time.monotonic()

    def check_process(self) -> None:
        """Counts the watched rank as alive now if its process on this machine used CPU time or is held by a debugger."""
        if self.process is not None and self.process.is_active_since(self.cpu):
            self.cpu, self.since = self.process.cpu(), time.monotonic()

    def has_died(self) -> bool:
        """Returns True if the watched rank's process on this machine has ended without the heartbeat of a normal end."""
        return self.beat is not None and not self.beat.left and self.process is not None and self.process.has_ended()

    def is_silent(self) -> bool:
        """Returns True if the watched rank has sent no heartbeat for longer than a high load of its machine can explain."""
        silence = time.monotonic() - self.since
        if self.beat is None:
            return silence > FIRST_BEAT_WITHIN_S
        return not self.beat.left and silence > SILENT_AFTER_S


class LocalProcess(NamedTuple):
    """Process of a rank of this machine, with the CPU time that it had used at an earlier reading."""

    process: Process
    cpu: int
    """CPU time that the process had used at the earlier reading, in clock ticks."""

    def is_active(self) -> bool:
        """Returns True if the process has used CPU time since the earlier reading, or is held by a debugger."""
        return self.process.is_active_since(self.cpu)


def local_processes(beats: Sequence[Beat | None]) -> dict[int, LocalProcess]:
    """Returns the processes of the ranks on this machine by rank, with the CPU time that each has used by now.

    Args:
        beats: latest heartbeat of every rank, in rank order; None for a rank that has sent no heartbeat.
    """
    found = {}
    for rank, beat in enumerate(beats):
        if beat is not None and beat.host == host_name() and (process := Process.find(beat.pid)) is not None:
            found[rank] = LocalProcess(process, process.cpu())
    return found


def dead_local_ranks(beats: Sequence[Beat | None]) -> list[int]:
    """Returns the ranks on this machine whose processes have ended without the heartbeat of a normal end.

    The list is empty on a system without /proc.

    Args:
        beats: latest heartbeat of every rank, in rank order; None for a rank that has sent no heartbeat.
    """
    if not has_proc():
        return []
    dead = []
    for rank, beat in enumerate(beats):
        if beat is not None and beat.host == host_name() and not beat.left:
            process = Process.find(beat.pid)
            if process is None or process.has_ended():
                dead.append(rank)
    return dead


def judge_ranks(
    before: Sequence[Beat | None],
    now: Sequence[Beat | None],
    *,
    own_rank: int,
    dead: Sequence[int],
    processes: dict[int, LocalProcess],
) -> LostRanks:
    """Compares two readings of all ranks' heartbeats; returns the ranks that are dead, silent or hang.

    Args:
        before: earlier heartbeat of every rank, in rank order; None for a rank that has sent no heartbeat.
        now: latest heartbeat of every rank, read long enough after `before` for a living rank to send another.
        own_rank: rank of this process, which is alive.
        dead: ranks known to be dead; if there are any, no other rank is judged to be silent.
        processes: processes of this machine's ranks, as they were at the earlier reading.
    """
    silent = [] if dead else [r for r, b in enumerate(now) if r != own_rank and (b is None or b == before[r])]
    silent = [r for r in silent if not (r in processes and processes[r].is_active()) and not _has_left(now[r])]
    dead = [r for r in dead if not _has_left(now[r])]
    if dead or silent:
        reasons = [f"rank {r} died{_last_sign(now[r])}" for r in dead]
        reasons += [f"rank {r} has fallen silent{_last_sign(now[r])}" for r in silent]
        lost = [(r, now[r]) for r in (*dead, *silent)]
        unreachable = tuple((r, beat.pid if beat else 0, beat.host if beat else "") for r, beat in lost)
        return LostRanks("; ".join(reasons), unreachable=unreachable)
    most = max(beat.landmarks for beat in now if beat is not None)
    behind = [r for r, beat in enumerate(now) if beat is not None and not beat.left and beat.landmarks < most]
    if behind:
        return LostRanks("; ".join(f"rank {r} hangs{_last_sign(now[r])}" for r in behind), hanging=tuple(behind))
    return LostRanks(None)


def kill_unreachable_ranks(notice: EndNotice) -> None:
    """Kills the ranks on this machine that cannot read the message that the launch is over.

    These ranks, and their launcher, would wait for ever.
    """
    for _, pid, host in notice.unreachable:
        if host == host_name() and pid not in (0, os.getpid()):
            with suppress(OSError):
                os.kill(pid, signal.SIGKILL)


def host_name() -> str:
    """Returns the host name of this machine."""
    return os.uname().nodename


def _has_left(beat: Beat | None) -> bool:
    return beat is not None and beat.left


def _last_sign(beat: Beat | None) -> str:
    """Returns the end of a sentence about a rank, which names its last landmark, its process and its machine."""
    if beat is None:
        return " and never gave a sign of life"
    return f" in: {beat.landmark} (process {beat.pid} on {beat.host})"
