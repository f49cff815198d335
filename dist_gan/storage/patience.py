"""Retries for a store that does not answer: time limit, intervals, and the message on stderr."""

from __future__ import annotations

import random
import sys
import time
from contextlib import suppress
from threading import Event, Lock

from dist_gan.storage.errors import Silent, is_transient, is_unconnected, is_unresolved, reason
from dist_gan.wording import safe

PATIENCE_S = 120.0
"""Default time limit, in seconds, for a store that does not answer; below the timeout of every collective."""
_SAID_AGAIN_S = 60.0
"""Shortest interval, in seconds, between messages about a store that fails repeatedly."""


class Patience:
    """Time limit for a store that does not answer, with a count of the retries.

    Waiting is announced on stderr with its reason, once for all operations that share one `Patience`.

    Args:
        seconds: time limit of one operation, counted from its first failure; `PATIENCE_S` by default.
        met: True if the store has answered before. An unresolved host name is then retried; otherwise the name is
            taken to be wrong, and the operation fails at once.
    """

    def __init__(self, seconds: float | None = None, *, met: bool = False) -> None:
        self.seconds = PATIENCE_S if seconds is None else seconds
        self.met = met
        self.retries = 0
        self._over = Event()
        self._said_at: float | None = None
        self._lock = Lock()

    def stop_retrying(self) -> None:
        """Ends all waiting; operations that fail from now on are not retried."""
        self._over.set()

    def wait(self, number: int, since: float, error: Exception, *, place: str) -> None:
        """Sleeps before try `number` + 1 of an operation that failed first at `since`, or raises its error.

        `place` is the beginning of the message on stderr.

        Waits grow from half a second to ten seconds, each drawn at random between half and the whole, so that many
        ranks do not retry at the same moment.
        """
        longest = min(10.0, 0.5 * 2**number)
        if not is_transient(error) or (is_unresolved(error) and not self.met):
            raise error
        if time.monotonic() + longest > since + self.seconds:
            raise Silent(f"the store has not answered for {self.seconds:.0f} s ({reason(error)})") from error
        # A failure that passes within half a second is not announced; a closed port seldom passes so fast.
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
        with suppress(OSError, ValueError):  # a closed terminal must not end the waiting
            sentence = f"{place}: the store does not answer ({reason(error)}); waiting: it is asked again for up to"
            print(safe(f"{sentence} {self.seconds:.0f} s"), file=sys.stderr, flush=True)
