"""Messages between the ranks of a launch in its key-value store: arrival, permission to begin, verdict at the end.

The store needs no process group, so ranks can exchange messages before a group exists and after it failed. The first
verdict (`Word`) on why a launch is over is in force; the rank that gave it reports it, and all others exit silently.
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
"""Key of the verdict on why the launch is over; its value is empty while training may run, and absent before that."""
_HERE, _OBJECTION, _HEARD, _ATTEMPT = "here", "objection", "heard", "attempt"
_LOOK_S = (0.1, 1.0)
"""Shortest and longest interval, in seconds, between requests while waiting."""
_TOLD_AFTER_S = 30.0
"""Seconds of waiting after which a message names the ranks that have not joined."""
_HEARD_WITHIN_S = 7.0
"""Time limit, in seconds, for all ranks to read a verdict; they read every five seconds."""


class NotMet(RuntimeError):
    """The ranks of a launch did not find each other, in one sentence."""


class Word(NamedTuple):
    """A verdict: the reason for which a launch is over."""

    rank: int
    """Rank that gave the verdict."""
    outcome: str
    code: int
    reason: str
    missing: tuple[tuple[int, int, str], ...] = ()
    """Rank, process ID and host of each rank that cannot read the verdict."""
    hanging: tuple[int, ...] = ()
    """Ranks that live, but make no progress."""
    at_end: bool = False
    """True if training ended normally, so that a rank that exits from now on is not reported as missing."""

    @staticmethod
    def read(data: bytes) -> Word | None:
        """The verdict in a value of the store; None for an empty value."""
        if not data:
            return None
        rank, outcome, code, reason, missing, hanging, at_end = json.loads(data)
        return Word(rank, outcome, code, reason, tuple((r, p, h) for r, p, h in missing), tuple(hanging), at_end)


class Meeting:
    """The launch's key-value store, for messages outside of process groups.

    Args:
        store: connection to the store; the process groups take it over once training begins.
        rank: rank of this process.
        world_size: number of processes of the launch.
    """

    def __init__(self, store: Store, *, rank: int, world_size: int) -> None:
        self.store, self.rank, self.world_size = store, rank, world_size

    def private(self) -> Meeting:
        """A `Meeting` in the same store, over a connection of its own that no other thread uses."""
        store: Any = self.store  # torch's type stubs lack `clone`
        return Meeting(store.clone(), rank=self.rank, world_size=self.world_size)

    # -- before the first step ------------------------------------------------------------------------------------

    def open_for(self, attempt: int, *, patience_s: float, tell: bool = True) -> Word | None:
        """Waits until every rank has joined, and permits training; returns a verdict if there is one. Rank 0 only.

        Args:
            attempt: number of this start, sent to the other ranks.
            patience_s: time limit, in seconds.
            tell: True to announce a long wait.

        Raises:
            NotMet: some ranks did not join within the time limit; the sentence names them.
        """
        keys = [f"{_HERE}/{rank}" for rank in range(1, self.world_size)]
        began, pause, told = time.monotonic(), _LOOK_S[0], not tell
        while not self.store.check(keys):
            if (word := self.objection()) is not None:
                return word
            waited = time.monotonic() - began
            if waited > patience_s:
                raise NotMet(f"rank {self._absent()} did not join within {patience_s:.0f} s (runtime.start_timeout_s)")
            if waited > _TOLD_AFTER_S and not told:
                told = True
                print(safe(f"dist_gan: waiting for rank {self._absent()} to join"), flush=True)
            time.sleep(pause)
            pause = min(_LOOK_S[1], pause * 1.2)
        if (word := self.objection()) is not None:
            return word
        self.store.set(_ATTEMPT, str(attempt))
        return Word.read(self.store.compare_set(OVER, "", ""))

    def join(self, *, patience_s: float) -> int | Word:
        """Announces this rank, and waits for rank 0; returns the number of the attempt, or a verdict if there is one.

        Raises:
            NotMet: rank 0 did not answer within `patience_s` seconds.
        """
        self.store.set(f"{_HERE}/{self.rank}", _name())
        if (word := self._verdict(patience_s)) is not None:
            return word
        return int(self.store.get(_ATTEMPT))

    def object(self, word: Word, *, patience_s: float) -> Word:
        """Sends rank 0 an objection; returns the verdict in force: this one, an earlier one, or rank 0's."""
        self.store.compare_set(_OBJECTION, "", json.dumps(word))
        self.store.set(f"{_HERE}/{self.rank}", _name())
        try:
            return self._verdict(patience_s) or self.end(word)
        except NotMet:
            return self.end(word)

    def objection(self) -> Word | None:
        """The first objection of a rank to the start, or else the verdict; None if there is neither."""
        return Word.read(self.store.compare_set(_OBJECTION, "", "")) or self.over()

    def _verdict(self, patience_s: float) -> Word | None:
        began, pause = time.monotonic(), _LOOK_S[0]
        while not self.store.check([OVER]):
            if time.monotonic() - began > patience_s:
                raise NotMet(f"rank 0 was not ready within {patience_s:.0f} s (runtime.start_timeout_s)")
            time.sleep(pause)
            pause = min(_LOOK_S[1], pause * 1.2)
        return self.over()

    def _absent(self) -> str:
        return ", ".join(str(r) for r in range(1, self.world_size) if not self.store.check([f"{_HERE}/{r}"]))

    def some_have_died_here(self, environment: Mapping[str, str]) -> str | None:
        """Local ranks that never joined, as text, if the launcher has lost processes; None otherwise."""
        local, first = (
            int(environment.get("LOCAL_WORLD_SIZE", "1")),
            self.rank - int(environment.get("LOCAL_RANK", "0")),
        )
        if len(siblings()) >= local:
            return None
        absent = [r for r in range(first, first + local) if r != self.rank and not self.store.check([f"{_HERE}/{r}"])]
        return ", ".join(map(str, absent)) or None

    # -- verdict -------------------------------------------------------------------------------------------

    def end(self, word: Word) -> Word:
        """Publishes a verdict; returns the one in force, which is an earlier one if there is one."""
        held = Word.read(self.store.compare_set(OVER, "", json.dumps(word)))
        return held or word

    def over(self) -> Word | None:
        """The verdict on why the launch is over; None while there is none."""
        return Word.read(self.store.get(OVER)) if self.store.check([OVER]) else None

    def has_heard(self) -> None:
        """Reports that this rank has read the verdict."""
        self.store.add(_HEARD, 1)

    def wait_until_heard(self, word: Word, *, seconds: float = _HEARD_WITHIN_S) -> None:
        """Waits until all reachable ranks have read a verdict: the store may end with the first machine's launcher."""
        expected = self.world_size - 1 - len([rank for rank, _, _ in word.missing if rank != self.rank])
        deadline = time.monotonic() + seconds
        while self.store.add(_HEARD, 0) < expected and time.monotonic() < deadline:
            time.sleep(0.1)


