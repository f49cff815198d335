"""What the ranks of a launch say to each other in its key-value store: who is here, whether to begin, why it is over.

It needs no process group, so a rank can speak before there is one and after it broke. The first word on why a launch is
over holds; the rank that gave it says it aloud, and all others leave in silence.
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
"""Empty from the moment at which training may begin; the word on why it is over from then on, or instead."""
_HERE, _OBJECTION, _HEARD, _ATTEMPT = "here", "objection", "heard", "attempt"
_LOOK_S = (0.1, 1.0)
"""Between two questions while waiting, at first and at last."""
_TOLD_AFTER_S = 30.0
"""A wait as long as that is spoken of."""
_HEARD_WITHIN_S = 7.0
"""The others look every five seconds."""


class NotMet(RuntimeError):
    """The ranks of a launch did not find each other, in one sentence."""


class Word(NamedTuple):
    """Why a launch is over."""

    rank: int
    """Who says so."""
    outcome: str
    code: int
    reason: str
    missing: tuple[tuple[int, int, str], ...] = ()
    """Rank, process and host of those that will not hear it."""
    hanging: tuple[int, ...] = ()
    """Ranks that live and do not go on."""
    at_end: bool = False
    """Whether training has ended as it should, so that whoever leaves now is not missed."""

    @staticmethod
    def read(data: bytes) -> Word | None:
        """The word in the store's bytes; None for no word."""
        if not data:
            return None
        rank, outcome, code, reason, missing, hanging, at_end = json.loads(data)
        return Word(rank, outcome, code, reason, tuple((r, p, h) for r, p, h in missing), tuple(hanging), at_end)


class Meeting:
    """The launch's store, for what is said outside of process groups.

    Args:
        store: connection to it; the process groups take it over once training begins.
        rank: of this process.
        world_size: of the launch.
    """

    def __init__(self, store: Store, *, rank: int, world_size: int) -> None:
        self.store, self.rank, self.world_size = store, rank, world_size

    def private(self) -> Meeting:
        """The same over a connection that nobody else waits on."""
        store: Any = self.store  # its stubs lack clone
        return Meeting(store.clone(), rank=self.rank, world_size=self.world_size)

    # -- before the first step ------------------------------------------------------------------------------------

    def open_for(self, attempt: int, *, patience_s: float, tell: bool = True) -> Word | None:
        """Waits until every rank is here, and lets training begin; the word instead, if some rank has one. Rank 0 alone.

        Args:
            attempt: number of this start, which the others learn by it.
            patience_s: seconds to wait.
            tell: whether a long wait is spoken of.

        Raises:
            NotMet: some rank is not here after all that time; names them.
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
        """Says that this rank is here, and waits for rank 0; the attempt's number, or the word on why it is over already.

        Raises:
            NotMet: rank 0 is silent for all that time.
        """
        self.store.set(f"{_HERE}/{self.rank}", _name())
        if (word := self._verdict(patience_s)) is not None:
            return word
        return int(self.store.get(_ATTEMPT))

    def object(self, word: Word, *, patience_s: float) -> Word:
        """Hands rank 0 a reason not to begin, and waits for its word: this one, an earlier one, or its own."""
        self.store.compare_set(_OBJECTION, "", json.dumps(word))
        self.store.set(f"{_HERE}/{self.rank}", _name())
        try:
            return self._verdict(patience_s) or self.end(word)
        except NotMet:
            return self.end(word)

    def objection(self) -> Word | None:
        """What keeps some rank from beginning."""
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
        """Ranks of this machine that never joined although the launcher has fewer processes left than it started."""
        local, first = (
            int(environment.get("LOCAL_WORLD_SIZE", "1")),
            self.rank - int(environment.get("LOCAL_RANK", "0")),
        )
        if len(siblings()) >= local:
            return None
        absent = [r for r in range(first, first + local) if r != self.rank and not self.store.check([f"{_HERE}/{r}"])]
        return ", ".join(map(str, absent)) or None

    # -- why it is over -------------------------------------------------------------------------------------------

    def end(self, word: Word) -> Word:
        """Says that the launch is over, and why; the word that holds, which is an earlier one if there is one."""
        held = Word.read(self.store.compare_set(OVER, "", json.dumps(word)))
        return held or word

    def over(self) -> Word | None:
        """The word on why the launch is over."""
        return Word.read(self.store.get(OVER)) if self.store.check([OVER]) else None

    def has_heard(self) -> None:
        """Says that this rank knows why the launch is over."""
        self.store.add(_HEARD, 1)

    def wait_until_heard(self, word: Word, *, seconds: float = _HEARD_WITHIN_S) -> None:
        """Waits until all ranks that can hear a word have: the store may end with the first machine's launcher."""
        expected = self.world_size - 1 - len([rank for rank, _, _ in word.missing if rank != self.rank])
        deadline = time.monotonic() + seconds
        while self.store.add(_HEARD, 0) < expected and time.monotonic() < deadline:
            time.sleep(0.1)


def open_meeting(environment: Mapping[str, str], *, patience_s: float) -> Meeting | None:
    """The meeting of this launch; None for a launch of one process.

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
    # Under a restarting launcher the store outlives the workers, and the addresses of dead ones would be dialled.
    apart = f"dist_gan/attempt-{environment.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    return Meeting(PrefixStore(apart, store), rank=rank, world_size=world_size)


def _wait_for_port(address: str, port: int, patience_s: float) -> None:
    """Waits where a signal is heard, which torch's own way of connecting does not allow."""
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
