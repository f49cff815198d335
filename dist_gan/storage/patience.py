"""Retries of requests to a store that does not answer: time limit, intervals, and a message on standard error."""

from __future__ import annotations

import random
import sys
import time
from contextlib import suppress
from threading import Event, Lock

from dist_gan.storage.errors import Silent, is_transient, is_unconnected, is_unresolved, reason
from dist_gan.wording import safe

PATIENCE_S = 120.0
"""Default time limit, in seconds, for retries of a request; shorter than the time limit of every collective."""
_SAID_AGAIN_S = 60.0
"""Shortest interval, in seconds, between two messages about a store that fails repeatedly."""


class Patience:
    """Time limit for retries of requests to a store that does not answer, with a count of the retries.

    A message on standard error says why an operation waits; operations that share one `Patience` share this message.

    Args:
        seconds: time limit of one operation, counted from its first failure; `PATIENCE_S` by default.
        met: True if the store has answered before. An operation is then retried even if the host name cannot be
            resolved; otherwise the name counts as wrong, and the operation fails at once.
    """

    def __init__(self, seconds: float | None = None, *, met: bool = False) -> None:
        self.seconds = PATIENCE_S if seconds is None else seconds
        self.met = met
        self.retries = 0
        self._over = Event()
        self._said_at: float | None = None
        self._lock = Lock()

    def stop_retrying(self) -> None:
        """Ends the waiting of all operations; operations that fail from now on are not retried."""
        self._over.set()

    def wait(self, number: int, since: float, error: Exception, *, place: str) -> None:
        """Waits before the next attempt of an operation that has failed, or raises an error if there is to be no attempt.

        The longest wait doubles from half a second up to ten seconds. Each wait is a random time between half of the
        longest and the longest, so that many ranks do not retry at the same moment.

        Args:
            number: number of retries made before this failure.
            since: time of the operation's first failure, a value of `time.monotonic`.
            error: the failure.
            place: description of the operation, with which the message on standard error begins.

        Raises:
            Silent: the time limit is reached.
            Exception: `error` itself, if a retry cannot help or retries have been stopped.
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
