"""Waiting for a store that does not answer: how long, how often, and the one line that says so."""

from __future__ import annotations

import random
import sys
import time
from contextlib import suppress
from threading import Event, Lock

from dist_gan.store_errors import Silent, is_transient, is_unconnected, is_unresolved, reason
from dist_gan.wording import safe

_SAID_AGAIN_S = 60.0
"""A store that comes and goes is told of once in so many seconds."""


class Patience:
    """How long a store may stay silent before an operation on it fails, and how often it was asked again.

    Whoever waits says so on stderr, with the reason: once for all operations that share the patience.

    Args:
        seconds: for one operation, from its first failure on.
        met: the store has answered before. One whose name cannot be resolved is then waited for; otherwise the name
            is wrong, and waiting does not mend it.
    """

    def __init__(self, seconds: float, *, met: bool = False) -> None:
        self.seconds = seconds
        self.met = met
        self.retries = 0
        self._over = Event()
        self._said_at: float | None = None
        self._lock = Lock()

    def give_up(self) -> None:
        """Ends all waiting: what fails from now on is not asked for again."""
        self._over.set()

    def wait(self, number: int, since: float, error: Exception, *, place: str) -> None:
        """Sleeps before try `number` + 1 of an operation that failed first at `since`, or raises its error.

        `place` is what the line on stderr begins with.

        Waits grow from half a second to ten, each by chance between half and the whole, so that many ranks do not
        come back at once.
        """
        longest = min(10.0, 0.5 * 2**number)
        if not is_transient(error) or (is_unresolved(error) and not self.met):
            raise error
        if time.monotonic() + longest > since + self.seconds:
            raise Silent(f"the store has not answered for {self.seconds:.0f} s ({reason(error)})") from error
        # What mends itself within half a second is not worth a line; a closed port seldom does.
        if number or is_unconnected(error):
            self._say(place, error)
        self.retries += 1
        if self._over.wait(longest * random.uniform(0.5, 1.0)):
            raise error

    def _say(self, place: str, error: Exception) -> None:
        now = time.monotonic()
        with self._lock:
            if self._over.is_set() or (self._said_at is not None and now < self._said_at + _SAID_AGAIN_S):
                return
            self._said_at = now
        with suppress(OSError, ValueError):  # a terminal that is gone is no reason not to wait
            sentence = f"{place}: the store does not answer ({reason(error)}); waiting: it is asked again for up to"
            print(safe(f"{sentence} {self.seconds:.0f} s"), file=sys.stderr, flush=True)
