"""Signs of life: which rank died or hangs, in words, when the others wait for it.

A collective that fails does not say who is missing. So every process tells the launch's store, once a second and from
a thread of its own, how many landmarks its training has passed; a process that has passed none for too long looks
at all of them, says who is behind or silent, and ends.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from torch.distributed.distributed_c10d import Store

INTERVAL_S = 1.0
SILENT_AFTER_S = 4.0
"""Without a beat for so long, a process is not merely late."""
STORE_AWAY_AFTER_S = 3 * SILENT_AFTER_S
"""Without an answer of the store for so long, its machine is gone, or the way there."""


class Beat(NamedTuple):
    """What a rank last said of itself."""

    beats: int
    landmarks: int
    place: str
    """What it began last."""
    host: str
    pid: int


class Missing(NamedTuple):
    """What a process could find out about the others."""

    reason: str | None
    """Who died or hangs, in one sentence; None if everybody lives and is equally far."""
    cut_off: bool = False
    """Whether the store did not answer, so that nothing is known of the others, and they may know nothing of this one."""


class Heartbeat:
    """The signs of life of one process.

    Args:
        store: the launch's key-value store, on a connection that nobody else waits on.
        rank: of this process.
        world_size: of the launch.
        patience_s: seconds without a landmark after which this process looks for the culprit and ends.
        on_failure: is told who is missing; the process ends when it returns.
    """

    def __init__(
        self, store: Store, *, rank: int, world_size: int, patience_s: float, on_failure: Callable[[Missing], object]
    ) -> None:
        self.patience_s = patience_s
        self._store, self._rank, self._world_size = store, rank, world_size
        self._on_failure = on_failure
        self._landmarks, self._place, self._since = 0, "starting", time.monotonic()
        self._beats = 0
        self._stop = threading.Event()
        self._beat()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()

    def mark(self, place: str) -> None:
        """Passes a landmark: `place` begins. Every rank passes the same ones in the same order."""
        self._place, self._landmarks, self._since = place, self._landmarks + 1, time.monotonic()

    def close(self) -> None:
        """Ends the signs of life; the others may see it as silence."""
        self._stop.set()
        self._thread.join(timeout=2 * INTERVAL_S)

    def missing(self) -> Missing:
        """Who died, and who hangs. Takes a few seconds, and ends even if the store's machine no longer answers."""
        found: list[Missing] = []

        def ask() -> None:
            try:
                found.append(Missing(self._missing()))
            except Exception as error:
                found.append(Missing(_store_away(type(error).__name__), cut_off=True))

        # A connection without another end answers after minutes, if at all.
        asking = threading.Thread(target=ask, name="heartbeat-missing", daemon=True)
        asking.start()
        asking.join(timeout=STORE_AWAY_AFTER_S)
        return found[0] if found else Missing(_store_away(f"for {STORE_AWAY_AFTER_S:.0f} s"), cut_off=True)

    def _missing(self) -> str | None:
        before = self._read()
        deadline = time.monotonic() + SILENT_AFTER_S
        dead = [r for r, beat in enumerate(before) if beat is not None and not _alive(beat)]
        while not dead and time.monotonic() < deadline:
            time.sleep(INTERVAL_S / 4)
            self._beat()  # the thread that asks is the one that would beat, here and on the others
            dead = [r for r, beat in enumerate(before) if beat is not None and not _alive(beat)]
        now = self._read()
        silent = [r for r, b in enumerate(now) if r not in dead and (b is None or b == before[r])] if not dead else []
        if dead or silent:
            return "; ".join(
                f"rank {r} {'died' if r in dead else 'has fallen silent'}{_where(now[r])}" for r in dead + silent
            )
        reached = [beat.landmarks for beat in now if beat is not None]
        behind = [r for r, beat in enumerate(now) if beat is not None and beat.landmarks < max(reached)]
        if behind:
            return "; ".join(f"rank {r} hangs{_where(now[r])}" for r in behind)
        return None

    # -- the thread -----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._stop.wait(INTERVAL_S):
            try:
                self._beat()
            except Exception:
                continue  # the store is gone with the launcher: collectives end by their own timeout
            waited = time.monotonic() - self._since
            if waited > self.patience_s:
                self._give_up(waited)

    def _beat(self) -> None:
        self._beats += 1
        mine = Beat(self._beats, self._landmarks, self._place, os.uname().nodename, os.getpid())
        self._store.set(f"dist_gan/beat/{self._rank}", json.dumps(mine))

    def _give_up(self, waited: float) -> None:
        found = self.missing()
        if self._since > time.monotonic() - self.patience_s:
            return  # it went on while we were looking
        reason = found.reason or "every rank waits at the same place"
        self._on_failure(found._replace(reason=f"no progress for {waited:.0f} s ({self._place}): {reason}"))
        faulthandler.dump_traceback(file=sys.stderr)
        os._exit(1)

    def _read(self) -> list[Beat | None]:
        keys = [f"dist_gan/beat/{rank}" for rank in range(self._world_size)]
        # Two requests while everybody has beaten once: all ranks ask at the same time when one is lost.
        here = [True] * len(keys) if self._store.check(keys) else [self._store.check([key]) for key in keys]
        values = iter(self._store.multi_get([key for key, there in zip(keys, here, strict=True) if there]))
        return [Beat(*json.loads(next(values))) if there else None for there in here]


def _where(beat: Beat | None) -> str:
    if beat is None:
        return " and never gave a sign of life"
    return f" in: {beat.place} (process {beat.pid} on {beat.host})"


def _store_away(how: str) -> str:
    here = os.uname().nodename
    return (
        f"rank 0's launcher does not answer {here} ({how}): it has ended, or its machine or the network between is gone"
    )


def _alive(beat: Beat) -> bool:
    """Whether a process can be known to be dead at once: on this machine, that is."""
    if beat.host != os.uname().nodename:
        return True
    try:
        state = Path(f"/proc/{beat.pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return not Path("/proc/self/stat").exists()
    return state not in ("Z", "X")


def private_store(store: Any) -> Store:
    """A connection to the same store that no other thread waits on."""
    clone: Store = store.clone()
    return clone
