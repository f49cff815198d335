"""Messages between the ranks of a launch in its key-value store: arrival, permission to begin, notice of the end.

The store needs no process group, so ranks can exchange messages before a group exists and after a group has failed. A
notice (`EndNotice`) says that the launch is over, and why. The first notice of a launch is in force: the rank that
published it reports the reason to the user, and all other ranks exit silently.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Any, NamedTuple

from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import PrefixStore, Store

from dist_gan.runtime.launcher import siblings
from dist_gan.wording import safe

OVER = "over"
"""Key, in the launch's store, of the notice that the launch is over.

The key is absent until rank 0 permits training, which gives it an empty value, or until a notice is published.
"""
_ARRIVAL, _OBJECTION, _CONFIRMATIONS, _ATTEMPT = "here", "objection", "heard", "attempt"
_POLL_S = (0.1, 1.0)
"""Shortest and longest interval, in seconds, between two requests of a rank that waits for others."""
_ANNOUNCE_AFTER_S = 30.0
"""Seconds for which rank 0 waits before it prints the ranks that have not joined the launch."""
_CONFIRM_WITHIN_S = 7.0
"""Time limit, in seconds, for all ranks to read a notice of the end; every rank looks for a notice every five seconds."""


class MeetingFailed(RuntimeError):
    """The ranks of a launch did not find each other; the message is one sentence for the user."""


class EndNotice(NamedTuple):
    """A notice of one rank to all others that the launch is over, and why."""

    rank: int
    """Rank that published the notice."""
    outcome: str
    """Outcome of the run, as written to `outcome.json`: `finished`, `preempted`, `failed`, ..."""
    code: int
    """Exit code of every rank."""
    reason: str
    """Sentence for the user that says why the launch is over."""
    unreachable: tuple[tuple[int, int, str], ...] = ()
    """Rank, process ID and host of each rank that cannot read the notice."""
    hanging: tuple[int, ...] = ()
    """Ranks that are alive, but make no progress."""
    at_end: bool = False
    """True if training ended normally, so that a rank that exits from now on is not reported as lost."""

    @staticmethod
    def read(data: bytes) -> EndNotice | None:
        """Returns the notice in a value of the store; None for an empty value."""
        if not data:
            return None
        rank, outcome, code, reason, unreachable, hanging, at_end = json.loads(data)
        ranks = tuple((r, pid, host) for r, pid, host in unreachable)
        return EndNotice(rank, outcome, code, reason, ranks, tuple(hanging), at_end)


class Meeting:
    """The launch's key-value store, for messages outside of process groups.

    Args:
        store: connection to the store; from the start of training on, the process groups use this connection.
        rank: rank of this process.
        world_size: number of processes of the launch.
    """

    def __init__(self, store: Store, *, rank: int, world_size: int) -> None:
        self.store, self.rank, self.world_size = store, rank, world_size

    def reconnect(self) -> Meeting:
        """Returns a `Meeting` in the same store, over a new connection that no other thread uses."""
        store: Any = self.store  # torch's type stubs lack `clone`
        return Meeting(store.clone(), rank=self.rank, world_size=self.world_size)

    # -- before the first step ------------------------------------------------------------------------------------

    def admit_ranks(self, attempt: int, *, patience_s: float, announce: bool = True) -> EndNotice | None:
        """Waits until every rank has joined, and permits training; returns a notice if the launch is over instead.

        Only rank 0 calls this method; the other ranks call `join` or `raise_objection`.

        Args:
            attempt: number of this start of the run, which is sent to the other ranks.
            patience_s: time limit, in seconds.
            announce: True to print the absent ranks after a long wait.

        Raises:
            MeetingFailed: some ranks did not join within the time limit; the sentence names them.
        """
        keys = [f"{_ARRIVAL}/{rank}" for rank in range(1, self.world_size)]
        began, pause = time.monotonic(), _POLL_S[0]
        while not self.store.check(keys):
            if (notice := self.objection()) is not None:
                return notice
            waited = time.monotonic() - began
            if waited > patience_s:
                absent = self._absent_ranks()
                raise MeetingFailed(f"rank {absent} did not join within {patience_s:.0f} s (runtime.start_timeout_s)")
            if waited > _ANNOUNCE_AFTER_S and announce:
                announce = False
                print(safe(f"dist_gan: waiting for rank {self._absent_ranks()} to join"), flush=True)
            time.sleep(pause)
            pause = min(_POLL_S[1], pause * 1.2)
        if (notice := self.objection()) is not None:
            return notice
        self.store.set(_ATTEMPT, str(attempt))
        return EndNotice.read(self.store.compare_set(OVER, "", ""))

    def join(self, *, patience_s: float) -> int | EndNotice:
        """Announces this rank, and waits until rank 0 permits training.

        Returns:
            The number of this start of the run, or a notice if the launch is over instead.

        Raises:
            MeetingFailed: rank 0 did not answer within `patience_s` seconds.
        """
        self.store.set(f"{_ARRIVAL}/{self.rank}", _name())
        if (notice := self._wait_for_rank_zero(patience_s)) is not None:
            return notice
        return int(self.store.get(_ATTEMPT))

    def raise_objection(self, notice: EndNotice, *, patience_s: float) -> EndNotice:
        """Sends rank 0 an objection to the start, and waits for rank 0; returns the notice that is in force.

        Args:
            notice: the objection; published as the notice of the end if rank 0 does not answer.
            patience_s: time limit, in seconds.
        """
        self.store.compare_set(_OBJECTION, "", json.dumps(notice))
        self.store.set(f"{_ARRIVAL}/{self.rank}", _name())
        try:
            return self._wait_for_rank_zero(patience_s) or self.publish_notice(notice)
        except MeetingFailed:
            return self.publish_notice(notice)

    def objection(self) -> EndNotice | None:
        """Returns the first objection of a rank to the start, or else the notice of the end; None if there is neither."""
        return EndNotice.read(self.store.compare_set(_OBJECTION, "", "")) or self.notice()

    def _wait_for_rank_zero(self, patience_s: float) -> EndNotice | None:
        """Waits until rank 0 permits training, and returns None; returns a notice if the launch is over instead."""
        began, pause = time.monotonic(), _POLL_S[0]
        while not self.store.check([OVER]):
            if time.monotonic() - began > patience_s:
                raise MeetingFailed(f"rank 0 was not ready within {patience_s:.0f} s (runtime.start_timeout_s)")
            time.sleep(pause)
            pause = min(_POLL_S[1], pause * 1.2)
        return self.notice()

    def _absent_ranks(self) -> str:
        return ", ".join(str(r) for r in range(1, self.world_size) if not self.store.check([f"{_ARRIVAL}/{r}"]))

    def dead_local_ranks(self, environment: Mapping[str, str]) -> str | None:
        """Returns the ranks on this machine that ended before they joined, separated by commas; None if there are none.

        Args:
            environment: environment variables of this process.
        """
        local = int(environment.get("LOCAL_WORLD_SIZE", "1"))
        first = self.rank - int(environment.get("LOCAL_RANK", "0"))
        if len(siblings()) >= local:
            return None
        others = [r for r in range(first, first + local) if r != self.rank]
        return ", ".join(str(r) for r in others if not self.store.check([f"{_ARRIVAL}/{r}"])) or None

    # -- notice of the end ----------------------------------------------------------------------------------------

    def publish_notice(self, notice: EndNotice) -> EndNotice:
        """Publishes a notice of the end, unless there is an earlier notice; returns the notice in force."""
        return EndNotice.read(self.store.compare_set(OVER, "", json.dumps(notice))) or notice

    def notice(self) -> EndNotice | None:
        """Returns the notice that the launch is over; None while there is no notice."""
        return EndNotice.read(self.store.get(OVER)) if self.store.check([OVER]) else None

    def confirm_notice(self) -> None:
        """Reports that this rank has read the notice of the end."""
        self.store.add(_CONFIRMATIONS, 1)

    def wait_for_confirmations(self, notice: EndNotice, *, seconds: float = _CONFIRM_WITHIN_S) -> None:
        """Waits until all reachable ranks have read a notice, for at most `seconds`.

        The store may end together with the first machine's launcher, after which the notice cannot be read.
        """
        unreachable = [rank for rank, _, _ in notice.unreachable if rank != self.rank]
        expected = self.world_size - 1 - len(unreachable)
        deadline = time.monotonic() + seconds
        while self.store.add(_CONFIRMATIONS, 0) < expected and time.monotonic() < deadline:
            time.sleep(0.1)


def open_meeting(environment: Mapping[str, str], *, patience_s: float) -> Meeting | None:
    """Connects to the launch's key-value store; returns None in a launch of one process.

    Args:
        environment: environment variables of this process.
        patience_s: time limit, in seconds, of the connection and of each later request.

    Raises:
        MeetingFailed: the launch's store cannot be reached.
    """
    world_size = int(environment.get("WORLD_SIZE", "1"))
    if world_size == 1:
        return None
    rank, address = int(environment.get("RANK", "0")), environment.get("MASTER_ADDR", "")
    port = environment.get("MASTER_PORT", "")
    if not address or not port.isdecimal():
        raise MeetingFailed(
            f"MASTER_ADDR={address!r} MASTER_PORT={port!r}: {world_size} processes need an address and a port of the first "
            f"machine to meet at; start them by accelerate launch or torchrun"
        )
    is_host = rank == 0 and environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    if not is_host:
        _wait_for_port(address, int(port), patience_s)
    try:
        store = TCPStore(
            address, int(port), world_size, is_host, timedelta(seconds=patience_s), wait_for_workers=False, multi_tenant=is_host
        )  # fmt: skip
    except RuntimeError as error:
        raise MeetingFailed(f"{_name()} cannot meet the other ranks at {address}:{port} ({_line(error)})") from error
    # A restarting launcher's store outlives the workers; without a prefix, the addresses of dead ones would be used.
    prefix = f"dist_gan/attempt-{environment.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    return Meeting(PrefixStore(prefix, store), rank=rank, world_size=world_size)


def _wait_for_port(address: str, port: int, patience_s: float) -> None:
    """Waits until the port of the launch's store is open.

    Signals are handled during this wait; in the constructor of torch's TCPStore they would have to wait.
    """
    deadline = time.monotonic() + patience_s
    while True:
        try:
            socket.create_connection((address, port), timeout=min(10.0, patience_s)).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise MeetingFailed(
                    f"{_name()} could not reach the launch's store at {address}:{port} within {patience_s:.0f} s "
                    f"({error.strerror or error}); is the first machine's launcher running, and that port open?"
                ) from error
            time.sleep(0.2)


def _name() -> str:
    return f"process {os.getpid()} on {os.uname().nodename}"


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