def open_meeting(environment: Mapping[str, str], *, patience_s: float) -> Meeting | None:
    """Connects to the launch's store; None for a launch of one process.

    Raises:
        NotMet: the launch's store cannot be reached.
    """
    world_size = int(environment.get("WORLD_SIZE", "1"))
    if world_size == 1:
        return None
    rank, address = int(environment.get("RANK", "0")), environment.get("MASTER_ADDR", "")
    port = environment.get("MASTER_PORT", "")
    if not address or not port.isdecimal():
        raise NotMet(
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
        raise NotMet(f"{_name()} cannot meet the other ranks at {address}:{port} ({_line(error)})") from error
    # A restarting launcher's store outlives the workers; without a prefix, the addresses of dead ones would be used.
    apart = f"dist_gan/attempt-{environment.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    return Meeting(PrefixStore(apart, store), rank=rank, world_size=world_size)


def _wait_for_port(address: str, port: int, patience_s: float) -> None:
    """Waits until the store's port is open, with signals handled meanwhile: torch's TCPStore would block them."""
    deadline = time.monotonic() + patience_s
    while True:
        try:
            socket.create_connection((address, port), timeout=min(10.0, patience_s)).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise NotMet(
                    f"{_name()} could not reach the launch's store at {address}:{port} within {patience_s:.0f} s "
                    f"({error.strerror or error}); is the first machine's launcher running, and that port open?"
                ) from error
            time.sleep(0.2)


def _name() -> str:
    return f"process {os.getpid()} on {os.uname().nodename}"


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
