"""A request to stop, by signal: noticed at once, obeyed at the end of a step."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = ("TERM", "INT", "HUP", "USR1", "USR2")
LEFT_AT_ONCE = 130
"""Exit code after a second signal."""
RELAYED_WITHIN_S = 5.0
"""A signal so soon after the first is the same request: Slurm tells every process, and launchers pass it on again."""


class Stopped(BaseException):
    """Request to stop that arrived before training began; not an error, hence not an `Exception`."""


class StopRequest:
    """Stop requests to this process, by signal.

    Before training begins, the first signal raises `Stopped`: there is nothing to save. During training, the first
    signal only sets a flag; a later second one ends the process at once, without saving: the last committed checkpoint
    is intact whatever was being written. Loader threads never receive signals. An ignored HUP, as under nohup, stays
    ignored.

    Args:
        names: signals that request a stop, without `SIG`.
        on_second: called with the name of the second signal before the process ends.
    """

    def __init__(self, names: tuple[str, ...] = SIGNALS, *, on_second: Callable[[str], object] | None = None) -> None:
        self.signal: str | None = None
        self._at = 0.0
        self._deferred = False
        self._on_second = on_second
        self._before: dict[int, Any] = {}
        for name in names:
            number = signal.Signals[f"SIG{name}"]
            if name == "HUP" and signal.getsignal(number) == signal.SIG_IGN:
                continue
            self._before[number] = signal.signal(number, self._notice)

    @property
    def requested(self) -> bool:
        """True if a stop has been requested."""
        return self.signal is not None

    @contextmanager
    def put_off(self) -> Iterator[None]:
        """Context that defers stop signals to its end, so that they do not interrupt a half-done operation."""
        self._deferred, before = True, self._deferred
        try:
            yield
        finally:
            self._deferred = before
        if self.signal is not None and not before:
            raise Stopped(self.signal)

    def training_begins(self) -> None:
        """Switches to training: from now on a stop request takes effect at the end of a step."""
        self._deferred = True
        if self.signal is not None:
            raise Stopped(self.signal)

    def ask(self, name: str) -> None:
        """Requests a stop without a signal; `name` is its name in `outcome.json`."""
        if self.signal is None:
            self.signal, self._at = name, time.monotonic()

    def _notice(self, number: int, frame: FrameType | None) -> None:
        now, name = time.monotonic(), signal.Signals(number).name
        if self.signal is None:
            self.signal, self._at = name, now
            if not self._deferred:
                raise Stopped(name)
        elif now - self._at > RELAYED_WITHIN_S:
            try:
                if self._on_second is not None:
                    self._on_second(name)
            finally:
                os._exit(LEFT_AT_ONCE)

    def close(self) -> None:
        """Gives the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
